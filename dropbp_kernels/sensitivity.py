"""How much the gradient changes when one branch is dropped: the sensitivity, by which drop rates are allocated.

One backward with nothing dropped gives g0, one more per branch gives g_i with only branch i dropped:

    "norm"     S_i = sum over parameter tensors of (||g0|| - ||g_i||)^2
    "element"  S_i = sum over parameter tensors of ||g0 - g_i||^2

A parameter without a gradient counts as a zero gradient. "element" sees every change but keeps g0, one extra set of
gradients; "norm" keeps one number per parameter, and is blind to a gradient that turns without changing its length.
`exact_sensitivity` gives the same numbers for less; this is the published procedure, which also bears what that one
does not (reentrant checkpointing), and its oracle.
"""

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .choices import check_choice

DEFINITIONS = ("norm", "element")


class HasGates(Protocol):
    """What is needed of a handler: a model, and its gates by name."""

    model: nn.Module
    gates: dict[str, Any]


def get_rng_state() -> tuple[Any, ...]:
    numpy = sys.modules.get("numpy")
    return (
        random.getstate(),
        numpy.random.get_state() if numpy is not None else None,
        torch.get_rng_state(),
        torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None,
    )


def set_rng_state(state: tuple[Any, ...]) -> None:
    python, numpy, cpu, cuda = state
    random.setstate(python)
    if numpy is not None:
        sys.modules["numpy"].random.set_state(numpy)
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state_all(cuda)


@contextmanager
def left_as_found(handler: HasGates) -> Iterator[None]:
    """Whatever happens inside, put back gradients, RNG states, train/eval modes and all attributes of the gates.

    Gradients are set aside, not copied: backprop finds none and makes its own.
    """
    grads = [(parameter, parameter.grad) for parameter in handler.model.parameters()]
    modes = [(module, module.training) for module in handler.model.modules()]
    gates = [
        (gate, {name: value for name, value in vars(gate).items() if not name.startswith("_")})
        for gate in handler.gates.values()
    ]
    rng_state = get_rng_state()
    try:
        for gate, attributes in gates:
            if attributes.get("unstepped") is not None:
                gate.unstepped = None  # a probe is no training
        yield
    finally:
        for parameter, grad in grads:
            parameter.grad = grad
        for module, training in modes:
            module.training = training
        for gate, attributes in gates:
            for name, value in attributes.items():
                setattr(gate, name, value)
        set_rng_state(rng_state)


def _take_gradients(handler: HasGates, backprop: Callable[[], Any], dropped: str | None) -> list[Tensor | None]:
    """Run backprop with only the branch `dropped` dropped; take the gradients off the parameters."""
    for name, gate in handler.gates.items():
        gate.kept = name != dropped
        gate.grad_scale = 1.0  # what is asked is how much of the gradient is lost, not of the estimate of it
    parameters = dict(handler.model.named_parameters())
    versions = [parameter._version for parameter in parameters.values()]
    with torch.enable_grad():
        backprop()
    for (name, parameter), version in zip(parameters.items(), versions, strict=True):
        if parameter._version != version:
            raise RuntimeError(f"backprop: expected a forward and a backward only, but it changed parameter {name!r}")
    grads = [parameter.grad for parameter in parameters.values()]
    for parameter in parameters.values():
        parameter.grad = None
    return grads


def norm(tensor: Tensor | None) -> float:
    """The Euclidean norm, 0 of no gradient."""
    if tensor is None:
        return 0.0
    # Sums of half-precision squares overflow; float64 gradients stay float64.
    return float(torch.linalg.vector_norm(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32)))


def _measure(grads: list[Tensor | None], definition: str) -> list[Any]:
    """What is remembered of the undropped gradients: their norms, or the gradients themselves."""
    if all(grad is None for grad in grads):
        raise RuntimeError("backprop: expected gradients on the model's parameters, but it left none")
    return [norm(grad) for grad in grads] if definition == "norm" else grads


def _sensitivity(undropped: list[Any], grads: list[Tensor | None], definition: str) -> float:
    if definition == "norm":
        changes = [before - norm(grad) for before, grad in zip(undropped, grads, strict=True)]
    else:
        changes = [
            norm(before - grad) if before is not None and grad is not None else norm(before) + norm(grad)
            for before, grad in zip(undropped, grads, strict=True)
        ]
    return sum(change * change for change in changes)


def mean_over_ranks(values: list[float]) -> list[float]:
    """The mean of each value over the ranks of torch.distributed, the same on all; `values` where there is one."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return values
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, values)
    return [sum(column) / len(gathered) for column in zip(*gathered, strict=True)]


@contextmanager
def with_progress(total: int, enabled: bool) -> Iterator[Callable[[], Any]]:
    """A function to call after each of `total` branches; it moves a tqdm bar when wanted and tqdm is installed."""
    bar = None
    if enabled:
        try:
            from tqdm import tqdm
        except ImportError:
            pass
        else:
            bar = tqdm(total=total, desc="sensitivity", unit="branch")
    try:
        yield (lambda: None) if bar is None else bar.update
    finally:
        if bar is not None:
            bar.close()


def check(handler: HasGates, definition: str) -> None:
    """Errors: ValueError for an unknown definition or a handler without gates."""
    check_choice("definition", definition, DEFINITIONS)
    if not handler.gates:
        raise ValueError("handler: expected at least one gate, got none")


def check_finite(sensitivity: float, name: str) -> None:
    """Errors: RuntimeError for a sensitivity that is not finite."""
    if not sensitivity < float("inf"):
        raise RuntimeError(
            f"backprop: expected finite gradients, but the sensitivity of branch {name!r} is {sensitivity}"
        )


def compute_sensitivity(
    handler: HasGates, backprop: Callable[[], Any], definition: str = "norm", progress: bool = False
) -> list[float]:
    """Return the sensitivity of each branch of `handler`, in model order.

    backprop runs one forward and backward on the same batch in every call; it may clear gradients, it must not change
    parameters. Gates count with grad_scale 1. Every call starts from the same RNG state, so dropout is the same in all
    of them. Gradients, RNG states (Python, NumPy when loaded, torch), train/eval modes, the plan and the counters of
    the gates are left as found, also when backprop raises. Buffers that a forward updates (running statistics) are not
    put back.

    Dtypes: gradients of any dtype; summed in float32 or, for float64 gradients, in float64.
    Errors: ValueError for an unknown definition or a handler without gates; RuntimeError when backprop leaves no
            gradient, changes a parameter, or gives a gradient that is not finite.
    Cost:   1 + num_branches calls of backprop; "element" holds one extra set of gradients, "norm" none.
    Source: DropBP (arXiv 2402.17812), section 3.3 ("element"); github.com/WooSunghyeon/dropbp since October 2024
            ("norm").
    """
    check(handler, definition)
    sensitivities: list[float] = []
    with left_as_found(handler):
        rng_state = get_rng_state()
        for parameter in handler.model.parameters():
            parameter.grad = None
        undropped = _measure(_take_gradients(handler, backprop, None), definition)
        with with_progress(len(handler.gates), progress) as advance:
            for name in handler.gates:
                set_rng_state(rng_state)
                # Gradients are passed on without a name: one that outlived its probe would be another set in memory.
                sensitivity = _sensitivity(undropped, _take_gradients(handler, backprop, name), definition)
                check_finite(sensitivity, name)
                sensitivities.append(sensitivity)
                advance()
    return sensitivities
