"""One pass of a decoder in the stages of a target plan."""

import contextlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..layer import as_inference
from ..plan import running
from ..targets import PASS_ROWS, Stage, TargetPlan, TargetRule
from .decoder_parts import DecoderParts, parts_of
from .stage_keys import LastKeysLeft, ModelMasks, StageKeys
from .swapping import with_attribute
from .target_checks import (
    BY_ROW,
    DOCUMENTS,
    IMAGE_FEATURES,
    IMAGE_TOKENS,
    WITH_CACHE,
    check_checkpointing,
    check_inputs,
    warn_of_embeds,
)

NEFTUNE_ALPHA = "neftune_noise_alpha"  # of an embedding, as the Trainer sets it
COUNTS_TOKENS = ("opt",)  # whose positions leave padding on the left out; all others count places


def run_in_stages(decoder: Any, run: Callable[..., Any], inputs: dict[str, Any], plan: TargetPlan) -> Any:
    """run(**inputs), stage by stage; the last_hidden_state of the output is that of the plan's head_rows, (B, T, D).

    Errors: ValueError for inputs that stages cannot share out among them.
    """
    if inputs.get("position_ids") is not None:
        for name in DOCUMENTS:
            inputs.pop(name, None)
    check_inputs(decoder, inputs, plan)
    rule = TargetRule.on(decoder)
    parts = parts_of(decoder)
    if rule.context_gradient != "none" and parts.gathers_weights:
        raise ValueError(
            'context_gradient: expected "none" under FSDP, which reduces the gradient of a block when its targets are '
            f"done and so would lose the context's, got {rule.context_gradient!r}"
        )
    check_checkpointing(parts.switches, rule.context_gradient, plan)
    if not parts.gathers_weights:  # whose parameters are others in a pass
        warn_of_embeds(decoder, inputs.get("inputs_embeds"), rule)
    positions = _positions(decoder, inputs, plan)
    inputs["position_ids"] = positions.expand(*positions.shape[:-2], *plan.documents.shape)
    parameter = next(p for p in decoder.parameters() if p.is_floating_point())
    masks = ModelMasks(decoder, plan.documents, inputs.get("attention_mask"))
    if masks.given is None or parts.gathers_weights:  # else slices could tear images, whose tokens see each other
        plan = sliced(parts, rule, plan)
    staged = plan.staged_rows(with_context=rule.context_gradient == "full")
    ends_at = None if rule.context_gradient == "full" else parts.last_keys
    keys, hidden = StageKeys(), []
    output: Any = None
    with _caches_under_checkpointing(decoder, parts), _compiled_layers_given_their_keys(parts):
        for stage in plan.stages:
            rows = _of_stage(inputs, stage)
            mask = masks.add(stage, parameter.dtype)
            is_last = stage is plan.stages[-1]
            is_hop = rule.context_gradient == "one_hop" and not (stage.is_target or rule.is_inference)
            keys = keys.of_next(stage, is_last=is_last, ends_at=None if stage.is_target else ends_at, is_hop=is_hop)
            context = contextlib.nullcontext() if stage.is_target else _context(parts, rule, parameter.device.type)
            whole = _last_layer_whole(parts) if is_last else contextlib.nullcontext()
            noise = _noise_as_of(plan.documents.shape[1], decoder, stage)
            with contextlib.suppress(LastKeysLeft), running(parts.gates, staged, stage), context, whole, noise:
                output = run(**{**inputs, **rows, "attention_mask": mask, "past_key_values": keys, "use_cache": True})
            if stage.is_target:
                hidden.append(stage.of_targets(output.last_hidden_state))
    output.last_hidden_state = torch.cat(hidden, dim=1)
    output.past_key_values = None
    return output


def _of_stage(inputs: dict[str, Any], stage: Stage) -> dict[str, Any]:
    """Those of the inputs that have a value for each row of a batch, for the rows that run in `stage`."""

    def gather(values: Tensor) -> Tensor:
        return stage.running(stage.gather(values))

    of_rows: dict[str, Any] = {name: gather(inputs[name]) for name in BY_ROW if inputs.get(name) is not None}
    positions = inputs["position_ids"]
    of_rows["position_ids"] = gather(positions) if positions.dim() == 2 else torch.stack([*map(gather, positions)])
    if (is_image := inputs.get(IMAGE_TOKENS)) is not None:
        numbers = (is_image.flatten().cumsum(0) - 1).view_as(is_image)  # of each among the image tokens of the batch
        of_rows[IMAGE_TOKENS] = is_image = gather(is_image) & stage.running(stage.is_row)
        numbers = gather(numbers)[is_image]
        of_rows[IMAGE_FEATURES] = [features[numbers] for features in inputs[IMAGE_FEATURES]]
    return of_rows


