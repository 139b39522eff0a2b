"""What tests of target plans share: models and a batch, and dense models whose context is cut off by hand."""

from functools import partial

import torch
from hypothesis import strategies as st
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks.tiny_models import tiny_causal_lm
from dropbp_kernels.targets import IGNORED, plan_targets

# The loss is float32 whatever the model is; what it hands back is good to about eight digits.
CLOSE = {"rtol": 1e-6, "atol": 1e-7}


def tiny(model_type="llama", dtype=torch.float64, **overrides) -> nn.Module:
    torch.manual_seed(0)
    model = tiny_causal_lm(model_type, **overrides).to(dtype).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif "dropout" in vars(module):  # a number, which OPT's blocks have
            vars(module)["dropout"] = 0.0
    return model


def chat(batch_size=3, seq_len=16) -> dict[str, torch.Tensor]:
    """A prompt and a completion, the same with a tail that no target sees, and a talk of two turns."""
    tokens = torch.randint(3, 96, (batch_size, seq_len), generator=torch.Generator().manual_seed(1))
    labels = tokens.clone()
    labels[0, :8] = IGNORED
    labels[1, :10] = labels[1, 13:] = IGNORED
    labels[2, :3] = labels[2, 6:11] = IGNORED
    return {"input_ids": tokens, "labels": labels, "use_cache": False}


def is_target(labels):
    return nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED) != IGNORED


def runs_again(labels, mask=None, **keep):
    """Which context rows run with autograd all the same, (B, S)."""
    plan = plan_targets(labels, mask, **keep)
    kept = torch.zeros_like(labels, dtype=torch.bool)
    for stage in plan.stages:
        if stage.is_target:
            for sample, rows in enumerate(stage.rows):
                kept[sample, rows[stage.is_row[sample]]] = True
    return kept & ~is_target(labels)


def backward(model, batch):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours, dense, **tolerance):
    torch.testing.assert_close(ours[0], dense[0], **tolerance)
    names = {name for name, grad in dense[1].items() if grad.count_nonzero()}
    assert names <= ours[1].keys()
    for name, grad in ours[1].items():
        torch.testing.assert_close(
            grad, dense[1].get(name, torch.zeros_like(grad)), **tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


def cut_keys(targets, function, module, query, key, value, *args, **kwargs):
    """Attention whose context keys and values are constants."""
    keep = targets[:, None, :, None]
    key, value = torch.where(keep, key, key.detach()), torch.where(keep, value, value.detach())
    return function(module, query, key, value, *args, **kwargs)


def cut_attention(model, targets):
    """Let a model of the attention interface attend with constant context keys and values, until `forget_cut`."""
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS.register("cut_keys", partial(cut_keys, targets, sdpa))
    ALL_MASK_ATTENTION_FUNCTIONS.register("cut_keys", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.config._attn_implementation = "cut_keys"
    return model


def forget_cut():
    """Take out of transformers' tables what `cut_attention` put there."""
    for functions in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
        functions._global_mapping.pop("cut_keys", None)


def cut_inputs(model, targets):
    """The same with the input of every attention a constant at context rows."""

    def cut(module, args, kwargs):
        name, states = ("hidden_states", kwargs["hidden_states"]) if "hidden_states" in kwargs else (0, args[0])
        states = torch.where(targets[:, :, None], states, states.detach())
        return ((states, *args[1:]), kwargs) if name == 0 else (args, {**kwargs, name: states})

    for module in model.modules():
        if hasattr(module, "layer_idx") and type(module).__name__.endswith("Attention"):
            module.register_forward_pre_hook(cut, with_kwargs=True)
    return model


@st.composite
def batches(draw):
    """Labels, attention_mask and position_ids of a batch, padded anywhere or packed."""
    batch_size, seq_len = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    bits = st.lists(st.booleans(), min_size=seq_len, max_size=seq_len)
    rows = [draw(bits) for _ in range(batch_size)]
    labels = torch.where(torch.tensor(rows), 5, IGNORED)
    if draw(st.booleans()):
        starts = torch.tensor([draw(bits) for _ in range(batch_size)])
        starts[:, 0] = True
        places = torch.arange(seq_len).expand(batch_size, seq_len)
        return labels, None, places - torch.where(starts, places, 0).cummax(1).values
    mask = torch.tensor([draw(bits) for _ in range(batch_size)])  # holes too
    labels[:, 1:][~mask[:, :-1]] = IGNORED
    return labels, mask.long(), None
