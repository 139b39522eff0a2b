"""How an autograd function tells autograd of its backward, and that this has no derivative of its own."""

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

_is_transforming = torch._C._are_functorch_transforms_active


class Function(torch.autograd.Function):
    """torch.autograd.Function without more than 2 us of Python a call.

    PyTorch's apply first looks for keyword arguments, a setup_context and tensors that a transform of torch.func left
    behind, of which ops have none; inside such a transform it is asked, and says so. torch.compile sees neither of
    both: it traces forward and backward.
    """

    _apply: ClassVar[Callable[..., Any]]

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        cls._apply = super(torch.autograd.Function, cls).apply  # type: ignore[misc]

    @classmethod
    def apply(cls, *args: Any) -> Any:
        return super().apply(*args) if _is_transforming() else cls._apply(*args)


def first_derivative(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward of which a second derivative is a RuntimeError, at no cost where no graph of it is recorded.

    PyTorch's once_differentiable puts its error at the end of a graph that leads nowhere: `loss.backward()` runs into
    it, but `torch.autograd.grad`, of which Hessian products are made, goes from the loss to its inputs alone, and takes
    what it cannot reach for zero. And it looks at the gradients only, which need none behind a loss that is a sum.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *gradients: Any) -> Any:
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():  # which has no second derivatives either
            return backward(ctx, *gradients)
        context = _ReadOnce(ctx)
        with torch.no_grad():
            results = backward(context, *gradients)
        sources = [
            tensor
            for tensor in (*gradients, *context.saved_tensors)
            if isinstance(tensor, Tensor) and tensor.requires_grad
        ]
        return _Underivable.apply(len(results), *results, *sources) if sources else results

    return wrapper


class _ReadOnce:
    """A node's context whose saved tensors are unpacked once: a checkpoint computes them for one reader."""

    def __init__(self, ctx: Any):
        self._ctx = ctx

    @functools.cached_property
    def saved_tensors(self) -> tuple[Tensor | None, ...]:
        return self._ctx.saved_tensors  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


class _Underivable(torch.autograd.Function):
    """The first `num` tensors, which are computed from the others."""

    @staticmethod
    def forward(ctx: Any, num: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return tuple(None if tensor is None else tensor.detach() for tensor in tensors[:num])

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError("no second derivative: a fused function of dropbp_kernels is once_differentiable")
