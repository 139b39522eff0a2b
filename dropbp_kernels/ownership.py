"""Whether a gradient that arrives in a backward belongs to that backward alone, so that it may be written into.

A backward that changes few rows of the residual stream's gradient would otherwise copy all of it. Autograd asks the
same of its own accumulation: it adds in place where nobody else refers to the tensor or to its memory. Whoever may
still read the gradient (a hook that kept it, another node that waits for it, the caller who passed it, a view) refers
to one of the two, or to the Python object.

The counts that stand for "nobody else" depend on the versions of torch and Python, so they are measured once, on a
gradient known to be nobody else's, and compared with another that is. Where they cannot be had or do not tell the two
apart, no gradient is ever called exclusive, which costs the copy and nothing else.
"""

import functools
import sys
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def is_exclusive(grad: Tensor) -> bool:
    """Whether `grad`, an argument of the calling `once_differentiable` backward, may be overwritten there.

    Call it directly from the backward, with the argument in one variable. False while torch.compile traces.
    """
    if torch.compiler.is_compiling() or type(grad) is not Tensor or grad.requires_grad or not grad.is_contiguous():
        return False
    counts = _counts(grad)
    return counts is not None and counts == _expected()


def _counts(grad: Tensor) -> tuple[int, ...] | None:
    """References to the Python object, the tensor and its memory."""
    try:
        num_storage = torch._C._storage_Use_Count(grad.untyped_storage()._cdata)  # type: ignore[attr-defined]
        return sys.getrefcount(grad), grad._use_count(), num_storage  # type: ignore[attr-defined]
    except AttributeError:  # another version of torch
        return None


class _Probe(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seen: list[Any]) -> Tensor:
        ctx.seen = seen
        return x * 1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        _note(grad, ctx.seen)
        return grad, None


def _note(grad: Tensor, seen: list[Any]) -> None:
    seen.append(_counts(grad))


@functools.cache
def _expected() -> tuple[int, ...] | None:
    """What `_counts` says of an exclusive gradient; None where a shared one looks alike."""
    seen: list[Any] = []
    with torch.enable_grad():
        x = torch.ones(2, requires_grad=True)
        torch.autograd.grad((_Probe.apply(x, seen) * 2).sum(), x)
        held: list[Tensor] = []
        probed = _Probe.apply(x, seen)
        probed.register_hook(held.append)
        torch.autograd.grad((probed * 2).sum(), x)
        shared = torch.ones(2)
        torch.autograd.grad(_Probe.apply(x, seen), x, shared)
        viewed = _Probe.apply(x, seen)
        torch.autograd.grad(viewed, x, shared.view(2))
    return seen[0] if seen[0] not in seen[1:] else None
