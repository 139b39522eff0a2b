"""QPaCA over weights that torchao holds in 4 or 8 bits: tensors of its own, which nobody writes columns into."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("torchao", reason="torchao, an optional package")

import peft
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_

from dropbp_kernels.paca import PacaConfig, convert_to_lora

IN, OUT, R = 128, 64, 4
CONFIGS = {
    "int8": Int8WeightOnlyConfig(),
    "int4": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
}


def adapted(bits):
    """(model, its dense twin): two linears in a chain with random columns, and the values of its weights."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(IN, OUT), nn.ReLU(), nn.Linear(OUT, IN))
    quantize_(net, CONFIGS[bits])
    dense = copy.deepcopy(net)
    for linear in (dense[0], dense[2]):
        linear.weight = nn.Parameter(linear.weight.dequantize())
    model = peft.get_peft_model(net, PacaConfig(r=R, alpha=2 * R, target_modules=["0", "2"]))
    for place in (0, 2):
        layer = model.base_model.model[place]
        layer.paca_columns["default"].data.normal_(std=0.1)
        dense[place].weight.data[:, layer.paca_indices["default"]] += 2.0 * layer.paca_columns["default"].detach()
    return model, dense


@pytest.mark.parametrize("bits", CONFIGS)
def test_equals_the_unpacked_weight_with_its_columns(bits):
    model, dense = adapted(bits)
    x = torch.randn(3, 5, IN, requires_grad=True)
    y, expected = model(x), dense(x)
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-4)
    trained = [model.base_model.model[place].paca_columns["default"] for place in (0, 2)]
    grads = torch.autograd.grad(y.square().mean(), [x, *trained])
    exact = torch.autograd.grad(expected.square().mean(), [x, dense[0].weight, dense[2].weight])
    torch.testing.assert_close(grads[0], exact[0], atol=1e-6, rtol=1e-3)
    for grad, full, place in zip(grads[1:], exact[1:], (0, 2), strict=True):
        chosen = full[:, model.base_model.model[place].paca_indices["default"]]
        torch.testing.assert_close(grad, 2.0 * chosen, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("bits", CONFIGS)
def test_is_not_merged_but_converted(bits, tmp_path):
    model, _ = adapted(bits)
    x = torch.randn(6, IN)
    expected = model(x).detach()
    with pytest.raises(TypeError, match="merge: expected a dense weight or one of bitsandbytes, got"):
        model.merge_adapter()
    assert torch.equal(model(x), expected)
    _, state = convert_to_lora(model, path=tmp_path)
    for place in (0, 2):
        base = model.base_model.model[place].base_layer
        key = f"base_model.model.{place}.lora_"
        change = state[f"{key}B.weight"] @ state[f"{key}A.weight"]
        change_of_model = model.base_model.model[place](torch.eye(base.in_features)) - base(torch.eye(base.in_features))
        torch.testing.assert_close(change_of_model.T, change, atol=1e-5, rtol=1e-4)
