"""PEFT's LoRA layers without passes between their products (`dropbp_kernels.lora`).

PEFT multiplies the adapter's product with the scaling and adds it to the base layer's: with a base in 16 bits and
adapters in its default float32, in float32, and with a float32 copy of the input saved for every layer. A layer that is
more than base + scaling * B A (DoRA, several adapters at once, an adapter's bias, merged, watched) is called as it is.
"""

import functools
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..autocast import is_autocast_on
from ..glu_linear import Adapter
from ..lora import add_lora, lora_linear
from ..plain_linear import is_watched, weight_and_bias
from .swapping import is_swapped, subclass, swap, swap_back

_ORIGINAL = "_dropbp_original_lora"  # of its own: gating may make a class of the one that is made here
_PLACES = "_dropbp_lora_places"


def install(block: nn.Module, fused: bool | str) -> None:
    """Let `refresh` fuse the LoRA layers that `block` has, and those that it gets later, unless `fused` is False."""
    if fused is not False:
        vars(block)[_PLACES] = list(_places(block))


def refresh(block: nn.Module) -> None:
    """Fuse the LoRA layers that `block` has got since the last time. Before its branches are gated."""
    if _PLACES not in vars(block) or not (kinds := _kinds()):
        return
    for parent, name in vars(block)[_PLACES]:
        module = parent._modules.get(name)
        if type(module) in kinds:
            swap(module, _fused_class)


def uninstall(model: nn.Module) -> None:
    """Undo `install` and `refresh`. After the model's branches were released."""
    for module in model.modules():
        vars(module).pop(_PLACES, None)
        if is_swapped(module, _ORIGINAL):
            swap_back(module, _ORIGINAL)


def _places(parent: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Where below `parent` PEFT puts its layers, or has put them: around modules that have none of their own."""
    for name, child in parent.named_children():
        if type(child) in _kinds() or next(child.children(), None) is None:
            yield parent, name
        else:
            yield from _places(child)


def _kinds() -> tuple[type, ...]:
    """PEFT's LoRA layers on a linear layer; none as long as nobody has imported PEFT."""
    return _kinds_of_peft() if "peft" in sys.modules else ()


@functools.cache
def _kinds_of_peft() -> tuple[type, ...]:
    """Plain, and of bitsandbytes where that is installed."""
    from peft.tuners import lora

    names = ("Linear4bit", "Linear8bitLt")  # asked of the package: without bitsandbytes their module is an error
    return (lora.Linear, *(getattr(lora, name) for name in names if hasattr(lora, name)))


@functools.cache
def _fused_class(original: Any) -> Any:
    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter = None if args or kwargs or torch.compiler.is_compiling() else _adapter(self)
        if adapter is None:
            return original.forward(self, x, *args, **kwargs)  # type: ignore[no-any-return]
        lora_a, lora_b, scaling, dropout = adapter
        if not _drops_out(dropout) and (frozen := _frozen(self.base_layer, x)) is not None:
            return lora_linear(x, *frozen, lora_a, lora_b, scaling)
        return add_lora(self.base_layer(x), dropout(x), lora_a, lora_b, scaling)

    return subclass(original, (_fused_class,), _ORIGINAL, forward=forward)


# Modules are looked up where nn.Module keeps them: its search takes 1 us, and this asks for many.
def _adapter(layer: Any) -> tuple[Tensor, Tensor, float, nn.Module] | None:
    """A, B, scaling and dropout of the one adapter that is to be added by nothing but these; else None."""
    if layer.disable_adapters or layer.merged_adapters or _has_any_global_hook():
        return None
    modules, active = layer._modules, layer.active_adapter
    downs = modules["lora_A"]._modules
    names = [name for name in ((active,) if isinstance(active, str) else active) if name in downs]
    if len(names) != 1 or names[0] in layer.lora_variant:
        return None
    (name,) = names
    dropout = modules["lora_dropout"]._modules[name]
    a, b = weight_and_bias(downs[name]), weight_and_bias(modules["lora_B"]._modules[name])
    if a is None or b is None or is_watched(dropout) or "forward" in vars(dropout):
        return None
    return (a[0], b[0], layer.scaling[name], dropout) if a[1] is None and b[1] is None else None


def _drops_out(dropout: Any) -> bool:
    return dropout.training and getattr(dropout, "p", 0.0) > 0.0  # type: ignore[no-any-return]


def _frozen(base: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of `base` where they are frozen and of x's dtype, or of any under autocast; else None."""
    found = weight_and_bias(base)
    if found is None or any(tensor is not None and tensor.requires_grad for tensor in found):
        return None
    return found if _has_dtype(found[0], x) else None


def trained_linear(layer: Any, x: Tensor) -> tuple[Tensor, Tensor | None, Adapter | None] | None:
    """Weight, bias and adapter of a layer whose gradients need its input x, and that nobody watches; else None.

    None also for a layer that does more with x than products (see `install`), or gets it in another dtype.
    """
    if is_watched(layer) or "forward" in vars(layer) or _has_any_global_hook():
        return None
    if not is_swapped(layer, _ORIGINAL):
        found = weight_and_bias(layer)
        if found is None or not found[0].requires_grad or not _has_dtype(found[0], x):
            return None
        return *found, None
    adapter, frozen = _adapter(layer), _frozen(layer.base_layer, x)
    if adapter is None or frozen is None or not adapter[0].requires_grad or _drops_out(adapter[3]):
        return None
    return *frozen, Adapter(*adapter[:3])


def _has_dtype(weight: Tensor, x: Tensor) -> bool:
    return weight.dtype is x.dtype or is_autocast_on(x.device.type)
