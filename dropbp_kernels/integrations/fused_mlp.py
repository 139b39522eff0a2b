"""Gated MLPs of transformers models with the activation and the product in one kernel (`ops.glu`).

As written, silu(gate(x)) * up(x) saves three tensors of the MLP's inner width for the backward. Fused it saves gate(x)
and up(x), whose gradients are then written where they lay, and a dropped branch writes the product over gate(x). Where
the layer behind is trained or has an adapter it would save the product, a third: `glu_linear` computes it again. Values
are equal up to rounding.
"""

import functools
import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn

from ..glu_linear import glu_linear
from ..ops.checks import DTYPES
from ..ops.glu import APPROXIMATIONS, glu
from ..plain_linear import is_watched
from .fused_lora import trained_linear
from .fusing import has_kernel
from .same_code import is_same_code
from .swapping import is_swapped, subclass, swap, swap_back

_ORIGINAL = "_dropbp_original_mlp"  # of its own: gating may make a class of the one that is made here
# Activations by class name; nn.GELU tells the rest by its attributes.
_ACTIVATIONS = {"SiLU": "silu", "SiLUActivation": "silu", "GELUTanh": "gelu_tanh", "GELUActivation": "gelu"}


def install(model: nn.Module, fused: bool | str) -> None:
    """Fuse the MLPs of `model` that are known, as `fused` of apply_dropbp says. Before its branches are gated."""
    if fused is False or "transformers" not in sys.modules:
        return
    for module in model.modules():
        kind: Any = type(module)
        if _parts(kind) is not None:
            swap(module, _fused_class, fused)


def uninstall(model: nn.Module) -> None:
    """Undo `install`. After its branches were released."""
    for module in model.modules():
        if is_swapped(module, _ORIGINAL):
            swap_back(module, _ORIGINAL)


@functools.cache
def _fused_class(original: Any, fused: bool | str) -> Any:
    parts = _parts(original)
    assert parts is not None  # or `install` had left it
    names, activation_name = parts
    is_packed = len(names) == 1

    def forward(self: Any, x: Tensor) -> Tensor:
        activation = getattr(self, activation_name)
        known = _known(activation)
        if known is None or torch.compiler.is_compiling() or not (fused is True or has_kernel(x.device.type, "glu")):
            return original.forward(self, x)  # type: ignore[no-any-return]
        makers = [getattr(self, name) for name in names]
        made = [maker(x) for maker in makers]
        gate, up = made[0].chunk(2, dim=-1) if is_packed else made
        if gate.dtype not in DTYPES or gate.dtype is not up.dtype:
            return self.down_proj(activation(gate) * up)  # type: ignore[no-any-return]
        # Nobody else holds what a projection just made, unless it made no tensor of its own or is watched.
        is_ours = not any(map(is_watched, makers)) and all(y._base is None and y is not x for y in made)
        if torch.is_grad_enabled() and (down := trained_linear(self.down_proj, gate)) is not None:
            weight, bias, adapter = down
            return glu_linear(gate, up, weight, bias, activation=known, adapter=adapter, donate=is_ours)
        is_recorded = torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad)
        product = glu(gate, up, known, inplace=is_ours and not is_recorded, donate=is_ours and is_recorded)
        del made, gate, up  # the product's node alone holds them, or nobody
        return self.down_proj(product)

    return subclass(original, (_fused_class, fused), _ORIGINAL, forward=forward)


@functools.cache
def _parts(mlp: Any) -> tuple[tuple[str, ...], str] | None:
    """Of MLPs of this class the names of the layers that make gate and up, or of the one that makes both, gate first,
    and of the activation; None where the forward is not known.
    """
    from transformers.models.llama.modeling_llama import LlamaMLP
    from transformers.models.phi3.modeling_phi3 import Phi3MLP

    if is_same_code(mlp.forward, LlamaMLP.forward) or is_same_code(mlp.forward, _in_a_line):
        return ("gate_proj", "up_proj"), "act_fn"
    return (("gate_up_proj",), "activation_fn") if is_same_code(mlp.forward, Phi3MLP.forward) else None


def _in_a_line(self: Any, x: Tensor) -> Any:
    """Llama's MLP as other models write it (Qwen2.5-VL)."""
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def _known(activation: Any) -> str | None:
    """The name by which `ops.glu` has an activation that nobody watches; None where it has none."""
    name, is_module = type(activation).__name__, isinstance(activation, nn.Module)
    if not is_module or is_watched(activation) or "forward" in vars(activation):
        return None
    if name == "GELU":
        return APPROXIMATIONS[activation.approximate]
    if inspect.ismethod(vars(activation).get("act")):  # asked for in Python, which rounds otherwise
        return None
    return _ACTIVATIONS.get(name)
