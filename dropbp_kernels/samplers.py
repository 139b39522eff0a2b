"""How a drop plan is drawn: from drop rates, FLOPs, seed and step to kept branches.

A sampler is a pure function ``(rates, flops, seed, step) -> tuple[bool, ...]``, True = kept. It draws from a private
generator seeded with the text "seed:step" and never touches a global one, so every rank, a resumed run and a recompute
draw the same plan. Only `random.Random(text).random()` is used: Python keeps that stream the same in all versions
(shuffles and choices it does not), so a plan does not depend on the Python that drew it.

=========  ===================  ========================================  ==================================
sampler    P(branch is kept)    backward work of a step                   branches of one step
=========  ===================  ========================================  ==================================
balanced   1 - rate, exactly    constant as far as exact rates allow      drawn without replacement
bernoulli  1 - rate, exactly    varies freely                             independent
cyclic     1 - rate, exactly    constant as far as exact rates allow      neighbours, in turn
published  below 1 - rate       at most the target share of branches      as bernoulli, then more are dropped
=========  ===================  ========================================  ==================================
"""

import bisect
import itertools
import math
import random
from collections.abc import Callable, Sequence

Sampler = Callable[[Sequence[float], Sequence[float], int, int], tuple[bool, ...]]


def _generator(rates: Sequence[float], flops: Sequence[float], seed: int, step: int) -> random.Random:
    """The generator of (seed, step), once the other arguments are found valid."""
    if len(rates) != len(flops):
        raise ValueError(f"flops: expected one for each of the {len(rates)} rates, got {len(flops)}")
    wrong = next((rate for rate in rates if not 0.0 <= rate < 1.0), None)
    if wrong is not None:
        raise ValueError(f"rates: expected 0 <= drop_rate < 1, got {wrong}")
    return random.Random(f"{seed}:{step}")


def bernoulli(rates: Sequence[float], flops: Sequence[float], seed: int, step: int) -> tuple[bool, ...]:
    """Drop each branch with its own rate, independently of the others.

    Errors: ValueError when the lengths differ or a rate is outside [0, 1).
    Cost:   one random number per branch.
    Source: DropBP (arXiv 2402.17812), section 3.1.
    """
    generator = _generator(rates, flops, seed, step)
    return tuple(generator.random() >= rate for rate in rates)


def published(rates: Sequence[float], flops: Sequence[float], seed: int, step: int) -> tuple[bool, ...]:
    """Draw as `bernoulli`, then drop more branches until the dropped share is at least the mean rate.

    The top-up goes through the branches in order of decreasing rate and, where rates are equal, in model order. So
    early branches are dropped more often than their rate says, and the mean rate is overshot: kept for comparisons.

    Errors: those of `bernoulli`.
    Cost:   one random number per branch and a sort.
    Source: github.com/WooSunghyeon/dropbp, the plan of one training step; its target is the mean rate here.
    """
    generator = _generator(rates, flops, seed, step)
    dropped = [generator.random() < rate for rate in rates]
    num_missing = math.ceil(math.fsum(rates) - 1e-9) - sum(dropped)  # 1e-9: ten rates of 0.3 ask for 3, not for 4
    by_decreasing_rate = sorted(range(len(rates)), key=lambda index: -rates[index])
    for index in [index for index in by_decreasing_rate if not dropped[index]][: max(num_missing, 0)]:
        dropped[index] = True
    return tuple(not is_dropped for is_dropped in dropped)


def balanced(rates: Sequence[float], flops: Sequence[float], seed: int, step: int) -> tuple[bool, ...]:
    """Keep each branch with probability exactly 1 - rate and spend nearly the same FLOPs in every step.

    Systematic sampling over a random order: lay the branches on a line, each as long as its probability of being
    kept, and keep those that contain one of the points u, u + 1, u + 2, ... with one uniform u. Branches of equal
    FLOPs (a group: all attention branches, say) stand next to each other, in random order. Then, in every step, the
    number of kept branches is the floor or the ceiling of its expectation, in each group and in total. Where a
    group's expectation is whole, its kept FLOPs are the same in every step.

    The groups stand in random order too. For two groups that changes nothing (the line read backwards draws the same
    plans). For many, a fixed order would let only few plans occur: if all FLOPs differed and all rates were 0.875,
    the branches would fall into 8 sets that are always kept together. The price is that the FLOPs of a step then vary.

    Errors: those of `bernoulli`.
    Cost:   one random number per branch and per group, and a sort.
    Source: systematic sampling with unequal probabilities, W. G. Madow, Ann. Math. Statist. 20 (1949) 333-354.
    """
    generator = _generator(rates, flops, seed, step)
    offset = generator.random()
    place_of_group = {group: generator.random() for group in dict.fromkeys(flops)}
    order = sorted((place_of_group[group], generator.random(), index) for index, group in enumerate(flops))
    kept = [rate == 0.0 for rate in rates]
    end = 0.0
    for _, _, index in order:
        if kept[index]:  # a length of 1 always holds a point; rounding must not decide that
            continue
        start, end = end, end + (1.0 - rates[index])
        # Ten lengths of 1 - 0.9 do not sum to 1 exactly: the 1e-16 they miss is the chance of a wrong count.
        kept[index] = math.floor(end + offset) > math.floor(start + offset)
    return tuple(kept)


