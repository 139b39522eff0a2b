"""Rotary position embedding (RoPE), in place on the fast path.

==========  ============  ==========================  ======================================================
the branch  argument      forward                     backward
==========  ============  ==========================  ======================================================
kept                      one new tensor; saves cos   one kernel: the gradient turned back, a new tensor
                          and sin, which blocks share
dropped                   one new tensor              none
dropped     inplace=True  writes into x               none
==========  ============  ==========================  ======================================================

Plain PyTorch makes five temporary tensors of x's size in the forward and as many in the backward.
"""

from typing import Any

import torch
from torch import Tensor

from ..derivative import Function, first_derivative
from .checks import check_dtype
from .raw import raw as _raw


def rope(x: Tensor, cos: Tensor, sin: Tensor, *, inplace: bool = False) -> Tensor:
    """Turn each pair of channels (i, i + R/2) of every head by the angle of its position.

    With x = (a, b, rest) of R/2, R/2 and D - R channels: (a cos - b sin, b cos + a sin, rest), the half-split layout of
    Llama and GPT-NeoX. Each half takes its own half of cos and sin, as in transformers' models.
    inplace writes the result into x and returns it: for a dropped branch.

    Shapes: x (B, S, H, D), any strides; cos, sin (S, R) or (1 or B, S, R) with R even and R <= D. The result is
            contiguous, or x. What a projection returns, viewed as heads, has this shape; transpose afterwards.
    Dtypes: x float32, float16, bfloat16 or float64; cos and sin alike, x's or float32 (float64 for float64). Computed
            in float32 (float64 for float64), rounded once.
    Errors: ValueError when a shape or device does not fit, when cos or sin requires a gradient, or with inplace when x
            does; TypeError for a dtype. A second derivative raises RuntimeError.
    Cost:   reads and writes x once, in place only R of its D channels; saves nothing of x's size.
    Source: RoFormer (arXiv 2104.09864), eq. 34; oracle reference.rope_reference.
    """
    _check(x, cos, sin)
    if inplace:
        if x.requires_grad:
            raise ValueError("x: expected a tensor that requires no gradient for inplace=True, got one that does")
        _raw.rope_(x, cos, sin)
        torch.autograd.graph.increment_version(x)  # a raw op knows nothing of autograd
        return x
    if torch.is_grad_enabled() and x.requires_grad:
        return _Rope.apply(x, cos, sin)
    return _raw.rope(x, cos, sin, False)


def _check(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    check_dtype("x", x.dtype)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if x.dim() != 4:
        raise ValueError(f"x: expected shape (batch, seq, heads, head_dim), got {tuple(x.shape)}")
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dtype not in (x.dtype, wide) or table.dtype is not cos.dtype:
            raise TypeError(f"{name}: expected x's dtype {x.dtype} or {wide}, as cos, got {table.dtype}")
        if table.dim() not in (2, 3) or table.shape[-2] != x.shape[1] or table.shape != cos.shape:
            raise ValueError(
                f"{name}: expected shape (seq, R) or (1 or batch, seq, R) alike for x {tuple(x.shape)}, "
                f"got {tuple(table.shape)}"
            )
        if table.dim() == 3 and table.shape[0] not in (1, x.shape[0]):
            raise ValueError(f"{name}: expected 1 or {x.shape[0]} samples, got {table.shape[0]}")
        if table.shape[-1] % 2 or table.shape[-1] > x.shape[-1]:
            raise ValueError(f"{name}: expected an even R <= {x.shape[-1]} of channels, got {table.shape[-1]}")
        if table.device != x.device:
            raise ValueError(f"{name}: expected on x's device {x.device}, got {table.device}")
        if table.requires_grad:
            raise ValueError(f"{name}: expected a constant, got a tensor that requires a gradient")


class _Rope(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(cos, sin)
        return _raw.rope(x, cos, sin, False)

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, None, None]:
        if grad_output is None:
            return None, None, None
        return _raw.rope(grad_output, *ctx.saved_tensors, True), None, None


@torch.library.register_fake("dropbp_kernels::rope")
def _(x: Tensor, cos: Tensor, sin: Tensor, transpose: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
