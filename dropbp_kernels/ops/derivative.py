"""How the backward of an op says that it has no derivative of its own."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable


def first_derivative(backward: Callable[..., Any]) -> Callable[..., Any]:
    """PyTorch's once_differentiable, without its 4 us a call where no graph of the backward is recorded."""
    checked = once_differentiable(backward)

    @functools.wraps(backward)
    def wrapper(ctx: Any, *gradients: Any) -> Any:
        return checked(ctx, *gradients) if torch.is_grad_enabled() else backward(ctx, *gradients)

    return wrapper
