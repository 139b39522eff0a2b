"""The product of a linear layer with a low-rank adapter beside it, and its gradients, without passes between products.

    y = x W^T + b + scaling * (x A^T) B^T

Written as modules that is a product, a second one of the same size, a multiplication and an addition, each of them a
pass over a tensor as large as y, and with adapters in a wider dtype a wider copy of x that is saved. Here the adapter's
second product adds into the first one's result; in the backward, so does its gradient into that of x. Saved are x, as
it is, and the r numbers a row of x A^T.

Products run in the dtype of x, or in autocast's; adapters in a wider dtype are rounded to it, as under autocast, and
their gradients come back in their own.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops.derivative import Function, first_derivative


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float = 1.0
) -> Tensor:
    """Return x W^T + b + scaling * (x A^T) B^T, where W and b are frozen.

    Shapes: x (..., in), weight (out, in), bias (out,), lora_a (r, in), lora_b (out, r); result (..., out).
    Dtypes: x and weight alike, or under autocast any; lora_a and lora_b any floating dtype. The result is of x's dtype,
        or of autocast's.
    Errors: those of torch.nn.functional.linear; ValueError when weight or bias requires a gradient, which it would not
        get.
    Cost:   one product of full size and two of rank r forward, one and four backward; passes over a tensor of y's size
        besides the product: one. Saves x and r numbers a row.
    Source: LoRA (arXiv 2106.09685), section 4.1; oracle the same sum in float64.
    """
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: expected a frozen tensor, got one that requires a gradient")
    dtype = _dtype(x)
    x = x.to(dtype)
    if torch.is_grad_enabled():
        return _LoraLinear.apply(x, weight, bias, lora_a, lora_b, scaling)  # type: ignore[no-any-return]
    return _linear(x, weight, bias, lora_a, lora_b, scaling)[0]


def add_lora(output: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float = 1.0) -> Tensor:
    """Return output + scaling * (x A^T) B^T, for a base layer of another kind (quantised, say) or an x of its own.

    Shapes: output (..., out), x (..., in), lora_a (r, in), lora_b (out, r); result (..., out).
    Dtypes: output any floating dtype, in which the result is and products run; the others any.
    Errors: those of torch.addmm.
    Cost:   two products of rank r forward, four backward, and one pass over output. Saves x in output's dtype (the
        tensor itself, where it is in that already) and r numbers a row.
    Source: as `lora_linear`.
    """
    x = x.to(output.dtype)
    if torch.is_grad_enabled():
        return _AddLora.apply(output, x, lora_a, lora_b, scaling)  # type: ignore[no-any-return]
    return _add(output, x, lora_a, lora_b, scaling)[0]


def _dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    is_cast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if is_cast else x.dtype


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """The result, and x A^T in rows."""
    dtype = x.dtype
    with torch.autocast(x.device.type, enabled=False):
        output = F.linear(x, weight.to(dtype), bias if bias is None else bias.to(dtype))
        low = _rows(x).mm(lora_a.to(dtype).t())
        output.view(-1, output.shape[-1]).addmm_(low, lora_b.to(dtype).t(), alpha=scaling)
    return output, low


def _add(output: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """The result, and x A^T in rows."""
    dtype = output.dtype
    with torch.autocast(x.device.type, enabled=False):
        low = _rows(x).mm(lora_a.to(dtype).t())
        result = output.clone(memory_format=torch.contiguous_format)
        result.view(-1, output.shape[-1]).addmm_(low, lora_b.to(dtype).t(), alpha=scaling)
    return result, low


def _save(ctx: Any, x: Tensor, low: Tensor, lora_a: Tensor, lora_b: Tensor, *others: Tensor) -> None:
    """What the backward needs: x for the gradient of lora_a alone, x A^T for that of lora_b alone."""
    wants_a, wants_b = ctx.wants = ctx.needs_input_grad[-3:-1]
    ctx.save_for_backward(x if wants_a else None, low if wants_b else None, lora_a, lora_b, *others)


def _backward(ctx: Any, grad: Tensor, x: Tensor, low: Tensor, lora_a: Tensor, lora_b: Tensor) -> tuple[Any, ...]:
    """The gradient of x A^T in rows, and those of lora_a and lora_b as far as they are wanted."""
    wants_a, wants_b = ctx.wants
    grad_low = grad.mm(lora_b.to(grad.dtype)).mul_(ctx.scaling)
    grad_a = grad_low.t().mm(_rows(x)).to(lora_a.dtype) if wants_a else None
    grad_b = grad.t().mm(low).to(lora_b.dtype).mul_(ctx.scaling) if wants_b else None
    return grad_low, grad_a, grad_b


class _LoraLinear(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float
    ) -> Tensor:
        output, low = _linear(x, weight, bias, lora_a, lora_b, scaling)
        _save(ctx, x, low, lora_a, lora_b, weight)
        ctx.scaling = scaling
        return output

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *adapter, weight = ctx.saved_tensors
        grad_x = None
        with torch.autocast(grad_output.device.type, enabled=False):
            grad = _rows(grad_output)
            grad_low, grad_a, grad_b = _backward(ctx, grad, *adapter)
            if ctx.needs_input_grad[0]:
                grad_x = grad_output.matmul(weight.to(grad.dtype))
                grad_x.view(-1, grad_x.shape[-1]).addmm_(grad_low, adapter[2].to(grad.dtype))
        return grad_x, None, None, grad_a, grad_b, None


class _AddLora(Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
        result, low = _add(output, x, lora_a, lora_b, scaling)
        _save(ctx, x, low, lora_a, lora_b)
        ctx.scaling = scaling
        return result

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, low, lora_a, lora_b = ctx.saved_tensors
        grad_x = None
        with torch.autocast(grad_output.device.type, enabled=False):
            grad_low, grad_a, grad_b = _backward(ctx, _rows(grad_output), x, low, lora_a, lora_b)
            if ctx.needs_input_grad[1]:
                grad_x = grad_low.mm(lora_a.to(grad_low.dtype)).view(*grad_output.shape[:-1], lora_a.shape[1])
        return grad_output, grad_x, grad_a, grad_b, None
