"""The linear layers that may have partial connections: their sizes, and their weight as (out, in)."""

from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..plain_linear import is_whole


def features(base: Any) -> tuple[int, int]:
    """(in, out) of a linear layer. Errors: TypeError when it is none that PaCA can train columns of."""
    if isinstance(base, Conv1D):
        return base.weight.shape[0], base.weight.shape[1]
    if isinstance(base, nn.Linear):
        return base.in_features, base.out_features
    raise TypeError(f"target_modules: expected nn.Linear or transformers' Conv1D, got {type(base).__name__}")


def out_by_in(base: Any) -> Tensor:
    """The values of a linear layer's weight as (out, in), without a graph; of a quantised one a new tensor."""
    if is_quantised(base):
        from .bnb import unpacked

        return unpacked(base)
    return base.weight.data.t() if isinstance(base, Conv1D) else base.weight.data


def is_quantised(base: Any) -> bool:
    """Whether bitsandbytes holds the weight; asked by name, so that bitsandbytes is not imported for the answer."""
    return type(base.weight).__name__ in ("Params4bit", "Int8Params")


def is_plain(base: Any) -> bool:
    """Whether the weight is a tensor like any other, or one of bitsandbytes: no subclass with products of its own."""
    return is_whole(base.weight) or is_quantised(base)
