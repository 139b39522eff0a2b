"""Does anybody else hold this tensor or its memory? Only where nobody does may a backward write into it.

Two backwards ask, each to save an allocation: one that recomputes from the tensors its forward saved and needs buffers
of just their sizes (`owns_saved_tensors`), and one that changes few rows of a gradient which it would otherwise copy
(`owns_gradient`). The answer is yes only for a contiguous tensor in memory of PyTorch's own, and only where four
reference counts, of the tensor and of its storage, in Python and in C++, are those of a tensor that autograd alone
holds. So Python objects, views, other autograd nodes and tensors of C++ all make it no.

What those counts are is not assumed but found out once a process, on a graph of two elements, and every way of sharing
that has to be told apart is tried as well. While some thread runs a function of torch.compile, every Python call in the
process holds its arguments once more: those counts are found out by themselves. Where PyTorch counts otherwise or lacks
what is asked, and while torch.compile traces, the answer is always no, which costs the copy and nothing else.

Counts do not see work that another CUDA stream still has to do on memory whose last reference is gone
(`Tensor.record_stream`), nor raw pointers, nor another process that maps the same memory.
"""

import functools
import sys
import threading
from collections.abc import Callable
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .derivative import first_derivative

Counts = tuple[int, int, int, int]
Arrival = tuple[list[CodeType], Counts | None]


def owns_saved_tensors(ctx: Any, num: int | None = None) -> bool:
    """Whether the running node, with context `ctx`, may overwrite its saved tensors, or the first `num` of them.

    To be asked before unpacking them.

    No while the graph is retained, for a second backward would read them, and where saved-tensor hooks own them.

    Errors: those of ctx.saved_tensors: a saved tensor that was modified in place is an error here too.
    """
    if torch.compiler.is_compiling() or (alone := _counts_of_a_sole_owner()) is None:
        return False
    is_sole = _is_last_use(ctx) and all(counts == alone.saved for counts in _saved_counts(ctx)[:num])
    return is_sole and _counts_of_a_sole_owner() is alone


def owns_gradient(grad: Tensor) -> bool:
    """Whether `grad`, an argument of the calling `first_derivative` backward, may be overwritten there.

    To be called directly from the backward, with the argument in one variable; from anywhere else the answer is no.
    """
    if torch.compiler.is_compiling() or grad.requires_grad or (alone := _counts_of_a_sole_owner()) is None:
        return False
    return _arrival(grad) == alone.gradient and _counts_of_a_sole_owner() is alone


def _counts(tensor: Any) -> Counts | None:
    """References to the tensor and to its storage, in Python and in C++; None for what no backward may write into."""
    if type(tensor) is not Tensor or not tensor.is_contiguous():
        return None
    storage = tensor.untyped_storage()
    if not storage.resizable():  # the memory of a NumPy array or of another library
        return None
    num_tensor = sys.getrefcount(tensor), tensor._use_count()  # type: ignore[attr-defined]
    return *num_tensor, sys.getrefcount(storage), torch._C._storage_Use_Count(storage._cdata)


def _saved_counts(ctx: Any) -> list[Counts | None]:
    tensors = list(ctx.saved_tensors)  # and no name for each, which would be counted
    return [_counts(tensors.pop(0)) for _ in range(len(tensors))]


def _is_last_use(ctx: Any) -> bool:
    """Whether the graph goes away after this node, and hooks have nothing to do with what it saved."""
    if torch._C._autograd._get_current_graph_task_keep_graph():
        return False
    return all(saved.unpack_hook is None for saved in ctx._raw_saved_tensors)


def _arrival(grad: Tensor) -> Arrival:
    """The counts of a gradient, and who called the backward: each function that it came through may hold it too."""
    backward = sys._getframe(2)
    callers = [frame.f_code for frame in (backward.f_back, backward.f_back and backward.f_back.f_back) if frame]
    return callers, _counts(grad)


class _Seen(NamedTuple):
    saved: Any  # the counts of both tensors; of a sole owner's: those of one
    gradient: Arrival


