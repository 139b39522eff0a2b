"""Which models, options and inputs target plans take, and why not the others."""

import inspect
import warnings
from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..choices import CONTEXT_GRADIENTS, check_choice
from ..handler import check_drop_rate
from ..targets import TargetPlan, TargetRule
from .checkpointing import is_reentrant
from .same_code import calls
from .swapping import is_sharded

ATTENTION = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flash_attention_4")
TAKES_MASKS = ATTENTION[:2]  # of our own; what the others can do, stages of one document a sample need
BY_ROW = ("input_ids", "inputs_embeds")
# What models whose first layers add features of an image (Qwen3-VL) are given of it: where its tokens stand, and these
# tokens' features for each of these layers.
IMAGE_TOKENS, IMAGE_FEATURES = "visual_pos_masks", "deepstack_visual_embeds"
REPLACED = {*BY_ROW, "position_ids", IMAGE_TOKENS, "attention_mask", "past_key_values", "use_cache"}  # by a stage's
# What collators without padding say of documents beside position_ids: for layers with a state, which are refused, and
# for flash attention, which would take the lengths of a whole batch for those of a stage.
DOCUMENTS = ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
# Which layers that transformers checkpoints say of themselves; before 5.15 they lost every cache.
WITH_CACHE = "_can_checkpoint_with_cache"
RECORDED = ("output_hidden_states", "output_attentions", "output_router_logits")


def check_context(model: nn.Module, context: str | None, rule: TargetRule) -> None:
    """Raise ValueError, with the reason, unless `patch_targets` can do what these options of apply_dropbp ask for."""
    if context not in (None, "inference"):
        raise ValueError(f'context: expected None or "inference", got {context!r}')
    check_choice("context_gradient", rule.context_gradient, CONTEXT_GRADIENTS)
    keep = check_drop_rate(rule.context_keep, "context_keep")
    if keep and rule.context_gradient == "full":
        raise ValueError(f'context_keep: expected 0 with context_gradient="full", which keeps all, got {keep}')
    if not isinstance(rule.shared_context, bool):
        raise TypeError(f"shared_context: expected True or False, got {rule.shared_context!r}")
    windows = rule.target_windows
    if isinstance(windows, bool) or not isinstance(windows, int) or windows < 1:
        raise ValueError(f"target_windows: expected a whole number from 1 on, got {windows!r}")
    share = rule.target_keep
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0.0 < share <= 1.0:
        raise ValueError(f"target_keep: expected 0 < target_keep <= 1, got {share!r}")
    if context is None:
        for option in fields(rule):
            if (value := getattr(rule, option.name)) != option.default:
                raise ValueError(f'context: expected "inference" with {option.name}={value}, got None')
        return
    decoder: Any = find_decoder(model)
    _check_release()
    _check_decoder(decoder)
    _check_shift(without_peft(model))
    for name, value, least in (("context_keep", keep, 0), ("target_keep", share, 1)):
        if value != least and (attention := decoder.config._attn_implementation) not in TAKES_MASKS:
            raise ValueError(
                f"{name}: expected {least} with attention {attention!r}, in which no row can skip a key, got "
                f"{value}; load the model with attn_implementation in {TAKES_MASKS}"
            )


def find_decoder(model: nn.Module) -> nn.Module:
    """The stack of blocks of a causal LM, with its embedding and last norm, without its head.

    Errors: ValueError when `model` is no causal LM.
    """
    lm = without_peft(model)
    decoder: Any = lm.get_decoder() if hasattr(lm, "get_decoder") else None
    if not hasattr(decoder, "config") or decoder is lm or lm.get_output_embeddings() is None:
        raise ValueError(f"model: expected a causal LM of transformers for context, got {type(lm).__name__}")
    return decoder  # type: ignore[no-any-return]


