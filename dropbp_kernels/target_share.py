"""How much of some batches a target plan runs with a backward, and what that promises, before any training.

share = count_targets(DataLoader(dataset, batch_size=8, collate_fn=collator))
share.targets  # 0.21 of the tokens have a loss
share.step_time(1.0)  # a LoRA step would take 0.61 of the time
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .targets import TargetPlan, plan_targets


@dataclass(frozen=True)
class TargetShare:
    """Rows of some batches, padding of the batch included: an undropped step runs it too.

    num_rows: all of them. num_targets: those whose logits enter the loss. forward_rows, backward_rows: those that a
    target plan runs, and runs with autograd; both with the padding of its stages. num_passes: through the decoder.
    """

    num_batches: int
    num_rows: int
    num_targets: int
    forward_rows: int
    backward_rows: int
    num_passes: int

    @property
    def targets(self) -> float:
        """Share of the rows that are targets."""
        return self.num_targets / self.num_rows

    @property
    def forward(self) -> float:
        """Share of the rows that run."""
        return self.forward_rows / self.num_rows

    @property
    def backward(self) -> float:
        """Share of the rows that run with a backward."""
        return self.backward_rows / self.num_rows

    @property
    def passes(self) -> float:
        """Passes through the decoder, a batch."""
        return self.num_passes / self.num_batches

    def step_time(self, backward_cost: float) -> float:
        """Time of a step by target plan over that of an undropped one, if rows cost alike and passes cost nothing.

        backward_cost: of a row's backward, in forwards: 1 with LoRA, 2 where all weights are trained, 1 more under
        gradient checkpointing.
        """
        return (self.forward + backward_cost * self.backward) / (1.0 + backward_cost)


def count_targets(batches: Iterable[Mapping[str, Any]]) -> TargetShare:
    """Count the rows of batches as a collator makes them: `labels`, and `attention_mask` or `position_ids` if any.

    Errors: ValueError without a batch, for one without labels, and those of `plan_targets`.
    Cost:   plans every batch on the host; no model.
    """
    counts = []
    for batch in batches:
        if batch.get("labels") is None:
            raise ValueError(f"batches: expected labels in each of them, got {', '.join(batch) or 'nothing'}")
        plan = plan_targets(batch["labels"], batch.get("attention_mask"), batch.get("position_ids"))
        counts.append((plan.documents.numel(), plan.num_target, *_run_by(plan)))
    if not counts:
        raise ValueError("batches: expected at least one, got none")
    return TargetShare(len(counts), *map(sum, zip(*counts, strict=True)))


def _run_by(plan: TargetPlan) -> tuple[int, int, int]:
    """Rows that run, rows that run with autograd, passes."""
    if plan.is_dense:
        return plan.documents.numel(), plan.documents.numel(), 1
    with_autograd = [stage.rows.numel() for stage in plan.stages if stage.is_target]
    return sum(stage.rows.numel() for stage in plan.stages), sum(with_autograd), len(plan.stages)
