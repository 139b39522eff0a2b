"""The boundary between two branches in one kernel, for models with LayerNorm: add branch i, normalise for branch i+1.

What is saved and what backward runs depends on who is kept:

========  ==========  ========================  =====================================================
branch i  branch i+1  forward saves             backward
========  ==========  ========================  =====================================================
kept      kept        new_residual, mean, rstd  one kernel; both gradients are the same tensor
dropped   kept        new_residual, mean, rstd  one kernel; only the residual's gradient
kept      dropped     nothing                   an alias of the gradient: no kernel, no allocation
dropped   dropped     nothing                   an alias of the gradient: no kernel, no allocation
========  ==========  ========================  =====================================================

The rows in which the next branch is dropped, and the sharing of one tensor as two gradients, are `boundary`'s.
"""

from typing import Any

import torch
from torch import Tensor

from ..derivative import Function, first_derivative
from .boundary import NextDropped, check, share
from .checks import check_bias
from .raw import raw as _raw


def gated_residual_layer_norm(
    residual: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    next_kept: bool = True,
    grad_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Return (normed, new_residual): new_residual = residual + branch, normed = LayerNorm(new_residual).

    weight and bias scale and shift the norm. The branch was dropped if it requires no gradient. next_kept tells whether
    the branch that reads normed is kept; if it is not, normed is a constant. grad_scale is the factor on the branch's
    gradient.

    Shapes: residual (..., D), branch (..., D) alike, weight (D,), bias (D,) or None; both results (..., D). Empty
            tensors are allowed.
    Dtypes: float32, float16, bfloat16, float64; residual may be wider than branch, weight has any of them and bias
            weight's. normed comes in branch's dtype, new_residual in residual's. Summed in float32 (float64 for a
            float64 residual) and rounded once; the norm reads the rounded sum, its statistics are float32 (float64).
    Errors: ValueError when shape or device do not fit, TypeError when a dtype is unsupported. A second derivative
            raises RuntimeError.
    Cost:   reads 2N, writes 2N elements; saves new_residual and two floats per row if next_kept, else nothing.
            Backward reads 3N, writes N; if not next_kept an alias. A grad_scale other than 1, or a branch of another
            dtype than residual: one more kernel over N. Frozen weight and bias cost nothing.
    Source: DropBP (arXiv 2402.17812); LayerNorm (arXiv 1607.06450), eq. 3-4, the variance biased; oracle
            reference.gated_residual_layer_norm_reference.
    """
    check(residual, branch, weight, grad_scale)
    if bias is not None:
        check_bias(bias, weight)

    if torch.is_grad_enabled():
        trains_stream = residual.requires_grad or branch.requires_grad
        trains_norm = weight.requires_grad or (bias is not None and bias.requires_grad)
        if next_kept and (trains_stream or trains_norm):
            return _Kept.apply(residual, branch, weight, bias, eps, grad_scale)
        if trains_norm:  # no edge to what gets no gradient; detach is a fourth of the price of no_grad
            weight, bias = weight.detach(), None if bias is None else bias.detach()
        if trains_stream:
            return NextDropped.apply(_raw.gated_residual_layer_norm, grad_scale, residual, branch, weight, bias, eps)
    normed, new_residual, _, _ = _raw.gated_residual_layer_norm(residual, branch, weight, bias, eps)
    return normed, new_residual


class _Kept(Function):
    """The next branch is kept: normed carries a gradient."""

    @staticmethod
    def forward(
        ctx: Any, residual: Tensor, branch: Tensor, weight: Tensor, bias: Tensor | None, eps: float, grad_scale: float
    ) -> tuple[Tensor, Tensor]:
        normed, new_residual, mean, rstd = _raw.gated_residual_layer_norm(residual, branch, weight, bias, eps)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(new_residual, weight, mean, rstd)
        ctx.sharing = grad_scale, branch.dtype
        return normed, new_residual

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad_normed: Tensor | None, grad_new: Tensor | None) -> tuple[Tensor | None, ...]:
        is_wanted = ctx.needs_input_grad
        if grad_normed is None:
            return *share(grad_new, is_wanted, *ctx.sharing), None, None, None, None
        weight_grad, bias_grad = is_wanted[2], is_wanted[3]
        grad, grad_weight, grad_bias = _raw.gated_residual_layer_norm_backward(
            grad_normed, grad_new, *ctx.saved_tensors, weight_grad, bias_grad
        )
        gradients = share(grad, is_wanted, *ctx.sharing)
        return *gradients, grad_weight if weight_grad else None, grad_bias if bias_grad else None, None, None


@torch.library.register_fake("dropbp_kernels::gated_residual_layer_norm")
def _(
    residual: Tensor, branch: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.float64 if residual.dtype == torch.float64 else torch.float32
    return (
        torch.empty_like(branch, memory_format=torch.contiguous_format),
        torch.empty_like(residual, memory_format=torch.contiguous_format),
        residual.new_empty(residual.shape[:-1], dtype=wide),
        residual.new_empty(residual.shape[:-1], dtype=wide),
    )


@torch.library.register_fake("dropbp_kernels::gated_residual_layer_norm_backward")
def _(
    grad_normed: Tensor,
    grad_new_residual: Tensor | None,
    new_residual: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_residual = torch.empty_like(new_residual, memory_format=torch.contiguous_format)
    width = weight.shape[0]
    return grad_residual, weight.new_empty(width if weight_grad else 0), weight.new_empty(width if bias_grad else 0)
