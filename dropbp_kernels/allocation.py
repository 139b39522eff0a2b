"""Drop rates from sensitivities and FLOPs: insensitive branches are dropped more often, at the same backward work."""

import ctypes
import heapq
import math
from collections.abc import Sequence

from . import _backend
from .choices import ALLOCATIONS, check_choice

STEP = 0.1
CAP = 0.9


def _float32(value: float) -> float:
    """value rounded to float32, infinite where it is too large for it."""
    return ctypes.c_float(value).value


def _allocate_published(
    sensitivities: Sequence[float], flops: Sequence[float], target_flops: float, min_rate: float
) -> list[float]:
    """The published greedy in plain Python, the twin of `allocate_published` in csrc/host.

    Its numbers depend on which ones are float32 (rates, sensitivities, FLOPs, keys) and which are float64 (the rest).
    Of equal keys, the branch that comes last in the model goes first.
    """
    rates = [_float32(min_rate)] * len(flops)
    costs = [_float32(cost) for cost in flops]
    weights = [_float32(sensitivity) for sensitivity in sensitivities]
    heap = [(_float32(weight * (STEP + min_rate)), -index) for index, weight in enumerate(weights)]
    heapq.heapify(heap)
    remaining = 0.0
    for cost in costs:
        remaining += cost
    remaining *= 1 - min_rate
    while remaining > target_flops:
        if not heap:
            raise RuntimeError(f"target_flops: expected a value that rates up to {CAP} can reach, got {target_flops}")
        key, index = heapq.heappop(heap)
        rates[-index] = _float32(rates[-index] + STEP)
        remaining -= costs[-index] * STEP
        if rates[-index] < CAP:
            heapq.heappush(heap, (_float32(key + STEP * weights[-index]), index))
    return rates


def _check_values(name: str, values: Sequence[float]) -> None:
    for index, value in enumerate(values):
        if not (math.isfinite(value) and value >= 0.0 and math.isfinite(_float32(value))):
            raise ValueError(f"{name}: expected finite numbers >= 0 that fit float32, got {value} for branch {index}")
    if not any(_float32(value) > 0.0 for value in values):
        raise ValueError(
            f"{name}: expected at least one positive number, got only zeros"
            + (" (were the gates called in the forward that backprop ran?)" if name == "sensitivities" else "")
        )


def _reachable_rate(min_rate: float) -> float:
    """The mean drop rate when no branch can be raised any more."""
    rate, num_raises = _float32(min_rate), 0
    while rate < CAP:
        rate, num_raises = _float32(rate + STEP), num_raises + 1
    return min_rate + STEP * num_raises


def default_max_rate(drop_rate: float) -> float:
    """The highest rate of a branch where none is given: 0.9, or half-way from the target to 1 where that is more."""
    return max(CAP, (1.0 + drop_rate) / 2)


def _allocate_optimal(
    weights: Sequence[float], costs: Sequence[float], drop_rate: float, lowest: float, highest: float
) -> list[float]:
    """Least sum of sensitivity * rate: branches rise to `highest` in order of sensitivity per FLOP.

    Those alike rise together. A linear objective under one budget is the fractional knapsack, for which this greedy is
    exact.
    """
    rates = [lowest] * len(costs)
    prices = [weight / cost if cost else math.inf for weight, cost in zip(weights, costs, strict=True)]
    missing = (drop_rate - lowest) * math.fsum(costs)
    for price in sorted(set(prices)):
        branches = [index for index, other in enumerate(prices) if other == price and costs[index]]
        room = (highest - lowest) * math.fsum(costs[index] for index in branches)
        if missing <= 0.0 or not branches:
            break
        for index in branches:
            rates[index] = lowest + (highest - lowest) * min(1.0, missing / room)
        missing -= room
    return rates


def _allocate_variance(
    weights: Sequence[float], costs: Sequence[float], drop_rate: float, lowest: float, highest: float
) -> list[float]:
    """Least sum of sensitivity * rate / (1 - rate): kept shares in proportion to sqrt(sensitivity / FLOPs), clipped.

    The FLOPs kept grow with the factor of proportion, in straight lines between the factors at which a branch meets a
    bound; so the factor that keeps the budget is found between two of those, exactly. What is left when all sensitive
    branches are kept as often as allowed goes to the others, in equal shares.
    """
    least, most = 1.0 - highest, 1.0 - lowest
    scores = [math.sqrt(weight / cost) if cost else 0.0 for weight, cost in zip(weights, costs, strict=True)]
    budget = (1.0 - drop_rate) * math.fsum(costs)

    def shares(factor: float) -> list[float]:
        return [min(max(factor * score, least), most) for score in scores]

    def spent(factor: float) -> float:
        return math.fsum(share * cost for share, cost in zip(shares(factor), costs, strict=True))

    bends = sorted({0.0, *(bound / score for score in scores if score for bound in (least, most))})
    low = next((i for i in reversed(range(len(bends))) if spent(bends[i]) <= budget), 0)
    if low + 1 < len(bends):
        start, end = spent(bends[low]), spent(bends[low + 1])
        factor = bends[low] + (bends[low + 1] - bends[low]) * (budget - start) / (end - start)
        kept = shares(factor)
    else:
        kept = shares(bends[-1])
        free = math.fsum(cost for cost, score in zip(costs, scores, strict=True) if not score)
        extra = (budget - spent(bends[-1])) / free if free else 0.0
        kept = [min(share + extra, most) if not score else share for share, score in zip(kept, scores, strict=True)]
    return [1.0 - share if cost else lowest for share, cost in zip(kept, costs, strict=True)]


