"""Partial connections against a dense linear layer in which only those columns have a gradient."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_as_exact
from torch import nn
from torch.utils.checkpoint import checkpoint

pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft
from transformers.pytorch_utils import Conv1D

from dropbp_kernels.measure import num_autograd_nodes, saved_bytes
from dropbp_kernels.paca import Linear, PacaConfig, PacaLayer
from dropbp_kernels.paca.selection import random_columns

IN, OUT, R, SCALING = 12, 7, 3, 2.0
INDICES = torch.tensor([1, 4, 10])


def linear(bias=True, dtype=torch.float64, kind=nn.Linear, in_features=IN, out_features=OUT):
    base = kind(in_features, out_features, bias=bias) if kind is nn.Linear else kind(out_features, in_features)
    base = base.to(dtype).requires_grad_(False)
    if not bias and kind is Conv1D:
        raise AssertionError("Conv1D always has a bias")
    return base


def adapted(base, indices=INDICES, trained=None, **overrides):
    """A layer with one adapter whose columns are already trained to `trained` (default: random)."""
    r = indices.numel()
    config = PacaConfig(r=r, alpha=SCALING * r, **overrides)
    layer = Linear(base, "default", r=r, alpha=SCALING * r, indices=indices, config=config)
    if trained is None:
        trained = torch.randn(layer.out_features, r, generator=torch.Generator().manual_seed(5))
    if not config.published:
        layer.paca_columns["default"].data = trained.to(layer.paca_columns["default"].dtype)
    return layer


def out_by_in(base):
    return base.weight.t() if isinstance(base, Conv1D) else base.weight


def dense(base, columns, indices=INDICES):
    """A function of x with W' as one leaf, and that leaf."""
    weight = out_by_in(base).detach().contiguous().clone()
    weight[:, indices] = columns.to(weight.dtype)
    weight.requires_grad_()
    return (lambda x: F.linear(x, weight, base.bias)), weight


def columns_of(layer, indices=INDICES):
    return out_by_in(layer.base_layer)[:, indices] + SCALING * layer.paca_columns["default"].detach()


@pytest.mark.parametrize("shape", [(IN,), (5, IN), (2, 5, IN), (2, 3, 5, IN), (0, IN)], ids=str)
@pytest.mark.parametrize(("kind", "bias"), [(nn.Linear, True), (nn.Linear, False), (Conv1D, True)])
def test_equals_dense_layer_with_a_gradient_for_its_columns(kind, bias, shape):
    base = linear(bias, kind=kind)
    if bias:
        base.bias.requires_grad_()
    layer, before = adapted(base), base.weight.clone()
    run, weight = dense(base, columns_of(layer))
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(*shape[:-1], OUT, dtype=torch.float64)
    expected, actual = run(x), layer(x)
    expected_grads = torch.autograd.grad(expected, [x, weight] + [base.bias] * bias, grad)
    grads = torch.autograd.grad(actual, [x, layer.paca_columns["default"]] + [base.bias] * bias, grad)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(grads[0], expected_grads[0])
    torch.testing.assert_close(grads[1], SCALING * expected_grads[1][:, INDICES])  # W' = W + scaling * columns
    if bias:
        torch.testing.assert_close(grads[2], expected_grads[2])
    assert torch.equal(base.weight, before)


