"""The modules of a decoder that the stages of a target plan ask about.

They are found once and not in each step: a model of 32 layers with adapters has thousands of modules, and a few walks
through them take as long as some layers.
"""

from collections import Counter
from typing import Any

from torch import nn

from ..layer import DropBP
from .target_checks import gathers_weights

PARTS = "_dropbp_parts"


class DecoderParts:
    """Found in `decoder` as it is now.

    gates: those of its branches. switches: modules with transformers' switch for checkpointing, the decoder among them.
    attention: modules that leave keys in a cache, in their order. around: from the decoder to the attention of its last
    layer. layers: by number, modules that hold one attention alone, outermost first. gathers_weights: whether ranks
    share out its weights and gather them in each pass.
    """

    def __init__(self, decoder: nn.Module):
        modules = dict(decoder.named_modules())
        self.gates = [module for module in modules.values() if isinstance(module, DropBP)]
        self.switches: list[Any] = [module for module in modules.values() if hasattr(module, "gradient_checkpointing")]
        attention = {name: module for name, module in modules.items() if _is_attention(module)}
        self.attention: list[Any] = list(attention.values())
        self._name = max(attention, key=lambda name: attention[name].layer_idx, default="")
        number = getattr(attention.get(self._name), "layer_idx", None)
        stacks = {name.split(f".{number}.")[0] for name, module in attention.items() if module.layer_idx == number}
        self._runs_last = len(stacks) == 1  # of a number that two stacks have (HRM's) nobody knows
        self.around = _around(decoder, self._name)
        self._types = [type(module) for module in self.around]
        ways = {module.layer_idx: _around(decoder, name) for name, module in attention.items()}
        held = Counter(module for way in ways.values() for module in way)
        self.layers = {number: [module for module in way if held[module] == 1] for number, way in ways.items()}
        self.gathers_weights = gathers_weights(decoder)

    def still_hold(self, decoder: nn.Module) -> bool:
        """Whether nobody has wrapped the last layer since, or swapped a class around it, as FSDP does."""
        try:
            around = _around(decoder, self._name)
        except AttributeError:
            return False
        return around == self.around and [type(module) for module in around] == self._types

    @property
    def last_keys(self) -> int | None:
        """The last layer that leaves keys to later stages: once they are made, a context stage may end.

        None where it has to run through, since hooks bring the weights of a module and take them away at its end, or
        where the highest number does not say which layer runs last.
        """
        held = any(module._forward_hooks or hasattr(module, "_hf_hook") for module in self.around)
        if held or self.gathers_weights or not self._runs_last:
            return None
        return self.around[-1].layer_idx  # type: ignore[return-value]


def parts_of(decoder: nn.Module) -> DecoderParts:
    """The parts of a patched decoder; cost: a walk through its modules at the first call."""
    parts: DecoderParts | None = vars(decoder).get(PARTS)
    if parts is None or not parts.still_hold(decoder):
        parts = vars(decoder)[PARTS] = DecoderParts(decoder)
    return parts


def _is_attention(module: nn.Module) -> bool:
    return _has_number(module) and not any(map(_has_number, module.children()))


def _has_number(module: nn.Module) -> bool:
    return getattr(module, "layer_idx", None) is not None


def _around(decoder: nn.Module, name: str) -> list[nn.Module]:
    around = [decoder]
    for child in name.split(".") if name else ():
        around.append(around[-1].get_submodule(child))
    return around
