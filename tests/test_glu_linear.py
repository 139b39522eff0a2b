"""A linear layer behind a gated product: the gradients of two layers, without the product among what is saved."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dropbp_kernels.glu_linear import Adapter, glu_linear
from dropbp_kernels.measure import PeakLiveBytes, saved_bytes
from dropbp_kernels.reference import glu_reference

ROWS, IN, OUT, RANK = 24, 16, 12, 4


def operands(shape=(2, ROWS // 2, IN), dtype=torch.float64, wide=None):
    """gate, up, weight, bias and an adapter's two matrices, all of which require gradients."""
    generator = torch.Generator().manual_seed(0)
    sizes = (shape, shape, (OUT, IN), (OUT,), (RANK, IN), (OUT, RANK))
    made = [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
    inputs = [each.to(dtype).requires_grad_() for each in made[:2]]
    return inputs + [nn.Parameter(each.to(wide or dtype)) for each in made[2:]]


def two_layers(gate, up, weight, bias, lora_a=None, lora_b=None, activation="silu"):
    product = glu_reference(gate, up, activation)
    output = F.linear(product, weight, bias)
    return output if lora_a is None else output + 1.5 * F.linear(F.linear(product, lora_a), lora_b)


def one(gate, up, weight, bias, lora_a=None, lora_b=None, activation="silu", donate=False):
    adapter = None if lora_a is None else Adapter(lora_a, lora_b, 1.5)
    return glu_linear(gate, up, weight, bias, activation=activation, adapter=adapter, donate=donate)


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("shape", [(IN,), (5, IN), (2, 3, IN), (0, IN)], ids=str)
def test_values_and_gradients(adapter, activation, shape):
    args = operands(shape)[: 6 if adapter else 4]
    expected = two_layers(*args, activation=activation)
    actual = one(*args, activation=activation)
    torch.testing.assert_close(actual, expected)
    grad_output = torch.randn_like(actual)
    gradients = (torch.autograd.grad(output, args, grad_output) for output in (actual, expected))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (4,), (5,), (0, 1, 4, 5), ()], ids=str)
def test_only_wanted_gradients_come_back(wanted):
    args = [arg.detach().requires_grad_(place in wanted) for place, arg in enumerate(operands())]
    if not wanted:
        assert not one(*args).requires_grad
        return
    inputs = [args[place] for place in wanted]
    expected = torch.autograd.grad(two_layers(*args).square().sum(), inputs)
    one(*args).square().sum().backward()
    torch.testing.assert_close([each.grad for each in inputs], list(expected))
    assert sum(arg.grad is not None for arg in args) == len(wanted)


@pytest.mark.parametrize("adapter", [False, True])
def test_saves_gate_and_up_alone(adapter):
    args = operands()[: 6 if adapter else 4]
    with saved_bytes() as saved:
        one(*args)
    assert saved.num_bytes == 8 * ROWS * (2 * IN + RANK * adapter)


def test_donated_inputs_take_the_gradients():
    """A backward allocates, of the inner width, the product and its gradient, one after the other, and no more."""
    *leaves, weight, bias, lora_a, lora_b = operands((2, 64, IN))
    peaks, gradients = {}, {}
    for donate in (False, True):
        output = one(*(leaf + 0.0 for leaf in leaves), weight, bias, lora_a, lora_b, donate=donate)
        grad_output = torch.ones_like(output)
        with PeakLiveBytes() as live:
            gradients[donate] = torch.autograd.grad(output, (*leaves, weight, lora_a, lora_b), grad_output)
        peaks[donate] = live.peak_bytes
        del output
    torch.testing.assert_close(gradients[True], gradients[False])
    assert peaks[True] < 2 * leaves[0].nbytes <= peaks[False] - leaves[0].nbytes


def test_donation_is_declined_where_the_graph_stays():
    args = operands()
    gate, up = args[0] * 1.0, args[1] * 1.0
    output = one(gate, up, *args[2:], donate=True)
    first = torch.autograd.grad(output.sum(), args, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(output.sum(), args), first)


@pytest.mark.parametrize("held", [0, 1])
def test_donation_is_declined_where_one_input_is_held(held):
    args = operands()
    inputs = [args[0] * 1.0, args[1] * 1.0]
    kept, before = inputs[held], inputs[held].detach().clone()
    output = one(*inputs, *args[2:], donate=True)
    del inputs
    output.sum().backward()
    assert torch.equal(kept, before)


def test_wider_weights_are_rounded_as_under_autocast_and_get_gradients_of_their_own_dtype():
    args = operands(dtype=torch.bfloat16, wide=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        expected = two_layers(*args)
        actual = one(*args)
    assert actual.dtype is torch.bfloat16
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=0.3)
    gradients = torch.autograd.grad(actual.float().sum(), args)
    assert [gradient.dtype for gradient in gradients] == [torch.bfloat16] * 2 + [torch.float32] * 4
    for ours, theirs in zip(gradients, torch.autograd.grad(expected.float().sum(), args), strict=True):
        assert F.cosine_similarity(ours.flatten().float(), theirs.flatten().float(), dim=0) > 0.99


def test_autocast_does_not_reach_in():
    args = operands(dtype=torch.float32)
    expected = one(*args)
    gradients = torch.autograd.grad(expected.sum(), args)
    with torch.autocast("cpu", torch.bfloat16):
        output = one(*args)
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(torch.autograd.grad(output.sum(), args), gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_rounds_at_most_twice_as_much_as_two_layers(dtype):
    args = operands((64, IN), dtype)
    exact = [arg.detach().double().requires_grad_() for arg in args]
    grad_output = torch.randn(64, OUT, dtype=dtype)

    def results(function, args, grad_output):
        output = function(*args)
        return [output.detach(), *torch.autograd.grad(output, args, grad_output)]

    oracle = results(two_layers, exact, grad_output.double())
    for ours, theirs, right in zip(
        results(one, args, grad_output), results(two_layers, args, grad_output), oracle, strict=True
    ):
        allowed = 2 * (theirs.double() - right).abs().max() + torch.finfo(dtype).eps * right.abs().max()
        assert (ours.double() - right).abs().max() <= allowed


def test_bad_input():
    gate, up, weight, bias, *_ = operands()
    with pytest.raises(ValueError, match="activation: expected one of silu, gelu, gelu_tanh, got 'relu'"):
        glu_linear(gate, up, weight, bias, activation="relu")
    with pytest.raises(ValueError, match="up: expected gate's shape"):
        glu_linear(gate, up[:1], weight, bias)
    gradient = torch.autograd.grad(glu_linear(gate, up, weight).square().sum(), gate, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
