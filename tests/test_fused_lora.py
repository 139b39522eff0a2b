"""PEFT's LoRA layers under fused=True: PEFT's results with fewer bytes, other layers as they are, all of it undone."""

import copy
import pickle
from pathlib import Path

import forks
import pytest
import torch
from fused_models import MIXED, build
from models import step, tiny_batch, tiny_gpt2, with_lora
from torch import nn

from dropbp_kernels import apply_dropbp, remove_dropbp
from dropbp_kernels.integrations import fused_lora, fused_mlp
from dropbp_kernels.measure import saved_bytes

peft = pytest.importorskip("peft")


@pytest.fixture
def calls(monkeypatch):
    """The names of the functions that fused layers called, since now; glu_linear is an MLP's last layer, where kept."""
    found = []

    def counted(room, name):
        function = getattr(room, name)

        def call(*args, **options):
            found.append(name)
            return function(*args, **options)

        monkeypatch.setattr(room, name, call)

    counted(fused_lora, "lora_linear"), counted(fused_lora, "add_lora"), counted(fused_mlp, "glu_linear")
    return found


def both(model, plan=MIXED, **options):
    """Loss and gradients of the patched model, unfused and fused."""
    results = []
    for fused in (False, True):
        own = copy.deepcopy(model)
        apply_dropbp(own, 0.5, fused=fused, **options).set_plan(plan)
        results.append(step(own, tiny_batch()))
    return results


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma2"])
def test_loss_and_gradients_are_pefts(model_type, calls):
    unfused, fused = both(with_lora(build(model_type)))
    torch.testing.assert_close(fused, unfused, rtol=1e-4, atol=1e-5)
    assert set(calls) == {"lora_linear", "glu_linear"}
    assert len(calls) == 3 * 7


def test_other_base_layers_are_called_and_added_to(calls):
    unfused, fused = both(with_lora(tiny_gpt2(), fan_in_fan_out=True), MIXED[:4])  # Conv1D
    torch.testing.assert_close(fused, unfused, rtol=1e-4, atol=1e-5)
    assert set(calls) == {"add_lora"}
    assert len(calls) == 2 * 4


def test_dropout_of_the_adapters_input_is_drawn_as_by_peft(calls):
    unfused, fused = both(with_lora(build(), lora_dropout=0.5))
    torch.testing.assert_close(fused, unfused, rtol=1e-4, atol=1e-5)
    assert set(calls) == {"add_lora"}
    calls.clear()
    model = with_lora(build(), lora_dropout=0.5)
    apply_dropbp(model, 0.5, fused=True)
    model.eval()(**tiny_batch())
    assert set(calls) == {"lora_linear", "glu_linear"}


@pytest.mark.parametrize("options", [{"checkpoint": "kept"}, {"checkpoint": "sliced"}, {"granularity": "sample"}])
def test_with_checkpointing_and_plans_by_rows(options, calls):
    plan = MIXED if "checkpoint" in options else [torch.tensor([True, False])] * 5 + [torch.tensor([True, True])]
    unfused, fused = both(with_lora(build()), plan, **options)
    torch.testing.assert_close(fused, unfused, rtol=1e-4, atol=1e-5)
    assert calls


def test_under_target_plans(calls):
    batch = tiny_batch()
    batch["labels"] = batch["labels"].clone()
    batch["labels"][:, :6] = -100
    results = []
    for fused in (False, True):
        model = with_lora(build())
        apply_dropbp(model, 0.0, strict=False, fused=fused, context="inference")
        results.append(step(model, batch))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    assert set(calls) == {"lora_linear", "glu_linear"}


def test_float32_adapters_on_a_bfloat16_base_save_no_float32_inputs():
    """PEFT's default: its layers save float32 copies of their inputs, query, key and value one each."""
    saved = {}
    for adapters in (torch.float32, torch.bfloat16):
        for fused in (False, True):
            model = with_lora(build(dtype=torch.bfloat16))
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.data = parameter.data.to(adapters)
            apply_dropbp(model, 0.0, strict=False, fused=fused, fused_loss="off")
            with saved_bytes() as counted:
                model(**tiny_batch())
            saved[adapters, fused] = counted.num_bytes
    assert saved[torch.float32, True] == saved[torch.bfloat16, True] < saved[torch.bfloat16, False]
    # Float32 inputs of q, k, v, o, gate, up (each of width 32) and down (48), in three blocks of 20 tokens; in their
    # place the input of o alone, in bfloat16: the others are saved by what made them.
    copies = 3 * 20 * (6 * 32 + 48) * 4
    assert saved[torch.float32, False] - saved[torch.float32, True] >= copies - 3 * 20 * 32 * 2


