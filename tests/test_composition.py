"""apply_dropbp with what people combine it with: adapters, quantised bases, precisions, caches, padding, packing."""

import pytest
import torch
from flash_stand_ins import attend_by_flash
from models import gradients

from benchmarks.models_check import check_gradients, detached, run_backward
from benchmarks.tiny_models import tiny_causal_lm, tiny_inputs
from dropbp_kernels import apply_dropbp, remove_dropbp

peft = pytest.importorskip("peft")
# A fused block, a block whose branches' members are linears that PEFT replaces, a parallel one, an expert one.
MODEL_TYPES = ["llama", "opt", "bloom", "phi", "mixtral"]
KEPT = (True, False, False, True)
ADAPTERS = {
    "lora": lambda: peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
    "dora": lambda: peft.LoraConfig(r=4, target_modules="all-linear", use_dora=True, init_lora_weights=False),
    "loha": lambda: peft.LoHaConfig(r=2, target_modules=r".*(q_proj|query_key_value|fc1|dense_h_to_4h|up_proj)"),
    "ia3": lambda: peft.IA3Config(
        target_modules=r".*(q_proj|query_key_value|fc2|dense_4h_to_h|down_proj)",
        feedforward_modules=r".*(fc2|dense_4h_to_h|down_proj)",
    ),
    "adalora": lambda: peft.AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=r".*(q_proj|fc1|up_proj)"),
    "oft": lambda: peft.OFTConfig(oft_block_size=4, target_modules=r".*(q_proj|fc1|up_proj)", init_weights=False),
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "adaption": lambda: peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=2),
}


def adapted(model, adapter):
    torch.manual_seed(1)
    return peft.get_peft_model(model, ADAPTERS[adapter]()).train()


def branch_ends(model):
    """The last module of each branch, by the names that the patched model had."""
    handler = apply_dropbp(model, 0.5)
    handler.set_plan([True] * len(handler.gates))
    ends = [gate.modules_of_branch[-1] for gate in handler.gates.values()]
    remove_dropbp(model)
    return ends


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys")  # PEFT on experts' weights
@pytest.mark.parametrize(
    ("adapter", "model_type"),
    [("lora", name) for name in MODEL_TYPES] + [("dora", name) for name in MODEL_TYPES if name != "mixtral"],
)  # PEFT has no DoRA for experts
def test_adapters_before_or_after(adapter, model_type, order):
    """Gradients against hooks on a model that was never patched; PEFT replaces linears that gates hold."""
    plain = adapted(tiny_causal_lm(model_type), adapter)
    inputs = tiny_inputs()
    with detached([end for end, is_kept in zip(branch_ends(plain), KEPT, strict=True) if not is_kept]):
        expected = run_backward(plain, inputs)
    model = tiny_causal_lm(model_type)
    if order == "after":
        model = adapted(model, adapter)
    handler = apply_dropbp(model, 0.5, fused_loss="off")
    if order == "before":
        model = adapted(model, adapter)
    handler.set_plan(KEPT)
    ours = run_backward(model, inputs)
    torch.testing.assert_close(ours[0], expected[0])
    assert ours[1].keys() == expected[1].keys()
    assert any(grad is not None for grad in ours[1].values())
    for name, grad in expected[1].items():
        assert (ours[1][name] is None) == (grad is None), name
        assert grad is None or torch.equal(ours[1][name], grad), name
    assert all(gate.is_trainable() for gate in handler.gates.values())
    remove_dropbp(model)
    assert not [name for module in model.modules() for name in vars(module) if "dropbp" in name]


OTHER_ADAPTERS = [(kind, name) for kind in ADAPTERS for name in ("llama", "opt") if kind not in ("lora", "dora")]


@pytest.mark.filterwarnings("ignore:.*FLOPs unknown .*AdaptedAttention")
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize(("adapter", "model_type"), [pair for pair in OTHER_ADAPTERS if pair != ("adaption", "opt")])
def test_other_adapters(adapter, model_type, order):
    """As in `test_adapters_before_or_after`; prefixes reach every layer as keys and values of a cache."""
    plain = with_weights(adapted(tiny_causal_lm(model_type), adapter))
    inputs = tiny_inputs()
    if order == "after":
        problems, (missed, _) = check_gradients(plain, inputs)
        assert not problems
        assert not missed
        return
    with detached([end for end, is_kept in zip(branch_ends(plain), KEPT, strict=True) if not is_kept]):
        expected = run_backward(plain, inputs)
    model = tiny_causal_lm(model_type)
    handler = apply_dropbp(model, 0.5, fused_loss="off")
    model = with_weights(adapted(model, adapter))
    handler.set_plan(KEPT)
    ours = run_backward(model, inputs)
    assert torch.equal(ours[0], expected[0])
    for name, grad in expected[1].items():
        assert (ours[1][name] is None) == (grad is None), name
        assert grad is None or torch.equal(ours[1][name], grad), name


@pytest.mark.parametrize("options", [{"checkpoint": "kept"}, {"granularity": "sample"}])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_prefixes_are_refused_where_their_cache_would_be_taken_away(model_type, options):
    """Also where blocks are given it by its place, as GPT-2's."""
    model = adapted(tiny_causal_lm(model_type), "prefix")
    inputs = tiny_inputs()
    apply_dropbp(model, 0.5, **options).step()
    with pytest.raises(ValueError, match=r"past_key_values: .* that holds keys \(prefix tuning\?\); patch with"):
        model(**inputs)
    model.eval()
    with torch.no_grad():
        model(**inputs)


