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

from .autocast import product_dtype, without_autocast
from .derivative import Function, first_derivative


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
    x = as_dtype(x, product_dtype(x))
    with without_autocast(x.device.type):
        if torch.is_grad_enabled():
            return _LoraLinear.apply(x, weight, bias, lora_a, lora_b, scaling)  # type: ignore[no-any-return]
        return linear_and_low(x, weight, bias, lora_a, lora_b, scaling)[0]


def add_lora(output: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float = 1.0) -> Tensor:
    """Return output + scaling * (x A^T) B^T, for a base layer of another kind (quantised, say) or an x of its own.

    Shapes: output (..., out), x (..., in), lora_a (r, in), lora_b (out, r); result (..., out).
    Dtypes: output any floating dtype, in which the result is and products run; the others any.
    Errors: those of torch.addmm.
    Cost:   two products of rank r forward, four backward, and a copy of output. Saves x in output's dtype (the
        tensor itself, where it is in that already) and r numbers a row.
    Source: as `lora_linear`.
    """
    with without_autocast(x.device.type):
        x = as_dtype(x, output.dtype)
        if torch.is_grad_enabled():
            return _AddLora.apply(output, x, lora_a, lora_b, scaling)  # type: ignore[no-any-return]
        return _add(output, x, lora_a, lora_b, scaling)[0]


def rows_of(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def as_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def linear_and_low(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """The result, and x A^T in rows."""
    dtype = x.dtype
    output = F.linear(x, as_dtype(weight, dtype), bias if bias is None else as_dtype(bias, dtype))
    low = rows_of(x).mm(as_dtype(lora_a, dtype).t())
    output.view(-1, output.shape[-1]).addmm_(low, as_dtype(lora_b, dtype).t(), alpha=scaling)
    return output, low


def _add(output: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """The result, and x A^T in rows."""
    dtype = output.dtype
    low = rows_of(x).mm(as_dtype(lora_a, dtype).t())
    result = output.clone(memory_format=torch.contiguous_format)
    result.view(-1, output.shape[-1]).addmm_(low, as_dtype(lora_b, dtype).t(), alpha=scaling)
    return result, low


def _save(ctx: Any, x: Tensor, low: Tensor, lora_a: Tensor, lora_b: Tensor, *others: Tensor) -> None:
    """What the backward needs: x for the gradient of lora_a alone, x A^T for that of lora_b alone."""
    wants_a, wants_b = ctx.wants = ctx.needs_input_grad[-3:-1]
    ctx.save_for_backward(x if wants_a else None, low if wants_b else None, lora_a, lora_b, *others)


def low_rank_gradients(ctx: Any, grad: Tensor, x: Any, low: Tensor, lora_a: Tensor, lora_b: Tensor) -> tuple[Any, ...]:
    """The gradient of x A^T in rows, but for scaling; those of lora_a and lora_b as far as wanted; lora_a as read.

    All in grad's dtype: autograd gives each parameter its own.
    """
    a, b = as_dtype(lora_a, grad.dtype), as_dtype(lora_b, grad.dtype)
    grad_low = grad.mm(b)
    # With beta 0 addmm reads nothing of what it adds to: it is a product that is scaled on its way out.
    scaled = {"beta": 0, "alpha": ctx.scaling}
    grad_a = torch.addmm(a, grad_low.t(), rows_of(x), **scaled) if ctx.wants[0] else None
    grad_b = torch.addmm(b, grad.t(), low, **scaled) if ctx.wants[1] else None
    return grad_low, grad_a, grad_b, a


class _LoraLinear(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float
    ) -> Tensor:
        output, low = linear_and_low(x, weight, bias, lora_a, lora_b, scaling)
        _save(ctx, x, low, lora_a, lora_b, weight)
        ctx.scaling = scaling
        return output

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *adapter, weight = ctx.saved_tensors
        grad_x = None
        with without_autocast(grad_output.device.type):
            grad = rows_of(grad_output)
            grad_low, grad_a, grad_b, a = low_rank_gradients(ctx, grad, *adapter)
            if ctx.needs_input_grad[0]:
                grad_x = grad.mm(as_dtype(weight, grad.dtype)).addmm_(grad_low, a, alpha=ctx.scaling)
                grad_x = grad_x.view(*grad_output.shape[:-1], a.shape[1])
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
        with without_autocast(grad_output.device.type):
            grad_low, grad_a, grad_b, a = low_rank_gradients(ctx, rows_of(grad_output), x, low, lora_a, lora_b)
            if ctx.needs_input_grad[1]:
                grad_x = grad_low.mul_(ctx.scaling).mm(a).view(*grad_output.shape[:-1], a.shape[1])
        return grad_output, grad_x, grad_a, grad_b, None
