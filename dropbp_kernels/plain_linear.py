"""Linear layers whose product may be computed past them: nobody would notice, and the numbers are theirs."""

from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor


def weight_and_bias(linear: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Those of a linear layer that nobody watches, where the weight is a whole tensor; None for any other module."""
    if type(linear) is not nn.Linear or is_watched(linear) or "forward" in vars(linear):
        return None
    # Where nn.Module keeps them: its search for an attribute takes 1 us.
    weight = linear._parameters.get("weight")
    return (weight, linear._parameters["bias"]) if weight is not None and is_whole(weight) else None


def is_watched(module: nn.Module) -> bool:
    """Whether anybody but the caller sees what goes into or comes out of `module`."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def is_whole(tensor: Any) -> bool:
    """Whether products with it may be our own: not of a DTensor or quantised one, nor of what DeepSpeed leaves."""
    return type(tensor) in (Tensor, nn.Parameter, FakeTensor) and not hasattr(tensor, "ds_id")
