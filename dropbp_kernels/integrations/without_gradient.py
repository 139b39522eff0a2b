"""Samples whose loss has values but no gradient, under a target plan: they run apart from the others, without autograd.

    completions with an advantage of zero (GRPO, RLOO), as where all answers to a prompt got the same reward

Their log-probabilities come back at their places, so the loss and all that is logged are those of the whole batch.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..layer import as_inference
from ..targets import IGNORED, TargetRule
from .model_outputs import tensors_in, with_tensors
from .without_target import one_token, with_zero_gradient


def samples_apart(rule: TargetRule, labels: Tensor, inputs: dict[str, Any]) -> list[int]:
    """Which samples of a call run apart; all of them where no other has a target.

    Shapes: labels (batch, seq_len), not shifted. inputs: of the call; where they hold more than values of its tokens,
        none runs apart: an image may belong to another sample than its place says.
    Errors: ValueError where the rule was told of another number of samples.
    """
    if rule.without_gradient is None:
        return []
    if rule.without_gradient.shape != labels.shape[:1]:
        raise ValueError(
            f"without_gradient: expected shape ({len(labels)},), one entry for each sample of the call, got "
            f"{tuple(rule.without_gradient.shape)}; given to step it holds until the next step"
        )
    shapes = {tuple(value.shape[:2]) for value in inputs.values() if isinstance(value, Tensor)}
    if not shapes <= {tuple(labels.shape), (1, labels.shape[1])}:
        return []
    has_target = (labels[:, 1:] != IGNORED).any(1)
    is_apart = rule.without_gradient.to(labels.device) & has_target  # one without a target costs nothing where it is
    if is_apart.any() and torch.equal(is_apart, has_target):
        return list(range(len(labels)))
    samples: list[int] = is_apart.nonzero().flatten().tolist()
    return samples


def run_apart(
    call: Callable[..., Any],
    module: nn.Module,
    run: Callable[..., Any],
    rule: TargetRule,
    labels: Tensor,
    inputs: dict[str, Any],
    samples: list[int],
) -> Any:
    """call(module, run, **inputs), of `samples` without autograd, then of the others with it; the output is of all.

    Without others one token runs with autograd, so that the loss has a backward, which gives zeros to all weights that
    others would train.
    Errors: ValueError where the model makes a loss of its own, which is that of a part; RuntimeError in the backward,
        where a gradient reaches values of `samples` after all.
    """
    others = [number for number in range(len(labels)) if number not in samples]
    told = rule.labels, rule.without_gradient

    def call_on(numbers: list[int]) -> Any:
        rule.labels = labels[numbers]
        return call(module, run, **{name: _of(numbers, value, len(labels)) for name, value in inputs.items()})

    try:
        rule.without_gradient, rule.is_inference = None, True
        with as_inference(labels.device.type):
            output = apart = call_on(samples)
        rule.is_inference = False
        if others:
            output = call_on(others)
            rule.num_tokens, rule.was_dense = labels.numel(), False
    finally:
        rule.is_inference = False
        rule.labels, rule.without_gradient = told
    if inputs.get("labels") is not None and not isinstance(getattr(output, "log_probs", None), Tensor):
        raise ValueError(
            "without_gradient: expected labels given to step as well, or a model that returns log_probs, got a model "
            "that makes the loss itself, of all samples alike"
        )
    values = {name: _without_gradient(value) for name, value in tensors_in(apart).items()}
    if not others:
        output = with_tensors(output, values)
        anchor = one_token(module, rule, run)
        return output if anchor is None else with_zero_gradient(output, anchor)
    place = torch.tensor([*samples, *others], device=labels.device).argsort()
    joined = {
        name: torch.cat([values[name], value]).index_select(0, place)
        for name, value in tensors_in(output).items()
        if value.shape[0] == len(others)
    }
    return with_tensors(output, joined)


def _of(samples: list[int], value: Any, num_samples: int) -> Any:
    return value[samples] if isinstance(value, Tensor) and len(value) == num_samples else value


def _without_gradient(values: Tensor) -> Tensor:
    if not values.is_floating_point():
        return values
    values = values.detach().requires_grad_()
    values.register_hook(_refuse)
    return values


def _refuse(grad: Tensor) -> None:
    if grad.any():
        raise RuntimeError(
            "without_gradient: expected samples whose loss has no gradient (TRL: completions with an advantage of "
            "zero), since they ran without autograd, got one that has"
        )
