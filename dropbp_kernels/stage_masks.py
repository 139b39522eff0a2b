"""Who attends to whom in the stages of a target plan: each row to itself and to those before it in its document."""

import torch
from torch import Tensor

from .targets import Stage


class StageMasks:
    """The rows of the stages so far, in the order in which they ran: keys for the rows of the last stage.

    Args:
        documents: int64 (B, S), as in `TargetPlan`.
    """

    def __init__(self, documents: Tensor):
        self.documents = documents
        self._stages: list[Stage] = []
        self._places: list[Tensor] = []  # of each stage's rows along the sequence, (B, L); -1: nobody attends to it

    def add(self, stage: Stage) -> None:
        """Let `stage` be the last one."""
        if stage.runs_again:  # what ran before of these rows is not seen any more
            again = torch.zeros_like(self.documents).scatter_add(1, stage.rows, stage.is_row.long()).bool()
            self._places = [places.masked_fill(again.gather(1, places.clamp(min=0)), -1) for places in self._places]
        self._places.append(torch.where(stage.is_row, stage.rows, -1))
        self._stages.append(stage)

    @property
    def is_causal(self) -> bool:
        """Whether each row attends to all keys up to itself."""
        return len(self._stages) == 1 and self._stages[0].is_prefix

    def is_row(self) -> Tensor:
        """Which keys are no padding: bool (samples that run, keys)."""
        return self._stages[-1].running(torch.cat([stage.is_row for stage in self._stages], dim=1))

    def mask(self, window: int | None = None) -> Tensor:
        """Which keys each row attends to, of the last `window` places: bool (samples that run, 1, L, keys)."""
        last = self._stages[-1]
        places = last.running(torch.cat(self._places, dim=1))
        documents = last.running(torch.cat([stage.gather(self.documents) for stage in self._stages], dim=1))
        num_rows = last.rows.shape[1]
        distance = places[:, -num_rows:].unsqueeze(2) - places.unsqueeze(1)
        mask = (places.unsqueeze(1) >= 0) & (distance >= 0)
        mask &= documents[:, -num_rows:].unsqueeze(2) == documents.unsqueeze(1)
        if window is not None:
            mask &= distance < window
        return self._with_padding(mask)

    def of_model(self, sees: Tensor) -> Tensor:
        """The same by a mask of the model's own, bool (B or 1, 1, S, S), by which rows may attend to later ones.

        Errors: ValueError where a row attends to one that no stage so far has run.
        """
        last = self._stages[-1]
        places, rows = last.running(torch.cat(self._places, dim=1)), last.running(last.rows)
        of_rows = last.running(sees[:, 0].expand(len(self.documents), -1, -1))
        of_rows = of_rows.gather(1, rows.unsqueeze(2).expand(-1, -1, of_rows.shape[2]))
        mask = of_rows.gather(2, places.clamp(min=0).unsqueeze(1).expand(-1, rows.shape[1], -1))
        mask &= (places >= 0).unsqueeze(1)
        is_torn = (mask.sum(2) != of_rows.sum(2)) & last.running(last.is_row)
        if is_torn.any():
            raise ValueError(
                "attention_mask: expected rows that attend to none of a later stage with context, got a mask of the "
                "model's by which some do (an image with a label on one of its tokens, or on the one behind it?)"
            )
        return self._with_padding(mask)

    def _with_padding(self, mask: Tensor) -> Tensor:
        # A padded row attends to itself, or softmax would divide by zero; nobody reads what it computes.
        last, num_rows = self._stages[-1], mask.shape[1]
        itself = torch.eye(num_rows, dtype=torch.bool, device=mask.device)
        mask[:, :, -num_rows:] |= itself & ~last.running(last.is_row).unsqueeze(2)
        return mask.unsqueeze(1)