def without_peft(model: Any) -> Any:
    """The model of transformers inside of PEFT's."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _check_release() -> None:
    """Raise ValueError unless transformers lets a layer that it checkpoints keep its cache."""
    from transformers import __version__
    from transformers.modeling_layers import GradientCheckpointingLayer

    if not hasattr(GradientCheckpointingLayer, WITH_CACHE):
        raise ValueError(f"transformers: expected 5.15 or later with context, got {__version__}")


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
    elif getattr(decoder, "layerdrop", 0.0) or getattr(config, "layerdrop", 0.0):
        reason = "skips layers at random (layerdrop), other ones in each pass; set layerdrop to 0"
    elif getattr(config, "alibi", False):
        reason = "adds position biases (ALiBi) by the order of its keys"
    elif "local" in getattr(config, "attention_layers", ()):
        reason = "counts the windows of its local layers by the order of its keys"
    elif any(hasattr(module, "create_position_ids_from_input_ids") for module in decoder.modules()):
        reason = "numbers its tokens by a rule of its own"
    elif unknown or getattr(decoder, "_is_stateful", False):
        reason = f"has layers with a state of their own ({', '.join(sorted(unknown)) or 'stateful'})"
    elif getattr(config, "is_causal", True) is False or getattr(config, "use_bidirectional_attention", False):
        reason = "attends in both directions, so context depends on targets"
    elif any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in decoder.modules()):
        reason = "normalises over the batch, so samples and stages see each other"
    elif config._attn_implementation not in ATTENTION:
        reason = f"uses attention {config._attn_implementation!r}; load it with attn_implementation in {ATTENTION}"
    if reason is not None:
        raise ValueError(f"model: expected a decoder that can run in stages for context, but {name} {reason}")


def _check_shift(lm: nn.Module) -> None:
    """Raise ValueError where labels belong to the logits beside them: of transformers' models where no loss_function
    of theirs, which shifts them, takes the loss.
    """
    if calls(lm, "loss_function") is False:
        raise ValueError(
            f"model: expected one whose labels are shifted by its loss for context, got {type(lm).__name__}"
        )


def gathers_weights(decoder: nn.Module) -> bool:
    """Whether ranks share out the weights of `decoder` and gather them in each pass (FSDP, ZeRO-3)."""
    return is_sharded(decoder) or any(hasattr(parameter, "ds_id") for parameter in decoder.parameters())


def check_ranks(decoder: nn.Module, num_passes: int, num_targets: int) -> None:
    """Raise ValueError, on all ranks of one that `gathers_weights`, where they would take other numbers of passes.

    They would wait for each other for ever. A batch is asked about and not the model, since targets are the data's.
    """
    counts = [num_passes, num_targets]
    device = next(decoder.parameters()).device
    most = torch.tensor([*counts, *(-count for count in counts)], device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    if most[:2].tolist() != (-most[2:]).tolist():
        raise ValueError(
            f"labels: expected as many passes on every rank under FSDP, got {num_passes} of which {num_targets} of "
            f"targets here and up to {most[0]} and {most[1]} elsewhere; use DDP, or batches that are alike (each with "
            "targets and context, and of one length)"
        )


def has_ranks() -> bool:
    """Whether other ranks take part in each step."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def check_checkpointing(switches: list[nn.Module], context_gradient: str, plan: TargetPlan) -> None:
    """Raise ValueError where reentrant checkpointing of one of the modules that have its switch would lose a gradient.

    Its blocks run without a graph first, and so do the keys that they leave to later stages.
    """
    num_targets = sum(stage.is_target for stage in plan.stages)
    if (num_targets > 1 or context_gradient != "none") and is_reentrant(switches):
        raise ValueError(
            "use_reentrant: expected False in gradient_checkpointing_kwargs with context where targets attend to keys "
            f"that have a gradient (several turns, or context_gradient), got reentrant with {num_targets} "
            f"turns and context_gradient={context_gradient!r}"
        )


