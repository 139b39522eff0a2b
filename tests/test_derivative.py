"""A second derivative of what has none is an error wherever it is taken, and never a zero."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from dropbp_kernels import DropBP, ops
from dropbp_kernels.plan import as_entry


def hessian_product(function, *inputs):
    """Through torch.autograd.grad twice, which runs only what lies between the loss and the inputs."""
    grads = torch.autograd.grad(function(*inputs), inputs, create_graph=True)
    return torch.autograd.grad(sum(grad.pow(2).sum() for grad in grads), inputs, allow_unused=True)


def two(*shape):
    return [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for _ in range(2)]


@pytest.mark.parametrize("power", [1, 2])
def test_hessian_products_are_refused(power):
    """Behind a sum the gradients that arrive need none themselves."""
    with pytest.raises(RuntimeError, match="no second derivative"):
        hessian_product(lambda gate, up: ops.swiglu(gate, up).pow(power).sum(), *two(3, 4))


def test_a_transform_of_torch_func_is_refused_in_words():
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda gate: ops.swiglu(gate, gate).sum())(torch.randn(3, 4))


def test_what_is_linear_has_constant_gradients():
    index = torch.tensor([2, 0])
    (x, y) = two(3, 4)
    ours = hessian_product(lambda x, y: (ops.partial_gather(x, index) + x[:, :2].sin() * y[:, :2]).sum(), x, y)
    plain = hessian_product(lambda x, y: (x[:, index] + x[:, :2].sin() * y[:, :2]).sum(), x, y)
    torch.testing.assert_close(ours, plain)


def test_a_plan_by_rows_is_refused():
    gate = DropBP()
    gate.kept = as_entry(torch.tensor([True, False, True]))
    weight = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    stream = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        hessian_product(lambda x, w: gate(x, lambda rows: (rows @ w).tanh()).pow(3).sum(), stream, weight)


def test_a_checkpoint_is_computed_again_for_one_reader():
    def loss(gate, up):
        product = checkpoint(lambda gate, up: ops.swiglu(gate.sin(), up), gate, up, use_reentrant=False)
        return product.pow(2).sum()

    inputs = two(3, 4)
    first = torch.autograd.grad(loss(*inputs), inputs)
    torch.testing.assert_close(torch.autograd.grad(loss(*inputs), inputs, create_graph=True), first)
    with pytest.raises(RuntimeError, match="no second derivative"):
        hessian_product(loss, *inputs)
