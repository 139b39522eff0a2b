"""Sensitivities from one forward, and from less: the published definition without its 1 + N forwards and backwards.

Dropping branch i takes away just the gradient that flows through its output o_i, and a backward is linear in what it
is started with. So with G_i, the gradient that arrives at o_i when nothing is dropped,

    g_0 - g_i  =  the backward from o_i, started with G_i

which runs through the branch and what lies below it, and through nothing above. One forward and one backward give g_0
and all G_i; the rest is half a backward per branch on average, and no forward. Where a gate also sees what its branch
reads (all but those that gate a block by its modules), the backward starts there, and through the branch runs none.

The estimate does without those, too. What branch i adds to the gradient of the stream is the difference between G_i
and the G of the branch before it; the gradients of the parameters below are taken to change by the same ratio as the
stream's. The branch's own part of the sensitivity, its own parameters' whole gradient, is exact.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from .choices import check_choice
from .sensitivity import (
    HasGates,
    check,
    check_finite,
    compute_sensitivity,
    get_rng_state,
    left_as_found,
    norm,
    set_rng_state,
    with_progress,
)
from .shared_backward import Gradients, SharedBackward, parameters_above

# What sums of gradients over several micro-batches may take: as many branches as fit are done in one pass over them.
SUMS_BYTES = 1 << 30

METHODS = ("exact", "estimate", "published")
NO_GRADIENT = (
    "loss: expected gradients on the model's parameters, but it left none (FSDP puts other tensors in their place: "
    "calibrate before the model is sharded, or use a saved calibration)"
)
Losses = Sequence[Callable[[], Tensor]]


def measure_sensitivity(
    handler: HasGates,
    loss: Callable[[], Any] | Losses,
    definition: str = "norm",
    method: str = "exact",
    progress: bool = False,
) -> list[float]:
    """The sensitivities of all branches by `exact_sensitivity`, `estimate_sensitivity` or `compute_sensitivity`.

    Errors: those of the three; ValueError for an unknown method or no loss.
    """
    check_choice("method", method, METHODS)
    if isinstance(loss, Tensor) or not (callable(loss) or isinstance(loss, Sequence)):
        raise TypeError(
            "loss: expected a function that returns it, such as lambda: model(**batch).loss, or a list of those, got "
            f"{type(loss).__name__}"
        )
    losses = [loss] if callable(loss) else list(loss)
    if not losses:
        raise ValueError("loss: expected a function, or one for each micro-batch, got none")
    if method == "exact":
        return exact_sensitivity(handler, losses, definition, progress=progress)
    if method == "estimate":
        return estimate_sensitivity(handler, losses, definition)

    def backprop() -> None:
        for each in losses:
            value = each()
            if isinstance(value, Tensor) and value.requires_grad:
                value.backward()

    return compute_sensitivity(handler, backprop, definition, progress)


def exact_sensitivity(
    handler: HasGates,
    losses: Losses,
    definition: str = "norm",
    *,
    progress: bool = False,
    sums_bytes: int = SUMS_BYTES,
) -> list[float]:
    """Return the sensitivity of each branch of `handler`, in model order: that of `compute_sensitivity`, for less.

    losses: functions that run the forward on a micro-batch each and return its loss; the gradient is that of their sum.
    All is left as found as in `compute_sensitivity`; the parameters' gradients are not touched at all.

    Dtypes: gradients of any dtype; sums over micro-batches, and squares, in float32 or, for float64, in float64.
    Errors: ValueError for an unknown definition or a handler without gates; TypeError when a loss is no number with a
            graph; RuntimeError for gradients that are missing or not finite, and of reentrant checkpointing, which
            knows no backward from within (there `compute_sensitivity` works).
    Cost:   a forward, a backward, and for every branch the backward of it and what lies below: about (3 + N/2)
            forwards' work with LoRA on N branches, where the published procedure takes 2 (1 + N). Memory: the graph
            of one undropped forward, a stream-sized gradient a branch, two sets of gradients. With several
            micro-batches also sums of at most sums_bytes (but for one branch); where those of all branches are
            more, the micro-batches are gone through several times.
    Source: the definition of DropBP (arXiv 2402.17812), section 3.3; the linearity of a backward.
    """
    check(handler, definition)
    parameters = [parameter for parameter in handler.model.parameters() if parameter.requires_grad]
    at_once = len(handler.gates)
    if len(losses) > 1:
        one_set = sum(parameter.numel() * max(4, parameter.element_size()) for parameter in parameters)
        at_once = min(at_once, max(1, sums_bytes // max(one_set, 1) - 1))
    names = list(handler.gates)
    found: dict[str, float] = {}
    with left_as_found(handler), ExitStack() as stack:
        advance = stack.enter_context(with_progress(len(names) * len(losses), progress))
        rng_state = get_rng_state()
        for start in range(0, len(names), at_once):
            set_rng_state(rng_state)
            whole: Gradients = [None] * len(parameters)
            parts: dict[str, Gradients] = {name: [None] * len(parameters) for name in names[start : start + at_once]}
            for loss in losses:
                backward = SharedBackward(handler, loss, parameters)
                _add(whole, backward.gradients, len(losses) > 1)
                for name in parts:
                    part = backward.through(name)
                    if len(losses) > 1:
                        _add(parts[name], part, True)
                    else:  # at once, so that the parts of only one branch are held
                        found[name] = _sensitivity(whole, part, definition)
                    advance()
                del backward  # its graph, before the next one is built
            if all(grad is None for grad in whole):
                raise RuntimeError(NO_GRADIENT)
            if len(losses) > 1:
                found |= {name: _sensitivity(whole, part, definition) for name, part in parts.items()}
            for name in parts:
                check_finite(found[name], name)
    return [found[name] for name in names]


def _add(sums: Gradients, grads: Gradients, is_sum: bool) -> None:
    """Add grads into sums, in float32 at least; where nothing will be added to them they stay as they are."""
    for index, grad in enumerate(grads):
        if grad is None:
            continue
        wide = grad.to(torch.promote_types(grad.dtype, torch.float32)) if is_sum else grad
        before = sums[index]
        if before is None:
            sums[index] = wide.clone() if wide is grad and is_sum else wide
        else:
            before += wide


def _sensitivity(whole: Gradients, part: Gradients, definition: str) -> float:
    """Of a branch: `whole` are the gradients with nothing dropped, `part` what of them flows through the branch."""
    if definition == "element":
        return sum(norm(through) ** 2 for through in part if through is not None)
    pairs = [(grad, through) for grad, through in zip(whole, part, strict=True) if through is not None]
    return sum((norm(grad) - norm(grad - through)) ** 2 for grad, through in pairs if grad is not None)


def estimate_sensitivity(handler: HasGates, losses: Losses, definition: str = "norm") -> list[float]:
    """Estimate the sensitivity of each branch, in model order, from one forward and one backward a micro-batch.

    Good for blocks whose branches follow each other; of branches that read the stream at the same place (parallel
    blocks) the first takes the whole block's share. See the module's docstring for the assumption.

    Dtypes, errors: those of `exact_sensitivity`, but for reentrant checkpointing, which it does not bear either.
    Cost:   a forward and a backward; memory as there, without sums for every branch.
    Source: none; benchmarks/bench_sensitivity.py measures how well its ranks agree with the exact ones.
    """
    check(handler, definition)
    parameters = [parameter for parameter in handler.model.parameters() if parameter.requires_grad]
    whole: Gradients = [None] * len(parameters)
    changes = dict.fromkeys(handler.gates, 0.0)
    owners: dict[str, tuple[list[int], list[int]]] = {}
    with left_as_found(handler):
        for loss in losses:
            backward = SharedBackward(handler, loss, parameters)
            _add(whole, backward.gradients, len(losses) > 1)
            last = {name: entries[0] for name, entries in backward.entries.items() if entries}
            in_order = sorted(last, key=lambda name, last=last: last[name][0].node._sequence_nr())  # type: ignore[misc]
            streams = {name: last[name][1] for name in in_order}
            for before, name in itertools.pairwise(in_order):
                changes[name] += _change(streams[before], streams[name], definition) ** 2 / len(losses)
            owners = dict(zip(in_order, _own_parameters(backward, handler, in_order), strict=True))
            del backward
    if all(grad is None for grad in whole):
        raise RuntimeError(NO_GRADIENT)
    squares = [0.0 if grad is None else norm(grad) ** 2 for grad in whole]
    found = dict.fromkeys(handler.gates, 0.0)
    below = 0.0
    for name, (own, others) in owners.items():
        own_square = sum(squares[index] for index in own)
        below += sum(squares[index] for index in others)
        found[name] = own_square + changes[name] * below
        below += own_square
        check_finite(found[name], name)
    return list(found.values())


def _change(before: Tensor, after: Tensor, definition: str) -> float:
    """The share of the stream's gradient below a branch (`before`) that the branch makes; `after`: that above it."""
    size = norm(before)
    if size == 0.0:
        return 0.0
    if definition == "element" and before.shape == after.shape:
        return norm(before - after) / size
    return 1.0 - norm(after) / size


def _own_parameters(
    backward: SharedBackward, handler: HasGates, in_order: list[str]
) -> Iterator[tuple[list[int], list[int]]]:
    """For each branch, the indices of the parameters that its output depends on and no earlier branch's does.

    In two lists: those of the branch, and others below it (an embedding). A gate that does not know its modules owns
    all of them.
    """
    index_of = {id(parameter): index for index, parameter in enumerate(backward.parameters)}
    seen: set[Any] = set()
    for name in in_order:
        own: list[int] = []
        others: list[int] = []
        modules = handler.gates[name].modules_of_branch
        known = {id(parameter) for module in modules for parameter in module.parameters()}
        for index in parameters_above({edge.node for edge, _ in backward.entries[name]}, seen, index_of):
            (own if id(backward.parameters[index]) in known or not known else others).append(index)
        yield own, others
