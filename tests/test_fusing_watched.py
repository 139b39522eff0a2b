"""When an add waits for the norm behind it: not where anybody would see that it does."""

import copy

import pytest
import torch
from fused_models import MIXED, assert_close, build, count_adds, patched
from models import backward, tiny_batch

from dropbp_kernels import remove_dropbp
from dropbp_kernels.integrations import fused_mlp, fusing


@pytest.fixture
def counts(monkeypatch):
    return count_adds(monkeypatch)


def test_auto_fuses_where_a_kernel_serves(counts, monkeypatch):
    batch = tiny_batch()
    fusing.has_kernel.cache_clear()
    backward(patched(MIXED, "auto"), batch)
    assert counts["fused"] == (6 if fusing._backend.serving("gated_residual_rms_norm", "cpu") != "reference" else 0)
    counts["fused"] = 0
    monkeypatch.setattr(fusing, "has_kernel", lambda device_type: False)
    backward(patched(MIXED, "auto"), batch)
    assert counts["fused"] == 0


@pytest.mark.parametrize(("model_type", "use_config"), [("llama", False), ("llama", True), ("opt", False)])
def test_recorded_hidden_states_are_whole(model_type, use_config, counts):
    batch = tiny_batch()
    expected = build(model_type)(**batch, output_hidden_states=True).hidden_states
    model = patched(MIXED, True, build(model_type))
    model.config.output_hidden_states = use_config
    found = model(**batch, **({} if use_config else {"output_hidden_states": True})).hidden_states
    assert len(found) == len(expected)
    for ours, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
    assert counts["fused"] == 3  # inside the blocks


def _hook_on_a_block(model):
    seen = []
    model.model.layers[1].register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    return seen


def _pre_hook_on_the_final_norm(model):
    seen = []
    model.model.norm.register_forward_pre_hook(lambda module, args: seen.append((args[0],)))
    return seen


def _another_forward(model):
    seen, block = [], model.model.layers[1]
    original = block.forward

    def forward(*args, **kwargs):
        seen.append(args[:1])
        return original(*args, **kwargs)

    block.forward = forward
    return seen


class Wrapper(torch.nn.Module):
    def __init__(self, block, seen):
        super().__init__()
        self.block, self.seen = block, seen

    def forward(self, hidden_states, **kwargs):
        self.seen.append((hidden_states,))
        return self.block(hidden_states, **kwargs)


def _wrapper_around_a_block(model):
    seen = []
    model.model.layers[1] = Wrapper(model.model.layers[1], seen)
    return seen


@pytest.mark.parametrize(
    "watch", [_hook_on_a_block, _pre_hook_on_the_final_norm, _another_forward, _wrapper_around_a_block]
)
def test_whoever_watches_a_block_sees_hidden_states(watch, counts):
    batch = tiny_batch()
    expected = backward(patched(MIXED, False), batch)
    model = patched(MIXED, True)
    seen = watch(model)
    counts.update(fused=0)
    logits, grads = backward(model, batch)
    assert counts["fused"] == 3
    assert seen
    assert all(isinstance(value, torch.Tensor) for values in seen for value in values)
    assert_close((logits, {name.replace(".block", ""): grad for name, grad in grads.items()}), expected)


def test_a_block_called_by_hand_returns_hidden_states():
    model = patched(MIXED, True)
    x = torch.randn(2, 10, 32)
    rope = model.model.rotary_emb(x, torch.arange(10)[None])
    assert isinstance(model.model.layers[0](x, position_embeddings=rope), torch.Tensor)


def test_a_model_of_ones_own_name_is_not_handed_anything(counts):
    """Its forward is not transformers' and may do anything between two blocks."""
    model = build()
    own = type("MyModel", (type(model.model),), {"__module__": __name__})
    model.model.__class__ = own
    backward(patched(MIXED, True, model), tiny_batch())
    assert counts["fused"] == 3


