"""Which rows each branch keeps in one step, where a plan differs from row to row.

A row is a sample of the batch or, for branches that treat each token for itself, a token of the flattened batch. A
`RowPlan` is fixed before the forward, and says which rows once the batch is known: it is a pure function of
(seed, step) and of how many rows there are, so every rank and a recompute draw the same.

* How many: branch b keeps its share, (1 - drop_rate_b) of its rows. Shares that are not whole are rounded up or down by
  the sampler of the branch plans, which balances that over the branches: in a batch of one sample it decides all.
* Which: drawn anew for every branch, or for every run of blocks (`aligned`), without replacement.
* By default every sample is kept by at least one branch, as far as the shares reach: samples that were drawn by none
  change places with samples that were drawn by several. Neither the number of rows of a branch nor the probability of
  a row changes by that, because what is done does not depend on which sample is which.
"""

import functools
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .row_draws import draw_samples, draw_tokens, tokens_by_stage
from .samplers import with_one_kept
from .targets import StagedRows


class Rows(NamedTuple):
    """The rows of one branch in one call: of permutation, int64 (N,), the first num_kept send a gradient.

    num_rows: how many count; less than N where padding, which is never kept and stands last. by_token: N tokens of the
    flattened batch; else N samples.
    """

    permutation: Tensor
    num_kept: int
    num_rows: int
    by_token: bool

    def is_like(self, other: object) -> bool:
        """Whether `other` are the same rows, known without looking at them."""
        return (
            isinstance(other, Rows)
            and other.permutation is self.permutation
            and other.num_kept == self.num_kept
            and other.by_token == self.by_token
        )


class Batch(NamedTuple):
    """What a plan has to know of a batch: its size, and which tokens are real, bool (num_samples, seq_len) or None.

    staged, stage: of a target plan the rows that run with autograd, and which of its stages this is; seq_len is then
    that of the stage, and what is padding is said by the stage.
    """

    num_samples: int
    seq_len: int
    device: torch.device
    is_real: Tensor | None = None
    staged: StagedRows | None = None
    stage: int = 0