def test_bfloat16_gradients_are_about_those_of_pefts_float32(calls):
    model = with_lora(build(dtype=torch.bfloat16))
    assert next(p for name, p in model.named_parameters() if "lora_" in name).dtype is torch.float32
    (_, unfused), (_, fused) = both(model, (True,) * 6)
    for name, gradient in unfused.items():
        if gradient is not None:
            assert fused[name].dtype is gradient.dtype is torch.float32
            assert torch.nn.functional.cosine_similarity(fused[name].flatten(), gradient.flatten(), dim=0) > 0.99
    assert calls


def test_autocast(calls):
    results = []
    for fused in (False, True):
        model = with_lora(build())
        apply_dropbp(model, 0.5, fused=fused).set_plan(MIXED)
        with torch.autocast("cpu", torch.bfloat16):
            results.append(step(model, tiny_batch()))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=2e-2, atol=1e-2)
    for name, gradient in results[0][1].items():
        if gradient is not None:
            assert (
                torch.nn.functional.cosine_similarity(results[1][1][name].flatten(), gradient.flatten(), dim=0) > 0.99
            )
    assert set(calls) == {"lora_linear", "glu_linear"}


def dora(model):
    return with_lora(model, use_dora=True)


def with_bias(model):
    return with_lora(model, lora_bias=True)


def two_adapters(model):
    model = with_lora(model)
    torch.manual_seed(2)
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model.add_adapter("second", config)
    model.base_model.set_adapter(["default", "second"])
    return model


def merged(model):
    model = with_lora(model)
    model.merge_adapter()
    return model


def disabled(model):
    model = with_lora(model)
    model.base_model.disable_adapter_layers()
    return model


def of_adapters_that_are_watched(model):
    model = with_lora(model)
    for name, module in model.named_modules():
        if name.endswith("lora_A.default"):
            module.register_forward_hook(lambda module, args, output: 2 * output)
    return model


@pytest.mark.filterwarnings("ignore:.*lora_bias")
@pytest.mark.parametrize("make", [dora, with_bias, two_adapters, merged, disabled, of_adapters_that_are_watched])
def test_other_layers_are_called_as_they_are(make, calls):
    model = make(build())
    results = []
    for fused in (False, True):
        own = copy.deepcopy(model)
        apply_dropbp(own, 0.5, fused=fused)
        own.eval()
        with torch.no_grad():
            results.append(own(**tiny_batch()).logits)
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    assert not calls


def test_watched_and_trained_base_layers_are_called(calls):
    model = with_lora(build())
    layers = [module for module in model.modules() if type(module).__name__ == "Linear" and hasattr(module, "lora_A")]
    seen = []
    layers[0].base_layer.register_forward_hook(lambda *_: seen.append(None))
    layers[1].base_layer.weight.requires_grad_()
    apply_dropbp(model, 0.0, strict=False, fused=True)
    step(model, tiny_batch())
    assert calls.count("add_lora") == 2
    assert calls.count("lora_linear") + calls.count("glu_linear") == len(layers) - 2
    assert len(seen) == 1
    assert layers[1].base_layer.weight.grad is not None


def test_watched_layers_behind_an_mlp_are_called(calls):
    model = with_lora(build())
    apply_dropbp(model, 0.0, strict=False, fused=True)
    seen = []
    for layer in model.base_model.model.model.layers[:2]:
        layer.mlp.down_proj.register_forward_hook(lambda *_: seen.append(None))
    step(model, tiny_batch())
    assert len(seen) == 2
    assert calls.count("glu_linear") == 1


def test_weights_that_compute_otherwise_are_left_to_their_layer(calls):
    class Other(torch.Tensor):
        pass

    model = with_lora(build())
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    layers[0].base_layer.weight = nn.Parameter(layers[0].base_layer.weight.data.as_subclass(Other), requires_grad=False)
    adapter = layers[1].lora_A["default"]
    adapter.weight = nn.Parameter(adapter.weight.data.as_subclass(Other))
    apply_dropbp(model, 0.0, strict=False, fused=True)
    step(model, tiny_batch())
    assert calls.count("add_lora") == 1
    assert calls.count("lora_linear") + calls.count("glu_linear") == len(layers) - 2