def test_by_hand():
    base = linear(dtype=torch.float32, in_features=3, out_features=2)
    base.weight.copy_(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
    base.bias.copy_(torch.tensor([0.5, 0.25]))
    layer = adapted(base, torch.tensor([0, 2]), torch.tensor([[1.0, 0.0], [0.0, -1.0]]))
    x = torch.tensor([[1.0, 10.0, 100.0]], requires_grad=True)
    y = layer(x)  # W' = [[3, 2, 3], [4, 5, 4]]
    assert y.tolist() == [[323.5, 454.25]]
    y.backward(torch.tensor([[1.0, 2.0]]))
    assert x.grad.tolist() == [[11.0, 12.0, 11.0]]
    assert layer.paca_columns["default"].grad.tolist() == [[2.0, 200.0], [4.0, 400.0]]  # 2 g x


def test_gradcheck():
    layer = adapted(linear())
    x = torch.randn(4, IN, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, _: layer(x), (x, layer.paca_columns["default"]))
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)[0].sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_error_is_that_of_a_dense_layer(dtype, kind):
    """The trained columns are float32, as PEFT keeps them, and rounded once into the weight."""
    base = linear(dtype=dtype, kind=kind, in_features=64, out_features=48)
    indices = random_columns(8, 64, 0, "")
    layer = adapted(base, indices)
    layer.paca_columns["default"].data = layer.paca_columns["default"].data.float()
    plain, plain_weight = dense(base, columns_of(layer, indices), indices)
    exact, exact_weight = dense(copy.deepcopy(base).double(), plain_weight.detach()[:, indices], indices)
    x = torch.randn(30, 64, dtype=dtype, requires_grad=True)
    exact_x = x.detach().double().requires_grad_()
    grad = torch.randn(30, 48, dtype=dtype)
    actual, expected, truth = layer(x), plain(x), exact(exact_x)
    assert_as_exact(actual, expected, truth, "output")
    grads = torch.autograd.grad(actual, [x, layer.paca_columns["default"]], grad)
    plain_grads = torch.autograd.grad(expected, [x, plain_weight], grad)
    exact_grads = torch.autograd.grad(truth, [exact_x, exact_weight], grad.double())
    assert_as_exact(grads[0], plain_grads[0], exact_grads[0], "grad_x")
    plain_columns, exact_columns = (SCALING * grads[1][:, indices] for grads in (plain_grads, exact_grads))
    assert grads[1].dtype == torch.float32
    assert_as_exact(grads[1], plain_columns.float(), exact_columns, "grad_columns", magnitude=16.0, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_equals_an_autocast_dense_layer(dtype):
    base = linear(dtype=dtype, in_features=64, out_features=48)
    indices = random_columns(8, 64, 0, "")
    layer, before = adapted(base, indices), base.weight.clone()
    run, weight = dense(base, columns_of(layer, indices), indices)
    x = torch.randn(30, 64, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual, expected = layer(x), run(x)
    assert actual.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected, atol=1e-2, rtol=2e-2)
    grads = torch.autograd.grad(actual.float().sum(), [x, layer.paca_columns["default"]])
    expected_grads = torch.autograd.grad(expected.float().sum(), [x, weight])
    assert grads[0].dtype == torch.float32
    torch.testing.assert_close(grads[0], expected_grads[0], atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(grads[1].float(), SCALING * expected_grads[1][:, indices].float(), atol=5e-2, rtol=5e-2)
    assert torch.equal(base.weight, before)


def test_weight_is_restored_when_the_product_fails():
    layer = adapted(linear())
    before = layer.weight.clone()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="cannot be multiplied"):
            layer(torch.randn(2, IN + 1, dtype=torch.float64))
    assert torch.equal(layer.weight, before)


def test_saves_the_chosen_channels_once_for_all_that_share_them():
    rows, width, r = 50, 256, 8
    config = PacaConfig(r=r, target_modules=["q", "k", "v", "o"])

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))

        def forward(self, x):
            return self.o(self.q(x) + self.k(x) + self.v(x))

    model = peft.inject_adapter_in_model(config, Attention())
    x = torch.randn(rows, width, requires_grad=True)
    with saved_bytes() as saved:
        y = model(x)
    assert saved.num_bytes == 2 * rows * r * 4  # dense: 2 * rows * width * 4
    assert num_autograd_nodes(y) == 4 + 2  # one for each linear, two adds
    with saved_bytes() as saved, torch.no_grad():
        model(x)
    assert saved.num_bytes == 0
    y.sum().backward()


def test_the_same_tensor_with_other_values_is_another_input():
    layer = adapted(linear())
    x = torch.randn(4, IN, dtype=torch.float64)
    grads = []
    for _ in range(2):
        grads += torch.autograd.grad(layer(x).sum(), layer.paca_columns["default"])
        x.mul_(2.0)
    torch.testing.assert_close(grads[1], 2 * grads[0])


def test_graph_survives_other_uses_of_the_weight():
    """Two forwards before one backward, a tied weight in the graph, and DDP's broadcast of the indices."""
    base = linear()
    layer = adapted(base)
    x = torch.randn(4, IN, dtype=torch.float64, requires_grad=True)
    tied = F.linear(x, base.weight)
    first = layer(x)
    layer.paca_indices["default"].copy_(layer.paca_indices["default"].clone())
    second = layer(x)
    both = torch.autograd.grad((tied.sum() + first.sum() + second.sum()), x)[0]
    (alone,) = torch.autograd.grad(layer(x).sum(), x)
    torch.testing.assert_close(both, 2 * alone + base.weight.sum(0).expand_as(x))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(use_reentrant):
    layer = adapted(linear())
    x = torch.randn(4, IN, dtype=torch.float64, requires_grad=True)
    inputs = [x, layer.paca_columns["default"]]
    expected = torch.autograd.grad(layer(x).square().sum(), inputs)
    checkpoint(layer, x, use_reentrant=use_reentrant).square().sum().backward()
    for tensor, grad in zip(inputs, expected, strict=True):
        assert torch.equal(tensor.grad, grad)


def test_frozen_input_or_frozen_columns_cost_nothing():
    layer = adapted(linear())
    x = torch.randn(4, IN, dtype=torch.float64)
    layer(x).sum().backward()
    assert layer.paca_columns["default"].grad is not None
    layer.requires_grad_(False)
    assert not layer(x).requires_grad
    x.requires_grad_()
    with saved_bytes() as saved:
        layer(x)
    assert saved.num_bytes == 0


def beside(layer):
    """The layer as it runs where its weight may not be written to."""
    layer.base_layer.register_forward_hook(lambda *_: None)
    return layer


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_base_layers_that_somebody_watches_are_called_as_they_are(kind, published):
    base = linear(kind=kind)
    layer = adapted(base, published=published)
    with torch.no_grad():
        layer.paca_columns["default"].add_(0.5)
    x = torch.randn(2, 4, IN, dtype=torch.float64, requires_grad=True)
    inputs = [x, layer.paca_columns["default"]]
    expected = layer(x)
    expected_grads = torch.autograd.grad(expected.square().sum(), inputs)
    calls = []
    base.register_forward_hook(lambda *_: calls.append(1))
    with saved_bytes() as saved:
        actual = layer(x)
    assert calls
    assert saved.num_bytes <= 8 * R * (8 + 2 * OUT)  # channels and columns; not x
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual.square().sum(), inputs), expected_grads)


