"""One forward and one backward with nothing dropped, whose graph stays: where each branch begins and ends in it.

From there `exact_sensitivity` runs the parts of the backward that flow through one branch.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_map_only

from .sensitivity import HasGates

Gradients = list[Tensor | None]


class _Watch:
    """The places in the graph where a branch begins and where it ends; known: where any branch ended so far."""

    def __init__(self, known: set[GradientEdge]) -> None:
        self._known = known
        self.begins: list[GradientEdge] = []
        self.ends: list[GradientEdge] = []
        self.is_split_off = False

    def entered(self, residual: Tensor) -> Tensor:
        self.is_split_off = True
        if not (residual.requires_grad and torch.is_grad_enabled()):
            return residual
        residual = residual.view_as(residual)  # a place of the branch's own: only its gradient arrives here
        self.begins.append(get_gradient_edge(residual))
        return residual

    def returned(self, output: Any) -> Any:
        return tree_map_only(Tensor, self._noted, output)

    def _noted(self, leaf: Tensor) -> Tensor:
        if not leaf.requires_grad:
            return leaf
        if get_gradient_edge(leaf) in self._known:  # handed on, as T5's position bias: a place of this branch's own
            leaf = leaf.view_as(leaf)
        self.ends.append(get_gradient_edge(leaf))
        self._known.add(self.ends[-1])
        return leaf


class SharedBackward:
    """One forward and its backward with nothing dropped, its graph kept: where each branch enters, and with what.

    gradients: g_0, one for each of `parameters`. entries: by branch, the places where its output enters the stream,
    each with the gradient that arrives there from outside of the branch.
    """

    def __init__(self, handler: HasGates, loss: Callable[[], Tensor], parameters: list[nn.Parameter]):
        known: set[GradientEdge] = set()
        watches = {name: _Watch(known) for name in handler.gates}
        for name, gate in handler.gates.items():
            gate.kept = True
            gate.grad_scale = 1.0
            gate.watch = watches[name]
        # A compiled block has no place inside of it from which a backward could start.
        with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
            value = loss()
        for gate in handler.gates.values():
            gate.watch = None
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(
                "loss: expected a function that runs the forward and returns the loss, one number with its graph, got "
                f'{found}; a function that runs the backward itself goes with method="published"'
            )
        self.parameters = parameters
        edges = [edge for watch in watches.values() for edge in (*watch.begins, *watch.ends)]
        sought: list[Any] = [*parameters, *edges]
        grads: Sequence[Tensor | None] = torch.autograd.grad(value, sought, retain_graph=True, allow_unused=True)
        self.gradients: Gradients = list(grads[: len(parameters)])
        arrived = dict(zip(edges, grads[len(parameters) :], strict=True))
        self.entries = {name: _from_outside(watch.ends, arrived) for name, watch in watches.items()}
        self._closed = {
            name: (own, [(edge, arrived[edge]) for edge in watches[name].begins if arrived[edge] is not None])
            for name, own in _closed_branches(watches, value, parameters).items()
        }

    def through(self, name: str) -> Gradients:
        """g_0 - g_i: the part of the gradients that flows through the branch."""
        own, entries = self._closed.get(name, ([], self.entries[name]))
        part: Gradients = [None] * len(self.parameters)
        if entries:
            edges, grads = zip(*entries, strict=True)
            part = list(torch.autograd.grad(edges, self.parameters, grads, retain_graph=True, allow_unused=True))
        for index in own:  # a closed branch's own: all of their gradient flows through it
            part[index] = self.gradients[index]
        return part


def _closed_branches(watches: dict[str, _Watch], value: Tensor, parameters: list[nn.Parameter]) -> dict[str, list[int]]:
    """The branches that read nothing but their input, by name, with the indices of their parameters.

    Of those the backward need not run again through the branch itself: what it hands down is known at its input, and
    its own parameters have no other gradient. Found in the graph: between output and input there are only parameters
    that are met nowhere else. All others start at their output: branches gated by modules, shared weights, what reads
    an encoder.
    """
    index_of = {id(parameter): index for index, parameter in enumerate(parameters)}
    candidates = {name: watch for name, watch in watches.items() if watch.is_split_off and len(watch.ends) == 1}
    ends = {watch.ends[0].node for watch in candidates.values()}
    met: Counter[int] = Counter(parameters_above({value.grad_fn}, ends, index_of))
    inside = {}
    for name, watch in candidates.items():
        if len(watch.begins) < 2:
            stops: set[Any] = {edge.node for edge in watch.begins}
            inside[name] = list(parameters_above({watch.ends[0].node}, stops, index_of))
            met.update(inside[name])
    return {name: own for name, own in inside.items() if all(met[index] == 1 for index in own)}


def parameters_above(starts: set[Any], seen: set[Any], index_of: dict[int, int]) -> Iterator[int]:
    """The indices of the parameters that a walk from `starts` towards the leaves meets; it enters no node of `seen`.

    Nodes that it goes through are added to `seen`.
    """
    waiting = list(starts - seen)
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        index = index_of.get(id(getattr(node, "variable", None)))
        if index is not None:
            yield index
        waiting += [following for following, _ in node.next_functions if following is not None]


def _from_outside(edges: list[GradientEdge], arrived: dict[GradientEdge, Tensor | None]) -> list[tuple[Any, Tensor]]:
    """The places of a branch, latest first, each with the gradient that arrives there by no other place of the branch.

    Only a branch of several outputs (router logits, a position bias), or one that is called several times, has several;
    there what flows from a later place to an earlier one is counted at the later one.
    """
    entries: list[tuple[Any, Tensor]] = []
    for edge in sorted(dict.fromkeys(edges), key=lambda edge: -edge.node._sequence_nr()):
        grad = arrived[edge]
        if grad is None:
            continue
        if entries:
            later, grads = zip(*entries, strict=True)
            (inner,) = torch.autograd.grad(later, [edge], grads, retain_graph=True, allow_unused=True)
            grad = grad if inner is None else grad - inner
        entries.append((edge, grad))
    return entries
