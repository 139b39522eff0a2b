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

The model's `__call__` reads the labels and hands the head's rows and labels on; the decoder's `__call__` runs the
stages. Both are patched as in `gating` (`swapping`).
"""

import contextlib
import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..targets import IGNORED, TargetPlan, plan_targets
from .swapping import is_swapped, subclass, swap_back

CONTEXT_GRADIENTS = ("none", "one_hop", "full")
ATTENTION = ("sdpa", "eager")  # implementations that take a mask of our own
_PLAN = "_dropbp_target_plan"
_ORIGINAL = "_dropbp_before_targets"  # a name of its own: the class swapped here may be one that `gating` made


def check_context(model: nn.Module, context: str | None, context_gradient: str) -> None:
    """Raise ValueError, with the reason, unless `patch_targets` can do what these options of apply_dropbp ask for."""
    if context not in (None, "inference"):
        raise ValueError(f'context: expected None or "inference", got {context!r}')
    if context_gradient not in CONTEXT_GRADIENTS:
        raise ValueError(f"context_gradient: expected one of {', '.join(CONTEXT_GRADIENTS)}, got {context_gradient!r}")
    if context is not None:
        _check_decoder(find_decoder(model))


def patch_targets(model: nn.Module, context_gradient: str = "none") -> None:
    """Let `model` (a causal LM, with or without PEFT) run by target plans whenever it trains on labels.

    Errors: those of `check_context`; nothing is patched then.
    Cost:   as many passes through the decoder as a batch has stages (two where each sample is one prompt and one
            completion); the rows of all stages together are those of one dense forward, less the rows that no target
            sees.
    """
    check_context(model, "inference", context_gradient)
    decoder = find_decoder(model)
    vars(decoder)["_dropbp_context_gradient"] = context_gradient
    lm = _without_peft(model)  # called by what PEFT wraps it in, or by itself
    for owner in (model,) if lm is model else (model, lm):
        vars(owner)["_dropbp_decoder"] = (decoder,)  # in a tuple, so that nn.Module does not register it again
        _swap(owner, _call_with_labels)
    _swap(decoder, _call_in_stages)


def unpatch_targets(model: nn.Module) -> bool:
    """Undo `patch_targets`; whether there was anything to undo."""
    patched = [module for module in model.modules() if is_swapped(module, _ORIGINAL)]
    for module in patched:
        swap_back(module, _ORIGINAL)
        for name in ("_dropbp_decoder", "_dropbp_context_gradient", _PLAN):
            vars(module).pop(name, None)
    return bool(patched)


def find_decoder(model: nn.Module) -> nn.Module:
    """The stack of blocks of a causal LM, with its embedding and last norm, without its head.

    Errors: ValueError when `model` is no causal LM.
    """
    lm = _without_peft(model)
    decoder = lm.get_decoder() if hasattr(lm, "get_decoder") else None
    if not isinstance(decoder, nn.Module) or decoder is lm or lm.get_output_embeddings() is None:
        raise ValueError(f"model: expected a causal LM of transformers for context, got {type(lm).__name__}")
    return decoder


def _without_peft(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _check_decoder(decoder: nn.Module) -> None:
    """Raise ValueError, with the reason, unless `decoder` can run rows in stages."""
    config: Any = decoder.config
    name = type(decoder).__name__
    reason = None
    accepted = inspect.signature(decoder.forward).parameters
    missing = [key for key in ("attention_mask", "position_ids", "past_key_values") if key not in accepted]
    unknown = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if getattr(config, "is_encoder_decoder", False):
        reason = "is an encoder-decoder"
    elif missing:
        reason = f"takes no {', '.join(missing)}: its rows cannot be told their places"
    elif getattr(config, "alibi", False):
        reason = "adds position biases (ALiBi) by the order of its keys"
    elif unknown or getattr(decoder, "_is_stateful", False):
        reason = f"has layers with a state of their own ({', '.join(sorted(unknown)) or 'stateful'})"
    elif getattr(config, "is_causal", True) is False or getattr(config, "use_bidirectional_attention", False):
        reason = "attends in both directions, so context depends on targets"
    elif config._attn_implementation not in ATTENTION:
        reason = f"uses attention {config._attn_implementation!r}; load it with attn_implementation in {ATTENTION}"
    if reason is not None:
        raise ValueError(f"model: expected a decoder that can run in stages for context, but {name} {reason}")


def _swap(module: nn.Module, call: Callable[..., Any]) -> None:
    module.__class__ = _class_with(type(module), call)  # type: ignore[arg-type]


@functools.cache
def _class_with(original: Any, call: Callable[..., Any]) -> Any:
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        return call(self, functools.partial(original.__call__, self), *args, **kwargs)

    return subclass(original, _ORIGINAL, __call__=__call__)


# ---- the model: from labels to a plan, and the head's rows back


def _call_with_labels(self: Any, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    (decoder,) = self._dropbp_decoder
    labels = kwargs.get("labels")
    if labels is None or not (self.training and torch.is_grad_enabled()) or getattr(decoder, _PLAN, None) is not None:
        return run(*args, **kwargs)
    # A hook sees the head's labels; who calls the model again with what a hook saw means the same batch.
    plan: TargetPlan | None = getattr(labels, _PLAN, None)
    if plan is None:
        plan = plan_targets(labels, kwargs.get("attention_mask"), kwargs.get("position_ids"))
    if plan.is_dense:
        return run(*args, **kwargs)
    if plan.num_target == 0:
        warnings.warn("labels: no target in a batch; its loss has no gradient", UserWarning, stacklevel=3)
        with torch.no_grad():
            return run(*args, **kwargs)
    vars(decoder)[_PLAN] = plan
    try:
        return run(*args, **{**kwargs, "labels": _head_labels(plan)})
    finally:
        del vars(decoder)[_PLAN]


def _head_labels(plan: TargetPlan) -> Tensor:
    """Labels (B, T + 1) that, shifted as a causal loss does, stand beside the target rows of the decoder's output."""
    rows = [
        stage.gather(plan.shift_labels).masked_fill(~stage.is_row, IGNORED) for stage in plan.stages if stage.is_target
    ]
    labels = torch.nn.functional.pad(torch.cat(rows, dim=1), (1, 0), value=IGNORED)
    setattr(labels, _PLAN, plan)
    return labels


