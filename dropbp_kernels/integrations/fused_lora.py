"""PEFT's LoRA layers without passes between their products (`dropbp_kernels.lora`).

PEFT multiplies the adapter's product with the scaling and adds it to the base layer's: with a base in 16 bits and
adapters in its default float32, in float32, and with a float32 copy of the input saved for every layer. A layer that is
more than base + scaling * B A (DoRA, several adapters at once, an adapter's bias, merged, watched) is called as it is.
"""

import functools
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..lora import add_lora, lora_linear
from .fusing import is_watched
from .swapping import is_swapped, is_whole, subclass, swap, swap_back

_ORIGINAL = "_dropbp_original_lora"  # of its own: gating may make a class of the one that is made here


def install(model: nn.Module, fused: bool | str) -> None:
    """Fuse the LoRA layers that `model` has, unless `fused` is False. Before its branches are gated."""
    if fused is False or "peft" not in sys.modules:
        return
    kinds = _kinds()
    for module in list(model.modules()):
        if type(module) in kinds:
            swap(module, _fused_class)


def uninstall(model: nn.Module) -> None:
    """Undo `install`. After its branches were released."""
    for module in model.modules():
        if is_swapped(module, _ORIGINAL):
            swap_back(module, _ORIGINAL)


@functools.cache
def _kinds() -> tuple[type, ...]:
    """PEFT's LoRA layers on a linear layer: plain, and of bitsandbytes where that is installed."""
    from peft.tuners.lora import bnb, layer

    names = ("Linear4bit", "Linear8bitLt")
    return (layer.Linear, *(getattr(bnb, name) for name in names if hasattr(bnb, name)))


@functools.cache
def _fused_class(original: Any) -> Any:
    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = None if args or kwargs or torch.compiler.is_compiling() else _adapter(self)
        if name is None:
            return original.forward(self, x, *args, **kwargs)  # type: ignore[no-any-return]
        base, dropout = self.base_layer, self.lora_dropout[name]
        adapter = self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]
        is_dropped_out = dropout.training and getattr(dropout, "p", 0.0) > 0.0
        if not is_dropped_out and _is_plain(base, x):
            return lora_linear(x, base.weight, base.bias, *adapter)
        return add_lora(base(x), dropout(x), *adapter)

    return subclass(original, (_fused_class,), _ORIGINAL, forward=forward)


def _adapter(layer: Any) -> str | None:
    """The name of the one adapter to add to the base layer's output, by nothing but its two matrices; else None."""
    if layer.disable_adapters or layer.merged or _has_any_global_hook():
        return None
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(names) != 1 or names[0] in layer.lora_variant:
        return None
    parts = layer.lora_A[names[0]], layer.lora_B[names[0]], layer.lora_dropout[names[0]]
    are_plain = all(type(part) is nn.Linear and is_whole(part.weight) and part.bias is None for part in parts[:2])
    return names[0] if are_plain and not any(is_watched(part) or "forward" in vars(part) for part in parts) else None


def _is_plain(base: Any, x: Tensor) -> bool:
    """Whether `base` is a frozen linear layer of plain tensors, which nobody watches."""
    if type(base) is not nn.Linear or is_watched(base) or "forward" in vars(base):
        return False
    weight, bias = base.weight, base.bias
    is_frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
    same_dtype = weight.dtype is x.dtype or torch.is_autocast_enabled(x.device.type)
    return is_frozen and same_dtype and is_whole(weight)
