"""Triton kernel of permuted_residual_add: row k of the branch is added to row permutation[k] of the residual.

The grid is one-dimensional, since the other grid axes end at 65535 programs: program -> (k, block of BLOCK columns).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tuning import WIDEST, Config, LaunchTable, Row
from .rows import device_guard, jit_kernel, wide_of

# 8 elements a thread: one 16-byte access of bfloat16, two of float32.
_ADD = LaunchTable(
    "permuted_residual_add",
    [Row(WIDEST, Config(block=1024, num_warps=4))],
    lambda to: launch_permuted_residual_add(to.x, to.y[:1], to.y[1:], to.permutation),
)


@jit_kernel
def _permuted_residual_add_kernel(
    residual_ptr,  # (num_rows, row_size)
    kept_ptr,  # (num_kept, row_size)
    dropped_ptr,  # (num_rows - num_kept, row_size)
    permutation_ptr,  # (num_rows,) int64
    output_ptr,  # (num_rows, row_size)
    num_rows,
    num_kept,
    row_size,
    blocks_per_row,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # I/O: read residual + read kept + read dropped + write output (+ read permutation).
    program = tl.program_id(0).to(tl.int64)  # offsets pass 2^31 elements
    k = program // blocks_per_row
    columns = (program % blocks_per_row) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(permutation_ptr + k)
    # A wrong index is skipped: it must not write outside.
    end = tl.where((row >= 0) & (row < num_rows), row_size, 0)
    kept_end = tl.where(k < num_kept, end, 0)
    kept = tl.load(kept_ptr + k * row_size + columns, mask=columns < kept_end, other=0.0)
    dropped = tl.load(
        dropped_ptr + (k - num_kept) * row_size + columns, mask=columns < end - kept_end, other=0.0
    )  # one of the two loads reads nothing
    branch = tl.where(k < num_kept, kept, dropped).to(WIDE)
    offsets = row * row_size + columns
    mask = columns < end
    total = tl.load(residual_ptr + offsets, mask=mask).to(WIDE) + branch
    tl.store(output_ptr + offsets, total.to(output_ptr.dtype.element_ty), mask=mask)


def launch_permuted_residual_add(residual: Tensor, kept: Tensor, dropped: Tensor, permutation: Tensor) -> Tensor:
    residual, kept, dropped = residual.contiguous(), kept.contiguous(), dropped.contiguous()
    output = torch.empty_like(residual)
    if residual.numel() == 0:
        return output
    num_rows = permutation.shape[0]
    row_size = residual.numel() // num_rows
    config = _ADD.at(row_size, residual.device)
    blocks_per_row = triton.cdiv(row_size, config.block)
    with device_guard(residual):
        _permuted_residual_add_kernel[(num_rows * blocks_per_row,)](
            residual,
            kept,
            dropped,
            permutation.contiguous(),
            output,
            num_rows,
            kept.shape[0],
            row_size,
            blocks_per_row,
            WIDE=wide_of(residual.dtype)[1],
            BLOCK=config.block,
            **config.options,
        )
    return output
