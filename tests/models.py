"""Small models that several tests share."""

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from dropbp_kernels import DropBP

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "use_cache": False,
}
CAUSAL_LMS = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


def tiny_causal_lm(family: str = "llama", **overrides) -> nn.Module:
    """A transformers causal LM of three small blocks in training mode, with the same weights at every call."""
    config_class, model_class = CAUSAL_LMS[family]
    sizes = dict(SIZES, head_dim=8) if family == "qwen3" else SIZES
    torch.manual_seed(0)
    return model_class(config_class(**{**sizes, **overrides})).train()


def tiny_gpt2() -> nn.Module:
    """GPT-2 of two small blocks in training mode, whose linears are `Conv1D`, with the same weights at every call."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2, use_cache=False)
    config.bos_token_id = config.eos_token_id = 0
    return GPT2LMHeadModel(config).train()


def encoder_decoder(name: str) -> tuple[nn.Module, dict[str, torch.Tensor], int]:
    """A tiny T5, Whisper or ViT in training mode, inputs with labels, and how many branches it has."""
    import transformers

    torch.manual_seed(0)
    tokens = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(1))
    if name == "t5":
        config = transformers.T5Config(
            vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0,
            use_cache=False,
        )  # fmt: skip
        return transformers.T5ForConditionalGeneration(config).train(), {"input_ids": tokens, "labels": tokens}, 10
    if name == "whisper":
        config = transformers.WhisperConfig(
            vocab_size=96, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=12,
            max_target_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        )  # fmt: skip
        features = torch.randn(2, 8, 24, generator=torch.Generator().manual_seed(1))
        model = transformers.WhisperForConditionalGeneration(config).train()
        return model, {"input_features": features, "labels": tokens}, 10
    if name == "vit":
        config = transformers.ViTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16,
            patch_size=4, num_labels=3,
        )  # fmt: skip
        pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
        model = transformers.ViTForImageClassification(config).train()
        return model, {"pixel_values": pixels, "labels": torch.tensor([0, 2])}, 4
    config = transformers.RobertaConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, pad_token_id=0
    )
    return transformers.RobertaForMaskedLM(config).train(), {"input_ids": tokens, "labels": tokens}, 4


def tiny_batch(batch_size: int = 2, seq_len: int = 10) -> dict[str, torch.Tensor]:
    """Token ids with themselves as labels."""
    tokens = torch.randint(64, (batch_size, seq_len), generator=torch.Generator().manual_seed(1))
    return {"input_ids": tokens, "labels": tokens}


class ToyBlock(nn.Module):
    """A user's own block: one gated branch around a norm and two linears."""

    def __init__(self, width: int = 8, dropout: float = 0.0):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)
        self.gate = DropBP(lambda batch_size, seq_len: 8.0 * batch_size * seq_len * width**2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gate.residual_add(x, lambda x: self.dropout(self.down(torch.relu(self.up(self.norm(x))))))


def toy_model(num_blocks: int = 4, dropout: float = 0.0) -> nn.Sequential:
    """A stack of `ToyBlock`, with the same weights at every call."""
    torch.manual_seed(0)
    return nn.Sequential(*(ToyBlock(dropout=dropout) for _ in range(num_blocks)))


def gradients(model: nn.Module) -> dict[str, torch.Tensor | None]:
    """The gradient of each parameter by name, None where there is none."""
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def backward(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    """The logits of a batch and the gradients of its loss."""
    model.zero_grad()
    output = model(**batch)
    output.loss.backward()
    return output.logits.detach(), gradients(model)


def step(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    """The loss of a batch and its gradients; dropout draws the same at every call."""
    torch.manual_seed(1)
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), gradients(model)


def with_lora(model: nn.Module, **options) -> nn.Module:
    """The model with LoRA on all linears, B not zero, so that every adapter matters; the same weights at every call."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = peft.LoraConfig(**{"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **options})
    return peft.get_peft_model(model, config).train()
