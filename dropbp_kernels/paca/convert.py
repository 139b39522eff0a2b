"""PaCA as LoRA, exactly: the change of r columns is a matrix of rank r."""

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .layer import PacaLayer

_PREFIX = "base_model.model."


@torch.no_grad()
def convert_to_lora(
    model: nn.Module, adapter_name: str = "default", path: str | Path | None = None
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Return a LoraConfig and the state dict of a LoRA adapter that changes every weight by the same matrix.

    lora_A is zero but for a one in each chosen column, lora_B is what the columns change by, alpha equals r. Modules
    that were trained as a whole come along. The model stays as it is.

    path: a folder to save both in, for `peft.PeftModel.from_pretrained(base_model, path)` or any server of LoRA.
    Errors: ValueError when the model has no such PaCA adapter, or one that trains biases too; RuntimeError when its
        columns are not chosen yet.
    Cost:   lora_A and lora_B in memory: r / out of the adapter more than it takes itself, times in / out.
    Source: exact, since W' = W + delta S with S the r x in matrix that picks the columns.
    """
    config: Any = getattr(model, "peft_config", {}).get(adapter_name)
    layers = {
        name.removeprefix(_PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, PacaLayer) and adapter_name in module.paca_columns
    }
    if not layers:
        raise ValueError(f"adapter_name: expected a PaCA adapter of this model, got {adapter_name!r}")
    if getattr(config, "bias", "none") != "none":
        raise ValueError(f"bias: LoRA has no place for biases that were trained, expected 'none', got {config.bias!r}")
    state: dict[str, Tensor] = {}
    for name, layer in layers.items():
        delta = layer._delta(adapter_name)
        selection = delta.new_zeros(layer.r[adapter_name], layer.in_features)
        selection[torch.arange(layer.r[adapter_name]), layer._indices(adapter_name)] = 1.0
        state[f"{_PREFIX}{name}.lora_A.weight"], state[f"{_PREFIX}{name}.lora_B.weight"] = selection, delta.contiguous()
    if config is not None and config.modules_to_save:
        saved = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
        state |= {key: tensor for key, tensor in saved.items() if ".paca_" not in key}
    lora = _lora_config(config, {name: layer.r[adapter_name] for name, layer in layers.items()})
    lora.fan_in_fan_out = all(isinstance(layer.get_base_layer(), Conv1D) for layer in layers.values())
    if path is not None:
        from safetensors.torch import save_file

        lora.save_pretrained(str(path))
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, Path(path) / SAFETENSORS_WEIGHTS_NAME)
    return lora, state


def _lora_config(config: Any, ranks: dict[str, int]) -> LoraConfig:
    r = Counter(ranks.values()).most_common(1)[0][0]
    others = {name: rank for name, rank in ranks.items() if rank != r}
    common = ("base_model_name_or_path", "revision", "task_type", "inference_mode", "modules_to_save")
    return LoraConfig(
        r=r,
        lora_alpha=r,
        target_modules=sorted(ranks),
        rank_pattern=others,
        alpha_pattern=dict(others),
        **{name: copy.copy(getattr(config, name)) for name in common if config is not None},
    )
