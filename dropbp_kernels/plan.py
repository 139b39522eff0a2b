"""The drop plan: which branches send a gradient in this step. Fixed before the forward, until the next step."""

from collections.abc import Iterator
from dataclasses import dataclass

from .layer import DropBP


@dataclass(frozen=True)
class DropPlan:
    """One step's decision for every branch, in model order.

    kept: True where the backward of the branch runs, False where the branch runs like inference.
    step: number of the step the plan was drawn for, from 0; -1 for a plan that was set by hand.
    seed: seed of the handler that drew it.
    """

    kept: tuple[bool, ...]
    step: int = -1
    seed: int = 0

    def __len__(self) -> int:
        return len(self.kept)

    def __iter__(self) -> Iterator[bool]:
        return iter(self.kept)

    @property
    def drop_rate(self) -> float:
        """Share of the branches whose backward this plan drops."""
        return 1.0 - sum(self.kept) / len(self.kept)


def set_plan(gates: dict[str, DropBP], kept: tuple[bool, ...]) -> None:
    """Tell every gate of `gates` (in model order) its entry of the plan.

    Errors: ValueError when the plan has another length than there are gates; TypeError when an entry is not a bool.
    No gate is changed then.
    """
    if len(kept) != len(gates):
        raise ValueError(f"plan: expected one entry for each of the {len(gates)} branches, got {len(kept)}")
    wrong = next((entry for entry in kept if not isinstance(entry, bool)), None)
    if wrong is not None:
        raise TypeError(f"plan: expected bool entries (True = kept), got {wrong!r} of type {type(wrong).__name__}")
    for gate, is_kept in zip(gates.values(), kept, strict=True):
        gate.refresh()
        gate.kept = is_kept
