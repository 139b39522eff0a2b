"""How an op tells autograd of its backward, and that this has no derivative of its own."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable


class Function(torch.autograd.Function):
    """torch.autograd.Function without 2 us of Python a call.

    PyTorch's apply first looks for keyword arguments, a setup_context and tensors that a transform of torch.func left
    behind, of which ops have none; inside such a transform it is asked, and says so. torch.compile sees neither of
    both: it traces forward and backward.
    """

    @classmethod
    def apply(cls, *args: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            return super().apply(*args)
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]


def first_derivative(backward: Callable[..., Any]) -> Callable[..., Any]:
    """PyTorch's once_differentiable, without its 4 us a call where no graph of the backward is recorded."""
    checked = once_differentiable(backward)

    @functools.wraps(backward)
    def wrapper(ctx: Any, *gradients: Any) -> Any:
        return checked(ctx, *gradients) if torch.is_grad_enabled() else backward(ctx, *gradients)

    return wrapper
