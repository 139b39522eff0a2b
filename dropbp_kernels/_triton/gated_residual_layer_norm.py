"""Triton kernels of gated_residual_layer_norm: one row per step, statistics in float32 (float64).

Forward: a program a row. Backward: a few programs per multiprocessor that stride over the rows, each with gradients of
weight and bias of its own in registers; the partial sums are then added in a fixed order, so results repeat bit for
bit. Rows too wide for registers are read twice, in chunks, and their weight and bias gradients are a kernel of its own.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tuning import LaunchTable, row_table
from . import rows
from .rows import add_chunk

# A program holds a row in registers up to the first width, and takes a wider one in chunks; the backward holds about
# three times as many values per column.
_FORWARD = LaunchTable(
    "gated_residual_layer_norm",
    row_table(32768, 4096),
    lambda to: launch_gated_residual_layer_norm(to.x, to.y, to.weight, to.weight, 1e-5),
)
_BACKWARD = LaunchTable(
    "gated_residual_layer_norm_backward",
    row_table(16384, 4096, rows.WARPS_OF_A_BACKWARD),
    lambda to: launch_gated_residual_layer_norm_backward(
        to.x, to.y, to.z, to.weight, to.per_row, to.per_row, True, True
    ),
)


@rows.jit_kernel
def _gated_residual_layer_norm_kernel(
    residual_ptr,  # (num_rows, D)
    branch_ptr,  # (num_rows, D)
    weight_ptr,  # (D,)
    bias_ptr,  # (D,), or unused
    normed_ptr,  # (num_rows, D)
    new_residual_ptr,  # (num_rows, D)
    mean_ptr,  # (num_rows,)
    rstd_ptr,  # (num_rows,)
    eps,
    eps_rest,
    D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_ONE_BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # I/O: read residual + branch + weight + bias, write normed + new_residual (+ mean + rstd); rows of several chunks
    # read twice.
    row = tl.program_id(0).to(tl.int64)  # offsets pass 2^31 elements
    start = row * D
    columns = tl.arange(0, BLOCK)
    if IS_ONE_BLOCK:
        x = add_chunk(residual_ptr, branch_ptr, new_residual_ptr, start, columns, D, WIDE, True)
        mean = tl.sum(x, axis=0) / D
        centred = tl.where(columns < D, x - mean, 0.0)
        variance = tl.sum(centred * centred, axis=0) / D
    else:
        # Each lane keeps the mean and the squares around it of its own columns (Welford); then the lanes are joined
        # (Chan et al.). The mean of squares less the square of the mean would lose everything to a large mean.
        lane_mean = tl.zeros((BLOCK,), dtype=WIDE)
        lane_squares = tl.zeros((BLOCK,), dtype=WIDE)
        for chunk in range(0, D, BLOCK):
            x = add_chunk(residual_ptr, branch_ptr, new_residual_ptr, start, chunk + columns, D, WIDE, True)
            delta = tl.where(chunk + columns < D, x - lane_mean, 0.0)
            lane_mean += delta / (chunk // BLOCK + 1)
            lane_squares += delta * (x - lane_mean)
        count = ((D - columns + BLOCK - 1) // BLOCK).to(WIDE)
        mean = tl.sum(lane_mean * count, axis=0) / D
        distance = lane_mean - mean
        variance = tl.sum(lane_squares + count * distance * distance, axis=0) / D
    rstd = 1.0 / tl.sqrt(variance + eps + eps_rest)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)
    if IS_ONE_BLOCK:
        _scale_chunk(centred * rstd, weight_ptr, bias_ptr, normed_ptr, start, columns, D, HAS_BIAS, WIDE)
    else:
        for chunk in range(0, D, BLOCK):
            at = chunk + columns
            # Added anew instead of read back: what other threads of the program stored need not be visible yet.
            x = add_chunk(residual_ptr, branch_ptr, new_residual_ptr, start, at, D, WIDE, False)
            _scale_chunk((x - mean) * rstd, weight_ptr, bias_ptr, normed_ptr, start, at, D, HAS_BIAS, WIDE)


@triton.jit
def _scale_chunk(
    normalized,
    weight_ptr,
    bias_ptr,
    normed_ptr,
    start,
    columns,
    D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WIDE: tl.constexpr,
):
    mask = columns < D
    normed = normalized * tl.load(weight_ptr + columns, mask=mask, other=0.0).to(WIDE)
    if HAS_BIAS:
        normed += tl.load(bias_ptr + columns, mask=mask, other=0.0).to(WIDE)
    tl.store(normed_ptr + start + columns, normed.to(normed_ptr.dtype.element_ty), mask=mask)


@rows.jit_kernel
def _gated_residual_layer_norm_backward_kernel(
    grad_normed_ptr,  # (num_rows, D)
    grad_new_residual_ptr,  # (num_rows, D), or unused
    new_residual_ptr,  # (num_rows, D)
    weight_ptr,  # (D,)
    mean_ptr,  # (num_rows,)
    rstd_ptr,  # (num_rows,)
    grad_residual_ptr,  # (num_rows, D)
    weight_partial_ptr,  # (num_programs, D) of WIDE: the weight gradient of each program's rows, or unused
    bias_partial_ptr,  # (num_programs, D) of WIDE, or unused
    num_rows,
    num_programs,
    D: tl.constexpr,
    HAS_GRAD_NEW_RESIDUAL: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr,
    BIAS_GRAD: tl.constexpr,
    IS_ONE_BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # With n = (x - mean) * rstd, g = grad_normed * weight:
    # grad_x = rstd * (g - mean(g) - n * mean(g * n)) + grad_new_residual.
    # I/O: read grad_normed + new_residual (+ grad_new_residual), write grad_residual; several chunks read the first two
    # twice.
    program = tl.program_id(0).to(tl.int64)  # offsets pass 2^31 elements
    columns = tl.arange(0, BLOCK)
    if IS_ONE_BLOCK:
        mask = columns < D
        weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(WIDE)  # read once for all rows
    weight_sum = tl.zeros((BLOCK,), dtype=WIDE)
    bias_sum = tl.zeros((BLOCK,), dtype=WIDE)
    row = program
    while row < num_rows:
        start = row * D
        mean = tl.load(mean_ptr + row)
        rstd = tl.load(rstd_ptr + row)
        if IS_ONE_BLOCK:
            normalized = _normalized(new_residual_ptr, start, columns, mean, rstd, D, WIDE)
            grad_normed = tl.load(grad_normed_ptr + start + columns, mask=mask, other=0.0).to(WIDE)
            grad = grad_normed * weight
            mean_grad = tl.sum(grad, axis=0) / D
            mean_product = tl.sum(grad * normalized, axis=0) / D
            grad_x = rstd * (grad - mean_grad - normalized * mean_product)
            if HAS_GRAD_NEW_RESIDUAL:
                grad_x += tl.load(grad_new_residual_ptr + start + columns, mask=mask, other=0.0).to(WIDE)
            tl.store(grad_residual_ptr + start + columns, grad_x.to(grad_residual_ptr.dtype.element_ty), mask=mask)
            if WEIGHT_GRAD:
                weight_sum += grad_normed * normalized
            if BIAS_GRAD:
                bias_sum += grad_normed
        else:
            grads = tl.zeros((BLOCK,), dtype=WIDE)
            products = tl.zeros((BLOCK,), dtype=WIDE)
            for chunk in range(0, D, BLOCK):
                grad = _weighted(grad_normed_ptr, weight_ptr, start, chunk + columns, D, WIDE)
                grads += grad
                products += grad * _normalized(new_residual_ptr, start, chunk + columns, mean, rstd, D, WIDE)
            mean_grad = tl.sum(grads, axis=0) / D
            mean_product = tl.sum(products, axis=0) / D
            for chunk in range(0, D, BLOCK):
                at = chunk + columns
                mask = at < D
                grad = _weighted(grad_normed_ptr, weight_ptr, start, at, D, WIDE)
                normalized = _normalized(new_residual_ptr, start, at, mean, rstd, D, WIDE)
                grad_x = rstd * (grad - mean_grad - normalized * mean_product)
                if HAS_GRAD_NEW_RESIDUAL:
                    grad_x += tl.load(grad_new_residual_ptr + start + at, mask=mask, other=0.0).to(WIDE)
                tl.store(grad_residual_ptr + start + at, grad_x.to(grad_residual_ptr.dtype.element_ty), mask=mask)
        row += num_programs
    if IS_ONE_BLOCK and WEIGHT_GRAD:
        tl.store(weight_partial_ptr + program * D + columns, weight_sum, mask=columns < D)
    if IS_ONE_BLOCK and BIAS_GRAD:
        tl.store(bias_partial_ptr + program * D + columns, bias_sum, mask=columns < D)


@triton.jit
def _normalized(x_ptr, start, columns, mean, rstd, D: tl.constexpr, WIDE: tl.constexpr):
    mask = columns < D
    x = tl.load(x_ptr + start + columns, mask=mask, other=0.0).to(WIDE)
    return tl.where(mask, (x - mean) * rstd, 0.0)  # behind the row it may be infinite


@triton.jit
def _weighted(grad_normed_ptr, weight_ptr, start, columns, D: tl.constexpr, WIDE: tl.constexpr):
    mask = columns < D
    grad_normed = tl.load(grad_normed_ptr + start + columns, mask=mask, other=0.0).to(WIDE)
    return grad_normed * tl.load(weight_ptr + columns, mask=mask, other=0.0).to(WIDE)


@rows.jit_kernel
def _gated_residual_layer_norm_weight_grad_kernel(
    grad_normed_ptr,  # (num_rows, D)
    new_residual_ptr,  # (num_rows, D)
    mean_ptr,  # (num_rows,)
    rstd_ptr,  # (num_rows,)
    weight_partial_ptr,  # (num_programs, D) of WIDE, or unused
    bias_partial_ptr,  # (num_programs, D) of WIDE, or unused
    num_rows,
    num_programs,
    blocks_per_row,
    D: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr,
    BIAS_GRAD: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # For rows of several chunks: one program per (stride of rows, block of columns). I/O: read grad_normed + x.
    program = tl.program_id(0).to(tl.int64) // blocks_per_row
    columns = (tl.program_id(0) % blocks_per_row) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < D
    weight_sum = tl.zeros((BLOCK,), dtype=WIDE)
    bias_sum = tl.zeros((BLOCK,), dtype=WIDE)
    row = program
    while row < num_rows:
        grad_normed = tl.load(grad_normed_ptr + row * D + columns, mask=mask, other=0.0).to(WIDE)
        if WEIGHT_GRAD:
            mean, rstd = tl.load(mean_ptr + row), tl.load(rstd_ptr + row)
            weight_sum += grad_normed * _normalized(new_residual_ptr, row * D, columns, mean, rstd, D, WIDE)
        bias_sum += grad_normed
        row += num_programs
    if WEIGHT_GRAD:
        tl.store(weight_partial_ptr + program * D + columns, weight_sum, mask=mask)
    if BIAS_GRAD:
        tl.store(bias_partial_ptr + program * D + columns, bias_sum, mask=mask)


def launch_gated_residual_layer_norm(
    residual: Tensor, branch: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    residual, branch, weight = residual.contiguous(), branch.contiguous(), weight.contiguous()
    width = weight.shape[0]
    torch_wide, wide = rows.wide_of(residual.dtype)
    normed = torch.empty_like(branch)
    new_residual = torch.empty_like(residual)
    mean, rstd = (torch.empty(residual.shape[:-1], dtype=torch_wide, device=residual.device) for _ in range(2))
    if residual.numel() == 0:
        return normed, new_residual, mean.fill_(0.0), rstd.fill_(eps**-0.5 if eps > 0 else float("inf"))
    config = _FORWARD.at(width, residual.device)
    block = min(config.block, triton.next_power_of_2(width))
    with rows.device_guard(residual):
        _gated_residual_layer_norm_kernel[(residual.numel() // width,)](
            residual,
            branch,
            weight,
            weight if bias is None else bias.contiguous(),
            normed,
            new_residual,
            mean,
            rstd,
            *rows.split_float(eps),
            D=width,
            HAS_BIAS=bias is not None,
            IS_ONE_BLOCK=block >= width,
            WIDE=wide,
            BLOCK=block,
            **config.options,
        )
    return normed, new_residual, mean, rstd


def launch_gated_residual_layer_norm_backward(
    grad_normed: Tensor,
    grad_new_residual: Tensor | None,
    new_residual: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_normed, new_residual, weight = grad_normed.contiguous(), new_residual.contiguous(), weight.contiguous()
    mean, rstd = mean.contiguous(), rstd.contiguous()
    width = weight.shape[0]
    torch_wide, wide = rows.wide_of(new_residual.dtype)
    grad_residual = torch.empty_like(new_residual)
    is_wanted = weight_grad, bias_grad
    if grad_residual.numel() == 0:
        grad_weight, grad_bias = (weight.new_zeros(width if wanted else 0) for wanted in is_wanted)
        return grad_residual, grad_weight, grad_bias
    num_rows = new_residual.numel() // width
    config = _BACKWARD.at(width, new_residual.device)
    num_programs = min(num_rows, rows.max_programs(new_residual.device, config.programs_per_multiprocessor))
    block = min(config.block, triton.next_power_of_2(width))
    is_one_block = block >= width
    grid = num_programs if is_one_block else num_rows
    partials = [
        torch.empty((num_programs if wanted else 0, width), dtype=torch_wide, device=weight.device)
        for wanted in is_wanted
    ]
    targets = [partial if wanted else grad_residual for partial, wanted in zip(partials, is_wanted, strict=True)]
    with rows.device_guard(new_residual):
        _gated_residual_layer_norm_backward_kernel[(grid,)](
            grad_normed,
            grad_normed if grad_new_residual is None else grad_new_residual.contiguous(),
            new_residual,
            weight,
            mean,
            rstd,
            grad_residual,
            *targets,
            num_rows,
            grid,
            D=width,
            HAS_GRAD_NEW_RESIDUAL=grad_new_residual is not None,
            WEIGHT_GRAD=weight_grad,
            BIAS_GRAD=bias_grad,
            IS_ONE_BLOCK=is_one_block,
            WIDE=wide,
            BLOCK=block,
            **config.options,
        )
        if any(is_wanted) and not is_one_block:
            blocks_per_row = triton.cdiv(width, block)
            _gated_residual_layer_norm_weight_grad_kernel[(num_programs * blocks_per_row,)](
                grad_normed,
                new_residual,
                mean,
                rstd,
                *targets,
                num_rows,
                num_programs,
                blocks_per_row,
                D=width,
                WEIGHT_GRAD=weight_grad,
                BIAS_GRAD=bias_grad,
                WIDE=wide,
                BLOCK=block,
                **config.options,
            )
    grad_weight, grad_bias = (
        partial.sum(0).to(weight.dtype) if wanted else weight.new_empty(0)
        for partial, wanted in zip(partials, is_wanted, strict=True)
    )
    return grad_residual, grad_weight, grad_bias
