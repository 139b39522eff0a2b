"""Triton kernels of permuted_norm: one row of D per step, read or written through the permutation.

A row of the permutation is `rows_per_index` consecutive rows of D (one for tokens, the sequence for samples).
Forward: a program a row. Backward: a few programs per multiprocessor that stride over the kept rows, each with
parameter gradients of its own in registers; the partial sums are then added in a fixed order, so results repeat bit for
bit. Rows too wide for registers are read again for each step of the computation, in chunks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tuning import LaunchTable, row_table
from .rows import WARPS_OF_A_BACKWARD, device_guard, jit_kernel, load_factor, max_programs, split_float, wide_of

_FORWARD = LaunchTable(
    "permuted_norm",
    row_table(32768, 4096),
    lambda to: launch_permuted_norm(
        to.x, to.weight, None, to.permutation, to.x.shape[0] // 4, 1e-6, False, False, to.x.dtype
    ),
)
_BACKWARD = LaunchTable(
    "permuted_norm_backward",
    row_table(16384, 4096, WARPS_OF_A_BACKWARD),
    lambda to: _tuned_backward(to),
)


@jit_kernel
def _permuted_norm_kernel(
    residual_ptr,  # (num_rows * rows_per_index, D)
    weight_ptr,  # (D,)
    bias_ptr,  # (D,), or unused
    permutation_ptr,  # (num_rows,) int64
    kept_ptr,  # (num_kept * rows_per_index, D)
    dropped_ptr,  # (the others, D)
    kept_rows_ptr,  # (num_kept * rows_per_index, D)
    mean_ptr,  # (num_kept * rows_per_index,), or unused
    rstd_ptr,  # (num_kept * rows_per_index,)
    num_rows,
    end_of_kept,  # num_kept * rows_per_index
    rows_per_index,
    eps,
    eps_rest,
    D: tl.constexpr,
    CENTERED: tl.constexpr,
    GEMMA: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_ONE_BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # I/O: read residual (+ weight, bias, permutation), write kept + dropped, and of kept rows their copy, rstd, mean.
    to = tl.program_id(0).to(tl.int64)  # offsets pass 2^31 elements
    index = tl.load(permutation_ptr + to // rows_per_index)
    is_wrong = (index < 0) | (index >= num_rows)
    start = tl.where(is_wrong, 0, index * rows_per_index + to % rows_per_index) * D
    end = tl.where(is_wrong, 0, D)  # of a wrong index nothing is read
    kept_end = tl.where(to < end_of_kept, D, 0)
    columns = tl.arange(0, BLOCK)
    mean = 0.0
    if IS_ONE_BLOCK:
        loaded = tl.load(residual_ptr + start + columns, mask=columns < end, other=0.0)
        tl.store(kept_rows_ptr + to * D + columns, loaded, mask=columns < kept_end)
        x = loaded.to(WIDE)
        if CENTERED:
            mean = tl.sum(x, axis=0) / D
            x = tl.where(columns < D, x - mean, 0.0)
        squares = x * x
    else:
        sums = tl.zeros((BLOCK,), dtype=WIDE)
        squares = tl.zeros((BLOCK,), dtype=WIDE)
        for chunk in range(0, D, BLOCK):
            at = chunk + columns
            loaded = tl.load(residual_ptr + start + at, mask=at < end, other=0.0)
            tl.store(kept_rows_ptr + to * D + at, loaded, mask=at < kept_end)
            sums += loaded.to(WIDE)
            squares += loaded.to(WIDE) * loaded.to(WIDE)
        if CENTERED:
            mean = tl.sum(sums, axis=0) / D
            squares = tl.zeros((BLOCK,), dtype=WIDE)
            for chunk in range(0, D, BLOCK):
                at = chunk + columns
                x = tl.load(residual_ptr + start + at, mask=at < end, other=0.0).to(WIDE)
                x = tl.where(at < D, x - mean, 0.0)
                squares += x * x
    rstd = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / D + eps + eps_rest)
    tl.store(rstd_ptr + to, rstd, mask=to < end_of_kept)
    if CENTERED:
        tl.store(mean_ptr + to, mean, mask=to < end_of_kept)
    for chunk in range(0, D, BLOCK):
        at = chunk + columns
        if not IS_ONE_BLOCK:
            x = tl.load(residual_ptr + start + at, mask=at < end, other=0.0).to(WIDE) - mean
        normed = x * rstd
        if not (CENTERED or GEMMA):
            normed = normed.to(kept_ptr.dtype.element_ty).to(WIDE)
        normed *= load_factor(weight_ptr, at, D, GEMMA, WIDE)
        if HAS_BIAS:
            normed += tl.load(bias_ptr + at, mask=at < D, other=0.0).to(WIDE)
        normed = normed.to(kept_ptr.dtype.element_ty)
        tl.store(kept_ptr + to * D + at, normed, mask=at < kept_end)
        tl.store(dropped_ptr + (to - end_of_kept) * D + at, normed, mask=at < D - kept_end)


@jit_kernel
def _permuted_norm_backward_kernel(
    grad_residual_ptr,  # (num_rows * rows_per_index, D), read and written at the kept rows
    grad_kept_ptr,  # (end_of_kept, D)
    kept_rows_ptr,  # (end_of_kept, D)
    weight_ptr,  # (D,)
    mean_ptr,  # (end_of_kept,), or unused
    rstd_ptr,  # (end_of_kept,)
    permutation_ptr,  # (num_rows,) int64
    partial_ptr,  # (2, num_programs, D) of WIDE: gradients of weight and bias of each program's rows, or unused
    num_rows,
    end_of_kept,
    rows_per_index,
    num_programs,
    D: tl.constexpr,
    CENTERED: tl.constexpr,
    GEMMA: tl.constexpr,
    HAS_PARTIAL: tl.constexpr,
    IS_ONE_BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # With n = (x - mean) * rstd, g = grad_kept * weight: grad += rstd * (g - n * mean(g * n) - mean(g)), the last term
    # if CENTERED. I/O, of kept rows: read grad_kept + rows + grad_residual, write grad_residual.
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    weight_sum = tl.zeros((BLOCK,), dtype=WIDE)
    bias_sum = tl.zeros((BLOCK,), dtype=WIDE)
    if IS_ONE_BLOCK:
        factor = load_factor(weight_ptr, columns, D, GEMMA, WIDE)  # read once for all rows
    row = program
    while row < end_of_kept:
        start = row * D
        rstd = tl.load(rstd_ptr + row)
        mean = tl.zeros((), dtype=WIDE)
        if CENTERED:
            mean = tl.load(mean_ptr + row)
        index = tl.load(permutation_ptr + row // rows_per_index)
        is_wrong = (index < 0) | (index >= num_rows)
        target = grad_residual_ptr + tl.where(is_wrong, 0, index * rows_per_index + row % rows_per_index) * D
        end = tl.where(is_wrong, 0, D)  # of a wrong index nothing is written
        if IS_ONE_BLOCK:
            mask = columns < D
            grad = tl.load(grad_kept_ptr + start + columns, mask=mask, other=0.0).to(WIDE)
            x = tl.load(kept_rows_ptr + start + columns, mask=mask, other=0.0).to(WIDE)
            normalized = tl.where(mask, (x - mean) * rstd, 0.0)
            weight_sum += grad * normalized
            bias_sum += grad
            grad *= factor
            inner = grad - normalized * (tl.sum(grad * normalized, axis=0) / D)
            if CENTERED:
                inner -= tl.sum(grad, axis=0) / D
            total = tl.load(target + columns, mask=columns < end, other=0.0).to(WIDE) + rstd * inner
            tl.store(target + columns, total.to(grad_residual_ptr.dtype.element_ty), mask=columns < end)
        else:
            products = tl.zeros((BLOCK,), dtype=WIDE)
            grads = tl.zeros((BLOCK,), dtype=WIDE)
            for chunk in range(0, D, BLOCK):
                at = chunk + columns
                grad = tl.load(grad_kept_ptr + start + at, mask=at < D, other=0.0).to(WIDE)
                grad *= load_factor(weight_ptr, at, D, GEMMA, WIDE)
                x = tl.load(kept_rows_ptr + start + at, mask=at < D, other=0.0).to(WIDE)
                products += grad * (x - mean) * rstd
                grads += grad
            product = tl.sum(products, axis=0) / D
            shift = tl.sum(grads, axis=0) / D
            for chunk in range(0, D, BLOCK):
                at = chunk + columns
                grad = tl.load(grad_kept_ptr + start + at, mask=at < D, other=0.0).to(WIDE)
                grad *= load_factor(weight_ptr, at, D, GEMMA, WIDE)
                x = tl.load(kept_rows_ptr + start + at, mask=at < D, other=0.0).to(WIDE)
                inner = grad - (x - mean) * rstd * product
                if CENTERED:
                    inner -= shift
                total = tl.load(target + at, mask=at < end, other=0.0).to(WIDE) + rstd * inner
                tl.store(target + at, total.to(grad_residual_ptr.dtype.element_ty), mask=at < end)
        row += num_programs
    if IS_ONE_BLOCK and HAS_PARTIAL:
        tl.store(partial_ptr + program * D + columns, weight_sum, mask=columns < D)
        tl.store(partial_ptr + (num_programs + program) * D + columns, bias_sum, mask=columns < D)


@jit_kernel
def _permuted_norm_parameter_grad_kernel(
    grad_kept_ptr,  # (end_of_kept, D)
    kept_rows_ptr,  # (end_of_kept, D)
    mean_ptr,  # (end_of_kept,), or unused
    rstd_ptr,  # (end_of_kept,)
    partial_ptr,  # (2, num_programs, D) of WIDE
    end_of_kept,
    num_programs,
    blocks_per_row,
    D: tl.constexpr,
    CENTERED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # For rows of several chunks: one program per (stride of rows, block of columns). I/O: read grad_kept + rows.
    program = tl.program_id(0).to(tl.int64) // blocks_per_row
    columns = (tl.program_id(0).to(tl.int64) % blocks_per_row) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < D
    weight_sum = tl.zeros((BLOCK,), dtype=WIDE)
    bias_sum = tl.zeros((BLOCK,), dtype=WIDE)
    row = program
    while row < end_of_kept:
        x = tl.load(kept_rows_ptr + row * D + columns, mask=mask, other=0.0).to(WIDE)
        if CENTERED:
            x -= tl.load(mean_ptr + row)
        grad = tl.load(grad_kept_ptr + row * D + columns, mask=mask, other=0.0).to(WIDE)
        weight_sum += grad * (x * tl.load(rstd_ptr + row))
        bias_sum += grad
        row += num_programs
    tl.store(partial_ptr + program * D + columns, weight_sum, mask=mask)
    tl.store(partial_ptr + (num_programs + program) * D + columns, bias_sum, mask=mask)


def _row_shape(residual: Tensor, num_rows: int) -> tuple[int, ...]:
    """residual (..., D) as (num_rows, ..., D): the fewest leading dimensions that have num_rows elements are one."""
    shape = residual.shape
    place = next(place for place in range(1, len(shape)) if shape[:place].numel() == num_rows)
    return num_rows, *shape[place:]


def launch_permuted_norm(
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    permutation: Tensor,
    num_kept: int,
    eps: float,
    centered: bool,
    gemma: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_rows, *of_row = _row_shape(residual, permutation.shape[0])
    torch_wide, wide = wide_of(residual.dtype)
    width = weight.shape[0]

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=residual.device)

    kept, dropped = empty(num_kept, *of_row, dtype=dtype), empty(num_rows - num_kept, *of_row, dtype=dtype)
    rows = empty(num_kept, *of_row, dtype=residual.dtype)
    mean = empty(num_kept, *of_row[:-1], dtype=torch_wide) if centered else empty(0, dtype=torch_wide)
    rstd = empty(num_kept, *of_row[:-1], dtype=torch_wide)
    if residual.numel() == 0:
        return kept, dropped, rows, mean.zero_(), rstd.fill_(eps**-0.5 if eps > 0 else float("inf"))
    num_all = residual.numel() // width
    rows_per_index = num_all // num_rows
    config = _FORWARD.at(width, residual.device)
    block = min(config.block, triton.next_power_of_2(width))
    with device_guard(residual):
        _permuted_norm_kernel[(num_all,)](
            residual.contiguous(),
            weight.contiguous(),
            weight if bias is None else bias.contiguous(),
            permutation.contiguous(),
            kept,
            dropped,
            rows,
            mean,
            rstd,
            num_rows,
            num_kept * rows_per_index,
            rows_per_index,
            *split_float(eps),
            D=width,
            CENTERED=centered,
            GEMMA=gemma,
            HAS_BIAS=bias is not None,
            IS_ONE_BLOCK=block >= width,
            WIDE=wide,
            BLOCK=block,
            **config.options,
        )
    return kept, dropped, rows, mean, rstd


def launch_permuted_norm_backward_(
    grad_residual: Tensor,
    grad_kept: Tensor,
    rows: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    permutation: Tensor,
    centered: bool,
    gemma: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor]:
    width = weight.shape[0]
    torch_wide, wide = wide_of(rows.dtype)
    sizes = width if weight_grad else 0, width if bias_grad else 0
    if rows.numel() == 0:
        grad_weight, grad_bias = (torch.zeros(size, dtype=weight.dtype, device=weight.device) for size in sizes)
        return grad_weight, grad_bias
    target = grad_residual.contiguous()
    grad_kept, rows, weight = grad_kept.contiguous(), rows.contiguous(), weight.contiguous()
    mean, rstd = mean.contiguous(), rstd.contiguous()
    num_rows, end_of_kept = permutation.shape[0], rows.numel() // width
    config = _BACKWARD.at(width, rows.device)
    num_programs = min(end_of_kept, max_programs(rows.device, config.programs_per_multiprocessor))
    block = min(config.block, triton.next_power_of_2(width))
    is_one_block = block >= width
    grid = num_programs if is_one_block else end_of_kept
    has_partial = weight_grad or bias_grad
    partial = torch.empty((2, num_programs if has_partial else 0, width), dtype=torch_wide, device=weight.device)
    with device_guard(rows):
        _permuted_norm_backward_kernel[(grid,)](
            target,
            grad_kept,
            rows,
            weight,
            mean,
            rstd,
            permutation.contiguous(),
            partial if has_partial else rstd,
            num_rows,
            end_of_kept,
            end_of_kept // rows.shape[0],
            grid,
            D=width,
            CENTERED=centered,
            GEMMA=gemma,
            HAS_PARTIAL=has_partial,
            IS_ONE_BLOCK=is_one_block,
            WIDE=wide,
            BLOCK=block,
            **config.options,
        )
        if has_partial and not is_one_block:
            blocks_per_row = triton.cdiv(width, block)
            _permuted_norm_parameter_grad_kernel[(num_programs * blocks_per_row,)](
                grad_kept,
                rows,
                mean,
                rstd,
                partial,
                end_of_kept,
                num_programs,
                blocks_per_row,
                D=width,
                CENTERED=centered,
                WIDE=wide,
                BLOCK=block,
                **config.options,
            )
    if not grad_residual.is_contiguous():
        grad_residual.copy_(target)
    grad_weight, grad_bias = (
        partial[place].sum(0).to(weight.dtype) if size else weight.new_empty(0) for place, size in enumerate(sizes)
    )
    return grad_weight, grad_bias


def _tuned_backward(to) -> tuple[Tensor, Tensor, Tensor]:
    grad = to.z.clone()
    kept = slice(0, to.x.shape[0] // 4)
    per_row = to.per_row[kept]
    grads = launch_permuted_norm_backward_(
        grad, to.y[kept], to.x[kept], to.weight, per_row, per_row, to.permutation, False, False, True, False
    )
    return grad, *grads