def with_weights(model):
    """No adapter at zero, where a gradient that is missing would be zero all the same."""
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.detach().any():
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def test_grad_scale_once_though_an_adapter_wraps_the_last_linear():
    grads = []
    for grad_scale in (1.0, 2.0):
        model = tiny_causal_lm("opt")
        handler = apply_dropbp(model, 0.5, grad_scale=grad_scale)
        model = adapted(model, "lora")
        handler.set_plan([False, False, False, True])
        grads.append(run_backward(model, tiny_inputs())[1])
    name = next(name for name, grad in grads[0].items() if grad is not None and "fc2.lora_B" in name)
    torch.testing.assert_close(grads[1][name], 2 * grads[0][name])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_quantised_bases(bits, model_type):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    model = tiny_causal_lm(model_type)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is torch.nn.Linear and name != "lm_head":
                kind = bitsandbytes.nn.Linear4bit if bits == 4 else bitsandbytes.nn.Linear8bitLt
                options = {} if bits == 4 else {"has_fp16_weights": False}
                quantised = kind(child.in_features, child.out_features, bias=child.bias is not None, **options)
                quantised.load_state_dict(child.state_dict())
                setattr(parent, name, quantised.to("cpu"))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.enable_input_require_grads()
    try:
        model = adapted(model, "lora")
        problems, (missed, _) = check_gradients(model, tiny_inputs())
    except (NotImplementedError, RuntimeError) as error:
        if bits == 8:
            pytest.skip(f"bitsandbytes {bitsandbytes.__version__}: no 8-bit training on this CPU ({error})")
        raise
    assert not problems
    assert not missed


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, model_type):
    model = tiny_causal_lm(model_type).to(dtype)
    problems, _ = check_gradients(model, tiny_inputs())
    assert not [problem for problem in problems if not problem.startswith("rounding")]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_autocast_over_two_micro_batches_with_other_plans(model_type):
    """One autocast region, first dropped and then kept: a cached cast without a graph must not be found again."""
    results = []
    for first in ([False] * 4, None):
        model = tiny_causal_lm(model_type)
        handler = apply_dropbp(model, 0.5, fused_loss="off")
        batch = tiny_inputs()
        with torch.autocast("cpu", torch.bfloat16):
            if first is not None:
                handler.set_plan(first)
                model(**batch)
            handler.set_plan([True] * 4)
            torch.manual_seed(0)
            loss = model(**batch).loss
        loss.backward()
        results.append(gradients(model))
    assert all(grad is not None for name, grad in results[1].items() if "layers.0" in name and "norm" not in name)
    for name, grad in results[1].items():
        assert (grad is None) == (results[0][name] is None), name
        assert grad is None or torch.equal(results[0][name], grad), name


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("case", ["cache", "left", "right", "packed", "eager", "frozen", "inputs", "tied"])
def test_ways_to_call_a_model(case, model_type):
    overrides = {"use_cache": True} if case == "cache" else {}
    if case == "eager":
        overrides["attn_implementation"] = "eager"
    if case == "tied":
        overrides["tie_word_embeddings"] = True
    model = tiny_causal_lm(model_type, **overrides)
    if case == "tied":
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    batch = tiny_inputs()
    if case in ("left", "right"):
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][0, slice(0, 4) if case == "left" else slice(-4, None)] = 0
    if case == "packed":
        batch["position_ids"] = torch.arange(12)[None].expand(2, -1) % 5
    if case == "frozen":
        model.get_input_embeddings().weight.requires_grad_(False)
    if case == "inputs":
        model.enable_input_require_grads()
    problems, (missed, _) = check_gradients(model, batch)
    assert not problems
    assert not missed


@pytest.mark.parametrize("case", ["dense", "left", "right", "packed"])
def test_flash_attention(case, monkeypatch):
    """transformers' own way to it, by stand-ins for its functions: padding and documents reach them as lengths."""
    model = tiny_causal_lm("mistral", sliding_window=None)
    batch = tiny_inputs()
    if case in ("left", "right"):
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][0, slice(0, 4) if case == "left" else slice(-4, None)] = 0
        batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)
    if case == "packed":
        batch = {name: value[:1] for name, value in batch.items()}
        batch["position_ids"] = torch.arange(12)[None] % 5
    logits = run_backward(model, batch)[0]
    attend_by_flash(monkeypatch, model)
    problems, (missed, _) = check_gradients(model, batch)
    assert not problems
    assert not missed
    is_real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    torch.testing.assert_close(run_backward(model, batch)[0][is_real], logits[is_real], atol=1e-5, rtol=1e-5)


def test_accumulated_gradients_are_the_sum_over_plans():
    model = tiny_causal_lm("gemma2")
    handler = apply_dropbp(model, 0.5, fused_loss="off")
    batch, alone = tiny_inputs(), []
    for plan in (KEPT, tuple(not kept for kept in KEPT)):
        handler.set_plan(plan)
        alone.append({k: g.clone() for k, g in run_backward(model, batch)[1].items() if g is not None})
    model.zero_grad()
    for plan in (KEPT, tuple(not kept for kept in KEPT)):
        handler.set_plan(plan)
        torch.manual_seed(2)
        model(**batch).loss.backward()
    for name, parameter in model.named_parameters():
        parts = [grads[name] for grads in alone if name in grads]
        torch.testing.assert_close(parameter.grad, sum(parts))