def _positions(decoder: Any, inputs: dict[str, Any], plan: TargetPlan) -> Tensor:
    """The positions of a batch's rows, (B, S) or (1, S), or of several axes, (A, B, S): as given, or those that the
    decoder gives them by itself.
    """
    given: Tensor | None = inputs.get("position_ids")
    if given is not None:
        return given
    mask = inputs.get("attention_mask")
    if mask is not None and decoder.config.model_type in COUNTS_TOKENS:
        return mask.long().cumsum(1) * mask.long() - 1
    return torch.arange(plan.documents.shape[1], device=plan.documents.device).unsqueeze(0)


def sliced(parts: DecoderParts, rule: TargetRule, plan: TargetPlan) -> TargetPlan:
    """The plan as it runs: its context in slices. With its gradient kept there is nothing to gain by them."""
    if rule.context_gradient == "full":
        return plan
    num_rows = max(stage.rows.numel() for stage in plan.stages if stage.is_target)
    return plan.with_slices(rows_at_once(parts, num_rows))


def rows_at_once(parts: DecoderParts, num_target_rows: int) -> int:
    """How many context rows run at a time, so that the peak of memory is that of the targets.

    A context row holds what its branch makes at that moment, about 12 times the hidden size; so does a target row, and
    in addition what every kept branch saved, 3 to 12 times the hidden size, or once under checkpointing; of a branch
    that is kept for a share of its rows, that share.
    """
    by_block = any(module.gradient_checkpointing for module in parts.switches)
    if by_block or any(gate.checkpoint is not None for gate in parts.gates):
        times = 1 + len(parts.gates) // 32
    else:
        shares = (float(gate.kept) if isinstance(gate.kept, bool) else gate.kept.kept_share for gate in parts.gates)
        times = 1 + int(sum(shares)) // 8
    return max(PASS_ROWS, times * num_target_rows)


@contextmanager
def _context(parts: DecoderParts, rule: TargetRule, device_type: str) -> Iterator[None]:
    """How a context stage runs. The one place that decides it: a lower precision than the targets' belongs here."""
    if rule.context_gradient == "full" or rule.is_inference:
        yield
        return
    with contextlib.ExitStack() as stack:
        if rule.context_gradient == "one_hop":
            for module in parts.attention:
                stack.callback(module.register_forward_pre_hook(_begin_hop).remove)
                stack.callback(module.register_forward_hook(_end_hop).remove)
        stack.enter_context(as_inference(device_type))
        yield


def _begin_hop(module: nn.Module, args: Any) -> None:
    torch.set_grad_enabled(True)  # what goes in was made under no_grad: a constant


def _end_hop(module: nn.Module, args: Any, output: Any) -> Any:
    torch.set_grad_enabled(False)
    return tree_map_only(Tensor, Tensor.detach, output)


@contextmanager
def _caches_under_checkpointing(decoder: nn.Module, parts: DecoderParts) -> Iterator[None]:
    """Let layers that transformers checkpoints keep the cache they are given: ours may be written again.

    Some decoders (GPT-2) do not even give it to their layers while they are told of checkpointing, which the layers do.
    """
    layers = [module for module in parts.switches if getattr(type(module), WITH_CACHE, None) is False]
    told = [decoder] if vars(decoder).get("gradient_checkpointing") else []
    with with_attribute(layers, WITH_CACHE, True), with_attribute(told, "gradient_checkpointing", False):
        yield


@contextmanager
def _compiled_layers_given_their_keys(parts: DecoderParts) -> Iterator[None]:
    """Give what is compiled by itself the keys of its layer alone: one graph then serves all layers."""
    with contextlib.ExitStack() as stack:
        for number, way in parts.layers.items():
            for module in way:
                name = "forward" if hasattr(module, "_orig_mod") else "_compiled_call_impl"
                if (compiled := vars(module).get(name)) is not None:
                    stack.enter_context(with_attribute([module], name, partial(_run_layer, compiled, number)))
                    break
        yield


def _run_layer(compiled: Callable[..., Any], number: int, *args: Any, **kwargs: Any) -> Any:
    def of_layer(value: Any) -> Any:
        return value.of_layer(number) if isinstance(value, StageKeys) else value

    return compiled(*map(of_layer, args), **{name: of_layer(value) for name, value in kwargs.items()})


def _noise_as_of(seq_len: int, decoder: Any, stage: Stage) -> contextlib.AbstractContextManager[None]:
    """Let NEFTune's noise, which is stronger where fewer tokens are embedded at once, be that of whole samples."""
    embedding = decoder.get_input_embeddings()
    if (alpha := getattr(embedding, NEFTUNE_ALPHA, None)) is None:
        return contextlib.nullcontext()
    return with_attribute([embedding], NEFTUNE_ALPHA, alpha * math.sqrt(stage.rows.shape[1] / seq_len))


def _last_layer_whole(parts: DecoderParts) -> contextlib.AbstractContextManager[None]:
    """Let the last layer that transformers checkpoints save what it computes.

    Its backward comes first: computed again, all of that would be live at the same moment.
    """
    checkpointed = [
        module for module in parts.switches if hasattr(type(module), WITH_CACHE) and module.gradient_checkpointing
    ]
    return with_attribute(checkpointed[-1:], "gradient_checkpointing", False)
