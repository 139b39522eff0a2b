"""Add a branch that ran on permuted rows, kept rows first, into the residual stream: one pass, in the stream's order.

The branch comes as two tensors, `kept` and `dropped`, as it was computed: with autograd and without. Neither has to be
copied next to the other, and the memory of each ends with its own last use.
"""

from typing import Any

import torch
from torch import Tensor

from ..derivative import Function, first_derivative
from ..permutation import check_permutation
from .boundary import branch_gradient
from .checks import check_dtype, check_holds, split_grad_scale
from .raw import raw as _raw


def permuted_residual_add(
    residual: Tensor,
    kept: Tensor,
    dropped: Tensor,
    permutation: Tensor,
    *,
    grad_scale: float | Tensor = 1.0,
) -> Tensor:
    """Return residual + branch, where row k of the branch (kept rows, then dropped) belongs to row permutation[k].

    Only kept gets a gradient, times grad_scale; dropped is a constant, whatever it requires. The residual's gradient is
    the incoming one, unchanged and uncopied.

    Shapes: residual (..., D); permutation (N,), its rows the leading dimensions of residual with N elements: N = B of
            (B, S, D) are samples, N = B * S tokens. kept (K, ..., D) and dropped (N - K, ..., D), K from 0 to N;
            grad_scale: a number, or (K,) of any float dtype, a constant; a zero skips the row. Result like residual.
    Dtypes: float32, float16, bfloat16, float64; residual may be wider than kept and dropped, which are alike. Summed in
            float32 (float64 for a float64 residual), rounded once. permutation int64, or int32, converted first.
    Errors: ValueError when shapes or devices do not fit, TypeError when a dtype is unsupported. Entries that are no
            permutation: IndexError on a CPU; on a GPU, where the host does not wait to see them, an entry out of
            range stops the CUDA kernel with a message and is skipped by the Triton kernel, and rows that no entry
            names are undefined. A second derivative raises RuntimeError.
    Cost:   reads 2N rows, writes N, as the plain sum does, and reads the permutation. Allocates the result. Saves the
            permutation (and a grad_scale tensor), nothing of the branch. Backward: reads K rows, writes K in one
            kernel; the residual's gradient is an alias.
    Source: DropBP (arXiv 2402.17812), x + D(f(x)), with D by rows; oracle reference.permuted_residual_add_reference.
    """
    for name, tensor in (("residual", residual), ("kept", kept), ("dropped", dropped)):
        check_dtype(name, tensor.dtype)
        if tensor.device != residual.device:
            raise ValueError(f"{name}: expected on residual's device {residual.device}, got {tensor.device}")
    if kept.dtype != dropped.dtype:
        raise TypeError(f"dropped: expected kept's dtype {kept.dtype}, got {dropped.dtype}")
    check_holds(residual.dtype, "kept", kept.dtype)
    permutation, shape = check_permutation(permutation, residual)
    for name, tensor in (("kept", kept), ("dropped", dropped)):
        if tensor.dim() == 0 or tensor.shape[1:] != shape[1:]:
            expected = ", ".join(["K", *map(str, shape[1:])])
            raise ValueError(f"{name}: expected shape ({expected}), got {tuple(tensor.shape)}")
    if kept.shape[0] + dropped.shape[0] != shape[0]:
        raise ValueError(f"kept, dropped: expected {shape[0]} rows in all, got {kept.shape[0]} and {dropped.shape[0]}")
    grad_scale, row_scale = split_grad_scale(grad_scale, kept)

    dropped = dropped.detach()
    if torch.is_grad_enabled() and (residual.requires_grad or kept.requires_grad):
        return _PermutedResidualAdd.apply(residual, kept, dropped, permutation, row_scale, grad_scale, shape)
    return _raw.permuted_residual_add(residual, kept, dropped, permutation)


class _PermutedResidualAdd(Function):
    @staticmethod
    def forward(
        ctx: Any,
        residual: Tensor,
        kept: Tensor,
        dropped: Tensor,
        permutation: Tensor,
        row_scale: Tensor | None,
        grad_scale: float,
        shape: tuple[int, ...],
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        if kept.requires_grad:
            ctx.save_for_backward(permutation, row_scale)
        ctx.num_kept, ctx.dtype = kept.shape[0], kept.dtype
        ctx.grad_scale, ctx.shape = grad_scale, shape
        return _raw.permuted_residual_add(residual, kept, dropped, permutation)

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_kept = None
        if grad_output is not None and ctx.needs_input_grad[1]:
            permutation, row_scale = ctx.saved_tensors
            grad_kept = branch_gradient(
                grad_output.reshape(ctx.shape), permutation[: ctx.num_kept], row_scale, ctx.grad_scale, ctx.dtype
            )
        return grad_output if ctx.needs_input_grad[0] else None, grad_kept, None, None, None, None, None


@torch.library.register_fake("dropbp_kernels::permuted_residual_add")
def _(residual: Tensor, kept: Tensor, dropped: Tensor, permutation: Tensor) -> Tensor:
    return torch.empty_like(residual, memory_format=torch.contiguous_format)
