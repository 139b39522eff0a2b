"""A differentiable function in the directions that a training step calls it in."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .timing import Variant

Inputs = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]  # what a function takes, and the gradients of its results
Function = Callable[..., Any]


def variant(function: Function, direction: str, *, is_writing: bool = False) -> Variant:
    """fwd, bwd, fwd+bwd, or "fwd in place" as a dropped branch runs: detached, and written into its first input.

    is_writing: the backward writes into what the function took. All variants are given the same, so it gets copies.
    """

    def prepared(inputs: Inputs) -> tuple[tuple[Tensor, ...], list[Tensor], tuple[Tensor, ...]]:
        arguments, grads = inputs
        if is_writing:
            arguments = _copied(arguments)
        return arguments, _trained(arguments), grads

    def with_graph(inputs: Inputs) -> tuple[Any, list[Tensor], tuple[Tensor, ...]]:
        arguments, trained, grads = prepared(inputs)
        return function(*arguments), trained, grads

    if direction == "fwd":
        return Variant(lambda state: function(*state[0]), prepared)
    if direction == "bwd":
        return Variant(lambda state: torch.autograd.grad(*state), with_graph)
    if direction == "fwd+bwd":
        return Variant(lambda state: torch.autograd.grad(function(*state[0]), *state[1:]), prepared)
    return Variant(
        lambda state: function(*state),
        lambda inputs: (inputs[0][0].detach().clone(), *(tensor.detach() for tensor in inputs[0][1:])),
    )


def results(function: Function, inputs: Inputs) -> list[Tensor]:
    """What the function returns, and the gradients of what it took, from copies: some write into them."""
    arguments = _copied(inputs[0])
    outputs = function(*arguments)
    found = [output.detach().clone() for output in (outputs if isinstance(outputs, tuple) else (outputs,))]
    return [*found, *torch.autograd.grad(outputs, _trained(arguments), inputs[1])]


def _copied(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in tensors)


def _trained(tensors: tuple[Tensor, ...]) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor.requires_grad]
