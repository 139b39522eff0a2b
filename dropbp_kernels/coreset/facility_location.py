"""Elements that stand for all others: the exact greedy maximiser of the facility location.

The sum over all elements of the similarity to their most similar pick is submodular: what an element would add to it
only falls as others are picked. So a gain computed earlier bounds the one of today, and the lazy greedy computes few of
them again. Both greedies pick the same, since sums are taken in integers: exact, and equal where they are equal.
"""

import ctypes
import heapq
import math

import torch
from torch import Tensor

from .. import _backend

_SUM_BITS = 62  # of a sum over all elements, in int64
_ROWS = 64  # converted at a time: whole, the float64 numbers would take as much memory as the result, and longer


def facility_location(similarity: Tensor, num_picks: int, *, lazy: bool = True) -> tuple[Tensor, Tensor]:
    """Return (picks, weights): the greedy choice of num_picks elements and how many elements each of them stands for.

    Each turn picks the element j that raises sum_i max over picks of similarity[j, i] most; of equals, the one with the
    smallest index. An element belongs to the pick that is most similar to it, of equals to the earliest one, and a pick
    to itself, so that weights are at least 1 and sum to B. For distances d pass d.max() - d.

    Similarities are scaled by a power of two and cut off to int64, about 2**-50 of the largest one for B = 4096. Beyond
    that the result depends on nothing: not on the order of sums, the machine, the threads, or whether C++ was built.

    Shapes: similarity (B, B), row j: how well element j stands for each element; it need not be symmetric. picks
            (num_picks,) in the order of the greedy, weights (num_picks,), 1 <= num_picks <= B.
    Dtypes: similarity of any real dtype, on any device, read on the host; picks and weights int64, on its device.
    Errors: ValueError when similarity is not square, holds a negative, infinite or NaN number, or num_picks is outside
            1 ... B; TypeError when it is complex or boolean.
    Cost:   8 bytes for each pair, B**2 additions, and B for each gain that is computed again: all of them in each turn
            with lazy=False. C++ where it is built, the same picks in PyTorch elsewhere.
    Source: CoLM (arXiv 2407.19580), section 4; Minoux 1978 for the lazy greedy.
    """
    if similarity.dim() != 2 or similarity.shape[0] != similarity.shape[1]:
        raise ValueError(f"similarity: expected shape (B, B), got {tuple(similarity.shape)}")
    if similarity.dtype == torch.bool or similarity.is_complex():
        raise TypeError(f"similarity: expected real numbers, got {similarity.dtype}")
    num_elements = similarity.shape[0]
    if not 1 <= num_picks <= num_elements:
        raise ValueError(f"num_picks: expected 1 to {num_elements}, one for each row at most, got {num_picks}")
    numbers = _whole_numbers(similarity.detach().cpu())
    host = _backend.host()
    if host is None:
        picks, weights = _pick(numbers, num_picks, lazy)
    else:
        values = (ctypes.c_int64 * numbers.numel()).from_address(numbers.data_ptr())  # a view; NumPy may be missing
        picks, weights = host.facility_location(values, num_elements, num_picks, lazy)
    device = similarity.device
    return torch.tensor(picks, device=device), torch.tensor(weights, device=device)


def _whole_numbers(similarity: Tensor) -> Tensor:
    """similarity as int64, scaled so that a sum over a row is exact and cannot overflow."""
    least, largest = (value.double().item() for value in similarity.aminmax())
    if not (least >= 0.0 and math.isfinite(largest)):  # a NaN is neither
        raise ValueError(f"similarity: expected finite numbers >= 0, got numbers from {least} to {largest}")
    bits = _SUM_BITS - (len(similarity) - 1).bit_length() - math.frexp(largest)[1]
    scale = 2.0 ** min(bits, 1000)  # a power of two changes no digit
    numbers = torch.empty(similarity.shape, dtype=torch.int64)
    for start in range(0, len(similarity), _ROWS):
        numbers[start : start + _ROWS] = similarity[start : start + _ROWS].double().mul_(scale)
    return numbers


def _pick(similarity: Tensor, num_picks: int, lazy: bool) -> tuple[list[int], list[int]]:
    """The greedy in PyTorch, the twin of `facility_location` in csrc/host."""
    covered = torch.zeros_like(similarity[0])
    cluster = torch.zeros_like(covered)
    heap: list[tuple[int, int, int]] = []  # (-gain, element, turn in which the gain was computed)
    picks: list[int] = []
    for turn in range(num_picks):
        if turn == 0 or not lazy:
            gains = similarity.sub(covered).clamp_min_(0).sum(1).tolist()
            heap = [(-gain, element, turn) for element, gain in enumerate(gains) if element not in picks]
            heapq.heapify(heap)
        _, pick, computed = heapq.heappop(heap)
        while computed != turn:
            gain = int(similarity[pick].sub(covered).clamp_min_(0).sum())
            _, pick, computed = heapq.heappushpop(heap, (-gain, pick, turn))
        cluster[similarity[pick] > covered] = turn
        torch.maximum(covered, similarity[pick], out=covered)
        picks.append(pick)
    cluster[torch.tensor(picks)] = torch.arange(num_picks)
    return picks, torch.bincount(cluster, minlength=num_picks).tolist()
