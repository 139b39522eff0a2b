"""The target plan of a batch: which tokens need a backward, and in which order the others can run without one.

A **target row** is a token whose logits enter the loss: its *next* token has a label. Every other token is **context**:
it serves targets through its keys and values only. Rows run in stages, each by itself:

    stage 0   context before the first target of its document    no autograd
    stage 1   the targets that follow                            autograd
    stage 2   context between these and later targets            no autograd
    ...

A row may attend to what its document holds before it; all of that is in earlier stages or in its own. Rows that no
later target could see (after the last target, in samples without a target, padding) are in no stage: they do not run.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = -100  # the label of a token without a loss, as PyTorch and transformers have it


@dataclass(frozen=True)
class Stage:
    """Rows of each sample that run together, in their order, padded on the right to the longest.

    rows: int64 (B, L), places along the sequence; 0 where padding. is_row: bool (B, L), False where padding.
    is_target: whether these are target rows. is_prefix: whether they are, unpadded, the first rows of one document in
    every sample.
    """

    rows: Tensor
    is_row: Tensor
    is_target: bool
    is_prefix: bool

    def gather(self, values: Tensor) -> Tensor:
        """values (B, S, ...) of these rows: (B, L, ...)."""
        index = self.rows.reshape(*self.rows.shape, *(1,) * (values.dim() - 2))
        return values.gather(1, index.expand(*self.rows.shape, *values.shape[2:]))


@dataclass(frozen=True)
class TargetPlan:
    """The stages of a batch and what each row needs to know.

    stages: in the order in which they run; the last one is a target stage.
    documents: int64 (B, S), which document a row belongs to.
    shift_labels: int64 (B, S), the label that a row's logits are compared with.
    num_context, num_target, num_skipped: how many rows run without autograd, with it, and not at all; padding is not
        counted.
    """

    stages: tuple[Stage, ...]
    documents: Tensor
    shift_labels: Tensor
    num_context: int
    num_target: int
    num_skipped: int

    @property
    def is_dense(self) -> bool:
        """Whether there is nothing to save: no context, and no sample skips more than its last row."""
        return self.num_context == 0 and self.num_skipped <= self.documents.shape[0]


def plan_targets(
    labels: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
) -> TargetPlan:
    """The target plan of a batch.

    Shapes: labels int64 (B, S), -100 where there is no loss, not shifted; attention_mask (B, S), 0 where padding, on
            either side; position_ids int64 (B, S) or (1, S): without attention_mask, a place where they do not go up by
            one starts a new document (packed sequences).
    Errors: ValueError when shapes do not fit or a padded row predicts a label.
    Cost:   planned on the host; labels are waited for once a batch.
    """
    if labels.dim() != 2:
        raise ValueError(f"labels: expected shape (batch, seq_len), got {tuple(labels.shape)}")
    for name, tensor in (("attention_mask", attention_mask), ("position_ids", position_ids)):
        if tensor is not None and tuple(tensor.shape) not in (tuple(labels.shape), (1, labels.shape[1])):
            raise ValueError(f"{name}: expected labels' shape {tuple(labels.shape)}, got {tuple(tensor.shape)}")
    device, labels = labels.device, labels.detach().cpu()
    shift_labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    is_target = shift_labels != IGNORED
    is_real = torch.ones_like(is_target) if attention_mask is None else attention_mask.cpu().expand_as(labels) != 0
    if (is_target & ~is_real).any():
        sample, row = (is_target & ~is_real).nonzero()[0].tolist()
        raise ValueError(
            f"labels: expected {IGNORED} after every padded row, but in sample {sample} the padding at place {row} "
            f"predicts label {int(shift_labels[sample, row])}"
        )
    documents = torch.zeros_like(labels)
    if attention_mask is None and position_ids is not None and labels.shape[1] > 1:
        steps = position_ids.detach().cpu().expand_as(labels).diff(dim=1)
        documents[:, 1:] = (steps != 1).cumsum(1)

    number = _stage_numbers(is_target, is_real, documents)
    stages = []
    for value in range(int(number.max()) + 1 if number.numel() else 0):
        chosen = number == value
        if chosen.any():
            stages.append(_stage(chosen, documents, is_target=value % 2 == 1, device=device))
    num_target = int(is_target.sum())
    num_context = int((number >= 0).sum()) - num_target
    return TargetPlan(
        tuple(stages),
        documents.to(device),
        shift_labels.to(device),
        num_context,
        num_target,
        int(is_real.sum()) - num_context - num_target,
    )


def _stage_numbers(is_target: Tensor, is_real: Tensor, documents: Tensor) -> Tensor:
    """The stage of every row (B, S): 2 x (turns of its document before it) + is_target; -1 where a row does not run."""
    places = torch.arange(is_target.shape[1]).expand_as(documents)
    starts = torch.ones_like(is_target)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    first = torch.where(starts, places, 0).cummax(1).values  # of the row's document

    # The last real row before each row; where it was a target of the same document and this is context, a turn begins.
    before = torch.full_like(places, -1)
    before[:, 1:] = torch.where(is_real, places, -1).cummax(1).values[:, :-1]
    after_target = is_target.gather(1, before.clamp(min=0)) & (before >= first)
    turns = (is_real & ~is_target & after_target).cumsum(1)
    turns = turns - turns.gather(1, first)  # no turn begins at the first row of a document

    ends = torch.ones_like(is_target)
    ends[:, :-1] = starts[:, 1:]
    num_rows = is_target.shape[1]
    last = torch.where(ends, places, num_rows - 1).flip(1).cummin(1).values.flip(1)
    targets_so_far = is_target.cumsum(1)
    has_later_target = targets_so_far.gather(1, last) > targets_so_far
    runs = is_target | (is_real & has_later_target)
    return torch.where(runs, 2 * turns + is_target, -1)


def _stage(chosen: Tensor, documents: Tensor, *, is_target: bool, device: torch.device) -> Stage:
    counts = chosen.sum(1)
    width = int(counts.max())
    rows = chosen.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :width]
    is_row = torch.arange(width) < counts.unsqueeze(1)
    is_prefix = bool(chosen[:, :width].all() and (documents[:, :width] == documents[:, :1]).all())
    return Stage(torch.where(is_row, rows, 0).to(device), is_row.to(device), is_target, is_prefix)