class RowPlan:
    """One step's rows for all branches of a model.

    Args:
        drop_rates: one for each branch, in model order.
        by_token: for each branch, whether its rows are tokens.
        run_of: for each branch, the number of the run of blocks that keeps the same rows.
        covering: for each branch, whether a sample that it keeps counts as kept.
        round_up: rates -> which branches keep one row, each with probability 1 - rate: a sampler of branch plans.
    """

    def __init__(
        self,
        drop_rates: Sequence[float],
        *,
        by_token: Sequence[bool],
        run_of: Sequence[int],
        covering: Sequence[bool],
        round_up: Callable[[Sequence[float]], Sequence[bool]],
        seed: int,
        step: int,
    ):
        self.drop_rates = tuple(drop_rates)
        self.by_token = tuple(by_token)
        self.run_of = tuple(run_of)
        self.covering = tuple(covering)
        self.round_up = round_up
        self.seed = seed
        self.step = step
        self._drawn: _Drawn | None = None  # of the last batch
        self._counts = [(0, 0)] * len(self.drop_rates)
        self._uncounted = set(range(len(self.drop_rates)))  # branches whose next call is of a batch not yet counted
        # Drawn and counted are numbers of the host, others in every step: traced, they would be a graph for every step.
        # Not a decorator, which would import the compiler, some seconds, for who does not compile.
        if "torch._dynamo" in sys.modules and not hasattr(RowPlan.rows, "_torchdynamo_disable"):
            reason = "rows of a plan are drawn on the host in every step: compile without fullgraph=True"
            RowPlan.rows = torch.compiler.disable(RowPlan.rows, reason=reason)  # type: ignore[method-assign]

    def rows(self, branch: int, batch: Batch) -> Rows:
        """The rows of a branch. Drawn for all branches when the first of them asks.

        Errors: ValueError for a batch without rows, or an is_real of another shape.
        Cost:   once a batch: a copy of (num_branches, num_samples) int64 to the device, and the sorts of
                `draw_permutation` for tokens; with is_real the host waits for the number of real tokens.
        """
        if self._drawn is None or not _is_same(self._drawn.batch, batch):
            self._drawn = self._draw(batch)
        if branch in self._uncounted:
            self._uncounted.remove(branch)
            kept, rows = self._counts[branch]
            self._counts[branch] = (kept + self._drawn.counts[branch][0], rows + self._drawn.counts[branch][1])
        return self._drawn.rows[batch.stage][branch]

    def expect_batch(self, branch: int) -> None:
        """Let the next rows of the branch be counted: a batch begins. Nobody says so of a recompute."""
        self._uncounted.add(branch)

    def kept_share(self, branch: int) -> float:
        """The share of its rows that the branch kept in the last batch; before that, what is expected."""
        if self._drawn is None:
            return 1.0 - self.drop_rates[branch]
        num_kept, num_rows = self._drawn.counts[branch]
        return num_kept / num_rows if num_rows else 1.0 - self.drop_rates[branch]

    def counts(self, branch: int) -> tuple[int, int]:
        """(rows kept, rows) of the branch in all batches that began; where nobody says so, in the first."""
        return self._counts[branch]

    def num_kept(self, num_samples: int, num_tokens: int) -> list[int]:
        """How many rows each branch keeps of a batch of so many samples and (real) tokens: numbers of the host.

        The sampler rounds: a share of 2.25 rows are 2 and one more with drop rate 0.75. A whole share of 2 rows is 1
        and one more with drop rate 0.
        """
        sizes = [num_tokens if by_token else num_samples for by_token in self.by_token]
        shares = [size - size * rate for size, rate in zip(sizes, self.drop_rates, strict=True)]
        ceilings = [math.ceil(share) for share in shares]
        # At least 0: a rounding error may take a share below the whole number that it is.
        rates = [max(0.0, ceiling - share) for ceiling, share in zip(ceilings, shares, strict=True)]
        more = self.round_up(rates)
        return [ceiling - 1 + is_up for ceiling, is_up in zip(ceilings, more, strict=True)]

    def _draw(self, batch: Batch) -> "_Drawn":
        if batch.num_samples * batch.seq_len == 0:
            raise ValueError(
                f"batch: expected at least one row, got {batch.num_samples} samples of {batch.seq_len} tokens"
            )
        stages = _Stages.of(batch, any(self.by_token))
        # Of a target plan: a sample without a row has nothing to keep.
        samples = [place for place, counts in enumerate(zip(*stages.counts, strict=True)) if any(counts)]
        if len(samples) == 1 and not all(self.by_token):
            _say_that_one_sample_is_no_share()
        num_kept = self.num_kept(len(samples), stages.num_tokens)
        is_kept = [count > 0 for count in num_kept]
        keeps = with_one_kept(is_kept, self.covering.__getitem__, self.drop_rates, self.seed, self.step)
        num_kept = [max(count, int(is_any)) for count, is_any in zip(num_kept, keeps, strict=True)]
        rows = self._sample_rows(num_kept, samples, stages, batch.device)
        rows |= self._token_rows(num_kept, stages, batch.device)
        sizes = [stages.num_tokens if by_token else len(samples) for by_token in self.by_token]
        return _Drawn(
            batch,
            list(zip(num_kept, sizes, strict=True)),
            [[rows[branch][stage] for branch in range(len(num_kept))] for stage in range(len(stages.widths))],
        )

    def _sample_rows(
        self, num_kept: list[int], samples: list[int], stages: "_Stages", device: torch.device
    ) -> dict[int, list[Rows]]:
        """By branch whose rows are samples: its rows in each stage. A sample is kept in all stages or in none."""
        branches = [branch for branch, by_token in enumerate(self.by_token) if not by_token]
        if not branches:
            return {}
        most_kept = {self.run_of[branch]: 0 for branch in branches}
        for branch in branches:
            if self.covering[branch]:
                run = self.run_of[branch]
                most_kept[run] = max(most_kept[run], num_kept[branch])
        orders = draw_samples(most_kept, samples, seed=self.seed, step=self.step)
        rows: dict[int, list[Rows]] = {branch: [] for branch in branches}
        # Samples that have no row in a stage stand last there.
        table = [
            [_with_others([sample for sample in order if counts[sample]], len(counts)) for order in orders.values()]
            for counts in stages.counts
        ]
        on_device = torch.tensor(table).to(device, non_blocking=True)
        for counts, of_stage in zip(stages.counts, on_device.unbind(), strict=True):
            of_run = dict(zip(orders, of_stage.unbind(), strict=True))
            for branch in branches:
                run = self.run_of[branch]
                here = sum(counts[sample] > 0 for sample in orders[run][: num_kept[branch]])
                rows[branch].append(Rows(of_run[run], here, sum(count > 0 for count in counts), False))
        return rows

    def _token_rows(self, num_kept: list[int], stages: "_Stages", device: torch.device) -> dict[int, list[Rows]]:
        """By branch whose rows are tokens: its rows in each stage, which together are its share."""
        branches = [branch for branch, by_token in enumerate(self.by_token) if by_token]
        runs = list(dict.fromkeys(self.run_of[branch] for branch in branches))
        if not runs:
            return {}
        num_rows = len(stages.counts[0]) * sum(stages.widths)
        drawn = draw_tokens(runs, num_rows, device, stages.is_real, seed=self.seed, step=self.step)
        kept = [(runs.index(self.run_of[branch]), num_kept[branch]) for branch in branches]
        orders, kept_here = tokens_by_stage(drawn, kept, stages.widths)
        of_run = [dict(zip(runs, order.unbind(), strict=True)) for order in orders]
        num_real = [stages.num_tokens] if len(orders) == 1 else [sum(counts) for counts in stages.counts]
        return {
            branch: [
                Rows(of_run[stage][self.run_of[branch]], here[stage], num_real[stage], True)
                for stage in range(len(orders))
            ]
            for branch, here in zip(branches, kept_here, strict=True)
        }


