"""Exact counts of what a backward costs: bytes saved, peak bytes live, autograd nodes.

    with saved_bytes() as saved, PeakLiveBytes() as live:
        loss = model(**batch).loss
        loss.backward()
    print(saved.num_bytes, live.peak_bytes)

All three count tensors, not allocator blocks, so they are the same on every device and repeatable to the byte.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass
class SavedBytes:
    """num_bytes: bytes of the distinct storages that autograd kept; num_tensors: how many times it kept one."""

    num_bytes: int = 0
    num_tensors: int = 0


@contextmanager
def saved_bytes() -> Iterator[SavedBytes]:
    """Count what autograd saves for backward inside the block, parameters (and views of them) excluded.

    A storage that several nodes save counts once. Tensors that lived before the block count too: autograd keeps them.
    What is saved and freed again inside the block stays counted; the peak of what is alive is `PeakLiveBytes`.
    """
    saved = SavedBytes()
    alive: set[int] = set()  # storages counted; forgotten when they die, since their address may be used again

    def pack(tensor: Tensor) -> Tensor:
        base = tensor._base if tensor._base is not None else tensor
        if isinstance(base, nn.Parameter):
            return tensor
        saved.num_tensors += 1
        storage = tensor.untyped_storage()
        if storage._cdata not in alive:
            alive.add(storage._cdata)
            weakref.finalize(storage, alive.discard, storage._cdata)
            saved.num_bytes += storage.nbytes()
        return tensor.detach()  # a node that saves its own output would otherwise hold itself, and never die

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


class PeakLiveBytes(TorchDispatchMode):
    """Context manager: the peak number of bytes, over time, of live tensors that were allocated inside it.

    Args: tag says what a new tensor is for (a name, or anything hashable), so that the bytes can be told apart;
    default: one tag, "tensors".
    Attributes: live_bytes and live_by_tag (now), peak_bytes, peak_by_tag (at the peak). Gradients of parameters count
    like any other tensor allocated inside.
    Cost: a Python call for every operator; measure time without it. Scratch memory inside an operator is not seen.
    Inside a FakeTensorMode it counts what the fake tensors would take.
    """

    def __init__(self, tag: Callable[[Tensor], Any] = lambda tensor: "tensors") -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self.live_by_tag: Counter[Any] = Counter()
        self.peak_by_tag: Counter[Any] = Counter()
        self._tag = tag
        self._known: dict[int, tuple[Any, int]] = {}  # storage: its tag and bytes

    def retag(self, tensor: Tensor, tag: Any) -> None:
        """Say what a tensor turned out to be for, as when a result becomes a gradient. Unknown tensors are ignored."""
        key = tensor.untyped_storage()._cdata
        if key in self._known:
            old, num_bytes = self._known[key]
            self._known[key] = tag, num_bytes
            self.live_by_tag[old] -= num_bytes
            self.live_by_tag[tag] += num_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # autograd's question at each edge: half the calls of a fake step
            return func(*args)
        inputs = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf, inputs)
        self._ran(func, args, kwargs or {}, result)
        return result

    def _ran(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """For subclasses: an operator has run. (torch wraps every override of `__torch_dispatch__` once more.)"""

    def _add(self, tensor: Tensor, inputs: set[int]) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or key in inputs:  # a view: nothing was allocated
            return
        if tensor.is_meta:  # asked for its shape only; a question that costs a fake tensor a dispatch, so it comes last
            return
        tag, num_bytes = self._tag(tensor), storage.nbytes()
        self._known[key] = tag, num_bytes
        self.live_bytes += num_bytes
        self.live_by_tag[tag] += num_bytes
        if self.live_bytes > self.peak_bytes:
            self.peak_bytes = self.live_bytes
            self.peak_by_tag = self.live_by_tag.copy()
        weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        tag, num_bytes = self._known.pop(key)
        self.live_bytes -= num_bytes
        self.live_by_tag[tag] -= num_bytes


def num_autograd_nodes(*tensors: Tensor) -> int:
    """Number of autograd nodes that a backward from `tensors` would visit, leaf accumulators excluded."""
    stack = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    seen = set(stack)
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is not None and node not in seen and node.name() != "torch::autograd::AccumulateGrad":
                seen.add(node)
                stack.append(node)
    return len(seen)
