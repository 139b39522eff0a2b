"""Which rows of a branch are kept: a random permutation of the rows, whose first `num_kept` send a gradient.

Both are pure functions of (seed, step, branch) and never touch a global generator, so every rank, a resumed run and a
recompute draw the same. The permutation is drawn where the rows live: the row numbers, hashed under the key
(seed, step, branch), are sorted. The hash maps 32 bits one to one onto 32 bits, so no two rows tie and the order does
not depend on how a device sorts. All arithmetic is that of integers below 2^63, which every device and Python itself do
alike.

The permutation needs no number from the device and hands none to it but the key; `num_kept` is an int of the host, so
shapes are known before anything runs.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

MAX_ROWS = 1 << 31
DTYPES = (torch.int64, torch.int32)
_MASK = 0xFFFFFFFF


def draw_permutation(
    num_rows: int,
    *,
    seed: int | Tensor,
    step: int | Tensor,
    branch: int | Tensor,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return a uniformly random permutation of range(num_rows), the same for equal (seed, step, branch) on any device.

    Shapes: result (num_rows,); with branch (B,) (num_rows) permutations of B branches in the same launches,
            (B, num_rows). A tensor of no dimension stands for its number, so that a captured graph or a compiled
            function need not be made anew for the next step.
    Dtypes: seed, step, branch: ints, negative too, of at most 64 bits, or int64 tensors on `device`. Result int64.
    Errors: ValueError when num_rows is negative or above 2^31, TypeError for seeds of another kind.
    Cost:   about 30 elementwise kernels over (B, num_rows) and a sort, fewer under torch.compile; no synchronisation.
            Draw all branches of a step at once.
    Source: hash: two rounds of a 32-bit multiply-xorshift finalizer, constants of github.com/skeeto/hash-prospector;
            sorting hashes draws without replacement.
    """
    if not 0 <= num_rows <= MAX_ROWS:
        raise ValueError(f"num_rows: expected 0 to {MAX_ROWS}, got {num_rows}")
    a, b = _key(seed, step, branch)
    rows = torch.arange(num_rows, device=device)
    a, b = (key.unsqueeze(-1) if isinstance(key, Tensor) else key for key in (a, b))
    return _mix((_mix(rows ^ a) + b) & _MASK).argsort(-1)


def draw_num_kept(num_rows: int, drop_rate: float, *, seed: int, step: int, branch: int) -> int:
    """Return how many of num_rows are kept: (1 - drop_rate) * num_rows, rounded up or down at random.

    Up with the probability that makes the mean exact, so each row is kept with probability 1 - drop_rate in a batch of
    any size. Independent of the permutation of the same (seed, step, branch).

    Errors: ValueError when drop_rate is outside [0, 1) or num_rows is negative.
    Cost:   on the host, a microsecond or two.
    """
    if not 0.0 <= drop_rate < 1.0:
        raise ValueError(f"drop_rate: expected 0 <= drop_rate < 1, got {drop_rate}")
    if num_rows < 0:
        raise ValueError(f"num_rows: expected 0 or more, got {num_rows}")
    expected = num_rows - num_rows * drop_rate
    a, b = _key(seed, step, branch)
    uniform = (_mix(_mix(a ^ _MASK) ^ b) + 0.5) / (1 << 32)  # row 2^32 - 1, which no permutation has, and xor for plus
    return min(math.floor(expected + uniform), num_rows)


def row_shape(shape: Sequence[int], num_rows: int) -> tuple[int, ...] | None:
    """`shape` (..., D) seen as num_rows rows, (num_rows, ..., D); None where it has no such rows.

    A row is an index of the leading dimensions that together have num_rows elements, as few of them as do: of (B, S, D)
    B rows are samples, (B, S, D), and B * S rows are tokens, (B * S, D).
    """
    product = 1
    for place, size in enumerate(shape[:-1]):
        product *= size
        if product == num_rows:
            return (num_rows, *shape[place + 1 :])
    return None


def check_permutation(permutation: Tensor, residual: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """(permutation as int64, residual's shape as rows). That it is one is checked where that needs no wait: on a CPU.

    Errors: TypeError for another dtype than int64 and int32, ValueError for a wrong device or length.
    """
    if permutation.dtype not in DTYPES:
        raise TypeError(f"permutation: expected dtype int64 or int32, got {permutation.dtype}")
    if permutation.device != residual.device:
        raise ValueError(f"permutation: expected on residual's device {residual.device}, got {permutation.device}")
    shape = row_shape(residual.shape, permutation.shape[0]) if permutation.dim() == 1 else None
    if shape is None:
        counts = [str(math.prod(residual.shape[:place])) for place in range(1, residual.dim())]
        raise ValueError(
            f"permutation: expected shape (N,), N = {' or '.join(dict.fromkeys(counts)) or 'a number of rows'} for "
            f"residual {tuple(residual.shape)}, got {tuple(permutation.shape)}"
        )
    return permutation.long(), shape


def _key(seed: int | Tensor, step: int | Tensor, branch: int | Tensor) -> tuple[Any, Any]:
    """Two words of 32 bits, each of which depends on every bit of the three numbers."""
    a: Any = 0x3243F6A8  # of pi
    b: Any = 0x05A308D3
    for name, number in (("seed", seed), ("step", step), ("branch", branch)):
        _check(name, number)
        for word in (number & _MASK, (number >> 32) & _MASK):
            a = _mix(a ^ word)
            b = _mix((b + a) & _MASK)
    return a, b


def _mix(x: Any) -> Any:  # of an int or a tensor
    """A map of 0 ... 2^32 - 1 onto itself in which each bit of x decides about half of the result's."""
    x = x ^ (x >> 16)
    x = (x * 0x21F0AAAD) & _MASK  # both factors below 2^31: no product reaches 2^63
    x = x ^ (x >> 15)
    x = (x * 0x735A2D97) & _MASK
    return x ^ (x >> 15)


def _check(name: str, number: int | Tensor) -> None:
    if isinstance(number, Tensor):
        if number.dtype != torch.int64 or number.dim() > (name == "branch"):
            raise TypeError(
                f"{name}: expected an int or an int64 tensor of no dimension, "
                f"got {number.dtype} of shape {tuple(number.shape)}"
            )
    elif isinstance(number, bool) or not isinstance(number, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an int or an int64 tensor, got {type(number).__name__}")
    elif not -(1 << 63) <= number < 1 << 63:
        raise ValueError(f"{name}: expected at most 64 bits, got {number}")