class _Drawn(NamedTuple):
    """What was drawn for a batch: (rows kept, rows) of each branch, and by stage the rows of each branch."""

    batch: Batch
    counts: list[tuple[int, int]]
    rows: list[list[Rows]]


class _Stages(NamedTuple):
    """The stages of a target plan whose rows are drawn from; without one, the batch is the only stage.

    widths: of each stage, how many tokens a sample has, padding included. counts: of each stage, how many rows each
    sample has (of a whole batch 1: whether it is there). num_tokens: real tokens of all stages together. is_real: which
    tokens those are, bool (B, sum(widths)); None: all.
    """

    widths: list[int]
    counts: list[list[int]]
    num_tokens: int
    is_real: Tensor | None

    @staticmethod
    def of(batch: Batch, by_token: bool) -> "_Stages":
        num_samples, seq_len, _, is_real, staged, _ = batch
        if staged is not None:
            widths = [stage.rows.shape[1] for stage in staged.stages]
            counts = [list(stage.num_rows) for stage in staged.stages]
            num_tokens, num_rows = sum(map(sum, counts)), num_samples * sum(widths)
            is_real = None if num_tokens == num_rows else torch.cat([stage.is_row for stage in staged.stages], dim=1)
            return _Stages(widths, counts, num_tokens, is_real)
        num_rows = num_tokens = num_samples * seq_len
        if is_real is not None and by_token:
            if tuple(is_real.shape) != (num_samples, seq_len):
                raise ValueError(
                    f"is_real: expected shape ({num_samples}, {seq_len}), as the batch has, got {tuple(is_real.shape)}"
                )
            num_tokens = int(is_real.sum())
        return _Stages([seq_len], [[1] * num_samples], max(1, num_tokens), None if num_tokens == num_rows else is_real)


