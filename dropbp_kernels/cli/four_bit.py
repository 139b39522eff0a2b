"""Linear layers held in 4 bits, as far as a plan needs them: how much they take, and what lives while they run.

The layout is QLoRA's: NF4 in blocks of 64 with an 8-bit scale each, and a float32 scale for 256 of those. A product
unpacks the weight first, in forward and in backward, and saves nothing for it.

Source: QLoRA (arXiv 2305.14314), section 3.
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

BYTES_PER_WEIGHT = 0.5 + 1 / 64 + 4 / (64 * 256)


class _UnpackedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight  # packed: what it takes is counted with the weights
        return x @ torch.empty_like(weight).t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad @ torch.empty_like(ctx.weight), None


class FourBitLinear(nn.Linear):
    """A frozen linear layer whose weight is unpacked for every product. Values are not kept: for fake tensors only."""

    def forward(self, input: Tensor) -> Tensor:
        output = _UnpackedProduct.apply(input, self.weight)
        return output if self.bias is None else output + self.bias


@functools.cache
def _paca_linear() -> Any:
    """The layer of PaCA over such a weight. Made when asked for: PaCA needs PEFT."""
    from ..paca.layer import Linear
    from ..paca.linear import Columns, column_linear

    class FourBitPaca(Linear):
        def _product(self, x: Tensor, columns: Columns, trained: Tensor) -> Tensor:
            base: Any = self.get_base_layer()
            return column_linear(
                x, base.weight, base.bias, trained, columns, unpack=lambda: torch.empty_like(base.weight)
            )

    return FourBitPaca


def mark(model: nn.Module) -> None:
    """Let every linear layer that has an adapter run as if held in 4 bits."""
    for layer, base in _adapted(model):
        if hasattr(layer, "paca_columns"):
            layer.__class__ = _paca_linear()
        else:
            base.__class__ = FourBitLinear


def saved_bytes(model: nn.Module) -> int:
    """How much less the weights take than in the model's dtype."""
    return round(sum(base.weight.nbytes - BYTES_PER_WEIGHT * base.weight.numel() for _, base in _adapted(model)))


def _adapted(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Linear]]:
    """(adapter's layer, linear layer below it)."""
    for module in model.modules():
        base = getattr(module, "base_layer", None)
        if isinstance(base, nn.Linear):
            yield module, base
