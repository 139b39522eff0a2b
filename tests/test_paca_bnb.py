"""QPaCA: partial connections over weights that bitsandbytes holds in 4 or 8 bits."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")

import bitsandbytes
import peft

from dropbp_kernels.measure import saved_bytes
from dropbp_kernels.paca import PacaConfig, convert_to_lora
from dropbp_kernels.paca.base_layer import out_by_in

IN, OUT, R = 128, 64, 4


class Net(nn.Module):
    def __init__(self, bits, dtype):
        super().__init__()
        torch.manual_seed(0)
        dense = {name: nn.Linear(IN, OUT).to(dtype) for name in ("query", "key")}
        for name, linear in dense.items():
            if bits == 4:
                new = bitsandbytes.nn.Linear4bit(IN, OUT, quant_type="nf4", compute_dtype=dtype)
            else:
                new = bitsandbytes.nn.Linear8bitLt(IN, OUT, has_fp16_weights=False)
            new.load_state_dict(linear.state_dict())
            self.add_module(name, new.to("cpu"))  # quantises

    def forward(self, x):
        return self.query(x) + 2.0 * self.key(x)


def adapted(bits, dtype=torch.float32, **options):
    config = PacaConfig(r=R, alpha=2 * R, target_modules=["query", "key"], **options)
    model = peft.get_peft_model(Net(bits, dtype), config)
    for name in ("query", "key"):
        trained = getattr(model.base_model.model, name).paca_columns["default"]
        assert trained.dtype == torch.float32
        trained.data.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    return model


def dense_twin(model):
    """A function of x, and its leaves: the unpacked weights with the columns in place."""
    layers = [getattr(model.base_model.model, name) for name in ("query", "key")]
    weights = []
    for layer in layers:
        weight = out_by_in(layer.base_layer).clone()
        indices = layer.paca_indices["default"]
        weight[:, indices] = (weight[:, indices] + 2.0 * layer.paca_columns["default"].detach()).to(weight.dtype)
        weights.append(weight.requires_grad_())

    def run(x):
        biases = [layer.base_layer.bias.to(x.dtype) for layer in layers]
        query, key = (F.linear(x, w.to(x.dtype), b) for w, b in zip(weights, biases, strict=True))
        return query + 2.0 * key

    return run, weights


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_unpacked_weight_with_its_columns(bits, dtype):
    model = adapted(bits, dtype)
    run, weights = dense_twin(model)
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.05}
    x = torch.randn(3, 5, IN, dtype=dtype, requires_grad=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    with saved_bytes() as saved:
        y = model(x)
    assert saved.num_bytes == 15 * R * x.element_size()  # one gather for both: they share x and draw alike
    expected = run(x)
    torch.testing.assert_close(y, expected, **tolerance)
    grads = torch.autograd.grad(y.square().sum(), [x, *trained])
    expected_grads = torch.autograd.grad(expected.square().sum(), [x, *weights])
    torch.testing.assert_close(grads[0], expected_grads[0], atol=1e-3 if dtype == torch.float32 else 2.0, rtol=0.05)
    for grad, full, name in zip(grads[1:], expected_grads[1:], ("query", "key"), strict=True):
        chosen = full[:, getattr(model.base_model.model, name).paca_indices["default"]]
        scale = chosen.abs().max().item()
        torch.testing.assert_close(
            grad, 2.0 * chosen.float(), atol=scale * (1e-4 if dtype == torch.float32 else 0.05), rtol=0
        )


@pytest.mark.parametrize("bits", [4, 8])
def test_merge_restores_the_packed_weight_to_the_bit(bits):
    model = adapted(bits)
    x = torch.randn(6, IN)
    expected = model(x).detach()
    before = copy.deepcopy(model.base_model.model.query.base_layer.weight.data)
    with pytest.warns(UserWarning, match="quantises all of the weight anew"):
        model.merge_adapter(safe_merge=True)
    merged = model(x).detach()
    assert (merged - expected).abs().max() < 0.5 * expected.abs().max()
    assert not torch.equal(model.base_model.model.query.base_layer.weight.data, before)
    model.unmerge_adapter()
    assert torch.equal(model.base_model.model.query.base_layer.weight.data, before)
    torch.testing.assert_close(model(x).detach(), expected)


def test_saved_over_a_packed_base_and_converted(tmp_path):
    model = adapted(4, selection="weight_norm")
    x = torch.randn(6, IN)
    expected = model(x).detach()
    model.save_pretrained(tmp_path / "paca")
    loaded = peft.PeftModel.from_pretrained(Net(4, torch.float32), tmp_path / "paca")
    torch.testing.assert_close(loaded(x), expected)
    convert_to_lora(model, path=tmp_path / "lora")
    lora = peft.PeftModel.from_pretrained(Net(4, torch.float32), tmp_path / "lora").train()  # eval: coarser products
    torch.testing.assert_close(lora(x), expected, atol=1e-4, rtol=1e-4)
