"""Target plans on Hugging Face causal models: tokens without a loss run as inference.

    apply_dropbp(model, drop_rate=0.0, context="inference")

The rows of a batch run in the stages of `targets.plan_targets`, each through the whole decoder: context under no_grad,
targets with autograd. A stage sees the keys and values of the stages before it through a key/value cache, so any
decoder that can generate with a cache and takes a 4-D mask can do it; nothing in its attention is replaced. The head
and the loss get the target rows alone.

What is left out of the gradient is what would flow through the keys and values of context rows:

context_gradient   what context rows contribute to the gradient
================   ===================================================================================================
"none"             nothing
"one_hop"          each block's key and value projections get the gradient of context keys and values; the block's
                   input is a constant there
"full"             everything: the gradient of dense training, in stages
================   ===================================================================================================

Labels come with the call, or are those given to the handler's `step`. The model's `__call__` makes the plan and hands
the head's rows and labels on; the decoder's `__call__` runs the stages (`staged_decoder`). Both are patched as in
`gating` (`swapping`).
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..targets import IGNORED, TargetPlan, TargetRule, plan_targets
from .decoder_parts import PARTS, parts_of
from .model_outputs import tensors_in, with_tensors
from .swapping import is_swapped, subclass, swap, swap_back
from .target_checks import ATTENTION, TAKES_MASKS, check_ranks, find_decoder, has_ranks, without_peft
from .without_gradient import run_apart, samples_apart
from .without_target import run_without_target

_PLAN = "_dropbp_target_plan"
_ORIGINAL = "_dropbp_before_targets"  # a name of its own: the class swapped here may be one that `gating` made


def patch_targets(model: nn.Module, rule: TargetRule) -> None:
    """Let `model` (a causal LM, with or without PEFT) run by target plans of `rule` whenever it trains on labels.

    The options must have passed `check_context`.
    Cost:   as many passes through the decoder as a batch has stages (two where each sample is one prompt and one
            completion, or more where context runs in slices); the rows of all stages together are those of one dense
            forward, less the rows that no target sees and what the last layer makes of context behind its keys, and
            more what runs twice (`context_keep`, `target_keep`).
    """
    decoder = find_decoder(model)
    rule.put_on(decoder)
    lm = without_peft(model)  # called by what PEFT wraps it in, or by itself
    for owner in (model,) if lm is model else (model, lm):
        vars(owner)["_dropbp_decoder"] = (decoder,)  # in a tuple, so that nn.Module does not register it again
        swap(owner, _class_with, _call_with_labels)
    swap(decoder, _class_with, _call_decoder)


def unpatch_targets(model: nn.Module) -> None:
    """Undo `patch_targets`, if it was done."""
    for module in [module for module in model.modules() if is_swapped(module, _ORIGINAL)]:
        swap_back(module, _ORIGINAL)
        TargetRule.take_off(module)
        for name in ("_dropbp_decoder", _PLAN, PARTS):
            vars(module).pop(name, None)


@functools.cache
def _class_with(original: Any, call: Callable[..., Any]) -> Any:
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        return call(self, functools.partial(original.__call__, self), *args, **kwargs)

    return subclass(original, (_class_with, call), _ORIGINAL, __call__=__call__)


# ---- the model: from labels to a plan, and the head's rows back


def _call_with_labels(self: Any, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    (decoder,) = self._dropbp_decoder
    rule = TargetRule.on(decoder)
    if args and "labels" not in kwargs and "labels" in (named := _named(self, args, kwargs)):
        args, kwargs = (), named
    labels = kwargs.get("labels")
    is_given = labels is None  # to the handler, by a caller who takes the loss
    labels = rule.labels if is_given else labels
    if labels is None or not _runs_by_plan(self, rule) or _PLAN in vars(decoder):
        return run(*args, **kwargs)
    inputs = _named(self, args, kwargs)
    if is_given and not {"input_ids", "inputs_embeds"} & inputs.keys():
        return run(*args, **kwargs)  # a trainer's loss in place of forward, which calls the decoder by itself
    if kwargs.get("shift_labels") is not None:
        raise ValueError("shift_labels: expected None with context, which shifts labels by itself, got a tensor")
    if samples := _samples_apart(decoder, rule, labels, inputs):
        return run_apart(_call_with_labels, self, run, rule, labels, inputs, samples)
    # A hook sees the head's labels; who calls the model again with what a hook saw means the same batch.
    plan: TargetPlan | None = getattr(labels, _PLAN, None)
    if plan is None:
        if rule.trains_on_part_by is not None:
            kwargs = _with_items_of_part(kwargs, rule, is_given)
        plan = _plan_of(decoder, rule, labels, inputs)
    if plan.num_target == 0:
        return run_without_target(self, rule, run, args, kwargs)
    if plan.is_dense:
        # Told of the plan as well: the model inside of PEFT's would take the counted items for those of all labels.
        return run(*args, **(kwargs if is_given else {**kwargs, "labels": with_plan(labels.detach(), plan)}))
    seq_len = plan.documents.shape[1]
    logits_to_keep = kwargs.pop("logits_to_keep", 0) if is_given else 0
    vars(decoder)[_PLAN] = plan
    try:
        output = run(*args, **(kwargs if is_given else {**kwargs, "labels": _head_labels(plan)}))
    finally:
        del vars(decoder)[_PLAN]
    num_rows = plan.head_rows[0].shape[1]
    if rule.trains_on_part_by is not None:
        _check_is_mean(output, rule.trains_on_part_by)
    if not is_given:  # what a loss function made of each label, such as TRL's log-probabilities, beside the labels
        return _replace(output, num_rows, lambda values: plan.to_places(values, seq_len - 1))

    def logits_at_places(logits: Tensor) -> Tensor:
        return plan.to_places(logits[:, :-1], seq_len)[:, _last(logits_to_keep)]

    return _replace(output, num_rows + 1, logits_at_places)


def _runs_by_plan(module: nn.Module, rule: TargetRule) -> bool:
    return module.training and (torch.is_grad_enabled() or rule.is_inference)


def _call_decoder(self: Any, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    from .staged_decoder import run_in_stages

    inputs = _named(self, args, kwargs)
    plan: TargetPlan | None = vars(self).get(_PLAN)
    if plan is not None:
        output = run_in_stages(self, run, inputs, plan)
        # One row more, beside the last label of _head_labels.
        output.last_hidden_state = nn.functional.pad(output.last_hidden_state, (0, 0, 0, 1))
        return output
    rule = TargetRule.on(self)  # called by itself, by a caller who takes the loss of the hidden states
    if rule.labels is None or not _runs_by_plan(self, rule):
        return run(*args, **kwargs)
    if samples := _samples_apart(self, rule, rule.labels, inputs):
        return run_apart(_call_decoder, self, run, rule, rule.labels, inputs, samples)
    plan = _plan_of(self, rule, rule.labels, inputs)
    if plan.num_target == 0:
        return run_without_target(self, rule, run, args, kwargs)
    if plan.is_dense:
        return run(*args, **kwargs)
    output = run_in_stages(self, run, inputs, plan)
    output.last_hidden_state = plan.to_places(output.last_hidden_state, plan.documents.shape[1])
    return output


def _samples_apart(decoder: Any, rule: TargetRule, labels: Tensor, inputs: dict[str, Any]) -> list[int]:
    # Ranks that gather weights together have to call the decoder equally often.
    return [] if parts_of(decoder).gathers_weights else samples_apart(rule, labels, inputs)


def _with_items_of_part(kwargs: dict[str, Any], rule: TargetRule, is_given: bool) -> dict[str, Any]:
    """kwargs; where a loss is a sum over so many labels as the Trainer counted, over those that a step trains on."""
    if is_given:
        raise ValueError(
            f"{rule.trains_on_part_by}: expected 1 with labels given to step, since who takes the loss sees all "
            f"labels, got {getattr(rule, str(rule.trains_on_part_by))}"
        )
    items = kwargs.get("num_items_in_batch")
    return kwargs if items is None else {**kwargs, "num_items_in_batch": items * rule.trained_share}


def _check_is_mean(output: Any, option: str) -> None:
    loss = output[0] if type(output) is tuple else getattr(output, "loss", None)
    if not isinstance(loss, Tensor) or loss.dim() > 0:
        raise ValueError(
            f"{option}: expected 1 for a loss that is no mean over labels (DPO, GRPO), since only a part of them has "
            "a value in a step"
        )
    if isinstance(getattr(output, "log_probs", None), Tensor):
        raise ValueError(
            f"{option}: expected 1 where the caller makes the loss of log-probabilities (TRL's SFTTrainer), since it "
            "divides those of a part by the labels of all; transformers' Trainer leaves the loss to the model"
        )


def _named(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    signature = inspect.signature(module.forward)
    if "args" in signature.parameters:  # of a PeftModel without a task type, which hands all on
        signature = inspect.signature(without_peft(module).forward)
    return {**signature.bind_partial(*args).arguments, **kwargs}


def _plan_of(decoder: Any, rule: TargetRule, labels: Tensor, inputs: dict[str, Any]) -> TargetPlan:
    plan = _make_plan(decoder, rule, labels, inputs)
    if has_ranks() and parts_of(decoder).gathers_weights:
        from .staged_decoder import sliced

        stages = () if plan.num_target == 0 or plan.is_dense else sliced(parts_of(decoder), rule, plan).stages
        num_targets = sum(stage.is_target for stage in stages)
        check_ranks(decoder, len(stages) or int(plan.is_dense), num_targets or int(plan.is_dense))
    return plan


def _make_plan(decoder: Any, rule: TargetRule, labels: Tensor, inputs: dict[str, Any]) -> TargetPlan:
    tokens, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
    for name, values in (("input_ids", tokens), ("inputs_embeds", embeds)):
        if values is not None and labels.shape != values.shape[:2]:
            raise ValueError(
                f"labels: expected the shape of {name}, {tuple(values.shape[:2])}, got {tuple(labels.shape)}"
                + ("; labels given to step hold until the next step" if labels is rule.labels else "")
            )
    attention = decoder.config._attn_implementation
    if attention not in ATTENTION:
        raise ValueError(
            f"model: expected attention in {ATTENTION} with context, got {attention!r}, set after apply_dropbp"
        )
    position_ids = _positions_of_text(inputs.get("position_ids"))
    plan = plan_targets(
        labels,
        _check_mask(inputs.get("attention_mask")),
        position_ids,
        context_keep=rule.context_keep,
        target_windows=rule.target_windows,
        target_keep=rule.target_keep,
        turns=_turns(decoder, rule),
        seed=rule.seed,
        step=rule.step,
    )
    rule.num_target, rule.was_dense, rule.num_tokens = plan.num_target, plan.is_dense, labels.numel()
    if plan.is_packed and attention not in TAKES_MASKS:
        raise ValueError(
            f"position_ids: expected one document a sample with context and attention {attention!r}, got packed ones; "
            f"load the model with attn_implementation in {TAKES_MASKS}, or do not pack"
        )
    if not rule.shared_context:
        return plan
    if tokens is None:
        raise ValueError("input_ids: expected token ids with shared_context, to tell which contexts are the same")
    if position_ids is None:
        position_ids = torch.arange(labels.shape[1], device=labels.device).unsqueeze(0)
    return plan.with_shared_context(tokens, position_ids)


def _positions_of_text(position_ids: Tensor | None) -> Tensor | None:
    """Positions that tell documents apart, (B, S) or (1, S).

    Of several axes, (3 or 4, B, S), a first of four does so, as transformers has it; the others are those of images.
    """
    if position_ids is None or position_ids.dim() == 2:
        return position_ids
    return position_ids[0] if len(position_ids) == 4 else None


def _turns(decoder: Any, rule: TargetRule) -> str:
    """How turns may run, as `plan_targets` has it."""
    if rule.shared_context or rule.context_gradient == "full":  # a context with targets in it is not shared; no gain
        return "apart"
    if decoder.config._attn_implementation not in TAKES_MASKS:
        return "apart"
    return "together" if parts_of(decoder).gathers_weights else "auto"


def _check_mask(mask: Any) -> Tensor | None:
    if mask is None or (isinstance(mask, Tensor) and mask.dim() == 2):
        return mask
    raise ValueError("attention_mask: expected shape (batch, seq_len) with context, got another kind of mask")


def with_plan(labels: Tensor, plan: TargetPlan) -> Tensor:
    """`labels`, by which a patched model runs `plan` instead of making one from their values."""
    setattr(labels, _PLAN, plan)
    return labels


def _head_labels(plan: TargetPlan) -> Tensor:
    """Labels (B, T + 1) that, shifted as a causal loss does, stand beside the target rows of the decoder's output."""
    rows, is_row = plan.head_rows
    labels = plan.shift_labels.gather(1, rows).masked_fill(~is_row, IGNORED)
    return with_plan(nn.functional.pad(labels, (1, 0), value=IGNORED), plan)


def _replace(output: Any, num_rows: int, function: Callable[[Tensor], Tensor]) -> Any:
    """The output of a model with function(tensor) in place of each tensor (batch, num_rows, ...)."""
    tensors = tensors_in(output).items()
    return with_tensors(output, {name: function(value) for name, value in tensors if value.shape[1:2] == (num_rows,)})


def _last(logits_to_keep: Any) -> Any:
    return slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep  # 0: all
