"""Triton kernels of gated_residual_rms_norm: one row per step, statistics in float32 (float64).

Forward: a program a row. Backward: a few programs per multiprocessor that stride over the rows, each with a weight
gradient of its own in registers; the partial sums are then added in a fixed order, so results repeat bit for bit. Rows
too wide for registers are read twice, in chunks, and their weight gradient is a kernel of its own.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tuning import LaunchTable, row_table
from . import rows
from .rows import add_chunk, load_factor

# A program holds a row in registers up to the first width, and takes a wider one in chunks; the backward holds about
# twice as many values per column.
_FORWARD = LaunchTable(
    "gated_residual_rms_norm",
    row_table(32768, 4096),
    lambda to: launch_gated_residual_rms_norm(to.x, to.y, to.weight, 1e-6, False),
)
_BACKWARD = LaunchTable(
    "gated_residual_rms_norm_backward",
    row_table(16384, 4096, rows.WARPS_OF_A_BACKWARD),
    lambda to: launch_gated_residual_rms_norm_backward(to.x, to.y, to.z, to.weight, to.per_row, False, True),
)


@rows.jit_kernel
def _gated_residual_rms_norm_kernel(
    residual_ptr,  # (num_rows, D)
    branch_ptr,  # (num_rows, D)
    weight_ptr,  # (D,)
    normed_ptr,  # (num_rows, D)
    new_residual_ptr,  # (num_rows, D)
    rstd_ptr,  # (num_rows,)
    eps,
    eps_rest,
    D: tl.constexpr,
    GEMMA: tl.constexpr,
    IS_ONE_BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # I/O: read residual + branch + weight, write normed + new_residual (+ rstd); rows of several chunks read twice.
    row = tl.program_id(0).to(tl.int64)  # offsets pass 2^31 elements
    start = row * D
    columns = tl.arange(0, BLOCK)
    if IS_ONE_BLOCK:
        x = add_chunk(residual_ptr, branch_ptr, new_residual_ptr, start, columns, D, WIDE, True)
        squares = x * x
    else:
        squares = tl.zeros((BLOCK,), dtype=WIDE)
        for chunk in range(0, D, BLOCK):
            x = add_chunk(residual_ptr, branch_ptr, new_residual_ptr, start, chunk + columns, D, WIDE, True)
            squares += x * x
    rstd = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / D + eps + eps_rest)
    tl.store(rstd_ptr + row, rstd)
    if IS_ONE_BLOCK:
        _scale_chunk(x, rstd, weight_ptr, normed_ptr, start, columns, D, GEMMA, WIDE)
    else:
        for chunk in range(0, D, BLOCK):
            # Added anew instead of read back: what other threads of the program stored need not be visible yet.
            x = add_chunk(residual_ptr, branch_ptr, new_residual_ptr, start, chunk + columns, D, WIDE, False)
            _scale_chunk(x, rstd, weight_ptr, normed_ptr, start, chunk + columns, D, GEMMA, WIDE)


@triton.jit
def _scale_chunk(
    x, rstd, weight_ptr, normed_ptr, start, columns, D: tl.constexpr, GEMMA: tl.constexpr, WIDE: tl.constexpr
):
    normalized = x * rstd
    if not GEMMA:
        normalized = normalized.to(normed_ptr.dtype.element_ty).to(WIDE)
    normed = normalized * load_factor(weight_ptr, columns, D, GEMMA, WIDE)
    tl.store(normed_ptr + start + columns, normed.to(normed_ptr.dtype.element_ty), mask=columns < D)


@rows.jit_kernel
def _gated_residual_rms_norm_backward_kernel(
    grad_normed_ptr,  # (num_rows, D)
    grad_new_residual_ptr,  # (num_rows, D), or unused
    new_residual_ptr,  # (num_rows, D)
    weight_ptr,  # (D,)
    rstd_ptr,  # (num_rows,)
    grad_residual_ptr,  # (num_rows, D)
    partial_ptr,  # (num_programs, D) of WIDE: the weight gradient of each program's rows, or unused
    num_rows,
    num_programs,
    D: tl.constexpr,
    GEMMA: tl.constexpr,
    HAS_GRAD_NEW_RESIDUAL: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr,
    IS_ONE_BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # With n = x * rstd, g = grad_normed * weight: grad_x = rstd * (g - n * mean(g * n)) + grad_new_residual.
    # I/O: read grad_normed + new_residual (+ grad_new_residual), write grad_residual; several chunks read the first two
    # twice.
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    if IS_ONE_BLOCK:
        scale = load_factor(weight_ptr, columns, D, GEMMA, WIDE)  # read once for all rows
        mask = columns < D
    weight_sum = tl.zeros((BLOCK,), dtype=WIDE)
    row = program
    while row < num_rows:
        start = row * D
        rstd = tl.load(rstd_ptr + row)
        if IS_ONE_BLOCK:
            normalized = tl.load(new_residual_ptr + start + columns, mask=mask, other=0.0).to(WIDE) * rstd
            grad_normed = tl.load(grad_normed_ptr + start + columns, mask=mask, other=0.0).to(WIDE)
            grad = grad_normed * scale
            mean = tl.sum(grad * normalized, axis=0) / D
            grad_x = rstd * (grad - normalized * mean)
            if HAS_GRAD_NEW_RESIDUAL:
                grad_x += tl.load(grad_new_residual_ptr + start + columns, mask=mask, other=0.0).to(WIDE)
            tl.store(grad_residual_ptr + start + columns, grad_x.to(grad_residual_ptr.dtype.element_ty), mask=mask)
            if WEIGHT_GRAD:
                weight_sum += grad_normed * normalized
        else:
            products = tl.zeros((BLOCK,), dtype=WIDE)
            for chunk in range(0, D, BLOCK):
                at = chunk + columns
                mask = at < D
                normalized = tl.load(new_residual_ptr + start + at, mask=mask, other=0.0).to(WIDE) * rstd
                grad_normed = tl.load(grad_normed_ptr + start + at, mask=mask, other=0.0).to(WIDE)
                products += grad_normed * load_factor(weight_ptr, at, D, GEMMA, WIDE) * normalized
            mean = tl.sum(products, axis=0) / D
            for chunk in range(0, D, BLOCK):
                at = chunk + columns
                mask = at < D
                normalized = tl.load(new_residual_ptr + start + at, mask=mask, other=0.0).to(WIDE) * rstd
                grad_normed = tl.load(grad_normed_ptr + start + at, mask=mask, other=0.0).to(WIDE)
                grad_x = rstd * (grad_normed * load_factor(weight_ptr, at, D, GEMMA, WIDE) - normalized * mean)
                if HAS_GRAD_NEW_RESIDUAL:
                    grad_x += tl.load(grad_new_residual_ptr + start + at, mask=mask, other=0.0).to(WIDE)
                tl.store(grad_residual_ptr + start + at, grad_x.to(grad_residual_ptr.dtype.element_ty), mask=mask)
        row += num_programs
    if IS_ONE_BLOCK and WEIGHT_GRAD:
        tl.store(partial_ptr + program * D + columns, weight_sum, mask=columns < D)


@rows.jit_kernel
def _gated_residual_rms_norm_weight_grad_kernel(
    grad_normed_ptr,  # (num_rows, D)
    new_residual_ptr,  # (num_rows, D)
    rstd_ptr,  # (num_rows,)
    partial_ptr,  # (num_programs, D) of WIDE
    num_rows,
    num_programs,
    blocks_per_row,
    D: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # For rows of several chunks: one program per (stride of rows, block of columns). I/O: read grad_normed + x.
    program = tl.program_id(0).to(tl.int64) // blocks_per_row
    columns = (tl.program_id(0) % blocks_per_row) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < D
    weight_sum = tl.zeros((BLOCK,), dtype=WIDE)
    row = program
    while row < num_rows:
        rstd = tl.load(rstd_ptr + row)
        normalized = tl.load(new_residual_ptr + row * D + columns, mask=mask, other=0.0).to(WIDE) * rstd
        weight_sum += tl.load(grad_normed_ptr + row * D + columns, mask=mask, other=0.0).to(WIDE) * normalized
        row += num_programs
    tl.store(partial_ptr + program * D + columns, weight_sum, mask=mask)


def launch_gated_residual_rms_norm(
    residual: Tensor, branch: Tensor, weight: Tensor, eps: float, gemma: bool
) -> tuple[Tensor, Tensor, Tensor]:
    residual, branch, weight = residual.contiguous(), branch.contiguous(), weight.contiguous()
    width = weight.shape[0]
    torch_wide, wide = rows.wide_of(residual.dtype)
    normed = torch.empty_like(branch)
    new_residual = torch.empty_like(residual)
    rstd = torch.empty(residual.shape[:-1], dtype=torch_wide, device=residual.device)
    if residual.numel() == 0:
        return normed, new_residual, rstd.fill_(eps**-0.5 if eps > 0 else float("inf"))
    config = _FORWARD.at(width, residual.device)
    block = min(config.block, triton.next_power_of_2(width))
    with rows.device_guard(residual):
        _gated_residual_rms_norm_kernel[(residual.numel() // width,)](
            residual,
            branch,
            weight,
            normed,
            new_residual,
            rstd,
            *rows.split_float(eps),
            D=width,
            GEMMA=gemma,
            IS_ONE_BLOCK=block >= width,
            WIDE=wide,
            BLOCK=block,
            **config.options,
        )
    return normed, new_residual, rstd


def launch_gated_residual_rms_norm_backward(
    grad_normed: Tensor,
    grad_new_residual: Tensor | None,
    new_residual: Tensor,
    weight: Tensor,
    rstd: Tensor,
    gemma: bool,
    weight_grad: bool,
) -> tuple[Tensor, Tensor]:
    grad_normed, new_residual, weight = grad_normed.contiguous(), new_residual.contiguous(), weight.contiguous()
    rstd = rstd.contiguous()
    width = weight.shape[0]
    torch_wide, wide = rows.wide_of(new_residual.dtype)
    grad_residual = torch.empty_like(new_residual)
    if grad_residual.numel() == 0:
        return grad_residual, torch.zeros(width if weight_grad else 0, dtype=weight.dtype, device=weight.device)
    num_rows = new_residual.numel() // width
    config = _BACKWARD.at(width, new_residual.device)
    num_programs = min(num_rows, rows.max_programs(new_residual.device, config.programs_per_multiprocessor))
    block = min(config.block, triton.next_power_of_2(width))
    is_one_block = block >= width
    grid = num_programs if is_one_block else num_rows
    partial = torch.empty((num_programs if weight_grad else 0, width), dtype=torch_wide, device=weight.device)
    with rows.device_guard(new_residual):
        _gated_residual_rms_norm_backward_kernel[(grid,)](
            grad_normed,
            grad_normed if grad_new_residual is None else grad_new_residual.contiguous(),
            new_residual,
            weight,
            rstd,
            grad_residual,
            partial if weight_grad else grad_residual,
            num_rows,
            grid,
            D=width,
            GEMMA=gemma,
            HAS_GRAD_NEW_RESIDUAL=grad_new_residual is not None,
            WEIGHT_GRAD=weight_grad,
            IS_ONE_BLOCK=is_one_block,
            WIDE=wide,
            BLOCK=block,
            **config.options,
        )
        if weight_grad and not is_one_block:
            blocks_per_row = triton.cdiv(width, block)
            _gated_residual_rms_norm_weight_grad_kernel[(num_programs * blocks_per_row,)](
                grad_normed,
                new_residual,
                rstd,
                partial,
                num_rows,
                num_programs,
                blocks_per_row,
                D=width,
                WIDE=wide,
                BLOCK=block,
                **config.options,
            )
    if not weight_grad:
        return grad_residual, torch.empty(0, dtype=weight.dtype, device=weight.device)
    return grad_residual, partial.sum(0).to(weight.dtype)
