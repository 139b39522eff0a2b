"""What a target plan is told of a batch where a Trainer makes the loss of it, and not the model.

- Labels, where the Trainer smooths them, and those that releases of TRL before 1.15 do not give to the model of
  `DPOTrainer`, `GRPOTrainer`, `RLOOTrainer` and `KTOTrainer`: every such batch has a `completion_mask`.
- Labels of TRL's trainers that call the model without and have no such mask: `_FINDS`.
- Which samples have a loss without a gradient: completions of `GRPOTrainer` and `RLOOTrainer` whose advantage is zero.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..targets import IGNORED, TargetRule

# Where `compute_loss` is defined that smooths the labels it keeps from the model, and reads no other logits.
_SMOOTHING = ("transformers.trainer", "trl.trainer.sft_trainer")
# Where the losses are defined whose only terms without an advantage are those of `_TERMS`.
_LOSSES = ("trl.trainer.grpo_trainer", "trl.trainer.rloo_trainer")
_TERMS = ("beta", "_entropy_bonus_enabled", "aux_loss_enabled")


def tell_of_batches(
    trainer: Any, rule: TargetRule, labels_by_user: Callable[[dict[str, Any]], Tensor] | None = None
) -> None:
    """Let `rule` know of each batch before `trainer` makes its loss: labels, as if they were given to `step`."""
    original = trainer.compute_loss
    find_labels = labels_by_user or _way_to_find(trainer)

    def compute_loss(model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        rule.labels = find_labels(inputs)
        rule.without_gradient = without_gradient_of(trainer, inputs)
        try:
            return original(model, inputs, *args, **kwargs)
        finally:
            rule.without_gradient = None

    trainer.compute_loss = compute_loss


def stop_telling_of_batches(trainer: Any) -> None:
    """Undo `tell_of_batches`."""
    del trainer.compute_loss


def _way_to_find(trainer: Any) -> Callable[[dict[str, Any]], Tensor | None]:
    if getattr(trainer, "use_uld_loss", False):  # GOLDTrainer between tokenizers: also reads the logits behind labels
        return labels_of
    if (known := _FINDS.get(type(trainer).__module__)) is not None:
        return known
    return _given_labels if _smooths_labels(trainer) else labels_of


def _smooths_labels(trainer: Any) -> bool:
    """Whether transformers' own loss is taken of labels that the model is not given; others may read any logits."""
    if trainer.label_smoother is None or trainer.compute_loss_func is not None:
        return False
    return type(trainer).compute_loss.__module__ in _SMOOTHING


def _given_labels(inputs: dict[str, Any]) -> Tensor | None:
    return inputs.get("labels")


def labels_of(inputs: dict[str, Any]) -> Tensor | None:
    """Labels (batch, seq_len), not shifted, of a batch with a completion_mask; None of any other.

    The mask is that of whole sequences, `input_ids`, or of completions alone, `completion_ids` behind `prompt_ids`.
    """
    mask = inputs.get("completion_mask")
    if mask is None or "labels" in inputs:
        return None
    if "completion_ids" not in inputs:
        return inputs["input_ids"].masked_fill(mask == 0, IGNORED)
    completions = inputs["completion_ids"].masked_fill(mask == 0, IGNORED)
    return torch.cat([torch.full_like(inputs["prompt_ids"], IGNORED), completions], dim=1)


def _labels_of_pairs(inputs: dict[str, Any]) -> Tensor:
    """Of chosen completions, and of rejected ones below them, which run as one batch."""
    return pad_sequence([*inputs["chosen_labels"], *inputs["rejected_labels"]], True, IGNORED)


def _labels_of_whole_chosen(inputs: dict[str, Any]) -> Tensor:
    """The same, where the loss has a term of the prompts of chosen completions too."""
    chosen = inputs["chosen_input_ids"].masked_fill(inputs["chosen_attention_mask"] == 0, IGNORED)
    return _labels_of_pairs({**inputs, "chosen_labels": chosen})


# By the module of a trainer's own class, since a subclass of the user's may read any logits.
_FINDS: dict[str, Callable[[dict[str, Any]], Tensor | None]] = {
    "trl.experimental.cpo.cpo_trainer": _labels_of_pairs,
    "trl.experimental.gkd.gkd_trainer": _given_labels,
    "trl.experimental.gold.gold_trainer": _given_labels,
    "trl.experimental.iw_opd.iw_opd_trainer": _given_labels,
    "trl.experimental.orpo.orpo_trainer": _labels_of_whole_chosen,
}


def without_gradient_of(trainer: Any, inputs: dict[str, Any]) -> Tensor | None:
    """Which samples have an advantage of exactly zero, bool (batch,); None where the loss may have other terms."""
    advantages = inputs.get("advantages")
    if advantages is None or any(getattr(trainer, name, 0) for name in _TERMS):
        return None
    if any(getattr(type(trainer), name).__module__ not in _LOSSES for name in ("compute_loss", "_compute_loss")):
        return None
    is_zero: Tensor = advantages.reshape(len(advantages), -1).eq(0).all(1)
    return is_zero