# ---- the decoder: the stages


def _call_in_stages(self: Any, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    plan: TargetPlan | None = vars(self).get(_PLAN)
    if plan is None:
        return run(*args, **kwargs)
    from .stage_keys import StageKeys, StageMasks

    inputs = {**inspect.signature(self.forward).bind_partial(*args).arguments, **kwargs}
    _check_inputs(inputs, plan)
    if inputs.get("position_ids") is None:
        inputs["position_ids"] = torch.arange(plan.documents.shape[1], device=plan.documents.device).unsqueeze(0)
    inputs["position_ids"] = inputs["position_ids"].expand_as(plan.documents)
    dtype = next(p.dtype for p in self.parameters() if p.is_floating_point())
    masks = StageMasks(self.config, plan.documents)
    keys, hidden = StageKeys(), []
    output: Any = None
    with _caches_under_checkpointing(self):
        for stage in plan.stages:
            rows = {name: stage.gather(inputs[name]) for name in _BY_ROW if inputs.get(name) is not None}
            mask = masks.add(stage, dtype)
            with _autograd(self, stage.is_target):
                output = run(**{**inputs, **rows, "attention_mask": mask, "past_key_values": keys, "use_cache": True})
            keys = keys.close(stage.rows.shape[1])
            if stage.is_target:
                hidden.append(output.last_hidden_state)
    # One row more, beside the last label of _head_labels.
    output.last_hidden_state = torch.nn.functional.pad(torch.cat(hidden, dim=1), (0, 0, 0, 1))
    output.past_key_values = None
    return output


@contextmanager
def _caches_under_checkpointing(decoder: nn.Module) -> Iterator[None]:
    """Let layers that transformers checkpoints keep the cache they are given: ours may be written again."""
    layers = [
        module for module in decoder.modules() if getattr(type(module), "_can_checkpoint_with_cache", None) is False
    ]
    for layer in layers:
        vars(layer)["_can_checkpoint_with_cache"] = True
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop("_can_checkpoint_with_cache", None)


_BY_ROW = ("input_ids", "inputs_embeds", "position_ids")
_REPLACED = {*_BY_ROW, "attention_mask", "past_key_values", "use_cache"}


def _check_inputs(inputs: dict[str, Any], plan: TargetPlan) -> None:
    if inputs.get("past_key_values") is not None:
        raise ValueError("past_key_values: expected None with labels and context, got a cache")
    mask = inputs.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        raise ValueError("attention_mask: expected shape (batch, seq_len) with context, got another kind of mask")
    for name in ("output_hidden_states", "output_attentions", "output_router_logits"):
        if inputs.get(name):
            raise ValueError(f"{name}: expected False with labels and context: context and targets run apart")
    shape = plan.documents.shape
    for name, value in inputs.items():
        if name not in _REPLACED and isinstance(value, Tensor) and value.shape[:2] == shape and value.dim() > 1:
            raise ValueError(f"{name}: expected no further input by token with context, got shape {tuple(value.shape)}")


@contextmanager
def _autograd(decoder: Any, is_target: bool) -> Iterator[None]:
    how = "full" if is_target else decoder._dropbp_context_gradient
    if how == "full":
        yield
        return
    with contextlib.ExitStack() as stack:
        if how == "one_hop":
            for module in decoder.modules():
                if _is_attention(module):
                    stack.callback(module.register_forward_pre_hook(_begin_hop).remove)
                    stack.callback(module.register_forward_hook(_end_hop, always_call=True).remove)
        stack.enter_context(torch.no_grad())
        yield


def _is_attention(module: nn.Module) -> bool:
    return hasattr(module, "layer_idx") and not any(hasattr(child, "layer_idx") for child in module.children())


def _begin_hop(module: nn.Module, args: Any) -> None:
    torch.set_grad_enabled(True)  # what goes in was made under no_grad: a constant


def _end_hop(module: nn.Module, args: Any, output: Any) -> Any:
    torch.set_grad_enabled(False)
    return tree_map_only(Tensor, Tensor.detach, output)