def test_weight_that_is_trained_too_gets_its_gradient():
    layer = adapted(linear())
    run, weight = dense(layer.base_layer, columns_of(layer))
    layer.base_layer.weight.requires_grad_()
    x = torch.randn(4, IN, dtype=torch.float64)
    run(x).square().sum().backward()
    layer(x).square().sum().backward()
    torch.testing.assert_close(layer.base_layer.weight.grad, weight.grad)


def test_compile():
    layer = adapted(linear(dtype=torch.float32))
    x = torch.randn(4, IN, requires_grad=True)
    inputs = [x, layer.paca_columns["default"]]
    expected = torch.autograd.grad(layer(x).square().sum(), inputs)
    actual = torch.autograd.grad(torch.compile(layer, fullgraph=True, backend="aot_eager")(x).square().sum(), inputs)
    torch.testing.assert_close(actual, expected)


def test_published_formula():
    """alpha / r times what is stored, which starts as the columns over alpha / r; the base keeps its own."""
    base = linear()
    before = base.weight.clone()
    layer = adapted(base, published=True)
    stored = layer.paca_columns["default"]
    torch.testing.assert_close(stored.data, before[:, INDICES] / SCALING)
    x = torch.randn(4, IN, dtype=torch.float64)
    torch.testing.assert_close(layer(x), base(x))
    stored.data.mul_(3.0)
    effective = before.clone()
    effective[:, INDICES] = SCALING * stored.data
    y = layer(x)
    torch.testing.assert_close(y, F.linear(x, effective, base.bias))
    y.backward(torch.ones_like(y))
    torch.testing.assert_close(stored.grad, SCALING * x[:, INDICES].sum(0).expand(OUT, R))
    assert torch.equal(base.weight, before)


def test_weight_decay_leaves_pretrained_columns_alone_unless_published():
    x = torch.randn(4, IN, dtype=torch.float64)
    outputs = {}
    for published in (False, True):
        layer = adapted(linear(), published=published)
        layer.reset_columns("default")
        before = layer(x).detach()
        optimizer = torch.optim.SGD(layer.paca_columns.parameters(), lr=0.1, weight_decay=1.0)
        layer.paca_columns["default"].grad = torch.zeros_like(layer.paca_columns["default"])
        optimizer.step()
        outputs[published] = (layer(x) - before).abs().max().item()
    assert outputs[False] == 0.0
    assert outputs[True] > 1e-3


def test_random_columns_are_a_pure_function_and_touch_no_generator():
    state = torch.get_rng_state()
    first = random_columns(5, 100, 7, "model.layers.0.self_attn")
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first, random_columns(5, 100, 7, "model.layers.0.self_attn"))
    assert first.tolist() == sorted(set(first.tolist()))
    assert not torch.equal(first, random_columns(5, 100, 8, "model.layers.0.self_attn"))
    assert not torch.equal(first, random_columns(5, 100, 7, "model.layers.1.self_attn"))
    assert random_columns(100, 100, 0, "").tolist() == list(range(100))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r: expected an integer of at least 1, got 0"),
        ({"r": 2.5}, "r: expected an integer of at least 1, got 2.5"),
        ({"rank_pattern": {"q": -1}}, r"rank_pattern\['q'\]: expected an integer of at least 1, got -1"),
        ({"alpha": 0}, "alpha: expected a positive number, got 0"),
        ({"alpha_pattern": {"q": float("nan")}}, r"alpha_pattern\['q'\]: expected a positive number, got nan"),
        ({"selection": "largest"}, "selection: expected one of random, weight_norm, gradient, got 'largest'"),
        ({"bias": "lora_only"}, "bias: expected none, all or paca_only, got 'lora_only'"),
        ({"seed": -1}, "seed: expected an integer of at least 0, got -1"),
        ({"target_modules": "x", "layers_to_transform": [0]}, "layers_to_transform: expected None where"),
        ({"target_modules": ["x"], "layers_pattern": "h"}, "layers_pattern: expected layers_to_transform with it"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        PacaConfig(**options)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.conv = nn.Linear(16, 8), nn.Linear(8, 4), nn.Conv1d(4, 4, 1)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"r": 9, "target_modules": ["first", "second"]}, ValueError, "r: expected at most the 8 inputs of second"),
        ({"target_modules": ["third"]}, ValueError, "not found in the base model"),
        ({"r": 2, "target_modules": ["first", "conv"]}, TypeError, "got Conv1d at conv"),
    ],
)
def test_what_does_not_fit_the_model_leaves_it_as_it_was(options, error, message):
    model = Net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(error, match=message):
        peft.get_peft_model(model, PacaConfig(**options))
    assert not any(isinstance(module, PacaLayer) for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
