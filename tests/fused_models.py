"""Tiny models of every family whose adds are fused, patched in several ways, and how their results are compared."""

import importlib
import re
from pathlib import Path

import torch
import transformers
from models import SIZES
from transformers import AutoConfig, AutoModelForCausalLM

from dropbp_kernels import apply_dropbp
from dropbp_kernels.blocks import Stream
from dropbp_kernels.integrations import fusing

MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MLA = {
    **{"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8},
    **{"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4},
}
# Model types whose adds are fused, and what their tiny configurations need besides SIZES.
FUSED_MODELS = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mixtral": MOE,
    "qwen2_moe": {**MOE, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {**MOE, "head_dim": 8},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8},
    "phi3": {"pad_token_id": 0},
    "granite": {"residual_multiplier": 0.5},
    "starcoder2": {},
    "stablelm": {},
    "gpt2": {"pad_token_id": 0, **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)},
    "gpt_neox": {"use_parallel_residual": False},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
    "apertus": {},
    "biogpt": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "activation_dropout": 0.0},
    "glm4": {"pad_token_id": 0, "head_dim": 8},
    "granitemoe": {**MOE, "residual_multiplier": 0.5},
    "hyperclovax": {"residual_multiplier": 0.5, "use_post_norm": True},
    "jetmoe": {**MOE, "kv_channels": 8, "num_key_value_heads": 2, "aux_loss_coef": 0.0},
    "minicpm3": MLA,
    "persimmon": {"pad_token_id": 0, "hidden_dropout": 0.0, "attention_dropout": 0.0},
    "vaultgemma": {"head_dim": 8},
    "deepseek_v2": {**MOE, **MLA, "topk_method": "greedy"},
    "deepseek_v3": {**MOE, **MLA},
}
MIXED = (True, False, False, True, False, True)
PLANS = [MIXED, (True,) * 6, (False,) * 5 + (True,), (True,) + (False,) * 5]


def build(model_type="llama", dtype=torch.float32, **overrides):
    """A tiny model of three blocks with the same weights at every call; norms with weights that matter."""
    torch.manual_seed(0)
    sizes = {**SIZES, **FUSED_MODELS[model_type], **overrides}
    config = AutoConfig.for_model(model_type, attn_implementation="eager", **sizes)
    model = AutoModelForCausalLM.from_config(config).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.to(dtype)


def patched(plan, fused, model=None, **options):
    model = build() if model is None else model
    apply_dropbp(model, 0.5, fused=fused, **options).set_plan(plan)
    return model


def assert_close(ours, expected, tolerance=2e-5):
    """Logits and gradients, the latter relative to the largest entry of each."""
    torch.testing.assert_close(ours[0], expected[0], atol=tolerance, rtol=tolerance)
    for name, grad in expected[1].items():
        assert (ours[1][name] is None) == (grad is None), name
        if grad is not None:
            atol = tolerance * float(grad.abs().max()) + 1e-9
            torch.testing.assert_close(ours[1][name], grad, atol=atol, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


def count_adds(monkeypatch):
    """How often, from now on, the fused op runs and how often a branch is added by itself."""
    found = {"fused": 0, "added": 0}

    def counted(key, function):
        def run(*args):
            found[key] += args[0].branch is not None
            return function(*args)

        return run

    monkeypatch.setattr(fusing, "_add_and_normalise", counted("fused", fusing._add_and_normalise))
    monkeypatch.setattr(Stream, "added", counted("added", Stream.added))
    return found


def named_classes(names):
    """Classes of transformers by name, each from a model that has one."""
    found = {}
    for path in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        for name in re.findall(r"^class (\w+)\(nn\.Module\)", path.read_text(), flags=re.M):
            if name in names and name not in found:
                module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
                found[name] = getattr(module, name)
    return found
