"""Triton kernels of gated_residual_add: a sum and a scaled copy, both over whole tensors or over rows of dim 0.

A tensor (R, ..., D) is seen as R rows of row_size elements; without rows, as one row of all elements. The grid is
one-dimensional, since the other grid axes end at 65535 programs: program -> (row, block of BLOCK columns).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tuning import WIDEST, Config, LaunchTable, Row
from .rows import device_guard, jit_kernel, split_float, wide_of

# 8 elements a thread: one 16-byte access of bfloat16, two of float32.
_ROWS = [Row(WIDEST, Config(block=1024, num_warps=4))]
_ADD = LaunchTable("gated_residual_add", _ROWS, lambda to: launch_gated_residual_add(to.x, to.y, to.permutation))
_ADD_BACKWARD = LaunchTable(
    "gated_residual_add_backward",
    _ROWS,
    lambda to: launch_gated_residual_add_backward(to.x, to.permutation, to.per_row, 1.0, to.x.dtype),
)


@jit_kernel
def _gated_residual_add_kernel(
    residual_ptr,  # (num_rows, row_size)
    branch_ptr,  # (K, row_size)
    output_ptr,  # (num_rows, row_size), may be residual
    rows_ptr,  # (K,) int64, or unused
    num_rows,
    row_size,
    blocks_per_row,
    HAS_ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # I/O: read residual + read branch + write output, of the K rows.
    program = tl.program_id(0).to(tl.int64)  # offsets pass 2^31 elements
    source = program // blocks_per_row
    columns = (program % blocks_per_row) * BLOCK + tl.arange(0, BLOCK)
    row = source
    end = row_size
    if HAS_ROWS:
        row = tl.load(rows_ptr + source)
        # A wrong index is skipped: it must not write outside.
        end = tl.where((row >= 0) & (row < num_rows), row_size, 0)
    mask = columns < end
    offsets = row * row_size + columns
    residual = tl.load(residual_ptr + offsets, mask=mask).to(WIDE)
    branch = tl.load(branch_ptr + source * row_size + columns, mask=mask).to(WIDE)
    tl.store(output_ptr + offsets, (residual + branch).to(output_ptr.dtype.element_ty), mask=mask)


@jit_kernel
def _gated_residual_add_backward_kernel(
    grad_output_ptr,  # (num_rows, row_size)
    grad_branch_ptr,  # (K, row_size)
    rows_ptr,  # (K,) int64, or unused
    row_scale_ptr,  # (K,) float, or unused
    grad_scale,
    grad_scale_rest,
    num_rows,
    row_size,
    blocks_per_row,
    HAS_ROWS: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # I/O: read the K rows of grad_output (but those of scale zero) + write grad_branch.
    program = tl.program_id(0).to(tl.int64)
    target = program // blocks_per_row
    columns = (program % blocks_per_row) * BLOCK + tl.arange(0, BLOCK)
    row = target
    end = row_size
    if HAS_ROWS:
        row = tl.load(rows_ptr + target)
        end = tl.where((row >= 0) & (row < num_rows), row_size, 0)
    scale = tl.zeros((BLOCK,), dtype=WIDE) + grad_scale + grad_scale_rest
    if HAS_ROW_SCALE:
        row_scale = tl.load(row_scale_ptr + target).to(WIDE)
        end = tl.where(row_scale != 0, end, 0)
        scale = scale * row_scale
    is_read = columns < end
    grad = tl.load(grad_output_ptr + row * row_size + columns, mask=is_read, other=0.0).to(WIDE)
    # A row that is not read is zero whatever the scale: zero times an infinite scale would be NaN.
    grad = tl.where(is_read, grad * scale, 0.0)
    tl.store(
        grad_branch_ptr + target * row_size + columns,
        grad.to(grad_branch_ptr.dtype.element_ty),
        mask=columns < row_size,
    )


def _geometry(branch: Tensor, is_by_rows: bool, table: LaunchTable) -> tuple[int, int, int, Config]:
    """(rows to visit, row_size, blocks_per_row, launch parameters)."""
    num_visits = branch.shape[0] if is_by_rows else 1
    row_size = branch.numel() // num_visits
    config = table.at(row_size, branch.device)
    return num_visits, row_size, triton.cdiv(row_size, config.block), config


def _add(residual: Tensor, branch: Tensor, output: Tensor, rows: Tensor | None) -> None:
    if branch.numel() == 0:
        return
    branch = branch.contiguous()
    num_visits, row_size, blocks_per_row, config = _geometry(branch, rows is not None, _ADD)
    with device_guard(residual):
        _gated_residual_add_kernel[(num_visits * blocks_per_row,)](
            residual,
            branch,
            output,
            residual if rows is None else rows.contiguous(),
            residual.shape[0] if residual.dim() else 1,
            row_size,
            blocks_per_row,
            HAS_ROWS=rows is not None,
            WIDE=wide_of(residual.dtype)[1],
            BLOCK=config.block,
            **config.options,
        )


def launch_gated_residual_add(residual: Tensor, branch: Tensor, rows: Tensor | None) -> Tensor:
    if rows is None:
        residual = residual.contiguous()
        output = torch.empty_like(residual)
        _add(residual, branch, output, None)
    else:
        # I/O: the copy reads and writes N, the kernel reads 2K and writes K. One pass would save 2K, at the price of
        # a map from every row to its place in the branch, built by more launches.
        output = residual.clone(memory_format=torch.contiguous_format)
        _add(output, branch, output, rows)
    return output


def launch_gated_residual_add_(residual: Tensor, branch: Tensor, rows: Tensor | None) -> None:
    if residual.is_contiguous():
        _add(residual, branch, residual, rows)
    else:
        residual.copy_(launch_gated_residual_add(residual, branch, rows))


def launch_gated_residual_add_backward(
    grad_output: Tensor, rows: Tensor | None, row_scale: Tensor | None, grad_scale: float, dtype: torch.dtype
) -> Tensor:
    shape = grad_output.shape if rows is None else (rows.shape[0], *grad_output.shape[1:])
    grad_branch = torch.empty(shape, dtype=dtype, device=grad_output.device)
    if grad_branch.numel() == 0:
        return grad_branch
    grad_output = grad_output.contiguous()
    is_by_rows = rows is not None or row_scale is not None
    num_visits, row_size, blocks_per_row, config = _geometry(grad_branch, is_by_rows, _ADD_BACKWARD)
    with device_guard(grad_output):
        _gated_residual_add_backward_kernel[(num_visits * blocks_per_row,)](
            grad_output,
            grad_branch,
            grad_output if rows is None else rows.contiguous(),
            grad_output if row_scale is None else row_scale.contiguous(),
            *split_float(grad_scale),
            grad_output.shape[0] if grad_output.dim() else 1,
            row_size,
            blocks_per_row,
            HAS_ROWS=rows is not None,
            HAS_ROW_SCALE=row_scale is not None,
            WIDE=wide_of(torch.promote_types(grad_output.dtype, dtype))[1],
            BLOCK=config.block,
            **config.options,
        )
    return grad_branch