def check_inputs(decoder: Any, inputs: dict[str, Any], plan: TargetPlan) -> None:
    """Raise ValueError for inputs of `decoder` that stages cannot share out among them."""
    if inputs.get("past_key_values") is not None:
        raise ValueError("past_key_values: expected None with labels and context, got a cache")
    for name in RECORDED:
        if inputs.get(name, getattr(decoder.config, name, False)):
            raise ValueError(f"{name}: expected False with labels and context: context and targets run apart")
    shape = plan.documents.shape
    position_ids = inputs.get("position_ids")
    if position_ids is not None and tuple(position_ids.shape[-2:]) not in (tuple(shape), (1, shape[1])):
        raise ValueError(
            f"position_ids: expected the shape of labels, {tuple(shape)}, or (axes, {shape[0]}, {shape[1]}), got "
            f"{tuple(position_ids.shape)}"
        )
    _check_shared(inputs.get("inputs_embeds"), position_ids, plan)
    for name, value in inputs.items():
        if not isinstance(value, Tensor) or value.dim() < 2:
            continue
        if name in BY_ROW and value.shape[:2] != shape:
            raise ValueError(
                f"{name}: expected the shape of labels, {tuple(shape)}, got {tuple(value.shape[:2])}; prompts that an "
                "adapter learns cannot run in stages"
            )
        if name not in REPLACED and value.shape[:2] == shape:
            raise ValueError(f"{name}: expected no further input by token with context, got shape {tuple(value.shape)}")


def warn_of_embeds(decoder: nn.Module, embeds: Tensor | None, rule: TargetRule) -> None:
    """Warn, once, of parameters that `embeds` were made with outside of `decoder`: context gives them no gradient."""
    if embeds is None or embeds.grad_fn is None or rule.has_warned_of_embeds:
        return
    if rule.context_gradient == "full" or rule.context_keep > 0.0:
        return
    own = set(decoder.parameters())  # of its embedding, which most of its callers use
    waiting, seen = [embeds.grad_fn], {embeds.grad_fn}
    outside: set[Tensor] = set()
    while waiting:
        node = waiting.pop()
        variable = getattr(node, "variable", None)
        if isinstance(variable, nn.Parameter) and variable not in own:  # others are leaves that a hook made
            outside.add(variable)
        following = {next_node for next_node, _ in node.next_functions if next_node is not None} - seen
        seen |= following
        waiting += following
    if outside:
        rule.has_warned_of_embeds = True
        warnings.warn(
            f"inputs_embeds: expected to depend on no trained parameter outside of {type(decoder).__name__} (a vision "
            f"tower, a projector, learned prompts?), got {len(outside)}, to which context gives no gradient; freeze "
            'them, or pass context_gradient="full"',
            UserWarning,
            stacklevel=2,
        )


def _check_shared(embeds: Tensor | None, position_ids: Tensor | None, plan: TargetPlan) -> None:
    """Raise ValueError where samples that share a context by their tokens have other embeds or positions there."""
    first = plan.stages[0]
    if embeds is None or first.samples is None or first.sample_of is None or embeds.shape[:2] != plan.documents.shape:
        return
    rows = first.gather(embeds).detach()
    # To rounding: a vision tower computes one image a little otherwise at another place of its batch (seen on CPUs:
    # 5 eps of a row's largest value after 24 layers).
    distance = (rows - rows[first.samples][first.sample_of]).abs().amax(-1)
    is_other = distance > 16 * torch.finfo(rows.dtype).eps * rows.abs().amax(-1)
    if position_ids is not None:  # those of images, which tell two empty ones of other shapes apart
        shape = embeds.shape[:2]
        for positions in position_ids.expand(*position_ids.shape[:-2], *shape).reshape(-1, *shape):
            places = first.gather(positions)
            is_other |= places != places[first.samples][first.sample_of]
    if (is_other & first.is_row).any():
        raise ValueError(
            "inputs_embeds: expected the same where samples have the same prompt with shared_context, got others "
            "(another image?); patch without shared_context"
        )
