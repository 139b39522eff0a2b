"""Triton kernels of column_update_ and column_restore_: element i of the columns (num_rows, num_columns), BLOCK of them
a program. Neighbours of i are neighbours in the weight where it has any: in one column, if columns are contiguous.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tuning import WIDEST, Config, LaunchTable, Row
from .rows import device_guard, jit_kernel, split_float, wide_of


def _tuned(update_only: bool, weight: Tensor, delta: Tensor) -> Tensor:
    weight = weight.clone()  # a run changes none of its inputs
    columns = torch.arange(min(64, weight.shape[1]), device=weight.device)
    delta = delta[:, : len(columns)]
    if update_only:
        launch_column_update_(weight, delta, columns, 0.5)
    else:
        launch_column_restore_(weight, delta, columns)
    return weight


# 4 elements a thread: each of them is a sector of 32 bytes in flight.
_ROWS = [Row(WIDEST, Config(block=512, num_warps=4))]
_UPDATE = LaunchTable("column_update", _ROWS, lambda to: _tuned(True, to.x, to.y))
_RESTORE = LaunchTable("column_restore", _ROWS, lambda to: _tuned(False, to.x, to.y))


@triton.jit
def _places(
    index_ptr, num_rows, num_columns, width, row_stride, column_stride, BY_COLUMN: tl.constexpr, BLOCK: tl.constexpr
):
    """Offsets in the weight and in the compact columns of a program's elements, and which of them there are."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # offsets pass 2^31 elements
    if BY_COLUMN:
        row, k = i % num_rows, i // num_rows
    else:
        row, k = i // num_columns, i % num_columns
    mask = (row < num_rows) & (k < num_columns)
    column = tl.load(index_ptr + k, mask=mask, other=0)
    # A wrong index is skipped: it must not write outside.
    mask = mask & (column >= 0) & (column < width)
    return row * row_stride + column * column_stride, row * num_columns + k, mask


@jit_kernel
def _column_update_kernel(
    weight_ptr,  # (num_rows, width), of these strides
    delta_ptr,  # (num_rows, num_columns)
    index_ptr,  # (num_columns,) int64
    original_ptr,  # (num_rows, num_columns)
    scale,
    scale_rest,
    num_rows,
    num_columns,
    width,
    row_stride,
    column_stride,
    WIDE: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # I/O: read + write a sector of weight for each element + read delta + write original
    place, compact, mask = _places(index_ptr, num_rows, num_columns, width, row_stride, column_stride, BY_COLUMN, BLOCK)
    old = tl.load(weight_ptr + place, mask=mask, other=0.0)
    tl.store(original_ptr + compact, old, mask=mask)
    factor = tl.zeros((BLOCK,), dtype=WIDE) + scale + scale_rest
    total = old.to(WIDE) + factor * tl.load(delta_ptr + compact, mask=mask, other=0.0).to(WIDE)
    if weight_ptr.dtype.element_ty != tl.float64:
        total = total.to(tl.float32)  # from double to 16 bits by way of float, as PyTorch does
    tl.store(weight_ptr + place, total.to(weight_ptr.dtype.element_ty), mask=mask)


@jit_kernel
def _column_restore_kernel(
    weight_ptr,  # (num_rows, width), of these strides
    original_ptr,  # (num_rows, num_columns)
    index_ptr,  # (num_columns,) int64
    num_rows,
    num_columns,
    width,
    row_stride,
    column_stride,
    BY_COLUMN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # I/O: read original + write a sector of weight for each element
    place, compact, mask = _places(index_ptr, num_rows, num_columns, width, row_stride, column_stride, BY_COLUMN, BLOCK)
    tl.store(weight_ptr + place, tl.load(original_ptr + compact, mask=mask), mask=mask)


def launch_column_update_(weight: Tensor, delta: Tensor, index: Tensor, scale: float) -> Tensor:
    original = torch.empty(weight.shape[0], index.shape[0], dtype=weight.dtype, device=weight.device)
    if original.numel() == 0:
        return original
    config = _UPDATE.at(index.shape[0], weight.device)
    wide = torch.promote_types(wide_of(weight.dtype)[0], wide_of(delta.dtype)[0])
    with device_guard(weight):
        _column_update_kernel[(triton.cdiv(original.numel(), config.block),)](
            weight,
            delta.contiguous(),
            index.contiguous(),
            original,
            *split_float(scale),
            *original.shape,
            weight.shape[1],
            *weight.stride(),
            WIDE=wide_of(wide)[1],
            BY_COLUMN=weight.stride(0) == 1,
            BLOCK=config.block,
            **config.options,
        )
    return original


def launch_column_restore_(weight: Tensor, original: Tensor, index: Tensor) -> None:
    if original.numel() == 0:
        return
    config = _RESTORE.at(index.shape[0], weight.device)
    with device_guard(weight):
        _column_restore_kernel[(triton.cdiv(original.numel(), config.block),)](
            weight,
            original.contiguous(),
            index.contiguous(),
            *original.shape,
            weight.shape[1],
            *weight.stride(),
            BY_COLUMN=weight.stride(0) == 1,
            BLOCK=config.block,
            **config.options,
        )
