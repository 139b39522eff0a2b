"""Labels of batches that a TRL trainer marks by a mask, told to a target plan, since the loss is not the model's.

Releases of TRL before 1.15 call the model of `DPOTrainer`, `GRPOTrainer`, `RLOOTrainer` and `KTOTrainer` without
labels. What has a loss is known where the loss is made: every such batch has a `completion_mask`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..targets import IGNORED, TargetRule


def tell_labels(trainer: Any, rule: TargetRule) -> None:
    """Let `rule` know the labels of each batch before `trainer` makes its loss, as if they were given to `step`."""
    original = trainer.compute_loss

    def compute_loss(model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        rule.labels = labels_of(inputs)
        return original(model, inputs, *args, **kwargs)

    trainer.compute_loss = compute_loss


def stop_telling_labels(trainer: Any) -> None:
    """Undo `tell_labels`."""
    del trainer.compute_loss


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
