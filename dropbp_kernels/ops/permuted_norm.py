"""The norm in front of a branch that runs on permuted rows, kept rows first.

Each row is read through the permutation, normalised, and written in permuted order into one of two tensors: `kept`,
which carries a gradient, and `dropped`, which is a constant. They are two tensors and not slices of one, because what
the kept branch saves would otherwise hold the memory of the dropped rows.

The residual is returned too, for the add at the end of the branch to use: so the stream's gradient arrives in the
norm's backward, which adds the kept rows' gradient into it and touches no other row. It is written in place where it
belongs to nobody else (`ownership`), which is the rule between two branches, and else into a copy.
"""

from typing import Any

import torch
from torch import Tensor

from ..derivative import Function, first_derivative
from ..ownership import owns_gradient
from ..permutation import check_permutation, row_shape
from .checks import check_bias, check_dtype, is_gemma
from .raw import raw as _raw


def permuted_rms_norm(
    residual: Tensor,
    weight: Tensor,
    permutation: Tensor,
    num_kept: int,
    *,
    eps: float = 1e-6,
    casting: str = "llama",
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (kept, dropped, residual): RMSNorm(rows) * weight of the rows in permuted order, and the residual itself.

    dropped is a constant. Use the returned residual from there on: then the backward touches the kept rows of the
    stream's gradient alone. With the one passed in the result is the same, at the cost of a gradient of its own.

    Shapes: residual (..., D), weight (D,); permutation (N,), its rows the leading dimensions of residual with N
            elements: N = B of (B, S, D) are samples, N = B * S tokens. kept (num_kept, ..., D), dropped
            (N - num_kept, ..., D), residual as it was. num_kept from 0 to N, an int of the host.
    Dtypes: float32, float16, bfloat16, float64; weight has any of them. kept and dropped come in dtype (default:
            residual's; not wider than it). Computed in float32 (float64 for a float64 residual). casting: "llama"
            rounds x * rstd to dtype before the product with weight; "gemma" rounds x * rstd * (1 + weight) once.
            permutation int64, or int32, which is converted first.
    Errors: ValueError when shape, device, num_kept or casting do not fit, TypeError when a dtype is unsupported.
            Entries that are no permutation: see permuted_residual_add. A second derivative raises RuntimeError.
    Cost:   reads N rows, writes N + K: the K kept rows once more, as they were, so that backward holds K rows and not
            the residual. Saves these, a float for each, and the permutation. Without gradients writes N and saves
            nothing. Backward: reads 3K rows, writes K in one kernel, allocates nothing; where the stream's gradient is
            somebody else's, a copy of it first. A frozen weight costs nothing.
    Source: DropBP (arXiv 2402.17812) by rows; RMSNorm (arXiv 1910.07467), eq. 4; oracle
            reference.permuted_norm_reference.
    """
    return _permuted_norm(residual, weight, None, permutation, num_kept, eps, False, is_gemma(casting), dtype)


def permuted_layer_norm(
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    permutation: Tensor,
    num_kept: int,
    *,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (kept, dropped, residual): LayerNorm(rows) * weight + bias in permuted order, and the residual itself.

    Shapes: those of permuted_rms_norm; bias (D,) or None.
    Dtypes: those of permuted_rms_norm; the result is rounded once. bias has weight's dtype.
    Errors: those of permuted_rms_norm.
    Cost:   that of permuted_rms_norm, and a second float saved for each kept row.
    Source: DropBP (arXiv 2402.17812) by rows; layer norm (arXiv 1607.06450), eq. 4; oracle
            reference.permuted_norm_reference.
    """
    if bias is not None:
        check_bias(bias, weight)
    return _permuted_norm(residual, weight, bias, permutation, num_kept, eps, True, False, dtype)


def _permuted_norm(
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    permutation: Tensor,
    num_kept: int,
    eps: float,
    centered: bool,
    gemma: bool,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = residual.dtype if dtype is None else dtype
    for name, found in (("residual", residual.dtype), ("weight", weight.dtype), ("dtype", dtype)):
        check_dtype(name, found)
    if torch.promote_types(residual.dtype, dtype) != residual.dtype:
        raise TypeError(f"dtype: expected one that residual's {residual.dtype} holds, got {dtype}")
    if residual.dim() == 0 or weight.dim() != 1 or weight.shape[0] != residual.shape[-1]:
        raise ValueError(f"weight: expected shape {tuple(residual.shape[-1:])}, got {tuple(weight.shape)}")
    if weight.device != residual.device:
        raise ValueError(f"weight: expected on residual's device {residual.device}, got {weight.device}")
    permutation, shape = check_permutation(permutation, residual)
    if isinstance(num_kept, Tensor):
        raise TypeError("num_kept: expected an int of the host, got a tensor, which would have to be waited for")
    if not 0 <= num_kept <= shape[0]:
        raise ValueError(f"num_kept: expected 0 to {shape[0]}, got {num_kept}")

    options = eps, centered, gemma, dtype
    parameters_need_grad = weight.requires_grad or (bias is not None and bias.requires_grad)
    if num_kept > 0 and torch.is_grad_enabled() and (residual.requires_grad or parameters_need_grad):
        kept, dropped, stream = _PermutedNorm.apply(residual, weight, bias, permutation, num_kept, *options)
        return kept, dropped, stream if residual.requires_grad else residual
    with torch.no_grad():  # nothing to save: all rows are written as dropped ones
        normed = _raw.permuted_norm(residual, weight, bias, permutation, 0, *options)[1]
        return normed[:num_kept], normed[num_kept:], residual


class _PermutedNorm(Function):
    @staticmethod
    def forward(
        ctx: Any,
        residual: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        permutation: Tensor,
        num_kept: int,
        eps: float,
        centered: bool,
        gemma: bool,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        kept, dropped, rows, mean, rstd = _raw.permuted_norm(
            residual, weight, bias, permutation, num_kept, eps, centered, gemma, dtype
        )
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(dropped)
        ctx.save_for_backward(rows, weight, mean, rstd, permutation)
        ctx.options = centered, gemma
        ctx.shape = residual.shape
        return kept, dropped, residual

    @staticmethod
    @first_derivative
    def backward(
        ctx: Any, grad_kept: Tensor | None, _: Tensor | None, grad_residual: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if grad_kept is None:
            return grad_residual, *[None] * 8
        rows, weight, mean, rstd, permutation = ctx.saved_tensors
        if grad_residual is None:
            grad_residual = rows.new_zeros(ctx.shape)
        elif not owns_gradient(grad_residual):
            grad_residual = grad_residual.clone(memory_format=torch.contiguous_format)
        wants_residual, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_weight, grad_bias = _raw.permuted_norm_backward_(
            grad_residual, grad_kept, rows, weight, mean, rstd, permutation, *ctx.options, wants_weight, wants_bias
        )
        return (
            grad_residual if wants_residual else None,
            grad_weight if wants_weight else None,
            grad_bias if wants_bias else None,
            *[None] * 6,
        )


@torch.library.register_fake("dropbp_kernels::permuted_norm")
def _(
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
    shape = row_shape(residual.shape, permutation.shape[0])
    assert shape is not None  # checked above
    wide = torch.float64 if residual.dtype == torch.float64 else torch.float32
    kept_shape = (num_kept, *shape[1:])
    return (
        residual.new_empty(kept_shape, dtype=dtype),
        residual.new_empty((shape[0] - num_kept, *shape[1:]), dtype=dtype),
        residual.new_empty(kept_shape),
        residual.new_empty(kept_shape[:-1] if centered else (0,), dtype=wide),
        residual.new_empty(kept_shape[:-1], dtype=wide),
    )


@torch.library.register_fake("dropbp_kernels::permuted_norm_backward_")
def _(
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
    return weight.new_empty(width if weight_grad else 0), weight.new_empty(width if bias_grad else 0)
