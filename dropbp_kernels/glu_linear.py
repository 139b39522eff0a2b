"""The linear layer behind a gated product: trained without saving that product, which the backward computes again.

    y = (activation(gate) * up) W^T + b   and, with an adapter,   + scaling * ((activation(gate) * up) A^T) B^T

As two layers gate, up and their product are saved; the product only for the gradient of W, or of A. It is one kernel,
and of the three tensors of an MLP's inner width it is the one that the other two make.
"""

from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from .autocast import without_autocast
from .derivative import Function, first_derivative
from .lora import as_dtype, linear_and_low, low_rank_gradients, rows_of
from .ops.glu import ACTIVATIONS, check_glu, glu_gradients
from .ops.raw import raw
from .ownership import owns_saved_tensors


class Adapter(NamedTuple):
    """A low-rank adapter beside a linear layer, as in `lora.lora_linear`."""

    lora_a: Tensor
    lora_b: Tensor
    scaling: float = 1.0


def glu_linear(
    gate: Tensor,
    up: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "silu",
    adapter: Adapter | None = None,
    donate: bool = False,
) -> Tensor:
    """Return the linear layer of activation(gate) * up.

    activation: "silu", "gelu" or "gelu_tanh". donate: as for `ops.swiglu`.

    Shapes: gate, up (..., in) alike, weight (out, in), bias (out,), lora_a (r, in), lora_b (out, r); result (..., out).
    Dtypes: gate and up alike: float32, float16, bfloat16 or float64, which the result has; the others may be wider, and
        are rounded to it, as under autocast.
    Errors: those of `ops.swiglu` and of torch.nn.functional.linear; ValueError when activation is something else.
    Cost:   as the gated product and the layer by themselves, and in the backward the product's kernel once more, where
        weight or lora_a are trained. Saves gate and up, and r numbers a row.
    Source: GLU Variants (arXiv 2002.05202); oracle the two layers in float64.
    """
    check_glu(gate, up)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    lora_a, lora_b, scaling = adapter or (None, None, 1.0)
    with without_autocast(gate.device.type):
        return _GluLinear.apply(  # type: ignore[no-any-return]
            gate, up, weight, bias, lora_a, lora_b, scaling, activation, donate
        )


class _GluLinear(Function):
    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        up: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        scaling: float,
        activation: str,
        donate: bool,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.scaling, ctx.activation, ctx.donate = scaling, activation, donate
        ctx.wants = ctx.needs_input_grad[4:6]
        product = raw.glu(gate, up, activation)
        if lora_a is None or lora_b is None:
            ctx.save_for_backward(gate, up, weight)
            return F.linear(product, as_dtype(weight, gate.dtype), bias if bias is None else as_dtype(bias, gate.dtype))
        output, low = linear_and_low(product, weight, bias, lora_a, lora_b, scaling)
        ctx.save_for_backward(gate, up, weight, low, lora_a, lora_b)
        return output

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * 9
        is_free = ctx.donate and owns_saved_tensors(ctx, 2)
        gate, up, weight, *adapter = ctx.saved_tensors
        needs_gate, needs_up, needs_weight, needs_bias, needs_a, _ = ctx.needs_input_grad[:6]
        grad_gate = grad_up = grad_weight = grad_a = grad_b = low = None
        product: Any = None
        with without_autocast(gate.device.type):
            grad = rows_of(grad_output)
            if needs_weight or needs_a:
                product = rows_of(raw.glu(gate, up, ctx.activation))
            if needs_weight:
                grad_weight = grad.t().mm(product)
            if adapter:
                low, grad_a, grad_b, a = low_rank_gradients(ctx, grad, product, *adapter)
            product = None  # before there is another tensor of its size
            if needs_gate or needs_up:
                grad_product = grad.mm(as_dtype(weight, grad.dtype))
                if low is not None:
                    grad_product.addmm_(low, a, alpha=ctx.scaling)
                grad_product = grad_product.view(gate.shape)
                grad_gate, grad_up = glu_gradients(grad_product, gate, up, ctx.activation, is_free)
            grad_bias = grad.sum(0) if needs_bias else None
        return grad_gate, grad_up, grad_weight, grad_bias, grad_a, grad_b, None, None, None
