"""What the ops at the boundary of two branches share, whichever norm they fuse: checks, gradients.

One tensor returned as two gradients is legal as long as nobody writes into it; autograd's own accumulation does not
while a second reference exists.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..derivative import Function, first_derivative
from .checks import DTYPES, check_dtype, check_holds
from .raw import raw as _raw


def check(residual: Tensor, branch: Tensor, weight: Tensor, grad_scale: float) -> None:
    """Raise ValueError or TypeError unless residual and branch (..., D), weight (D,) and grad_scale fit together."""
    shape, dtype, device = residual.shape, residual.dtype, residual.device
    if shape != branch.shape or dtype is not branch.dtype or dtype not in DTYPES:
        _check_sum(residual, branch)
    if not shape or weight.shape != (shape[-1],):  # a slice of a shape takes as long as the other checks of it
        raise ValueError(f"weight: expected shape {tuple(shape[-1:])}, got {tuple(weight.shape)}")
    if weight.dtype is not dtype:
        check_dtype("weight", weight.dtype)
    if device != branch.device or device != weight.device:
        raise ValueError(f"branch, weight: expected on {device}, got {branch.device}, {weight.device}")
    if not isinstance(grad_scale, (float, int)):
        raise TypeError(f"grad_scale: expected a number, got {type(grad_scale).__name__}")


def _check_sum(residual: Tensor, branch: Tensor) -> None:
    check_dtype("residual", residual.dtype)
    check_dtype("branch", branch.dtype)
    if residual.shape != branch.shape:
        raise ValueError(f"branch: expected residual's shape {tuple(residual.shape)}, got {tuple(branch.shape)}")
    check_holds(residual.dtype, "branch", branch.dtype)


class NextDropped(Function):
    """(normed, new_residual) where the next branch is dropped: normed is a constant, the stream's gradient passes."""

    @staticmethod
    def forward(
        ctx: Any,
        raw_op: Callable[..., tuple[Tensor, ...]],
        grad_scale: float,
        residual: Tensor,
        branch: Tensor,
        *arguments: Any,
    ) -> tuple[Tensor, Tensor]:
        normed, new_residual, *_ = raw_op(residual, branch, *arguments)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(normed)
        ctx.sharing = grad_scale, branch.dtype
        ctx.num_arguments = len(arguments)
        return normed, new_residual

    @staticmethod
    @first_derivative
    def backward(ctx: Any, _: Tensor | None, grad_new: Tensor | None) -> tuple[Tensor | None, ...]:
        is_wanted = ctx.needs_input_grad[2:4]
        gradients = share(grad_new, is_wanted, *ctx.sharing)
        return None, None, *gradients, *[None] * ctx.num_arguments


def share(
    grad: Tensor | None, is_wanted: tuple[bool, ...], grad_scale: float, branch_dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of residual and branch from that of their sum: one tensor, where scale and dtype allow."""
    if grad is None:
        return None, None
    grad_branch = None
    if is_wanted[1]:
        grad_branch = grad
        if grad_scale != 1.0 or grad.dtype != branch_dtype:
            grad_branch = branch_gradient(grad, None, None, grad_scale, branch_dtype)
    return grad if is_wanted[0] else None, grad_branch


def branch_gradient(
    grad: Tensor, rows: Tensor | None, row_scale: Tensor | None, grad_scale: float, dtype: torch.dtype
) -> Tensor:
    """The gradient of a branch from that of its sum, at rows and times its scale, a number or one for each row.

    torch.compile takes a raw op's number for a constant, and would compile anew for another one: there PyTorch
    multiplies, or the op is given the number once for each row.
    """
    is_compiling = torch.compiler.is_compiling()
    if rows is None and row_scale is None and (grad.dtype is dtype or is_compiling):
        return (grad * grad_scale).to(dtype)  # nothing to fuse: PyTorch's own kernel moves no byte more
    if is_compiling and row_scale is None and rows is not None and grad_scale != 1.0:
        ones = grad.new_ones(rows.shape, dtype=torch.promote_types(grad.dtype, torch.float32))
        row_scale, grad_scale = ones * grad_scale, 1.0
    return _raw.gated_residual_add_backward(grad, rows, row_scale, grad_scale, dtype)  # type: ignore[no-any-return]
