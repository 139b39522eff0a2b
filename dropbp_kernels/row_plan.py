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
import random
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .permutation import draw_permutation

GRANULARITIES = ("branch", "sample", "token")


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
    """What a plan has to know of a batch: its size, and which tokens are real, bool (num_samples, seq_len) or None."""

    num_samples: int
    seq_len: int
    device: torch.device
    is_real: Tensor | None = None


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
        self._drawn: tuple[Batch, list[Rows]] | None = None  # of the last batch

    def rows(self, branch: int, batch: Batch) -> Rows:
        """The rows of a branch. Drawn for all branches when the first of them asks.

        Errors: ValueError for a batch without rows, or an is_real of another shape.
        Cost:   once a batch: a copy of (num_branches, num_samples) int64 to the device, and the sorts of
                `draw_permutation` for tokens; with is_real the host waits for the number of real tokens.
        """
        if self._drawn is None or not _is_same(self._drawn[0], batch):
            self._drawn = batch, self._draw(batch)
        return self._drawn[1][branch]

    def kept_share(self, branch: int) -> float:
        """The share of its rows that the branch kept in the last batch; before that, what is expected."""
        num_kept, num_rows = self.counts(branch)
        return num_kept / num_rows if num_rows else 1.0 - self.drop_rates[branch]

    def counts(self, branch: int) -> tuple[int, int]:
        """(rows kept, rows) of the branch in the last batch; before one, none."""
        if self._drawn is None:
            return 0, 0
        rows = self._drawn[1][branch]
        return rows.num_kept, rows.num_rows

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

    def _draw(self, batch: Batch) -> list[Rows]:
        num_samples, seq_len, device, is_real = batch
        if num_samples * seq_len == 0:
            raise ValueError(f"batch: expected at least one row, got {num_samples} samples of {seq_len} tokens")
        if num_samples == 1 and not all(self.by_token):
            _say_that_one_sample_is_no_share()
        num_tokens = num_samples * seq_len
        if is_real is not None and any(self.by_token):
            if tuple(is_real.shape) != (num_samples, seq_len):
                raise ValueError(
                    f"is_real: expected shape ({num_samples}, {seq_len}), as the batch has, got {tuple(is_real.shape)}"
                )
            num_real = int(is_real.sum())
            if num_real == num_tokens:
                is_real = None
            num_tokens = max(1, num_real)
        num_kept = self.num_kept(num_samples, num_tokens)
        if any(self.covering):
            num_kept = self._with_one_kept(num_kept)
        samples = self._draw_samples(num_kept, num_samples, device)
        tokens = self._draw_tokens(num_samples * seq_len, device, is_real)
        return [
            Rows(tokens[run], count, num_tokens, True) if by_token else Rows(samples[run], count, num_samples, False)
            for run, count, by_token in zip(self.run_of, num_kept, self.by_token, strict=True)
        ]

    def _with_one_kept(self, num_kept: list[int]) -> list[int]:
        """num_kept, or with one more where no row would be kept by any branch that has something to train."""
        candidates = [branch for branch, counts in enumerate(self.covering) if counts]
        if any(num_kept[branch] for branch in candidates):
            return num_kept
        weights = [1.0 - self.drop_rates[branch] for branch in candidates]
        chosen = random.Random(f"keep_one:{self.seed}:{self.step}").choices(candidates, weights)[0]
        return [count + (branch == chosen) for branch, count in enumerate(num_kept)]

    def _draw_samples(self, num_kept: list[int], num_samples: int, device: torch.device) -> dict[int, Tensor]:
        """A permutation of the samples for each run of blocks."""
        branches = [branch for branch, by_token in enumerate(self.by_token) if not by_token]
        runs = list(dict.fromkeys(self.run_of[branch] for branch in branches))
        if not runs:
            return {}
        drawn = draw_permutation(num_samples, seed=self.seed, step=self.step, branch=torch.tensor(runs)).tolist()
        orders = dict(zip(runs, drawn, strict=True))
        most_kept = dict.fromkeys(runs, 0)
        for branch in branches:
            if self.covering[branch]:
                run = self.run_of[branch]
                most_kept[run] = max(most_kept[run], num_kept[branch])
        cover(orders, most_kept, random.Random(f"cover:{self.seed}:{self.step}"))
        on_device = torch.tensor([orders[run] for run in runs]).to(device, non_blocking=True)
        return dict(zip(runs, on_device.unbind(), strict=True))

    def _draw_tokens(self, num_rows: int, device: torch.device, is_real: Tensor | None) -> dict[int, Tensor]:
        """A permutation of the tokens of the flattened batch for each run of blocks, padding last."""
        runs = list(dict.fromkeys(run for run, by_token in zip(self.run_of, self.by_token, strict=True) if by_token))
        if not runs:
            return {}
        branch = torch.tensor(runs, device=device)
        drawn = draw_permutation(num_rows, seed=self.seed, step=self.step, branch=branch, device=device)
        if is_real is not None:
            is_padding = ~is_real.to(device).flatten()[drawn]
            drawn = drawn.gather(1, is_padding.to(torch.int8).argsort(dim=1, stable=True))
        return dict(zip(runs, drawn.unbind(), strict=True))


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
        """(rows kept, rows) of the last batch."""
        return self.plan.counts(self.branch)

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
        num_tokens = batch.num_samples * batch.seq_len
        if len(self.kept) not in (batch.num_samples, num_tokens if per_token else -1):
            expected = f"{batch.num_samples} samples" + (f" or {num_tokens} tokens" if per_token else "")
            raise ValueError(f"plan: expected as many rows as the batch has, {expected}, got {len(self.kept)}")
        permutation = torch.cat((self.kept.nonzero(), (~self.kept).nonzero())).flatten().to(batch.device)
        return Rows(permutation, self.num_kept, len(self.kept), len(self.kept) != batch.num_samples)

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


def cover(orders: dict[int, list[int]], num_kept: dict[int, int], generator: random.Random) -> None:
    """Let samples change places so that every one is among the first num_kept of some order, as far as these reach.

    orders: permutations of the same samples, by run; changed in place. Who changes with whom is drawn without regard to
    which sample is which, so every sample is as likely as before to be at any place.

    Cost: on the host, the length of all kept places, and again for each sample that was in none.
    """
    num_samples = len(next(iter(orders.values())))
    times = [0] * num_samples
    for run, order in orders.items():
        for sample in order[: num_kept[run]]:
            times[sample] += 1
    missing = [sample for sample in range(num_samples) if times[sample] == 0]
    # Not by shuffle, whose stream Python may change.
    for sample in sorted(missing, key=lambda _: generator.random()):
        places = [
            (run, place)
            for run, order in orders.items()
            for place, other in enumerate(order[: num_kept[run]])
            if times[other] > 1
        ]
        if not places:
            return
        run, place = places[math.floor(generator.random() * len(places))]
        order = orders[run]
        times[order[place]] -= 1
        times[sample] += 1
        order[order.index(sample)], order[place] = order[place], sample


def _is_same(one: Batch, other: Batch) -> bool:
    return one[:3] == other[:3] and one.is_real is other.is_real


@functools.cache  # once a process
def _say_that_one_sample_is_no_share() -> None:
    warnings.warn(
        "granularity: a batch of one sample has no share to keep, so branches whose rows are samples are kept or "
        "dropped whole, as with granularity='branch'",
        UserWarning,
        stacklevel=2,
    )