@pytest.mark.parametrize("way", ["transformers", "kept"])
def test_no_add_is_fused_under_checkpointing(way, counts, monkeypatch):
    monkeypatch.setattr(fused_mlp, "install", lambda model, fused: None)  # MLPs are: a recompute does the same again
    batch = tiny_batch()
    expected = backward(patched(MIXED, False), batch)
    model = patched(MIXED, True, checkpoint="kept" if way == "kept" else None)
    if way == "transformers":
        model.gradient_checkpointing_enable()
    logits, grads = backward(model, batch)
    assert counts["fused"] == 0
    assert torch.equal(logits, expected[0])
    for name, grad in expected[1].items():
        assert grad is None or torch.equal(grads[name], grad), name


def test_a_norm_of_another_kind_is_called_as_it_is(counts):
    batch = tiny_batch()
    model = build()
    model.model.layers[1].post_attention_layernorm = torch.nn.RMSNorm(32)
    expected = backward(copy.deepcopy(model), batch)
    assert_close(backward(patched((True,) * 6, True, model), batch), expected)
    assert counts["fused"] == 5


def test_autocast_adds_as_written(counts, monkeypatch):
    monkeypatch.setattr(fused_mlp, "install", lambda model, fused: None)
    batch = tiny_batch()
    with torch.autocast("cpu", torch.bfloat16):
        expected = build()(**batch).logits
        logits = patched((True,) * 6, True)(**batch).logits
    assert torch.equal(logits, expected)
    assert counts["fused"] == 0


def test_compiles_without_a_break_and_fuses_nothing(counts):
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    batch = tiny_batch()
    expected = backward(patched(MIXED, False), batch)
    model = patched(MIXED, True)
    logits, grads = backward(torch.compile(model, backend="aot_eager"), batch)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert_close((logits, {name.removeprefix("_orig_mod."): grad for name, grad in grads.items()}), expected)


@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_generation_is_the_same(model_type):
    tokens = tiny_batch()["input_ids"]
    options = {"max_new_tokens": 6, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    expected = build(model_type).eval().generate(tokens, **options)
    assert torch.equal(patched(MIXED, True, build(model_type)).eval().generate(tokens, **options), expected)


@pytest.mark.parametrize("order", ["before", "after"])
def test_liger_kernel_in_either_order(order, counts, monkeypatch):
    """Its norms are computed in the fused op with their own settings; the first norm, and its MLPs, stay its own."""
    monkey_patch = pytest.importorskip("liger_kernel.transformers.monkey_patch")
    from liger_kernel.transformers.rms_norm import LigerRMSNorm

    calls = []

    def forward(self, hidden_states):  # liger's kernels need a GPU; its classes do not
        calls.append(self)
        variance = hidden_states.float().square().mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(variance + self.variance_epsilon))

    forward.__qualname__ = "LigerRMSNorm.forward"
    monkeypatch.setattr(LigerRMSNorm, "forward", forward)
    batch, model = tiny_batch(), build()
    expected = backward(patched(MIXED, False, copy.deepcopy(model)), batch)
    unpatched = backward(build(), batch)

    def liger(model):
        rest = {"rope": False, "swiglu": False, "fused_linear_cross_entropy": False}
        from transformers.models.llama import modeling_llama

        monkeypatch.setattr(modeling_llama, "LlamaRMSNorm", modeling_llama.LlamaRMSNorm)  # put back at the end
        monkey_patch.apply_liger_kernel_to_llama(**rest, model=model)

    if order == "before":
        liger(model)
    patched(MIXED, True, model)
    if order == "after":
        liger(model)
    assert_close(backward(model, batch), expected)
    assert calls == [model.model.layers[0].input_layernorm] + [
        model.model.layers[i].input_layernorm for i in (1, 2)
    ] + [model.model.norm]
    assert counts["fused"] == 3
    remove_dropbp(model)
    calls.clear()
    assert_close(backward(model, batch), unpatched)
    assert len(calls) == 7
