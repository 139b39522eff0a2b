"""Any causal LM of transformers, shrunk by the names that configurations use for their sizes."""

from typing import Any

import torch
from torch import nn

VOCAB_SIZE = 96
# What sizes are called in the configurations of transformers, and what they shrink to; a configuration takes those it
# knows. Layers stay 2, so that there is a boundary between blocks and, where layers differ, one of each kind.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size", "decoder_vocab_size"), 96),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_dim", "embedding_size"), 32),
    **dict.fromkeys(("word_embed_proj_dim", "lru_width", "backbone_hidden_size", "input_embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_dim", "n_inner", "dff"), 48),
    **dict.fromkeys(("dim_ff", "ffn_hidden_size", "intermediate_size_mlp", "d_inner", "feed_forward_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 24),
    **dict.fromkeys(("expert_ffn_hidden_size", "moe_shared_expert_intermediate_size", "dense_intermediate_size"), 24),
    **dict.fromkeys(("num_hidden_layers", "decoder_layers", "encoder_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("num_encoder_layers", "num_decoder_layers", "num_blocks", "num_layers_per_stack"), 2),
    **dict.fromkeys(("num_attention_heads", "decoder_attention_heads", "encoder_attention_heads", "n_head"), 4),
    **dict.fromkeys(("n_heads", "num_heads", "attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("num_decoder_attention_heads", "swa_num_attention_heads", "num_query_groups"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "swa_head_dim", "dim_head", "d_head", "kv_channels", "attention_head_size"), 8),
    **dict.fromkeys(("attention_head_dim", "rotary_dim", "index_head_dim", "q_lora_rank", "kv_lora_rank"), 8),
    **dict.fromkeys(("v_head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "gated_norm_rank", "o_lora_rank"), 8),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "index_n_heads"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "n_shared_experts", "num_shared_experts"), 1),
    **dict.fromkeys(("moe_num_shared_experts", "first_k_dense_replace", "zero_expert_num", "expert_layer_offset"), 1),
    **dict.fromkeys(("num_nextn_predict_layers", "num_kv_shared_layers", "moe_layer_start_index"), 0),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size", "mamba_d_head", "mamba_headdim"), 8),
    **dict.fromkeys(("mamba_head_dim", "linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads", "linear_num_key_heads"), 4),
    **dict.fromkeys(("linear_num_value_heads", "linear_num_heads", "time_step_rank", "mamba_dt_rank"), 4),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size", "n_positions", "n_ctx", "max_seq_len", "context_length"), 64),
    **dict.fromkeys(("max_position_embeddings", "max_source_positions", "max_target_positions"), 64),
    **dict.fromkeys(("max_sequence_length", "model_max_length", "sliding_window", "local_attention"), 64),
    **dict.fromkeys(("attention_hidden_size", "mamba_d_ssm"), 32),
    **dict.fromkeys(("attn_layer_period", "expert_layer_period", "layer_group_size"), 2),
    **dict.fromkeys(("attn_layer_offset", "num_dense_layers", "mamba_n_groups", "n_groups", "mamba_ngroups"), 1),
    **dict.fromkeys(("layerdrop", "decoder_layerdrop", "encoder_layerdrop"), 0.0),
    "use_cache": False,
    "is_decoder": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# What the names above do not say: sizes that have to fit each other, or names that mean another thing here.
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_d_head": 16},
    "dots3_note_text": {"num_key_value_heads": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"mamba_d_head": 16},
    "mamba2": {"num_heads": 8},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(model_type: str, **overrides: Any) -> Any:
    """A configuration of `model_type` with small sizes, its sub-configurations too."""
    from transformers import AutoConfig

    default = AutoConfig.for_model(model_type)
    return type(default)(**{**_sizes(default), **SPECIAL.get(model_type, {}), **overrides})


def _sizes(config: Any) -> dict[str, Any]:
    sizes = {}
    for name, value in config.to_dict().items():
        if isinstance(value, dict) and name.endswith("config") and hasattr(getattr(config, name), "to_dict"):
            sizes[name] = _sizes(getattr(config, name)) | {"model_type": getattr(config, name).model_type}
        elif name in SIZES:
            sizes[name] = SIZES[name]
    if "kv_lora_rank" in sizes:  # latent attention has as many key heads as query heads
        sizes["num_key_value_heads"] = 4
    return sizes


def tiny_causal_lm(model_type: str, **overrides: Any) -> nn.Module:
    """The causal LM of `model_type` with two small blocks, in training mode, the same weights at every call."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, **overrides)).train()
    for parameter in model.parameters():  # zeros (layer scales, biases) would hide a missing gradient
        if not parameter.detach().any():
            nn.init.normal_(parameter, std=0.02)
    return model


def tiny_inputs(batch_size: int = 2, seq_len: int = 12) -> dict[str, torch.Tensor]:
    """Token ids with themselves as labels."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, VOCAB_SIZE, (batch_size, seq_len), generator=generator)
    return {"input_ids": tokens, "labels": tokens}
