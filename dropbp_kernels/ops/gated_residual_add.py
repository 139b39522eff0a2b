"""residual + branch, where the gradient that enters the branch may be scaled.

Who serves what: the sum of two whole tensors is PyTorch's own `add`. It takes the sum in float32 and rounds once, its
node saves nothing and hands the gradient on without a copy, so there is nothing to fuse. The raw ops of this package
serve what `add` cannot: rows, and a scaled gradient.
"""

from typing import Any

import torch
from torch import Tensor

from ..derivative import Function, first_derivative
from .boundary import branch_gradient
from .checks import DTYPES, check_dtype, check_holds, split_grad_scale
from .raw import raw as _raw


def gated_residual_add(
    residual: Tensor,
    branch: Tensor,
    *,
    grad_scale: float | Tensor = 1.0,
    rows: Tensor | None = None,
    inplace: bool = False,
) -> Tensor:
    """Return residual + branch; the branch's gradient is scaled by grad_scale.

    A branch that needs no gradient (it ran under no_grad) costs the residual's graph one node that saves nothing, or no
    node with inplace. inplace writes into residual and returns it; autograd complains in backward if residual had been
    saved by someone.

    Shapes: residual (R, ..., D); branch alike, or (K, ..., D) with rows int64 (K,), the unique places along dim 0
            where it is added. grad_scale: a number, or (K,) of any float dtype, a factor for each index of the
            branch's dim 0, a constant; a zero skips the row. Result like residual. Empty tensors are allowed.
    Dtypes: float32, float16, bfloat16, float64; residual may be wider than branch. Summed in float32 (float64 for a
            float64 residual), rounded once to residual's dtype. The branch's gradient has the branch's dtype.
    Errors: ValueError when shapes or devices do not fit, or inplace meets a leaf that requires grad; TypeError when a
            dtype is unsupported. rows out of range: IndexError on the CPU; on a GPU, where the host does not wait to
            see them, the CUDA kernel stops with a message and the Triton kernel skips the row. rows given twice:
            undefined which one is added. A second derivative raises RuntimeError where the gradient is scaled.
    Cost:   reads 2N, writes N elements (rows: reads N + 2K, writes N + K; inplace only the K rows). Saves nothing but
            rows and a grad_scale tensor. Backward: an alias; grad_scale, rows or another dtype: one kernel over branch.
    Source: DropBP (arXiv 2402.17812), x + D(f(x)); oracle reference.gated_residual_add_reference.
    """
    dtype = residual.dtype
    if rows is not None or residual.shape != branch.shape or dtype is not branch.dtype or dtype not in DTYPES:
        _check(residual, branch, rows)
    if residual.device != branch.device:
        raise ValueError(f"branch: expected on residual's device {residual.device}, got {branch.device}")
    row_scale = None
    if not isinstance(grad_scale, float):
        grad_scale, row_scale = split_grad_scale(grad_scale, branch)

    is_recorded = torch.is_grad_enabled()
    if inplace and is_recorded and residual.requires_grad and residual.is_leaf:
        raise ValueError("residual: expected a tensor that is no leaf requiring grad for inplace=True")
    if not (is_recorded and branch.requires_grad):
        return _add_constant(residual, branch, rows, inplace)
    if rows is None and row_scale is None and grad_scale == 1.0:
        return residual.add_(branch) if inplace else residual + branch
    return _GatedResidualAdd.apply(residual, branch, rows, row_scale, grad_scale, inplace)


def _add_constant(residual: Tensor, branch: Tensor, rows: Tensor | None, inplace: bool) -> Tensor:
    """The sum with a branch that gets no gradient."""
    if rows is None and not inplace:
        return residual + branch
    if rows is None:
        with torch.no_grad():  # residual keeps its grad_fn: d(residual + constant) = d(residual)
            return residual.add_(branch)
    if not (residual.requires_grad and torch.is_grad_enabled()):
        if not inplace:
            return _raw.gated_residual_add(residual, branch, rows)
    elif not inplace:
        residual = residual.clone(memory_format=torch.contiguous_format)  # one node, of C++, that hands gradients on
    with torch.no_grad():
        _raw.gated_residual_add_(residual, branch, rows)
    torch.autograd.graph.increment_version(residual)  # a raw op knows nothing of autograd
    return residual


class _GatedResidualAdd(Function):
    @staticmethod
    def forward(
        ctx: Any,
        residual: Tensor,
        branch: Tensor,
        rows: Tensor | None,
        row_scale: Tensor | None,
        grad_scale: float,
        inplace: bool,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(rows, row_scale)
        ctx.grad_scale = grad_scale
        ctx.dtype = branch.dtype
        if inplace:
            ctx.mark_dirty(residual)
            if rows is None:
                residual.add_(branch)
            else:
                _raw.gated_residual_add_(residual, branch, rows)
            return residual
        if rows is None:
            return residual + branch
        return _raw.gated_residual_add(residual, branch, rows)

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return None, None, None, None, None, None
        rows, row_scale = ctx.saved_tensors
        grad_branch = branch_gradient(grad_output, rows, row_scale, ctx.grad_scale, ctx.dtype)
        return grad_output if ctx.needs_input_grad[0] else None, grad_branch, None, None, None, None


def _check(residual: Tensor, branch: Tensor, rows: Tensor | None) -> None:
    if residual.dtype is not branch.dtype or residual.dtype not in DTYPES:
        check_dtype("residual", residual.dtype)
        check_dtype("branch", branch.dtype)
        check_holds(residual.dtype, "branch", branch.dtype)
    if rows is None:
        if residual.shape != branch.shape:
            raise ValueError(f"branch: expected residual's shape {tuple(residual.shape)}, got {tuple(branch.shape)}")
        return
    if rows.dtype != torch.int64:
        raise TypeError(f"rows: expected dtype int64, got {rows.dtype}")
    if rows.device != branch.device:
        raise ValueError(f"rows: expected on branch's device {branch.device}, got {rows.device}")
    shape, branch_shape = residual.shape, branch.shape
    if not shape or not branch_shape or branch_shape[1:] != shape[1:]:
        expected = ", ".join(["K", *map(str, shape[1:])])
        raise ValueError(f"branch: expected shape ({expected}), got {tuple(branch_shape)}")
    if rows.dim() != 1 or rows.shape[0] != branch_shape[0]:
        raise ValueError(f"rows: expected shape ({branch_shape[0]},) as branch has, got {tuple(rows.shape)}")
    if branch_shape[0] > shape[0]:
        raise ValueError(f"rows: expected at most residual's {shape[0]}, got {branch_shape[0]}")


@torch.library.register_fake("dropbp_kernels::gated_residual_add")
def _(residual: Tensor, branch: Tensor, rows: Tensor | None) -> Tensor:
    return torch.empty_like(residual, memory_format=torch.contiguous_format)


@torch.library.register_fake("dropbp_kernels::gated_residual_add_backward")
def _(
    grad_output: Tensor, rows: Tensor | None, row_scale: Tensor | None, grad_scale: float, dtype: torch.dtype
) -> Tensor:
    shape = grad_output.shape if rows is None else (rows.shape[0], *grad_output.shape[1:])
    return grad_output.new_empty(shape, dtype=dtype)
