"""Gated linear units: activation(gate) * up in one kernel, saving its two inputs and nothing else.

==========  ============  ======================  ==========================================================
the branch  argument      forward                 backward
==========  ============  ======================  ==========================================================
kept                      saves gate and up       one kernel; the gradients are two new tensors
kept        donate=True   saves gate and up       one kernel; the gradients lie where gate and up lay, if
                                                  nobody else holds these (`ownership`), else two new tensors
dropped                   saves nothing           none
dropped     inplace=True  saves nothing and       none
                          writes into gate
==========  ============  ======================  ==========================================================

Plain PyTorch saves activation(gate) as well. The linear layer that reads the product saves that too where its weight,
or an adapter beside it, is trained: `dropbp_kernels.glu_linear` is both in one, and computes it again.
"""

from typing import Any

import torch
from torch import Tensor

from ..derivative import Function, first_derivative
from ..ownership import owns_saved_tensors
from .checks import check_dtype
from .raw import raw as _raw

APPROXIMATIONS = {"none": "gelu", "tanh": "gelu_tanh"}
ACTIVATIONS = ("silu", *APPROXIMATIONS.values())


def swiglu(gate: Tensor, up: Tensor, *, inplace: bool = False, donate: bool = False) -> Tensor:
    """Return silu(gate) * up, with silu(x) = x * sigmoid(x).

    inplace writes the result into gate and returns it: for a dropped branch, which nothing is saved for.
    donate promises that the caller has no more use for gate and up: backward may then write their gradients into them.
    It does so only where their reference counts show that nobody else holds them, the graph is not retained and no
    saved-tensor hook is at work; what counts do not show, and the promise has to cover, is a kernel on another stream
    that still reads them. Under torch.compile donate is ignored: Inductor plans memory itself.

    Shapes: gate, up (..., D) alike; result (..., D). Halves of a packed (..., 2D) tensor are read where they are.
            Empty tensors are allowed.
    Dtypes: float32, float16, bfloat16, float64; both alike. Computed in float32 (float64 for float64), rounded once.
            A gate of minus infinity gives NaN, as in PyTorch.
    Errors: ValueError when shape or device differ, or with inplace when a gradient is required, TypeError when a dtype
            is unsupported or differs. A second derivative raises RuntimeError.
    Cost:   reads 2N, writes N elements; saves gate and up, without autograd nothing. Backward reads 3N, writes 2N.
            A layout other than rows of contiguous elements at one distance: a copy more.
    Source: GLU Variants (arXiv 2002.05202), eq. 6; oracle reference.glu_reference.
    """
    return glu(gate, up, "silu", inplace=inplace, donate=donate)


def geglu(
    gate: Tensor, up: Tensor, *, approximate: str = "none", inplace: bool = False, donate: bool = False
) -> Tensor:
    """Return gelu(gate) * up; approximate: "none" (by erf) or "tanh", as in torch.nn.functional.gelu.

    inplace, donate: as for `swiglu`.

    Shapes: as for `swiglu`.
    Dtypes: as for `swiglu`.
    Errors: as for `swiglu`; ValueError when approximate is something else.
    Cost:   as for `swiglu`.
    Source: GLU Variants (arXiv 2002.05202), eq. 6; GELU (arXiv 1606.08415); oracle reference.glu_reference.
    """
    if approximate not in APPROXIMATIONS:
        raise ValueError(f"approximate: expected one of {', '.join(APPROXIMATIONS)}, got {approximate!r}")
    return glu(gate, up, APPROXIMATIONS[approximate], inplace=inplace, donate=donate)


def glu(gate: Tensor, up: Tensor, activation: str, *, inplace: bool = False, donate: bool = False) -> Tensor:
    """`swiglu` or `geglu` by the name of the activation: "silu", "gelu" or "gelu_tanh"."""
    check_glu(gate, up)
    is_recorded = torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad)
    if inplace:
        return _overwrite(gate, up, activation, is_recorded)
    if is_recorded:
        return _Glu.apply(gate, up, activation, donate)
    return _raw.glu(gate, up, activation)


def check_glu(gate: Tensor, up: Tensor) -> None:
    """The errors of `swiglu`, but for those of inplace."""
    check_dtype("gate", gate.dtype)
    if up.dtype is not gate.dtype:
        raise TypeError(f"up: expected gate's dtype {gate.dtype}, got {up.dtype}")
    if up.shape != gate.shape:
        raise ValueError(f"up: expected gate's shape {tuple(gate.shape)}, got {tuple(up.shape)}")
    if up.device != gate.device:
        raise ValueError(f"up: expected on gate's device {gate.device}, got {up.device}")


def _overwrite(gate: Tensor, up: Tensor, activation: str, is_recorded: bool) -> Tensor:
    if is_recorded or gate.requires_grad:
        raise ValueError(
            "gate, up: expected tensors that require no gradient for inplace=True, got gate.requires_grad="
            f"{gate.requires_grad}, up.requires_grad={up.requires_grad}"
        )
    _raw.glu_(gate, up, activation)
    torch.autograd.graph.increment_version(gate)  # a raw op knows nothing of autograd
    return gate


class _Glu(Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str, donate: bool) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        ctx.donate = donate
        return _raw.glu(gate, up, activation)

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return None, None, None, None
        is_free = ctx.donate and owns_saved_tensors(ctx)
        gate, up = ctx.saved_tensors
        grads = glu_gradients(grad_output, gate, up, ctx.activation, is_free)
        needed = zip(grads, ctx.needs_input_grad, strict=False)
        return *(grad if is_needed else None for grad, is_needed in needed), None, None


def glu_gradients(
    grad_output: Tensor, gate: Tensor, up: Tensor, activation: str, is_free: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up: two new tensors, or (is_free) where gate and up lay."""
    if not is_free:
        return _raw.glu_backward(grad_output, gate, up, activation)  # type: ignore[no-any-return]
    _raw.glu_backward_(grad_output, gate, up, activation)
    torch.autograd.graph.increment_version((gate, up))  # whoever still meant to read them gets an error
    return gate.detach(), up.detach()


@torch.library.register_fake("dropbp_kernels::glu")
def _(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


@torch.library.register_fake("dropbp_kernels::glu_backward")
def _(grad_output: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    grad_gate = torch.empty_like(gate, memory_format=torch.contiguous_format)
    return grad_gate, torch.empty_like(grad_gate)