def cyclic(rates: Sequence[float], flops: Sequence[float], seed: int, step: int) -> tuple[bool, ...]:
    """Keep neighbouring branches, a window that moves from the input to the output and starts again.

    With equal rates the window covers a share 1 - rate of the depth and moves on by its own length, so each branch is
    kept once in a round of 1 / (1 - rate) steps and branches that meet in a window always meet. With unequal rates each
    branch is kept every 1 / (1 - rate) of its own steps. Depth is counted among branches of equal FLOPs, so attention
    and MLP of a block are kept together. The seed chooses where the first window stands: the only thing random here.

    Errors: those of `bernoulli`.
    Cost:   one random number, and arithmetic on the step.
    Source: LCSB (arXiv 2602.13073), whole layers in turn; a window for any rate in place of a fixed number of groups.
    """
    _generator(rates, flops, seed, step)
    start = random.Random(f"cyclic:{seed}").random()
    size = {group: list(flops).count(group) for group in set(flops)}
    seen = dict.fromkeys(size, 0)
    kept = []
    for rate, group in zip(rates, flops, strict=True):
        depth = (seen[group] + 0.5) / size[group]
        seen[group] += 1
        # How many windows began above this branch before a step; one more of them in this step means kept. Both ends
        # are the same expression of their step, so over all steps no window is lost or counted twice by rounding.
        before, after = (math.floor(number * (1.0 - rate) + start - depth) for number in (step, step + 1))
        kept.append(rate == 0.0 or after > before)  # 0: one window a step, which rounding must not lose
    return tuple(kept)


SAMPLERS: dict[str, Sampler] = {
    "balanced": balanced,
    "bernoulli": bernoulli,
    "published": published,
    "cyclic": cyclic,
}


def get_sampler(sampler: str | Sampler) -> Sampler:
    """Return the sampler of that name; a callable is returned as it is.

    Errors: ValueError for an unknown name, TypeError for anything else.
    """
    if callable(sampler):
        return sampler
    if not isinstance(sampler, str):
        raise TypeError(f"sampler: expected a name or a callable, got {type(sampler).__name__}")
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler: expected a callable or one of {', '.join(SAMPLERS)}, got {sampler!r}")
    return SAMPLERS[sampler]


def draw_kept(
    sampler: Sampler, rates: Sequence[float], flops: Sequence[float], seed: int, step: int
) -> tuple[bool, ...]:
    """What `sampler` draws, once it is found to be a plan: one bool per branch.

    Errors: those of the sampler; TypeError or ValueError when it returned something else.
    """
    kept = sampler(rates, flops, seed, step)
    if not isinstance(kept, Sequence) or isinstance(kept, str):
        raise TypeError(f"sampler: expected it to return a tuple of bools, got {type(kept).__name__} at step {step}")
    if len(kept) != len(rates):
        raise ValueError(f"sampler: expected it to return {len(rates)} bools, got {len(kept)} at step {step}")
    wrong = next((entry for entry in kept if not isinstance(entry, bool)), None)
    if wrong is not None:
        raise TypeError(f"sampler: expected it to return bools, got {wrong!r} of type {type(wrong).__name__}")
    return tuple(kept)


def with_one_kept(
    kept: Sequence[bool], is_trainable: Callable[[int], bool], rates: Sequence[float], seed: int, step: int
) -> tuple[bool, ...]:
    """`kept`, and one branch more where it keeps none with something to train: by chance, in proportion to 1 - rate.

    is_trainable: whether the branch of that index has something to train; asked of all only where it matters, since in
        a large model the answer takes a walk through its parameters.
    """
    if any(is_kept and is_trainable(index) for index, is_kept in enumerate(kept)):
        return tuple(kept)
    candidates = [index for index in range(len(kept)) if is_trainable(index)]
    if not candidates:  # only parameters outside the branches are trained: nothing to keep a branch for
        return tuple(kept)
    ends = list(itertools.accumulate(1.0 - rates[index] for index in candidates))
    point = random.Random(f"keep_one:{seed}:{step}").random() * ends[-1]
    chosen = candidates[bisect.bisect(ends, point, 0, len(ends) - 1)]
    return tuple(is_kept or index == chosen for index, is_kept in enumerate(kept))
