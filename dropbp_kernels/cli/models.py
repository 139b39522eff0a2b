"""The model to fine-tune, its tokenizer and its adapter. Imports transformers and PEFT when called, not before."""

import copy
import hashlib
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import builtin
from .data import Data
from .errors import UserError, first_line
from .model_config import check_on_hub
from .settings import Settings

LORA_ALPHA_PER_RANK, PACA_ALPHA_PER_RANK = 2, 4  # PaCA's as published
FINGERPRINT_VALUES = 256


def load_tokenizer(settings: Settings) -> Any:
    if settings.model == builtin.NAME:
        return builtin.ByteTokenizer()
    from transformers import AutoTokenizer

    if not Path(settings.model).expanduser().is_dir():
        check_on_hub(settings.model, [builtin.NAME])
    try:
        tokenizer = AutoTokenizer.from_pretrained(settings.model)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {settings.model}: no tokenizer could be loaded: {first_line(error)}") from error
    if not tokenizer.encode("text", add_special_tokens=False):  # without files transformers makes up an empty one
        raise UserError(f"--model {settings.model}: no tokenizer could be loaded: its files are missing")
    tokenizer.model_max_length = 2**31  # whole documents are encoded, then cut into rows: no warning about that
    return tokenizer


def load_model(settings: Settings, data: Data) -> nn.Module:
    """The model with its adapter, on its device, in training mode; gates come later.

    Full fine-tuning keeps float32 weights, under autocast; with LoRA the frozen weights are held in --dtype.
    Errors: UserError when it cannot be loaded or does not fit the data.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    device = torch.device(settings.device)
    source: str | Path = settings.model
    if settings.model == builtin.NAME:
        disable_progress_bar()  # a model of this size is read in no time
        source = builtin.ensure_pretrained(settings.recipe(), device)
    dtype = torch.float32 if settings.adapter == "full" else settings.torch_dtype()
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    except (OSError, ValueError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        raise UserError(f"--model {settings.model}: {first_line(error)}") from error
    model.config.use_cache = False
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and settings.seq_len > limit:
        raise UserError(
            f"--seq-len: expected at most {limit}, which is what the model was made for, got {settings.seq_len}"
        )
    if (largest := data.max_id()) >= model.get_input_embeddings().num_embeddings:
        raise UserError(
            f"--model {settings.model}: the tokenizer gives token {largest}, but the model has only "
            f"{model.get_input_embeddings().num_embeddings} embeddings"
        )
    if settings.adapter != "full":
        model = _with_adapter(model, settings)
    return model.to(device).train()


def _with_adapter(model: Any, settings: Settings) -> Any:
    from peft import LoraConfig, get_peft_model

    common: dict[str, Any] = {"r": settings.lora_rank, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    config: Any
    if settings.adapter == "paca":
        from ..paca import PacaConfig

        config = PacaConfig(alpha=PACA_ALPHA_PER_RANK * settings.lora_rank, seed=settings.seed, **common)
    else:
        torch.manual_seed(settings.seed)  # the initial adapter
        config = LoraConfig(lora_alpha=LORA_ALPHA_PER_RANK * settings.lora_rank, **common)
    with warnings.catch_warnings():  # PEFT asks transformers by a name that is on its way out
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)
        try:
            return get_peft_model(model, config)
        except ValueError as error:  # more columns than a layer has
            raise UserError(f"--adapter {settings.adapter} on --model {settings.model}: {error}") from error


def twin(model: nn.Module) -> nn.Module:
    """A copy with trainable parameters of its own; frozen ones are shared, so that a large base is held once."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters() if not p.requires_grad})


def fingerprint(model: nn.Module) -> str:
    """Hash of names, shapes and some values of all parameters: tells one model from another, cheaply."""
    digest = hashlib.sha1()
    for name, parameter in model.named_parameters():
        values = parameter.detach().flatten()[:FINGERPRINT_VALUES].float().cpu()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()