def test_global_hooks_see_every_module(calls):
    model = with_lora(build())
    apply_dropbp(model, 0.5, fused=True)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        model(**tiny_batch())
    finally:
        handle.remove()
    assert model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"] in seen
    assert not calls


def test_inputs_of_another_dtype_than_the_base_raise_as_before():
    model = with_lora(build(dtype=torch.bfloat16))
    apply_dropbp(model, 0.5, fused=True)
    with pytest.raises(RuntimeError, match="dtype"):
        model.base_model.model.model.layers[0].mlp.up_proj(torch.randn(2, 32))


def test_several_adapters_in_one_batch(calls):
    model = two_adapters(build())
    model.base_model.set_adapter("default")
    apply_dropbp(model, 0.5, fused=True)
    model.eval()
    tokens = tiny_batch()["input_ids"]
    with torch.no_grad():
        mixed = model(input_ids=tokens, adapter_names=["default", "second"]).logits
        assert not calls
        for index, name in enumerate(("default", "second")):
            model.base_model.set_adapter(name)
            torch.testing.assert_close(mixed[index], model(input_ids=tokens).logits[index], rtol=1e-4, atol=1e-5)
    assert calls


def test_adapters_can_be_added_merged_saved_and_pickled_while_fused(tmp_path):
    model = with_lora(build())
    with torch.no_grad():
        expected = model.eval()(**tiny_batch()).logits
    keys = list(model.state_dict())
    apply_dropbp(model, 0.5, fused=True)
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(build(), tmp_path).eval()
    again = pickle.loads(pickle.dumps(model))
    merged = copy.deepcopy(model).merge_and_unload()
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules="all-linear"))
    with torch.no_grad():
        for each in (model, loaded, again, merged):
            torch.testing.assert_close(each.eval()(**tiny_batch()).logits, expected, rtol=1e-4, atol=1e-4)


def test_undone_and_not_asked_for():
    model = with_lora(build())
    types = [type(module) for module in model.modules()]
    apply_dropbp(model, 0.5, fused=False)
    assert not any(hasattr(type(module), fused_lora._ORIGINAL) for module in model.modules())
    remove_dropbp(model)
    apply_dropbp(model, 0.5, fused="auto")
    assert sum(hasattr(type(module), fused_lora._ORIGINAL) for module in model.modules()) == 3 * 7
    remove_dropbp(model)
    assert [type(module) for module in model.modules()] == types


def test_bitsandbytes_bases(calls):
    bnb = pytest.importorskip("bitsandbytes")
    model = build()
    for block in model.model.layers:
        old = block.mlp.up_proj
        block.mlp.up_proj = bnb.nn.Linear4bit(32, 48, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        block.mlp.up_proj.load_state_dict({"weight": old.weight.data})
        block.mlp.up_proj.to("cpu")
    model.is_loaded_in_4bit = True
    unfused, fused = both(with_lora(model))
    torch.testing.assert_close(fused, unfused, rtol=1e-4, atol=1e-5)
    assert calls.count("add_lora") == 3
    assert calls.count("lora_linear") + calls.count("glu_linear") == 3 * 6


def test_bitsandbytes_may_be_missing():
    code = f"""
import sys
sys.path.append({str(Path(__file__).parent)!r})
sys.modules["bitsandbytes"] = None
from models import tiny_causal_lm, with_lora
from dropbp_kernels import apply_dropbp
from dropbp_kernels.integrations import fused_lora
model = with_lora(tiny_causal_lm())
apply_dropbp(model, 0.5, fused=True)
print(sum(hasattr(type(module), fused_lora._ORIGINAL) for module in model.modules()))
"""
    result = forks.run(code)
    assert result.stdout.strip() == "21", result.stderr


def test_compiled_models_run_as_written(calls):
    model = with_lora(build())
    apply_dropbp(model, 0.0, strict=False, fused=True)
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    assert isinstance(layer, nn.Module)
    x = torch.randn(2, 48)
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))
    assert calls == ["lora_linear"]
