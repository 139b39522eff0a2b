"""A linear layer with a low-rank adapter: gradients, rounding, what is saved and which passes are made."""

import functools
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dropbp_kernels.lora import add_lora, lora_linear
from dropbp_kernels.measure import saved_bytes

ROWS, IN, OUT, RANK, SCALING = 24, 16, 20, 4, 1.5
SHAPES = [(IN,), (5, IN), (2, 3, IN), (2, 2, 2, IN), (0, IN)]


def operands(shape=(2, ROWS // 2, IN), dtype=torch.float64, adapter_dtype=None, *, bias=False):
    """x, weight, bias, lora_a and lora_b; x and the adapter require gradients."""
    generator = torch.Generator().manual_seed(0)
    sizes = (shape, (OUT, IN), (OUT,), (RANK, IN), (OUT, RANK))
    x, weight, b, *adapter = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
    lora_a, lora_b = (nn.Parameter(each.to(adapter_dtype or dtype)) for each in adapter)
    frozen = functools.partial(nn.Parameter, requires_grad=False)
    return x.to(dtype).requires_grad_(), frozen(weight.to(dtype)), frozen(b.to(dtype)) if bias else None, lora_a, lora_b


def as_modules(x, weight, bias, lora_a, lora_b, scaling=SCALING):
    return F.linear(x, weight, bias) + F.linear(F.linear(x, lora_a), lora_b) * scaling


def by_adding(x, weight, bias, lora_a, lora_b, scaling=SCALING):
    return add_lora(F.linear(x, weight, bias), x, lora_a, lora_b, scaling)


WAYS = [functools.partial(lora_linear, scaling=SCALING), by_adding]


@pytest.mark.parametrize("way", WAYS, ids=["lora_linear", "add_lora"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(way, bias, shape):
    args = operands(shape, bias=bias)
    expected = as_modules(*args)
    torch.testing.assert_close(way(*args), expected)
    assert torch.autograd.gradcheck(way, args)
    with torch.no_grad():
        torch.testing.assert_close(way(*args), expected)


@pytest.mark.parametrize("way", WAYS, ids=["lora_linear", "add_lora"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_rounds_at_most_twice_as_much_as_the_modules(way, dtype):
    args = operands((64, IN), dtype)
    grad_output = torch.randn(64, OUT, dtype=dtype)
    exact = [arg if arg is None else arg.detach().double().requires_grad_(arg.requires_grad) for arg in args]

    def results(function, args, grad_output):
        inputs = [arg for arg in args if arg is not None and arg.requires_grad]
        output = function(*args)
        return [output.detach(), *torch.autograd.grad(output, inputs, grad_output)]

    oracle = results(as_modules, exact, grad_output.double())
    for ours, theirs, right in zip(
        results(way, args, grad_output), results(as_modules, args, grad_output), oracle, strict=True
    ):
        allowed = 2 * (theirs.double() - right).abs().max() + torch.finfo(dtype).eps * right.abs().max()
        assert (ours.double() - right).abs().max() <= allowed


@pytest.mark.parametrize("way", WAYS, ids=["lora_linear", "add_lora"])
def test_wider_adapters_save_no_wider_input_and_get_gradients_of_their_own_dtype(way):
    args = operands(dtype=torch.bfloat16, adapter_dtype=torch.float32)
    with saved_bytes() as saved:
        output = way(*args)
    assert output.dtype is torch.bfloat16
    assert saved.num_bytes == ROWS * (IN + RANK) * 2
    output.sum().backward()
    assert [args[3].grad.dtype, args[4].grad.dtype, args[0].grad.dtype] == [torch.float32] * 2 + [torch.bfloat16]


def test_saves_only_what_a_wanted_gradient_needs():
    x, weight, _, lora_a, lora_b = operands()
    numbers = {}
    for wanted in ("ab", "a", "b", ""):
        lora_a.requires_grad_("a" in wanted), lora_b.requires_grad_("b" in wanted)
        with saved_bytes() as saved:
            output = lora_linear(x, weight, None, lora_a, lora_b)
        numbers[wanted] = saved.num_bytes // (8 * ROWS)
        output.sum().backward()
        assert [lora_a.grad is not None, lora_b.grad is not None] == ["a" in wanted, "b" in wanted]
        lora_a.grad = lora_b.grad = None
    assert numbers == {"ab": IN + RANK, "a": IN, "b": RANK, "": 0}


class Calls(TorchDispatchMode):
    """Counts the operators that read or write numbers."""

    VIEWS = ("t", "view", "_unsafe_view", "reshape", "transpose", "detach", "alias")

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._opname
        if name not in self.VIEWS:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def test_no_pass_besides_products():
    x, weight, _, lora_a, lora_b = operands()
    with Calls() as forward:
        output = lora_linear(x, weight, None, lora_a, lora_b, SCALING)
    assert forward.counts == {"mm": 2, "addmm_": 1}
    grad_output = torch.ones_like(output)
    with Calls() as backward:
        torch.autograd.grad(output, (x, lora_a, lora_b), grad_output)
    assert backward.counts == {"mm": 2, "addmm": 2, "addmm_": 1}


@pytest.mark.parametrize("way", WAYS, ids=["lora_linear", "add_lora"])
def test_autocast(way):
    args = operands(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        expected = as_modules(*args)
        with saved_bytes() as saved:
            output = way(*args)
    assert output.dtype is expected.dtype is torch.bfloat16
    torch.testing.assert_close(output, expected, rtol=2e-2, atol=2e-1)
    if way is not by_adding:
        assert saved.num_bytes == ROWS * (IN + RANK) * 2
    expected_gradients = torch.autograd.grad(expected.float().sum(), (args[0], *args[3:]))
    gradients = torch.autograd.grad(output.float().sum(), (args[0], *args[3:]))
    assert [gradient.dtype for gradient in gradients] == [torch.float32] * 3
    torch.testing.assert_close(gradients, expected_gradients, rtol=2e-2, atol=3e-1)


@pytest.mark.parametrize("way", WAYS, ids=["lora_linear", "add_lora"])
def test_backward_under_autocast_runs_in_the_dtype_of_the_forward(way):
    args = operands(dtype=torch.float32)
    output = way(*args)
    inputs = (args[0], *args[3:])
    expected = torch.autograd.grad(output.sum(), inputs, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        gradients = torch.autograd.grad(output.sum(), inputs)
    if way is by_adding:  # of which the base layer is PyTorch's own
        gradients, expected = gradients[1:], expected[1:]
    torch.testing.assert_close(gradients, expected)


def test_autocast_does_not_reach_into_what_is_added_to_a_wider_output():
    x, weight, _, *adapter = operands(dtype=torch.float32)
    output = F.linear(x, weight)
    expected = add_lora(output, x, *adapter)
    for is_recording in (True, False):
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(is_recording):
            torch.testing.assert_close(add_lora(output, x, *adapter), expected)


def test_no_copy_of_strided_rows_is_needed_for_right_gradients():
    x, *others = operands((IN, 6))
    torch.testing.assert_close(lora_linear(x.t(), *others), as_modules(x.t(), *others, scaling=1.0))
    assert torch.autograd.gradcheck(lambda x: lora_linear(x.t(), *others), x)


def test_the_output_that_is_added_to_stays():
    x, weight, _, *adapter = operands()
    output = F.linear(x, weight).detach()
    before = output.clone()
    for is_recording in (True, False):
        with torch.set_grad_enabled(is_recording):
            assert not torch.equal(add_lora(output, x, *adapter), output)
    assert torch.equal(output, before)


def test_what_gets_no_gradient_is_refused():
    x, weight, bias, *adapter = operands(bias=True)
    with pytest.raises(ValueError, match="weight: expected a frozen tensor"):
        lora_linear(x, weight.requires_grad_(), bias, *adapter)
    with pytest.raises(ValueError, match="bias: expected a frozen tensor"):
        lora_linear(x, weight.detach(), bias.requires_grad_(), *adapter)
    with torch.no_grad():
        lora_linear(x, weight, bias, *adapter)
    loss = lora_linear(x, weight.detach(), None, *adapter).square().sum()
    gradient = torch.autograd.grad(loss, x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
