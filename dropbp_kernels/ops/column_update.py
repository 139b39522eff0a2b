"""Change a few columns of a weight for a while, in place, and put back what they were, bit for bit.

    original = column_update(weight, delta, index, scale=scale)
    y = F.linear(x, weight)
    column_restore(weight, original, index)

Subtracting what was added would not undo it: the sum was rounded.
"""

import torch
from torch import Tensor

from .checks import check_channels, check_dtype
from .raw import raw as _raw


def column_update(weight: Tensor, delta: Tensor, index: Tensor, *, scale: float = 1.0) -> Tensor:
    """Add scale * delta to the columns index of weight, in place, and return what these columns were.

    weight's version does not change: graphs that saved it need not be told of what is undone before they run. Whoever
    calls this sees to it that it is, by `column_restore`.

    Shapes: weight (out, in) of any strides, so (in, out) transposed too; delta (out, r), index (r,), all different;
            result (out, r), contiguous.
    Dtypes: float32, float16, bfloat16, float64, each of weight and delta; summed in float32, float64 where one of them
            is float64, and rounded once to weight's. index int64, or int32, converted first.
    Errors: ValueError when shapes or devices do not fit, TypeError when a dtype is unsupported, RuntimeError where a
            gradient would be expected, for there is none, and, but by the Triton kernel, where rows of weight share
            elements. Entries that repeat or are outside 0 ... in - 1: IndexError on a CPU, weight untouched; on a GPU,
            where the host does not wait to see them, those outside stop the CUDA kernel with a message and are skipped
            by the Triton kernel, and what repeats is undefined.
    Cost:   reads and writes a cache line (a sector of 32 bytes on a GPU) for each element of the columns; allocates
            the result. One kernel.
    Source: PaCA (arXiv 2503.01905), section 3; oracle reference.column_update__reference.
    """
    index = _check(weight, "delta", delta, index)
    check_dtype("delta", delta.dtype)
    return _raw.column_update_(weight, delta.detach(), index, scale)


def column_restore(weight: Tensor, original: Tensor, index: Tensor) -> None:
    """Write original, what `column_update` returned, into the columns index of weight, in place.

    Shapes: weight (out, in) of any strides, original (out, r), index (r,), all different.
    Dtypes: float32, float16, bfloat16, float64, weight and original alike, copied bit for bit; index int64 or int32.
    Errors: as those of `column_update`, and TypeError when original has another dtype than weight.
    Cost:   reads original, writes a cache line for each of its elements; allocates nothing. One kernel.
    Source: PaCA (arXiv 2503.01905), section 3; oracle reference.column_restore__reference.
    """
    index = _check(weight, "original", original, index)
    if original.dtype != weight.dtype:
        raise TypeError(f"original: expected weight's dtype {weight.dtype}, got {original.dtype}")
    _raw.column_restore_(weight, original.detach(), index)


def _check(weight: Tensor, name: str, columns: Tensor, index: Tensor) -> Tensor:
    check_dtype("weight", weight.dtype)
    if weight.dim() != 2:
        raise ValueError(f"weight: expected shape (out, in), got {tuple(weight.shape)}")
    index = check_channels(index, "weight", weight)
    if columns.shape != (weight.shape[0], index.shape[0]):
        expected = (weight.shape[0], index.shape[0])
        raise ValueError(f"{name}: expected shape {expected}, got {tuple(columns.shape)}")
    if columns.device != weight.device:
        raise ValueError(f"{name}: expected on weight's device {weight.device}, got {columns.device}")
    if torch.is_grad_enabled() and (weight.requires_grad or columns.requires_grad):
        raise RuntimeError(f"weight, {name}: expected none that requires a gradient, or torch.no_grad()")
    return index


@torch.library.register_fake("dropbp_kernels::column_update_")
def _(weight: Tensor, delta: Tensor, index: Tensor, scale: float) -> Tensor:
    return weight.new_empty((weight.shape[0], index.shape[0]))