def depth_linear_rates(flops: Sequence[float], drop_rate: float, *, max_rate: float | None = None) -> list[float]:
    """Drop rates that rise evenly with depth, as steeply as 0 and max_rate allow; a share drop_rate of the FLOPs.

    Errors: ValueError for a drop_rate outside [0, 1) or above max_rate, and for no branch or FLOPs that are no FLOPs.
    Source: stochastic depth (arXiv 1603.09382), whose survival probability falls linearly; here for the backward.
    """
    highest = _check_bounds(drop_rate, 0.0, max_rate)
    costs = [float(cost) for cost in flops]
    _check_values("flops", costs)
    depths = [index / max(1, len(costs) - 1) for index in range(len(costs))]
    mean = math.fsum(d * cost for d, cost in zip(depths, costs, strict=True)) / math.fsum(costs)
    slope = min(drop_rate / max(mean, 1e-9), (highest - drop_rate) / max(1.0 - mean, 1e-9))
    return [min(max(drop_rate + slope * (depth - mean), 0.0), highest) for depth in depths]


def _check_bounds(drop_rate: float, min_rate: float, max_rate: float | None) -> float:
    """The highest rate, once target and bounds are found to fit each other."""
    if not 0.0 <= drop_rate < 1.0:
        raise ValueError(f"drop_rate: expected 0 <= drop_rate < 1, got {drop_rate}")
    if not 0.0 <= min_rate <= drop_rate:
        raise ValueError(f"min_rate: expected 0 <= min_rate <= drop_rate ({drop_rate}), got {min_rate}")
    highest = default_max_rate(drop_rate) if max_rate is None else max_rate
    if not drop_rate <= highest < 1.0:
        raise ValueError(f"max_rate: expected drop_rate ({drop_rate}) <= max_rate < 1, got {highest}")
    return highest


def allocate(
    sensitivities: Sequence[float],
    flops: Sequence[float],
    drop_rate: float,
    *,
    method: str = "published",
    min_rate: float = 0.0,
    max_rate: float | None = None,
) -> list[float]:
    """Return a drop rate for each branch, so that a share drop_rate of the FLOPs is dropped on average.

    With sensitivities S, FLOPs F, rates r and bounds min_rate <= r <= max_rate (default: 0.9, or half-way from the
    target to 1 where that is more):

    "optimal": least sum of S r. Exactly the target; most branches at one of the bounds.
    "variance": least sum of S r / (1 - r), to first order the variance of the gradient when grad_scale="unbiased":
    1 - r in proportion to sqrt(S / F), clipped to the bounds. Exactly the target.
    "published": all rates start at min_rate; the branch with the smallest sensitivity * (rate + 0.1) is raised by 0.1,
    again and again, until at most int((1 - drop_rate) * sum(flops)) of the FLOPs are left; a branch of rate 0.9 or more
    is not raised any further, so max_rate stays None. FLOPs of a branch do not enter its key. The rates equal those of
    the published code bit for bit: float32 numbers a little off the 0.1 grid, such as 0.30000001192092896. Because of
    the int, pass real FLOPs rather than small ratios. drop_rate == min_rate returns min_rate everywhere.

    Errors: ValueError for an unknown method, different lengths, no branch, values that are negative, NaN, infinite or
            all zero, rates outside 0 <= min_rate <= drop_rate <= max_rate < 1, and a drop_rate that the cap puts out
            of reach.
    Cost:   "published": at most 9 heap operations per branch; C++ where it is built, the same numbers in Python
            elsewhere. The others: a sort and a few sums per branch.
    Source: DropBP (arXiv 2402.17812), section 3.3; github.com/WooSunghyeon/dropbp.
    """
    check_choice("method", method, ALLOCATIONS)
    if len(sensitivities) != len(flops):
        raise ValueError(f"flops: expected one for each of the {len(sensitivities)} sensitivities, got {len(flops)}")
    if not len(flops):
        raise ValueError("sensitivities: expected at least one branch, got none")
    highest = _check_bounds(drop_rate, min_rate, max_rate)
    if method == "published" and max_rate is not None:
        raise ValueError(
            f"max_rate: expected None, since the cap of {CAP} is part of the published method, got {max_rate}"
        )
    weights = [float(sensitivity) for sensitivity in sensitivities]
    costs = [float(cost) for cost in flops]
    _check_values("sensitivities", weights)
    _check_values("flops", costs)
    if method != "published":
        run = _allocate_optimal if method == "optimal" else _allocate_variance
        return run(weights, costs, drop_rate, min_rate, highest)
    if drop_rate == min_rate:
        return [_float32(min_rate)] * len(costs)

    target_flops = float(int((1 - drop_rate) * sum(costs)))
    reachable = _reachable_rate(min_rate)
    # The sums are rounded to float32 and float64 on the way: a target at the very limit counts as out of reach.
    if target_flops <= (1.0 - reachable + 1e-6) * sum(costs):
        raise ValueError(
            f"drop_rate: expected less than {reachable:.6g}, where every branch is at the cap of {CAP}, "
            f"got {drop_rate} (FLOPs left to spend: {target_flops:.6g} of {sum(costs):.6g})"
        )
    host = _backend.host()
    greedy = _allocate_published if host is None else host.allocate_published
    return list(greedy(weights, costs, target_flops, float(min_rate)))
