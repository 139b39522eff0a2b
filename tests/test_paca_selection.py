"""Which columns PaCA trains: drawn, by the norm of the weight's, by the gradient's."""

import pytest
import torch
from models import tiny_batch, tiny_causal_lm, tiny_gpt2

pytest.importorskip("peft")

import peft

from dropbp_kernels import apply_dropbp
from dropbp_kernels.paca import PacaConfig, PacaLayer, convert_to_lora, select_columns
from dropbp_kernels.paca.selection import NOT_CHOSEN

ALL = {"r": 4, "target_modules": "all-linear"}


def test_query_key_and_value_choose_the_same_columns():
    model = peft.get_peft_model(tiny_causal_lm(), PacaConfig(**ALL))
    layer = model.base_model.model.model.layers[0]
    chosen = [getattr(layer.self_attn, name).chosen["default"] for name in ("q_proj", "k_proj", "v_proj")]
    assert chosen[0] == chosen[1] == chosen[2] != layer.mlp.gate_proj.chosen["default"]
    assert layer.mlp.gate_proj.chosen == layer.mlp.up_proj.chosen
    assert chosen[0] != model.base_model.model.model.layers[1].self_attn.q_proj.chosen["default"]


def test_selection_by_weight_norm():
    model = tiny_gpt2()
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.weight[[3, 9]] *= 100.0  # Conv1D: rows are inputs
    model = peft.get_peft_model(model, PacaConfig(r=2, target_modules=["c_attn"], selection="weight_norm"))
    assert model.base_model.model.transformer.h[0].attn.c_attn.chosen["default"] == (3, 9)


def test_selection_by_gradient():
    model = peft.get_peft_model(tiny_causal_lm(), PacaConfig(**ALL, selection="gradient")).train()
    batch = tiny_batch()
    with pytest.raises(RuntimeError, match=r"call dropbp_kernels.paca.select_columns\(model, backprop\) before"):
        model(**batch)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**batch).logits, tiny_causal_lm().eval()(**batch).logits)
    rng = torch.get_rng_state()
    apply_dropbp(model, 0.5).step()
    model.train()
    select_columns(model, lambda: model(**batch).loss.backward())
    assert torch.equal(rng, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())

    full = tiny_causal_lm()
    full(**batch).loss.backward()
    for name, module in model.named_modules():
        if isinstance(module, PacaLayer):
            name = name.removeprefix("base_model.model.")
            parent, _, last = name.rpartition(".")
            shared = next((s for s in (["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]) if last in s), [last])
            grads = [full.get_submodule(f"{parent}.{each}").weight.grad.double() for each in shared]
            squares = sum(grad.square().sum(0) for grad in grads)
            best = squares[list(module.chosen["default"])].sum()
            assert best >= (1 - 1e-6) * squares.topk(4).values.sum(), name
            assert module.paca_indices["default"].tolist() == list(module.chosen["default"])
    model(**batch).loss.backward()
    with pytest.raises(RuntimeError, match="expected a gradient for every target"):
        select_columns(model, lambda: None)
    with pytest.raises(ValueError, match="expected an adapter with selection='gradient', got 'other'"):
        select_columns(model, lambda: None, "other")


def test_a_single_column_changes_something_once_it_is_chosen():
    model, batch = tiny_causal_lm().eval(), tiny_batch()
    expected = model(**batch).logits
    config = PacaConfig(**ALL | {"r": 1}, selection="gradient")
    model = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, expected)
        layer = model.base_model.model.model.layers[0].mlp.down_proj
        layer.choose("default", torch.tensor([0]))
        layer.paca_columns["default"].fill_(1.0)
        assert not torch.equal(model(**batch).logits, expected)


def test_unchosen_columns_can_be_saved_and_loaded(tmp_path):
    model = peft.get_peft_model(tiny_causal_lm(), PacaConfig(**ALL, selection="gradient"))
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_causal_lm(), tmp_path)
    assert loaded.base_model.model.model.layers[0].self_attn.q_proj.chosen["default"][0] == NOT_CHOSEN
    with pytest.raises(RuntimeError, match="its columns are not chosen yet"):
        convert_to_lora(loaded)
    unchosen = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    select_columns(loaded.train(), lambda: loaded(**tiny_batch()).loss.backward())
    loaded.load_state_dict(unchosen)
    with pytest.raises(RuntimeError, match="its columns are not chosen yet"):
        convert_to_lora(loaded)
