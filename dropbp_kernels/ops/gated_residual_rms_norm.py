"""The boundary between two branches in one kernel: add branch i to the residual, normalise for branch i+1.

What is saved and what backward runs depends on who is kept:

========  ==========  ==================  =====================================================
branch i  branch i+1  forward saves       backward
========  ==========  ==================  =====================================================
kept      kept        new_residual, rstd  one kernel; both gradients are the same tensor
dropped   kept        new_residual, rstd  one kernel; only the residual's gradient
kept      dropped     nothing             an alias of the gradient: no kernel, no allocation
dropped   dropped     nothing             an alias of the gradient: no kernel, no allocation
========  ==========  ==================  =====================================================

The rows in which the next branch is dropped, and the sharing of one tensor as two gradients, are `boundary`'s.
"""

from typing import Any

import torch
from torch import Tensor

from ..derivative import Function, first_derivative
from .boundary import NextDropped, check, share
from .checks import is_gemma
from .raw import raw as _raw


def gated_residual_rms_norm(
    residual: Tensor,
    branch: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-6,
    next_kept: bool = True,
    grad_scale: float = 1.0,
    casting: str = "llama",
) -> tuple[Tensor, Tensor]:
    """Return (normed, new_residual): new_residual = residual + branch, normed = RMSNorm(new_residual) * weight.

    The branch was dropped if it requires no gradient. next_kept tells whether the branch that reads normed is kept; if
    it is not, normed is a constant. grad_scale is the factor on the branch's gradient.

    Shapes: residual (..., D), branch (..., D) alike, weight (D,); both results (..., D). Empty tensors are allowed.
    Dtypes: float32, float16, bfloat16, float64; residual may be wider than branch, weight has any of them. normed comes
            in branch's dtype, new_residual in residual's. Summed in float32 (float64 for a float64 residual) and
            rounded once; the norm reads the rounded sum, its statistics are float32 (float64). casting: "llama" rounds
            x * rstd to branch's dtype before the product with weight; "gemma" rounds x * rstd * (1 + weight) once.
    Errors: ValueError when shape, device or casting do not fit, TypeError when a dtype is unsupported. A second
            derivative raises RuntimeError.
    Cost:   reads 2N, writes 2N elements; saves new_residual and a float per row if next_kept, else nothing. Backward
            reads 3N, writes N; if not next_kept an alias. A grad_scale other than 1, or a branch of another
            dtype than residual: one more kernel over N. A frozen weight costs nothing.
    Source: DropBP (arXiv 2402.17812); RMSNorm (arXiv 1910.07467), eq. 4; oracle
            reference.gated_residual_rms_norm_reference.
    """
    check(residual, branch, weight, grad_scale)
    gemma = is_gemma(casting)

    if torch.is_grad_enabled():
        trains_stream = residual.requires_grad or branch.requires_grad
        if next_kept and (trains_stream or weight.requires_grad):
            return _Kept.apply(residual, branch, weight, eps, gemma, grad_scale)
        if weight.requires_grad:  # no edge to what gets no gradient; detach is a fourth of the price of no_grad
            weight = weight.detach()
        if trains_stream:
            return NextDropped.apply(_raw.gated_residual_rms_norm, grad_scale, residual, branch, weight, eps, gemma)
    normed, new_residual, _ = _raw.gated_residual_rms_norm(residual, branch, weight, eps, gemma)
    return normed, new_residual


class _Kept(Function):
    """The next branch is kept: normed carries a gradient."""

    @staticmethod
    def forward(
        ctx: Any, residual: Tensor, branch: Tensor, weight: Tensor, eps: float, gemma: bool, grad_scale: float
    ) -> tuple[Tensor, Tensor]:
        normed, new_residual, rstd = _raw.gated_residual_rms_norm(residual, branch, weight, eps, gemma)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(new_residual, weight, rstd)
        ctx.gemma = gemma
        ctx.sharing = grad_scale, branch.dtype
        return normed, new_residual

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad_normed: Tensor | None, grad_new: Tensor | None) -> tuple[Tensor | None, ...]:
        is_wanted = ctx.needs_input_grad
        if grad_normed is None:
            return *share(grad_new, is_wanted, *ctx.sharing), None, None, None, None
        new_residual, weight, rstd = ctx.saved_tensors
        weight_grad = is_wanted[2]
        grad, grad_weight = _raw.gated_residual_rms_norm_backward(
            grad_normed, grad_new, new_residual, weight, rstd, ctx.gemma, weight_grad
        )
        gradients = share(grad, is_wanted, *ctx.sharing)
        return *gradients, grad_weight if weight_grad else None, None, None, None


@torch.library.register_fake("dropbp_kernels::gated_residual_rms_norm")
def _(residual: Tensor, branch: Tensor, weight: Tensor, eps: float, gemma: bool) -> tuple[Tensor, Tensor, Tensor]:
    rstd_dtype = torch.float64 if residual.dtype == torch.float64 else torch.float32
    return (
        torch.empty_like(branch, memory_format=torch.contiguous_format),
        torch.empty_like(residual, memory_format=torch.contiguous_format),
        residual.new_empty(residual.shape[:-1], dtype=rstd_dtype),
    )


@torch.library.register_fake("dropbp_kernels::gated_residual_rms_norm_backward")
def _(
    grad_normed: Tensor,
    grad_new_residual: Tensor | None,
    new_residual: Tensor,
    weight: Tensor,
    rstd: Tensor,
    gemma: bool,
    weight_grad: bool,
) -> tuple[Tensor, Tensor]:
    grad_residual = torch.empty_like(new_residual, memory_format=torch.contiguous_format)
    return grad_residual, weight.new_empty(weight.shape[0] if weight_grad else 0)