class RowsOfBranch(NamedTuple):
    """The plan entry of one branch under a `RowPlan`."""

    plan: RowPlan
    branch: int

    def rows(self, batch: Batch, *, per_token: bool) -> Rows:
        """The rows that the branch keeps of a batch."""
        return self.plan.rows(self.branch, batch)

    @property
    def kept_share(self) -> float:
        """The share of the rows that is kept."""
        return self.plan.kept_share(self.branch)

    def counts(self) -> tuple[int, int]:
        """(rows kept, rows) of the batches so far."""
        return self.plan.counts(self.branch)

    def expect_batch(self) -> None:
        """A batch begins."""
        self.plan.expect_batch(self.branch)

    def as_list(self) -> None:
        """Nothing: the rows are drawn anew from the seed and the step."""


class ChosenRows:
    """The plan entry of one branch whose rows were chosen by hand: kept, bool (N,), True where a row is kept.

    Errors: TypeError for another dtype than bool, ValueError for another shape.
    """

    def __init__(self, kept: Tensor):
        if kept.dtype != torch.bool:
            raise TypeError(f"plan: expected rows of dtype bool (True = kept), got {kept.dtype}")
        if kept.dim() != 1 or len(kept) == 0:
            raise ValueError(f"plan: expected rows of shape (N,), N at least 1, got {tuple(kept.shape)}")
        self.kept = kept.cpu()
        self.num_kept = int(self.kept.sum())

    def rows(self, batch: Batch, *, per_token: bool) -> Rows:
        """The rows that the branch keeps of a batch.

        Errors: ValueError when the batch has another number of rows than the plan.
        """
        num_tokens = batch.num_samples * (batch.seq_len if batch.staged is None else batch.staged.seq_len)
        if len(self.kept) not in (batch.num_samples, num_tokens if per_token else -1):
            expected = f"{batch.num_samples} samples" + (f" or {num_tokens} tokens" if per_token else "")
            raise ValueError(f"plan: expected as many rows as the batch has, {expected}, got {len(self.kept)}")
        kept, by_token = self.kept, len(self.kept) != batch.num_samples
        if by_token and batch.staged is not None:
            stage = batch.staged.stages[batch.stage]
            of_sample = kept.to(batch.device).view(batch.num_samples, -1)
            kept = (of_sample.gather(1, stage.rows) & stage.is_row).flatten()
        permutation = torch.cat((kept.nonzero(), (~kept).nonzero())).flatten().to(batch.device)
        return Rows(permutation, int(kept.sum()), len(kept), by_token)

    @property
    def kept_share(self) -> float:
        """The share of the rows that is kept."""
        return self.num_kept / len(self.kept)

    def counts(self) -> tuple[int, int]:
        """(rows kept, rows)."""
        return self.num_kept, len(self.kept)

    def as_list(self) -> list[bool]:
        """The rows as plain values, for a file."""
        return self.kept.tolist()  # type: ignore[no-any-return]


def _is_same(one: Batch, other: Batch) -> bool:
    if one.staged is not None or other.staged is not None:
        return one.staged is other.staged and one.device == other.device
    return one[:3] == other[:3] and one.is_real is other.is_real


def _with_others(order: list[int], num_samples: int) -> list[int]:
    """`order`, and behind it the samples that are not in it."""
    return [*order, *sorted(set(range(num_samples)) - set(order))]


@functools.cache  # once a process
def _say_that_one_sample_is_no_share() -> None:
    warnings.warn(
        "granularity: a batch of one sample has no share to keep, so branches whose rows are samples are kept or "
        "dropped whole, as with granularity='branch'",
        UserWarning,
        stacklevel=2,
    )