class _Probe(torch.autograd.Function):
    """A node that saves two tensors, and notes what its backward sees of them and of its gradient."""

    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor, seen: list[_Seen]) -> Tensor:
        ctx.save_for_backward(first, second)
        ctx.seen = seen
        return first + second

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        arrival = _as_asked(grad)
        ctx.seen.append(_Seen(_saved_counts(ctx) if _is_last_use(ctx) else None, arrival))
        return grad * 1, grad * 1, None


def _as_asked(grad: Tensor) -> Arrival:
    return _arrival(grad)  # in the place of owns_gradient, whose argument is a reference as well


_lock = threading.Lock()


def _counts_of_a_sole_owner() -> _Seen | None:
    """What a node sees now of tensors that nobody else holds; None where shared ones cannot be told from them.

    Another object than before where meanwhile a thread went into or came out of a function of torch.compile.
    """
    with _lock:
        return _found_out(_references(object()))


def _references(argument: object) -> int:
    """To the argument of a Python call. While a frame evaluation function is set (PEP 523), the caller has one, too."""
    return sys.getrefcount(argument)


@functools.cache
def _found_out(references: int) -> _Seen | None:
    """With as many `_references` to the argument of a call."""
    found: list[_Seen | None] = []
    # Hooks, modes and grad mode belong to a thread: in a fresh one there are none.
    thread = threading.Thread(target=lambda: found.append(_experiment(references)))
    thread.start()
    thread.join()
    return found[0] if found else None


def _experiment(references: int) -> _Seen | None:
    sys.settrace(None)  # a debugger's copies of the local variables would be counted, and taken for no owner later on
    sys.setprofile(None)
    try:
        alone = _seen()
        shared = [_seen(make) for make in _SHARED]
        held = [_seen(follow=follow) for follow in _HELD]
        reread = [_seen(retain_graph=True)]
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.detach(), lambda tensor: tensor):
            reread.append(_seen())
    except (AttributeError, RuntimeError, TypeError):  # a PyTorch that lacks one of the counts
        return None
    first, second = alone.saved or (None, None)
    is_told_apart = (
        first == second is not None
        and all(seen.saved is not None and seen.saved[0] != first for seen in shared)
        and all(seen.saved is None for seen in reread)
        and alone.gradient[1] is not None
        and all(seen.gradient != alone.gradient for seen in held)
        and _references(object()) == references
    )
    return _Seen(first, alone.gradient) if is_told_apart else None


def _seen(
    make: Callable[[Tensor], list[Any]] = lambda leaf: [leaf * 2, leaf * 3],
    follow: Callable[[Tensor, Tensor], Tensor] = lambda output, earlier: output * 2,
    retain_graph: bool = False,
) -> _Seen:
    """What the probe sees of the first two that `make` returns, and of the gradient that it gets from `follow`."""
    seen: list[_Seen] = []
    leaf = torch.ones(2, requires_grad=True)
    parts, earlier = make(leaf), leaf * 5  # whose node runs after the probe's
    output = _Probe.apply(parts.pop(0), parts.pop(0), seen)
    torch.autograd.backward(follow(output, earlier), torch.ones(2), retain_graph=retain_graph)
    return seen[0]


def _hold_saved(hold: Callable[[Tensor], Any]) -> Callable[[Tensor], list[Any]]:
    def make(leaf: Tensor) -> list[Any]:
        first = leaf * 2
        return [first, leaf * 3, hold(first)]

    return make


def _hold_gradient(hold: Callable[[Tensor], Any]) -> Callable[[Tensor, Tensor], Tensor]:
    def follow(output: Tensor, earlier: Tensor) -> Tensor:
        held: list[Any] = []  # which the hook keeps
        output.register_hook(lambda grad: held.append(hold(grad)))
        return output * 2

    return follow


_HOLDS: tuple[Callable[[Tensor], Any], ...] = (
    lambda tensor: tensor,
    lambda tensor: tensor[:1],
    lambda tensor: tensor.detach(),
    lambda tensor: tensor.untyped_storage(),
)
# Saved by another node too, by its maker, and twice; a gradient that another node waits for.
_SHARED = (
    *map(_hold_saved, (*_HOLDS, torch.sin)),
    lambda leaf: [leaf.exp(), leaf * 3],
    lambda leaf: [leaf * 2] * 2,
)
_HELD = (*map(_hold_gradient, _HOLDS), lambda output, earlier: (output + earlier) * 2)
