"""Samples whose loss has values but no gradient, under a target plan: they run apart from the others, without autograd.

    completions with an advantage of zero (GRPO, RLOO), as where all answers to a prompt got the same reward

Their log-probabilities come back at their places, so the loss and all that is logged are those of the whole batch.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..layer import as_inference
from ..targets import IGNORED, TargetRule
from .model_outputs import tensors_in, with_tensors


def samples_apart(rule: TargetRule, labels: Tensor, inputs: dict[str, Any]) -> list[int]:
    """Which samples of a call run apart: of all that have a target one is left, for the loss to have a backward.

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
    num_targets = (labels[:, 1:] != IGNORED).sum(1).tolist()
    is_without = rule.without_gradient.tolist()
    # One without a target costs nothing where it is.
    samples = [number for number, count in enumerate(num_targets) if count and is_without[number]]
    if samples and len(samples) == sum(count > 0 for count in num_targets):
        samples.remove(min(samples, key=num_targets.__getitem__))
    return samples


def run_apart(
    call: Callable[..., Any], rule: TargetRule, labels: Tensor, inputs: dict[str, Any], samples: list[int]
) -> Any:
    """call(**inputs), of `samples` without autograd, then of the others with it; the tensors are of the whole batch.

    Errors: ValueError where the model makes a loss of its own, which is that of a part; RuntimeError in the backward,
        where a gradient reaches values of `samples` after all.
    """
    others = [number for number in range(len(labels)) if number not in samples]
    told = rule.labels, rule.without_gradient
    try:
        rule.without_gradient, rule.is_inference = None, True
        with as_inference(labels.device.type):
            apart = _call_on(samples, call, rule, labels, inputs)
        rule.is_inference = False
        output = _call_on(others, call, rule, labels, inputs)
    finally:
        rule.is_inference = False
        rule.labels, rule.without_gradient = told
    if inputs.get("labels") is not None and not isinstance(getattr(output, "log_probs", None), Tensor):
        raise ValueError(
            "without_gradient: expected labels given to step as well, or a model that returns log_probs, got a model "
            "that makes the loss itself, of all samples alike"
        )
    rule.num_tokens, rule.was_dense = labels.numel(), False
    place = torch.tensor([*samples, *others], device=labels.device).argsort()
    values = tensors_in(apart)
    joined = {
        name: torch.cat([_without_gradient(values[name]), value]).index_select(0, place)
        for name, value in tensors_in(output).items()
        if value.shape[0] == len(others)
    }
    return with_tensors(output, joined)


def _call_on(
    samples: list[int], call: Callable[..., Any], rule: TargetRule, labels: Tensor, inputs: dict[str, Any]
) -> Any:
    rule.labels = labels[samples]
    return call(
        **{
            name: value[samples] if isinstance(value, Tensor) and len(value) == len(labels) else value
            for name, value in inputs.items()
        }
    )


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
