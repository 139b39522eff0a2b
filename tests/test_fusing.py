"""Adds fused with the norms behind them, in transformers models: same values, when it is done, when not, and undone."""

import copy
import importlib

import pytest
import torch
from models import SIZES, gradients, tiny_batch, with_lora
from transformers import AutoConfig, AutoModelForCausalLM

from dropbp_kernels import apply_dropbp, remove_dropbp
from dropbp_kernels._backend import use_backend
from dropbp_kernels.blocks import Stream
from dropbp_kernels.integrations import fused_mlp, fusing
from dropbp_kernels.measure import PeakLiveBytes, num_autograd_nodes, saved_bytes
from dropbp_kernels.ops import gated_residual_rms_norm

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


def backward(model, batch):
    model.zero_grad()
    output = model(**batch)
    output.loss.backward()
    return output.logits.detach(), gradients(model)


def assert_close(ours, expected, tolerance=2e-5):
    """Logits and gradients, the latter relative to the largest entry of each."""
    torch.testing.assert_close(ours[0], expected[0], atol=tolerance, rtol=tolerance)
    for name, grad in expected[1].items():
        assert (ours[1][name] is None) == (grad is None), name
        if grad is not None:
            atol = tolerance * float(grad.abs().max()) + 1e-9
            torch.testing.assert_close(ours[1][name], grad, atol=atol, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


@pytest.fixture
def counts(monkeypatch):
    """How often the fused op runs, and how often a branch is added by itself."""
    found = {"fused": 0, "added": 0}

    def counted(key, function):
        def run(*args):
            found[key] += args[0].branch is not None
            return function(*args)

        return run

    monkeypatch.setattr(fusing, "_add_and_normalise", counted("fused", fusing._add_and_normalise))
    monkeypatch.setattr(fusing, "_add", counted("added", fusing._add))
    return found


@pytest.mark.parametrize("model_type", FUSED_MODELS)
def test_logits_and_gradients_of_every_family_within_rounding(model_type, counts):
    """Every boundary is fused: two a block, the last one with the final norm."""
    batch = tiny_batch()
    for plan in PLANS[:2]:
        expected = backward(patched(plan, False, build(model_type)), batch)
        assert counts == {"fused": 0, "added": 6}
        assert_close(backward(patched(plan, True, build(model_type)), batch), expected)
        assert counts == {"fused": 6, "added": 6}
        counts.update(fused=0, added=0)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("lora", [False, True])
def test_gradients_are_those_of_the_unpatched_model_with_detached_branches(plan, lora):
    batch, wrap = tiny_batch(), with_lora if lora else (lambda model: model)
    dense = wrap(build())
    for index, layer in enumerate(dense.get_submodule("model.layers" if not lora else "base_model.model.model.layers")):
        if not plan[2 * index]:
            layer.self_attn.register_forward_hook(lambda module, args, output: (output[0].detach(), *output[1:]))
        if not plan[2 * index + 1]:
            layer.mlp.register_forward_hook(lambda module, args, output: output.detach())
    assert_close(backward(patched(plan, True, wrap(build())), batch), backward(dense, batch))


def test_values_do_not_depend_on_the_plan_bit_for_bit():
    model, batch = patched(PLANS[0], True), tiny_batch()
    logits = [backward(patched(plan, True), batch)[0] for plan in PLANS]
    with torch.no_grad():
        logits.append(model(**batch).logits)
    for other in logits[1:]:
        assert torch.equal(other, logits[0])


@pytest.mark.parametrize("model_type", ["llama", "gemma"])
def test_bfloat16_is_as_exact_as_the_unpatched_model(model_type):
    batch = tiny_batch()
    exact, _ = backward(build(model_type, torch.float64), batch)
    plain, _ = backward(build(model_type, torch.bfloat16), batch)
    ours, _ = backward(patched((True,) * 6, True, build(model_type, torch.bfloat16)), batch)
    assert (ours - exact).abs().max() <= 2 * (plain - exact).abs().max() + 1e-3


@pytest.mark.parametrize("name", fusing._CASTINGS)
def test_norms_cast_as_the_table_says_bit_for_bit(name):
    family = {"Gemma3": "gemma3", "DeepseekV2": "deepseek_v2", "DeepseekV3": "deepseek_v3"}
    prefix = name.removesuffix("RMSNorm")
    stem = family.get(prefix, prefix.lower().replace("moe", "_moe"))
    norm_class = getattr(importlib.import_module(f"transformers.models.{stem}.modeling_{stem}"), name)
    norm = norm_class(64, eps=1e-3).to(torch.bfloat16)
    with torch.no_grad(), use_backend("reference"):
        norm.weight.add_(torch.randn(64))
        x = torch.randn(50, 64).to(torch.bfloat16)
        assert fusing._known_casting(norm) == fusing._CASTINGS[name]
        normed, _ = gated_residual_rms_norm(
            torch.zeros_like(x), x, norm.weight, eps=fusing._eps(norm), casting=fusing._CASTINGS[name]
        )
        assert torch.equal(normed, norm(x))


def test_dropped_boundaries_save_nothing_and_kept_ones_less_than_unfused():
    embedded = torch.randn(2, 10, 32, requires_grad=True)

    def stack(plan, fused):
        model = patched(plan, fused)
        rope = model.model.rotary_emb(embedded, torch.arange(10)[None])
        with saved_bytes() as saved:
            x = embedded
            for layer in model.model.layers:
                x = layer(x, position_embeddings=rope, **({fusing._HANDS_ON: True} if fused else {}))
            if fused:
                assert isinstance(x, fusing.Pending)
                x = fusing._add(x.take())
        return saved.num_bytes, num_autograd_nodes(x)

    assert stack((False,) * 6, True) == (0, 6)
    assert stack((True,) * 6, True)[0] < stack((True,) * 6, False)[0]


def test_what_is_handed_on_is_not_held_by_the_one_who_passes_it():
    batch = tiny_batch(2, 40)

    def peak(fused):
        model = patched((False,) * 5 + (True,), fused, with_lora(build()))
        with PeakLiveBytes() as live:
            model(**batch).loss.backward()
        return live.peak_bytes

    assert peak(True) <= peak(False)
    pending = fusing.Pending(Stream(torch.zeros(1)))
    pending.take()
    with pytest.raises(RuntimeError, match="taken twice"):
        pending.take()


# ---- decided before the call


def test_auto_fuses_where_a_kernel_serves(counts, monkeypatch):
    batch = tiny_batch()
    fusing.has_kernel.cache_clear()
    backward(patched(MIXED, "auto"), batch)
    assert counts["fused"] == (6 if fusing._backend.serving("gated_residual_rms_norm", "cpu") != "reference" else 0)
    counts["fused"] = 0
    monkeypatch.setattr(fusing, "has_kernel", lambda device_type: False)
    backward(patched(MIXED, "auto"), batch)
    assert counts["fused"] == 0


@pytest.mark.parametrize("use_config", [False, True])
def test_recorded_hidden_states_are_whole(use_config, counts):
    batch = tiny_batch()
    expected = build()(**batch, output_hidden_states=True).hidden_states
    model = patched(MIXED, True)
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


def test_generation_is_the_same():
    tokens = tiny_batch()["input_ids"]
    options = {"max_new_tokens": 6, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    expected = build().eval().generate(tokens, **options)
    assert torch.equal(patched(MIXED, True).eval().generate(tokens, **options), expected)


# ---- with others, and undone


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


def test_everything_is_put_back():
    model = build()
    before = [(name, type(module), sorted(vars(module))) for name, module in model.named_modules()]
    keys = list(model.state_dict())
    apply_dropbp(model, 0.5, fused=True)
    assert list(model.state_dict()) == keys
    assert type(model.model.norm).__name__ == "LlamaRMSNorm"
    remove_dropbp(model)
    assert [(name, type(module), sorted(vars(module))) for name, module in model.named_modules()] == before
    assert not model.model._forward_pre_hooks
    apply_dropbp(model, 0.5, fused=True)  # and again


def test_a_deep_copy_is_fused_and_removed_by_itself(counts):
    batch, model = tiny_batch(), patched(MIXED, True)
    twin = copy.deepcopy(model)
    expected = backward(model, batch)
    remove_dropbp(model)
    counts.update(fused=0)
    assert torch.equal(backward(twin, batch)[0], expected[0])
    assert counts["fused"] == 6
    remove_dropbp(twin)
    assert not twin.model._forward_pre_hooks


def test_unknown_settings_are_refused():
    model = build()
    with pytest.raises(ValueError, match=r"fused: expected True, False or \"auto\", got 'always'"):
        apply_dropbp(model, 0.5, fused="always")
    with pytest.raises(ValueError, match="patched by apply_dropbp"):
        remove_dropbp(model)
