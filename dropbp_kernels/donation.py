"""May a backward write into the tensors that its forward saved? Only when nobody else can see them any more.

A node that recomputes from its saved inputs needs two buffers for their gradients, of the same sizes as the inputs,
which nobody needs after that node has run. `is_sole_owner` tells whether they are free to be overwritten:

- the graph is not retained, so that no second backward reads them;
- no saved-tensor hook owns or replaces them;
- no Python object, no other autograd node, no view and no tensor of C++ shares the tensor or its storage: the four
  reference counts (of both, in Python and in C++) are those of a tensor that a graph alone holds.

What those counts are is not assumed but found out once a process, on a graph of two elements, and everything that has
to be told apart is tried as well. Where PyTorch counts otherwise or lacks what is asked, the answer is always no.

Counts do not see work that another CUDA stream still has to do on memory whose last reference is gone
(`Tensor.record_stream`), nor raw pointers. So a caller has to promise that there is none: ops ask only for tensors
that were given to them as donated.
"""

import functools
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Counts = tuple[int, int, int, int]


def is_sole_owner(ctx: Any) -> bool:
    """Whether the running node, with context `ctx`, alone holds its saved tensors; to be asked before unpacking them.

    Errors: those of ctx.saved_tensors: a saved tensor that was modified in place is an error here too.
    """
    expected = _counts_of_a_sole_owner()
    return expected is not None and _is_last_use(ctx) and all(counts == expected for counts in _counts(ctx))


def _is_last_use(ctx: Any) -> bool:
    """Whether the graph goes away after this node, and hooks have nothing to do with what it saved."""
    if torch._C._autograd._get_current_graph_task_keep_graph():
        return False
    return all(saved.unpack_hook is None for saved in ctx._raw_saved_tensors)


def _counts(ctx: Any) -> list[Counts | None]:
    """References to each saved tensor and to its storage, in Python and in C++; None for a subclass."""
    counts: list[Counts | None] = []
    tensors = list(ctx.saved_tensors)
    while tensors:
        tensor = tensors.pop(0)
        if type(tensor) is not Tensor:
            counts.append(None)
            continue
        storage = tensor.untyped_storage()
        storage_uses = sys.getrefcount(storage), torch._C._storage_Use_Count(storage._cdata)
        del storage
        counts.append((sys.getrefcount(tensor), tensor._use_count(), *storage_uses))  # type: ignore[attr-defined]
    return counts


class _Probe(torch.autograd.Function):
    """A node that saves two tensors and notes what its backward sees of them."""

    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor, seen: list[Any]) -> Tensor:
        ctx.save_for_backward(first, second)
        ctx.seen = seen
        return first + second

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        ctx.seen.append(_counts(ctx) if _is_last_use(ctx) else None)
        return grad, grad, None


@functools.cache
def _counts_of_a_sole_owner() -> Counts | None:
    """The counts of a tensor that a graph alone holds; None where they cannot be told from those of a shared one."""
    found: list[Counts | None] = []
    # Hooks, modes and grad mode belong to a thread: in a fresh one there are none.
    thread = threading.Thread(target=lambda: found.append(_experiment()))
    thread.start()
    thread.join()
    return found[0] if found else None


def _experiment() -> Counts | None:
    try:
        alone = _seen(lambda leaf: (leaf * 2, leaf * 3))
        shared = [_seen(make) for make in _SHARED]
        retained = _seen(lambda leaf: (leaf * 2, leaf * 3), retain_graph=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.detach(), lambda tensor: tensor):
            hooked = _seen(lambda leaf: (leaf * 2, leaf * 3))
    except (AttributeError, RuntimeError, TypeError):  # a PyTorch that lacks one of the counts
        return None
    # Of the two tensors the first is the one that is shared.
    is_told_apart = all(counts is not None and counts[0] != alone[0] for counts in shared) if alone else False
    if alone is None or alone[0] != alone[1] or not is_told_apart or retained is not None or hooked is not None:
        return None
    return alone[0]


def _seen(make: Callable[[Tensor], tuple[Any, ...]], *, retain_graph: bool = False) -> list[Counts | None] | None:
    """What the node sees of the first two tensors that `make` returns, while the others live."""
    seen: list[list[Counts | None] | None] = []
    leaf = torch.ones(2, requires_grad=True)
    parts = list(make(leaf))
    output = _Probe.apply(parts.pop(0), parts.pop(0), seen)
    output.sum().backward(retain_graph=retain_graph)
    return seen[0]


def _by_python(leaf: Tensor) -> tuple[Any, ...]:
    first = leaf * 2
    return first, leaf * 3, first


def _by_a_view(leaf: Tensor) -> tuple[Any, ...]:
    first = leaf * 2
    return first, leaf * 3, first[:1]


def _by_detach(leaf: Tensor) -> tuple[Any, ...]:
    first = leaf * 2
    return first, leaf * 3, first.detach()


def _by_its_storage(leaf: Tensor) -> tuple[Any, ...]:
    first = leaf * 2
    return first, leaf * 3, first.untyped_storage()


def _by_a_node(leaf: Tensor) -> tuple[Any, ...]:
    first = leaf * 2
    return first, leaf * 3, first * leaf


def _by_its_maker(leaf: Tensor) -> tuple[Any, ...]:
    return leaf.exp(), leaf * 3


def _by_a_pair(leaf: Tensor) -> tuple[Any, ...]:
    first = leaf * 2
    return first, first


_SHARED = (_by_python, _by_a_view, _by_detach, _by_its_storage, _by_a_node, _by_its_maker, _by_a_pair)
