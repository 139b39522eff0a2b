"""Adapters that come, change and go under fused=True: after each change logits and gradients are PEFT's."""

import pytest
import torch
from fused_models import build
from models import gradients, tiny_batch, tiny_gpt2, with_lora

from dropbp_kernels import apply_dropbp, remove_dropbp
from dropbp_kernels.integrations import fused_lora

peft = pytest.importorskip("peft")

PLAN = [True, False, False, True, True, True]


def config(seed=1, **options):
    torch.manual_seed(seed)
    return peft.LoraConfig(**{"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **options})


def results(model):
    model.zero_grad()
    torch.manual_seed(2)  # of dropout
    output = model(**tiny_batch())
    if output.loss.requires_grad:
        output.loss.backward()
    return output.logits.detach(), gradients(model)


def assert_alike(model, plain):
    torch.testing.assert_close(results(model), results(plain), rtol=1e-4, atol=1e-5)


def fused_layers(model):
    return [module for module in model.modules() if hasattr(type(module), fused_lora._ORIGINAL)]


def bloom():
    """A family that is gated by its modules, of which some are the linear layers themselves."""
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    return BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4, use_cache=False)).train()


def wrapped(model, **options):
    return peft.get_peft_model(model, config(**options)).train()


def added(model, **options):
    """As transformers puts adapters on, without a wrapper."""
    model.add_adapter(config(**options))
    return model.train()


@pytest.mark.parametrize(
    ("make", "options"),
    [(build, {}), (bloom, {}), (tiny_gpt2, {"fan_in_fan_out": True})],
    ids=["llama", "bloom", "gpt2"],
)
@pytest.mark.parametrize("adapt", [wrapped, added])
def test_adapters_that_are_put_on_later_are_fused_with_the_next_plan(make, options, adapt):
    model, plain = make(), make()
    classes = [type(module) for module in model.modules()]
    handlers = [apply_dropbp(each, 0.5, fused=fused) for each, fused in ((model, True), (plain, False))]
    model, plain = adapt(model, **options), adapt(plain, **options)
    for handler in handlers:
        handler.set_plan(PLAN[: len(handler.gates)])
    assert_alike(model, plain)
    assert fused_layers(model) == [module for module in model.modules() if hasattr(module, "lora_A")] != []
    remove_dropbp(model)
    assert not fused_layers(model)
    handlers[1].set_plan([True] * len(handlers[1].gates))
    assert_alike(model, plain)
    if adapt is wrapped:
        assert [type(module) for module in model.unload().modules()] == classes


@pytest.mark.filterwarnings("ignore:Adapter third was active")
def test_adapters_change_and_go(tmp_path):
    with_lora(build(), r=2).save_pretrained(tmp_path)

    def disable(model):
        model.base_model.disable_adapter_layers()

    def enable(model):
        model.base_model.enable_adapter_layers()

    changes = {
        "load": lambda model: model.load_adapter(tmp_path, "second", is_trainable=True),
        "set": lambda model: model.set_adapter("second"),
        "both": lambda model: model.base_model.set_adapter(["default", "second"]),
        "none": disable,
        "all": enable,
        "back": lambda model: model.set_adapter("default"),
        "merge": lambda model: model.merge_adapter(),
        "unmerge": lambda model: model.unmerge_adapter(),
        "weighted": lambda model: model.add_weighted_adapter(["default", "second"], [0.5, 2.0], "third", "cat"),
        "third": lambda model: model.set_adapter("third"),
        "delete": lambda model: model.delete_adapter("third"),
        "scale": lambda model: [layer.scale_layer(3.0) for layer in model.modules() if hasattr(layer, "scale_layer")],
    }
    model, plain = with_lora(build()), with_lora(build())
    handlers = [apply_dropbp(each, 0.5, fused=fused) for each, fused in ((model, True), (plain, False))]
    logits = {"before": results(model)[0]}
    for name, change in changes.items():
        for each, handler in zip((model, plain), handlers, strict=True):
            torch.manual_seed(3)
            change(each)
            handler.set_plan(PLAN)
        assert_alike(model, plain)
        logits[name] = results(model)[0]
    assert not torch.allclose(logits["before"], logits["set"], atol=1e-3)  # these do change something
    assert not torch.allclose(logits["back"], logits["third"], atol=1e-3)
    torch.testing.assert_close(logits["unmerge"], logits["before"], rtol=1e-4, atol=1e-5)
    # Gone, and others put on: where the layers were, the new ones are fused.
    model, plain = wrapped(model.unload(), r=3), wrapped(plain.unload(), r=3)
    assert not fused_layers(model)
    for handler in handlers:
        handler.set_plan(PLAN)
    assert len(fused_layers(model)) == 3 * 7
    assert_alike(model, plain)
