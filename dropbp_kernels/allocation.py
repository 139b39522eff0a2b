"""Drop rates from sensitivities and FLOPs: insensitive branches are dropped more often, at the same backward work."""

import ctypes
import heapq
import math
from collections.abc import Sequence

from . import _backend

METHODS = ("published",)
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


def allocate(
    sensitivities: Sequence[float],
    flops: Sequence[float],
    drop_rate: float,
    *,
    method: str = "published",
    min_rate: float = 0.0,
) -> list[float]:
    """Return a drop rate for each branch, so that a share drop_rate of the FLOPs is dropped on average.

    "published": all rates start at min_rate; the branch with the smallest sensitivity * (rate + 0.1) is raised by 0.1,
    again and again, until at most int((1 - drop_rate) * sum(flops)) of the FLOPs are left; a branch of rate 0.9 or more
    is not raised any further. FLOPs of a branch do not enter its key. The rates equal those of the published code bit
    for bit: float32 numbers a little off the 0.1 grid, such as 0.30000001192092896. Because of the int, pass real
    FLOPs rather than small ratios. drop_rate == min_rate returns min_rate everywhere.

    Errors: ValueError for an unknown method, different lengths, no branch, values that are negative, NaN, infinite or
            all zero, rates outside 0 <= min_rate <= drop_rate < 1, and a drop_rate that the cap puts out of reach.
    Cost:   at most 9 heap operations per branch; C++ where it is built, the same numbers in Python elsewhere.
    Source: DropBP (arXiv 2402.17812), section 3.3; github.com/WooSunghyeon/dropbp.
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    if len(sensitivities) != len(flops):
        raise ValueError(f"flops: expected one for each of the {len(sensitivities)} sensitivities, got {len(flops)}")
    if not len(flops):
        raise ValueError("sensitivities: expected at least one branch, got none")
    if not 0.0 <= drop_rate < 1.0:
        raise ValueError(f"drop_rate: expected 0 <= drop_rate < 1, got {drop_rate}")
    if not 0.0 <= min_rate <= drop_rate:
        raise ValueError(f"min_rate: expected 0 <= min_rate <= drop_rate ({drop_rate}), got {min_rate}")
    weights = [float(sensitivity) for sensitivity in sensitivities]
    costs = [float(cost) for cost in flops]
    _check_values("sensitivities", weights)
    _check_values("flops", costs)
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
    run = _allocate_published if host is None else host.allocate_published
    return list(run(weights, costs, target_flops, float(min_rate)))
