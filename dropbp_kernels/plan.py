"""The drop plan: which branches, or which of their rows, send a gradient in one step.

Drawn before the forward (`draw_plan`), then told to the gates (`set_plan`).
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .layer import DropBP, Entry
from .row_plan import ChosenRows, RowPlan, RowsOfBranch
from .samplers import Sampler, draw_kept, with_one_kept
from .targets import Stage, StagedRows

# Share of a stage's rows: leaving out fewer does not pay for the copies that it takes.
LEAST_PADDING = 0.1


@dataclass(frozen=True)
class DropPlan:
    """One step's decision for every branch, in model order.

    kept: True where the backward of the branch runs, False where the branch runs like inference; under a plan that
        differs from row to row, the entry that says which rows are kept.
    step: number of the step the plan was drawn for, from 0; -1 for a plan that was set by hand, none of whose rows
        were drawn.
    seed: seed of the handler that drew it.
    """

    kept: tuple[Entry, ...]
    step: int = -1
    seed: int = 0

    def __len__(self) -> int:
        return len(self.kept)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.kept)

    @property
    def kept_shares(self) -> list[float]:
        """The share of each branch that is kept: 1 or 0, or of its rows in the last batch (before it: by its rate)."""
        return [float(entry) if isinstance(entry, bool) else entry.kept_share for entry in self.kept]

    @property
    def drop_rate(self) -> float:
        """Share of the backward that this plan drops, all branches counted alike."""
        return 1.0 - sum(self.kept_shares) / len(self.kept)


def draw_plan(
    gates: dict[str, DropBP],
    rates: Sequence[float],
    flops: Sequence[float],
    *,
    sampler: Sampler,
    granularity: str,
    aligned: bool | int,
    keep_one: bool,
    seed: int,
    step: int,
) -> DropPlan:
    """The plan of `step` for gates with these drop rates and FLOPs: a pure function, which tells no gate.

    The options are those of `DropBPHandler`. Errors: TypeError or ValueError when the sampler returns something else
    than it should.
    """
    if granularity == "branch":
        kept = draw_kept(sampler, rates, flops, seed, step)
        if keep_one:
            branches = list(gates.values())
            kept = with_one_kept(kept, lambda index: branches[index].is_trainable(), rates, seed, step)
        return DropPlan(kept, step, seed)
    rows = RowPlan(
        rates,
        by_token=[granularity == "token" and gate.per_token for gate in gates.values()],
        run_of=_runs_of_blocks(list(gates), aligned),
        covering=[keep_one and gate.is_trainable() for gate in gates.values()],
        round_up=partial(draw_kept, sampler, flops=flops, seed=seed, step=step),
        seed=seed,
        step=step,
    )
    return DropPlan(tuple(RowsOfBranch(rows, branch) for branch in range(len(gates))), step, seed)


def _runs_of_blocks(names: Sequence[str], aligned: bool | int) -> list[int]:
    """For each branch, the number of the run of blocks, or of branches, that keeps the same rows."""
    if not aligned:
        return list(range(len(names)))
    blocks = [name.rpartition(".")[0] for name in names]
    number = {block: place for place, block in enumerate(dict.fromkeys(blocks))}
    return [0 if aligned is True else number[block] // aligned for block in blocks]


def as_entry(entry: Any) -> Entry:
    """The plan entry that `entry` stands for: a bool, a bool tensor or list over rows, or an entry already.

    Errors: TypeError for anything else, or a tensor of another dtype; ValueError for one of another shape than (N,).
    """
    if isinstance(entry, Tensor | list):
        return ChosenRows(torch.as_tensor(entry))
    if not isinstance(entry, bool | RowsOfBranch | ChosenRows):
        raise TypeError(
            f"plan: expected bool entries (True = kept) or bool tensors over rows, got {entry!r} of type "
            f"{type(entry).__name__}"
        )
    return entry


def set_plan(gates: dict[str, DropBP], kept: Sequence[Entry]) -> None:
    """Tell every gate of `gates` (in model order) its entry of the plan.

    Errors: ValueError when the plan has another length than there are gates; TypeError when an entry is none. No gate
    is changed then.
    """
    if len(kept) != len(gates):
        raise ValueError(f"plan: expected one entry for each of the {len(gates)} branches, got {len(kept)}")
    entries = [as_entry(entry) for entry in kept]
    for gate in gates.values():
        gate.refresh()
    for gate, entry in zip(gates.values(), entries, strict=True):
        gate.kept = entry


@contextmanager
def running(gates: Iterable[DropBP], staged: StagedRows, stage: Stage) -> Iterator[None]:
    """Let `gates` know that `stage` of a target plan runs.

    A plan by rows keeps its share of `staged`; branches that treat each token for itself leave padding out, where there
    is enough of it.
    """
    numbers = [number for number, other in enumerate(staged.stages) if other is stage]
    real_rows = stage.real_rows() if stage.padded_share >= LEAST_PADDING else None
    for gate in gates:
        gate.stage = (staged, numbers[0]) if numbers else None
        gate.real_rows = real_rows if gate.per_token else None
    try:
        yield
    finally:
        for gate in gates:
            gate.stage = gate.real_rows = None
