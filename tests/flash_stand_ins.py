"""Stand-ins for the two functions of flash-attn, which needs a GPU: transformers' code above them runs as it is."""

import torch
from transformers import modeling_flash_attention_utils as flash


def attend(query, key, value, causal, softmax_scale, window):
    """Attention of one sequence, (rows, heads, head_dim), whose last query sees the last key."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * softmax_scale
    places = torch.arange(len(query))[:, None] + len(key) - len(query)
    distance = places - torch.arange(len(key))
    sees = (distance >= 0) if causal else torch.ones_like(distance, dtype=torch.bool)
    if window[0] >= 0:
        sees &= distance <= window[0]
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~sees, -torch.inf).softmax(-1), value)


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1)):
    return torch.stack([attend(*qkv, causal, softmax_scale, window_size) for qkv in zip(q, k, v, strict=True)])


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
):
    parts = [x.split(ends.diff().tolist()) for x, ends in ((q, cu_seqlens_q), (k, cu_seqlens_k), (v, cu_seqlens_k))]
    return torch.cat([attend(*qkv, causal, softmax_scale, window_size) for qkv in zip(*parts, strict=True)])


def attend_by_flash(monkeypatch, model):
    """`model`, attending by transformers' flash attention, down to the functions of the package."""
    values = {
        "_loaded_implementation": "flash_attention_2",
        "_flash_fn": flash_attn_func,
        "_flash_varlen_fn": flash_attn_varlen_func,
        "_pad_fn": flash._pad_input,
        "_unpad_fn": flash._unpad_input,
        "_process_flash_kwargs_fn": flash._lazy_define_process_function(flash_attn_varlen_func),
        "_process_with_kvcache_kwargs_fn": dict,
    }
    for name, value in values.items():
        monkeypatch.setattr(flash, name, value, raising=False)  # transformers 5.15 has not all of them
    model.config._attn_implementation = "flash_attention_2"
    return model
