"""What torch.autocast means for functions that run products of their own: in which dtype, and whether it is on."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

_NOTHING = nullcontext()


def is_autocast_on(device_type: str) -> bool:
    """Whether products on such devices run under autocast; False where there is none (meta)."""
    # Asking devices without autocast whether it is on is an error. Which have any is a question that dynamo of torch
    # 2.11 cannot trace; what it traces has.
    has_autocast = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device_type)
    return has_autocast and torch.is_autocast_enabled(device_type)


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a product with x, as torch.nn.functional.linear has it: x's own, or autocast's but for float64."""
    if x.dtype is torch.float64 or not is_autocast_on(x.device.type):
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """A context without autocast on such devices; where there is none, one that takes no time."""
    return torch.autocast(device_type, enabled=False) if is_autocast_on(device_type) else _NOTHING
