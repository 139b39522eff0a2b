"""Models that treat their logits in different ways, and how their losses and gradients are compared."""

import torch
from models import CAUSAL_LMS, gradients, tiny_batch, tiny_causal_lm
from transformers import (
    BertConfig,
    BertForMaskedLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
# What a model does between its head and its loss, beside nothing: scale, soft cap, bias, no shift, another loss call.
OTHERS = {
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=0.5)),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.3)),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=7.0)),
    "phi": lambda: PhiForCausalLM(PhiConfig(**SIZES)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4, n_positions=64)),
    "bert": lambda: BertForMaskedLM(BertConfig(**SIZES)),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0)
    ),
}


def model_of(family):
    torch.manual_seed(0)
    return (tiny_causal_lm(family) if family in CAUSAL_LMS else OTHERS[family]()).train()


def batch_of():
    batch = tiny_batch()
    batch["labels"] = batch["labels"].clone()
    batch["labels"][0, :4] = -100
    return batch


def backward(model, **inputs):
    torch.manual_seed(5)  # dropout
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    return output, gradients(model)


def assert_close(ours, expected, **tolerance):
    assert set(ours) == set(expected)
    for name, grad in expected.items():
        assert (ours[name] is None) == (grad is None), name
        if grad is not None:
            torch.testing.assert_close(ours[name], grad, msg=lambda text, name=name: f"{name}: {text}", **tolerance)
