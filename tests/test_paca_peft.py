"""What a PEFT user does with an adapter, done with PaCA: save and load, merge, switch, disable, convert, combine."""

import copy
import json
import re
import warnings
from pathlib import Path

import forks
import pytest
import torch
from models import gradients, tiny_batch, tiny_causal_lm, tiny_gpt2

pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft

from dropbp_kernels import apply_dropbp
from dropbp_kernels.flops import linear_flops
from dropbp_kernels.measure import saved_bytes
from dropbp_kernels.paca import PacaConfig, PacaLayer, convert_to_lora

ALL = {"r": 4, "target_modules": "all-linear"}
MODELS = {"llama": lambda: tiny_causal_lm().eval(), "gpt2": lambda: tiny_gpt2().eval()}


def perturbed(model, seed=3, adapter="default"):
    """What a few steps would have made of the adapter."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, PacaLayer) and adapter in module.paca_columns:
            trained = module.paca_columns[adapter]
            trained.data.add_(0.02 * torch.randn(trained.shape, generator=generator))
    return model


def adapted(family="llama", **options):
    return perturbed(peft.get_peft_model(MODELS[family](), PacaConfig(**{**ALL, **options})))


@torch.no_grad()
def logits(model):
    return model(input_ids=tiny_batch()["input_ids"]).logits


def base_weights(model):
    return {n: t.clone() for n, t in model.state_dict().items() if "paca" not in n}


def equal(one, other):
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("family", MODELS)
def test_starts_as_the_base_and_trains_columns_alone(family):
    plain = MODELS[family]()
    model = peft.get_peft_model(copy.deepcopy(plain), PacaConfig(**ALL)).train()
    assert torch.equal(logits(model.eval()), logits(plain)) or family == "gpt2"
    torch.testing.assert_close(logits(model), logits(plain))
    model.train()(**tiny_batch()).loss.backward()
    grads = gradients(model)
    assert {name for name, grad in grads.items() if grad is not None} == {n for n in grads if "paca_columns" in n}
    before = base_weights(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    loss = model(**tiny_batch()).loss.item()
    for _ in range(3):
        optimizer.zero_grad()
        model(**tiny_batch()).loss.backward()
        optimizer.step()
    assert model(**tiny_batch()).loss.item() < loss
    assert equal(before, base_weights(model))


@pytest.mark.parametrize("family", MODELS)
def test_save_and_load(family, tmp_path):
    model = adapted(family, modules_to_save=["ln_f"] if family == "gpt2" else ["norm"], seed=5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(1.5)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["peft_type"], saved["r"], saved["seed"]) == ("DROPBP_PACA", 4, 5)
    saved["seed"] = 6  # which columns is in the file, not drawn again
    (tmp_path / "adapter_config.json").write_text(json.dumps(saved))
    for options in ({}, {"low_cpu_mem_usage": True}):
        loaded = peft.PeftModel.from_pretrained(MODELS[family](), tmp_path, **options)
        assert torch.equal(logits(loaded), expected)
        assert not any(p.requires_grad for p in loaded.parameters())
    training = peft.PeftModel.from_pretrained(MODELS[family](), tmp_path, is_trainable=True)
    training(**tiny_batch()).loss.backward()
    torch.testing.assert_close(logits(training), expected)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("published", [False, True])
def test_merge_and_unmerge_to_the_bit(family, published):
    model = adapted(family, published=published)
    before, expected, plain = base_weights(model), logits(model), logits(MODELS[family]())
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model), expected)
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    assert not equal(before, base_weights(model))
    model.unmerge_adapter()
    assert equal(before, base_weights(model))
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()
    assert torch.equal(logits(model), expected)
    model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), plain)
    assert equal(before, base_weights(model))
    merged = model.merge_and_unload()
    assert not any(isinstance(module, PacaLayer) for module in merged.modules())
    torch.testing.assert_close(logits(merged), expected)


def test_unload_returns_the_base():
    model = adapted()
    plain = MODELS["llama"]()
    assert torch.equal(logits(model.unload()), logits(plain))


def test_safe_merge_refuses_and_changes_nothing():
    model = adapted()
    model.base_model.model.model.layers[0].self_attn.q_proj.paca_columns["default"].data[0, 0] = float("nan")
    before = base_weights(model)
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert equal(before, base_weights(model))


def test_several_adapters():
    model = adapted()
    first = logits(model)
    model.add_adapter("second", PacaConfig(r=6, alpha=12, seed=1, target_modules=["q_proj", "down_proj"]))
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    torch.testing.assert_close(logits(model), logits(MODELS["llama"]()))
    perturbed(model, seed=4, adapter="second")
    second = logits(model)
    assert not torch.allclose(second, first)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if "paca_columns.second" in n}
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    before = base_weights(model)

    model.base_model.set_adapter(["default", "second"])
    both = logits(model)
    deltas = {}
    for name, module in model.named_modules():
        if isinstance(module, PacaLayer):
            deltas[name] = sum(module.get_delta_weight(adapter) for adapter in module.paca_columns)
    expected = MODELS["llama"]()
    for name, delta in deltas.items():
        expected.get_submodule(name.removeprefix("base_model.model.")).weight.data += delta
    torch.testing.assert_close(both, logits(expected))
    with pytest.raises(ValueError, match="adapter_names: expected None, since samples of a batch share their columns"):
        model(**tiny_batch(), adapter_names=["default", "second"])
    model(**tiny_batch()).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "paca_columns" in n)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), both)
    model.unmerge_adapter()
    assert equal(before, base_weights(model))
    model.delete_adapter("default")
    assert not any("default" in name for name in model.state_dict())
    torch.testing.assert_close(logits(model), second)


def test_published_adapters_work_alone():
    model = adapted(published=True)
    model.add_adapter("second", PacaConfig(**ALL))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="published: such an adapter replaces columns and works alone"):
        logits(model)


def test_loading_columns_of_another_shape_is_refused(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    state = peft.utils.load_peft_weights(tmp_path, device="cpu")
    other = peft.get_peft_model(MODELS["llama"](), PacaConfig(r=5, target_modules="all-linear"))
    before = base_weights(other)
    with pytest.raises(ValueError, match=r"paca_columns.default: expected shape \(\d+, 5\), got \(\d+, 4\)"):
        peft.set_peft_model_state_dict(other, state)
    assert equal(before, base_weights(other))
    same = adapted()
    key = next(key for key in state if "paca_indices" in key)
    with pytest.raises(ValueError, match="expected 4 different columns of 48, got"):
        peft.set_peft_model_state_dict(same, state | {key: torch.tensor([0, 1, 1, 2])})


def test_patterns_and_layers():
    model = peft.get_peft_model(
        MODELS["llama"](),
        PacaConfig(
            r=4,
            alpha=8,
            target_modules=["q_proj", "k_proj", "down_proj"],
            exclude_modules=["layers.2.self_attn.q_proj"],
            layers_to_transform=[0, 2],
            rank_pattern={"q_proj": 2, "layers.2.mlp.down_proj": 3},
            alpha_pattern={"k_proj": 4},
        ),
    )
    found = {n.partition("layers.")[2]: (m.r, m.scaling) for n, m in model.named_modules() if isinstance(m, PacaLayer)}
    assert found == {
        "0.self_attn.q_proj": ({"default": 2}, {"default": 4.0}),
        "0.self_attn.k_proj": ({"default": 4}, {"default": 1.0}),
        "0.mlp.down_proj": ({"default": 4}, {"default": 2.0}),
        "2.self_attn.k_proj": ({"default": 4}, {"default": 1.0}),
        "2.mlp.down_proj": ({"default": 3}, {"default": 8 / 3}),
    }


def test_default_targets_are_those_of_the_model_type():
    model = peft.get_peft_model(MODELS["gpt2"](), PacaConfig(r=2))
    assert {name.rpartition(".")[2] for name in model.base_model.targeted_module_names} == {"c_attn"}


def test_bias_only():
    model = peft.get_peft_model(MODELS["gpt2"](), PacaConfig(r=2, target_modules=["c_fc"], bias="paca_only"))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[2] for name in trained} == {"default", "bias"}
    assert all("c_fc" in name for name in trained)
    model(**tiny_batch()).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_tied_embeddings():
    """The head, tied to the embeddings, may be a target: forward and backward see its columns, the embeddings none."""
    model = tiny_causal_lm(tie_word_embeddings=True).eval()
    embedding = model.get_input_embeddings().weight
    before = embedding.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of tied targets
        model = perturbed(peft.get_peft_model(model, PacaConfig(r=4, target_modules=["lm_head", "q_proj"])))
    assert model.get_output_embeddings().base_layer.weight is embedding
    model(**tiny_batch()).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert torch.equal(embedding, before)
    untied = tiny_causal_lm().eval()
    untied.load_state_dict(
        {**untied.state_dict(), "lm_head.weight": before + model.lm_head.get_delta_weight("default")}
    )
    untied.get_input_embeddings().weight.data.copy_(before)
    for number, layer in enumerate(model.base_model.model.model.layers):
        delta = layer.self_attn.q_proj.get_delta_weight("default")
        untied.model.layers[number].self_attn.q_proj.weight.data.add_(delta)
    torch.testing.assert_close(logits(model), logits(untied))


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("published", [False, True])
def test_convert_to_lora_is_exact(family, published, tmp_path):
    norm = "norm" if family == "llama" else "ln_f"
    options = {"published": published, "rank_pattern": {"q_proj" if family == "llama" else "c_attn": 2}}
    model = perturbed(
        peft.get_peft_model(
            MODELS[family]().double(),
            PacaConfig(**ALL, **options, modules_to_save=[norm], task_type="CAUSAL_LM"),
            autocast_adapter_dtype=False,
        )
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(1.5)
    expected = logits(model)
    convert_to_lora(model, path=tmp_path)
    lora = peft.PeftModel.from_pretrained(MODELS[family]().double(), tmp_path, autocast_adapter_dtype=False)
    torch.testing.assert_close(logits(lora), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(logits(model), expected)
    with pytest.raises(ValueError, match="expected a PaCA adapter of this model, got 'other'"):
        convert_to_lora(model, "other")


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_and_accumulation(use_reentrant):
    model = adapted().train()
    model(**tiny_batch()).loss.backward()
    model(**tiny_batch()).loss.backward()
    expected = gradients(model)
    other = adapted().train()
    if use_reentrant:
        other.enable_input_require_grads()
    other.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    first, second = other(**tiny_batch()).loss, other(**tiny_batch()).loss  # two graphs at a time
    first.backward()
    second.backward()
    for name, grad in gradients(other).items():
        if grad is not None:
            torch.testing.assert_close(grad, expected[name])


def test_ddp_with_accumulation(tmp_path):
    model = adapted().train()
    for _ in range(2):
        model(**tiny_batch()).loss.backward()
    expected = gradients(model)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        other = adapted().train()
        parallel = torch.nn.parallel.DistributedDataParallel(other)
        with parallel.no_sync():
            parallel(**tiny_batch()).loss.backward()
        parallel(**tiny_batch()).loss.backward()
    finally:
        torch.distributed.destroy_process_group()
    for name, grad in gradients(other).items():
        assert (grad is None) == (expected[name] is None)
        if grad is not None:
            torch.testing.assert_close(grad, expected[name])


@pytest.mark.parametrize("granularity", ["sample", "token"])
def test_plans_by_rows(granularity):
    """Gradients are those of rows that ran with autograd and were detached; dropped rows save no channels."""
    gradients_of, saved_of = {}, {}
    for dropped_runs in ("detach", "inference"):
        model = adapted().train()
        apply_dropbp(model, 0.5, granularity=granularity, dropped_runs=dropped_runs, fused_loss="off").step()
        with saved_bytes() as saved:
            loss = model(**tiny_batch(batch_size=4)).loss
        loss.backward()
        gradients_of[dropped_runs], saved_of[dropped_runs] = gradients(model), saved.num_bytes
    assert saved_of["inference"] < 0.75 * saved_of["detach"]
    assert any(grad is not None for grad in gradients_of["inference"].values())
    for name, grad in gradients_of["detach"].items():
        assert (grad is None) == (gradients_of["inference"][name] is None), name
        if grad is not None:
            torch.testing.assert_close(gradients_of["inference"][name], grad)


@pytest.mark.parametrize("checkpoint", ["none", "kept"])
def test_dropped_branches_are_the_pretrained_products(checkpoint):
    """Gradients are those of detach-after, a dropped branch saves nothing, kept ones save r channels."""
    expected = adapted().train()
    model = adapted().train()
    handlers = [
        apply_dropbp(expected, 0.5, dropped_runs="detach"),
        apply_dropbp(model, 0.5, checkpoint=None if checkpoint == "none" else checkpoint),
    ]
    plan = [True, False, False, True, False, False]
    for handler, each in zip(handlers, (expected, model), strict=True):
        handler.set_plan(plan)
        each(**tiny_batch()).loss.backward()
    grads = gradients(model)
    assert sum(grad is not None for grad in grads.values()) == 4 + 3
    for name, grad in gradients(expected).items():
        assert (grad is None) == (grads[name] is None), name
        if grad is not None:
            torch.testing.assert_close(grads[name], grad)
    if checkpoint == "none":
        handlers[1].set_plan([False] * 6)
        before = base_weights(model)
        with saved_bytes() as none_kept:
            model(**tiny_batch())
        handlers[1].set_plan([True] + [False] * 5)
        with saved_bytes() as saved:
            model(**tiny_batch())
        assert saved.num_bytes > none_kept.num_bytes
        assert equal(before, base_weights(model))


def test_flops_are_those_of_the_base():
    layer = adapted().base_model.model.model.layers[0]
    assert linear_flops(layer.mlp, 10) == linear_flops(tiny_causal_lm().model.layers[0].mlp, 10)


def test_import_makes_peft_know_it_also_beside_a_paca_of_pefts_own(tmp_path):
    adapted().save_pretrained(tmp_path)
    code = f"""
import warnings, peft
peft.PacaConfig = object
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import dropbp_kernels.paca
assert any("has a PaCA of its own" in str(w.message) and "DROPBP_PACA" in str(w.message) for w in caught)
config = peft.PeftConfig.from_pretrained({str(tmp_path)!r})
print(config.peft_type.value, config.r)
"""
    result = forks.run(code)
    assert result.stdout.strip() == "DROPBP_PACA 4", result.stderr


def test_without_peft_the_import_says_what_is_missing():
    code = "import sys; sys.modules['peft'] = None; import dropbp_kernels.paca"
    result = forks.run(code)
    (floor,) = re.findall(r'"peft>=([\d.]+)"', Path(__file__).parents[1].joinpath("pyproject.toml").read_text())
    assert f"dropbp_kernels.paca needs PEFT {floor} or later: pip install 'peft>={floor}'" in result.stderr
