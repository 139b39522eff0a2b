"""gated_residual_layer_norm: the numbers of add and norm. Who is kept and what is saved: test_boundary_norms.py."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inputs import LAYOUTS, make
from tolerances import ATOL, DTYPE_PAIRS, assert_as_exact

from dropbp_kernels import reference
from dropbp_kernels.ops import gated_residual_layer_norm

raw = torch.ops.dropbp_kernels


def plain(residual, branch, weight, bias, eps=1e-5):
    """The op in plain PyTorch, in the arithmetic's dtype, rounded once."""
    new_residual = residual + branch
    x = new_residual.to(torch.promote_types(new_residual.dtype, torch.float32))
    bias = None if bias is None else bias.to(x.dtype)
    return F.layer_norm(x, weight.shape, weight.to(x.dtype), bias, eps).to(branch.dtype), new_residual


def plain_with_gradients(residual, branch, weight, bias, grad_normed, grad_new_residual, eps):
    inputs = [tensor.detach().requires_grad_() for tensor in (residual, branch, weight, bias)]
    outputs = plain(*inputs, eps)
    grads = torch.autograd.grad(outputs, (inputs[0], *inputs[2:]), (grad_normed, grad_new_residual))
    return *(tensor.detach() for tensor in outputs), *grads


def magnitudes(x, weight, mean, rstd, grad_normed):
    """Sizes of the terms that cancel, all in float64: a large mean in n, large parts of the gradient in their rest."""
    mean, rstd = mean.double().unsqueeze(-1), rstd.double().unsqueeze(-1)
    normalized = ((x - mean) * rstd).abs() + (mean * rstd).abs()
    scaled = (grad_normed * weight).abs()
    grad = rstd * (scaled + scaled.mean(-1, keepdim=True) + normalized * (scaled * normalized).mean(-1, keepdim=True))
    columns = (grad_normed.abs() * normalized).reshape(-1, len(weight)).sum(0)
    biases = grad_normed.abs().reshape(-1, len(weight)).sum(0)
    largest = ((normalized * weight.abs()).max(), torch.ones(()), grad.max(), columns.max(), biases.max())
    return [value.item() for value in largest]


def check(residual, branch, weight, bias, grad_normed, grad_new_residual, eps=1e-5):
    """Both raw ops against float64."""
    inputs = residual, branch, weight, bias, grad_normed, grad_new_residual
    exact = plain_with_gradients(*(tensor.double() for tensor in inputs), eps)
    expected = plain_with_gradients(*inputs, eps)
    normed, new_residual, mean, rstd = raw.gated_residual_layer_norm(residual, branch, weight, bias, eps)
    saved = new_residual, weight, mean, rstd
    backward = raw.gated_residual_layer_norm_backward(grad_normed, grad_new_residual, *saved, True, True)
    sizes = magnitudes(exact[1], weight.double(), mean, rstd, grad_normed.double())
    coarsest = max((tensor.dtype for tensor in inputs), key=ATOL.get)
    names = "normed", "new_residual", "grad_residual", "grad_weight", "grad_bias"
    actual = normed, new_residual, *backward
    for name, ours, others, theirs, size in zip(names, actual, expected, exact, sizes, strict=True):
        assert ours.is_contiguous(), name
        dtype = coarsest if name in ("grad_weight", "grad_bias") else None
        assert_as_exact(ours, others, theirs, name, size, dtype)
    without = raw.gated_residual_layer_norm(residual, branch, weight, None, eps)
    zero = raw.gated_residual_layer_norm(residual, branch, weight, torch.zeros_like(bias), eps)
    assert all(torch.equal(a, b) for a, b in zip(without, zero, strict=True))
    for wanted in ((False, False), (True, False), (False, True)):
        grads = raw.gated_residual_layer_norm_backward(grad_normed, grad_new_residual, *saved, *wanted)
        assert torch.equal(grads[0], backward[0])
        for is_wanted, grad, full in zip(wanted, grads[1:], backward[1:], strict=True):
            assert grad.dtype == weight.dtype
            assert torch.equal(grad, full) if is_wanted else grad.shape == (0,)


# By hand: x = (1, 3, 5, 7), mean 4, squares around it 20, variance 5; with eps 4 rstd = 1/3 and n = (-1, -1/3, 1/3, 1).


@pytest.mark.parametrize("op", [reference.gated_residual_layer_norm_reference, raw.gated_residual_layer_norm])
def test_forward_by_hand(op):
    residual, branch = torch.tensor([[1.0, 1.0, 2.0, 7.0]]), torch.tensor([[0.0, 2.0, 3.0, 0.0]])
    weight, bias = torch.tensor([1.0, 3.0, -3.0, 2.0]), torch.tensor([0.0, 1.0, 0.5, -1.0])
    normed, new_residual, mean, rstd = op(residual, branch, weight, bias, 4.0)
    torch.testing.assert_close(normed, torch.tensor([[-1.0, 0.0, -0.5, 1.0]]))
    assert new_residual.tolist() == [[1.0, 3.0, 5.0, 7.0]]
    assert mean.tolist() == [4.0]
    torch.testing.assert_close(rstd, torch.tensor([1 / 3]))
    normed, *_, rstd = op(residual, branch, weight, None, 0.0)
    torch.testing.assert_close(rstd, torch.tensor([1 / math.sqrt(5)]))
    torch.testing.assert_close(normed, torch.tensor([[-3.0, -3.0, -3.0, 6.0]]) / math.sqrt(5))


@pytest.mark.parametrize(
    "op", [reference.gated_residual_layer_norm_backward_reference, raw.gated_residual_layer_norm_backward]
)
def test_backward_by_hand(op):
    # g = (3, 0, 0, 0): mean 0.75, mean(g * n) = -0.75; grad = (g - 0.75 + 0.75 n) / 3.
    x, weight = torch.tensor([[1.0, 3.0, 5.0, 7.0]]), torch.tensor([1.5, 3.0, -3.0, 2.0])
    grad_normed, grad_new = torch.tensor([[2.0, 0.0, 0.0, 0.0]]), torch.tensor([[10.0, 20.0, 30.0, 40.0]])
    statistics = torch.tensor([4.0]), torch.tensor([1 / 3])
    grad_residual, grad_weight, grad_bias = op(grad_normed, grad_new, x, weight, *statistics, True, True)
    torch.testing.assert_close(grad_residual, torch.tensor([[10.5, 20 - 1 / 3, 30 - 1 / 6, 40.0]]))
    torch.testing.assert_close(grad_weight, torch.tensor([-2.0, 0.0, 0.0, 0.0]))
    torch.testing.assert_close(grad_bias, torch.tensor([2.0, 0.0, 0.0, 0.0]))
    grad_residual, grad_weight, grad_bias = op(grad_normed, None, x, weight, *statistics, False, False)
    torch.testing.assert_close(grad_residual, torch.tensor([[0.5, -1 / 3, -1 / 6, 0.0]]))
    assert grad_weight.shape == grad_bias.shape == (0,)


@pytest.mark.parametrize(("dtype", "lost"), [(torch.bfloat16, 2**-9), (torch.float16, 2**-12)])  # by rounding
def test_norm_reads_the_rounded_sum(backend, device, dtype, lost):
    residual = torch.tensor([[1.0, 3.0]], dtype=dtype, device=device)
    branch = torch.tensor([[lost, 0.0]], dtype=dtype, device=device)
    weight = torch.ones(2, dtype=dtype, device=device)
    _, new_residual, mean, rstd = raw.gated_residual_layer_norm(residual, branch, weight, None, 3.0)
    assert new_residual.tolist() == [[1.0, 3.0]]
    assert (mean.item(), rstd.item()) == (2.0, 0.5)


def test_rounds_once_after_the_bias(backend, device):
    # n = (1, -1). In bfloat16 1.0078125 + 0.00390625 lies halfway to its neighbour; the product alone is not rounded.
    residual = torch.tensor([[1.0, -1.0]], device=device)
    branch = torch.zeros(1, 2, dtype=torch.bfloat16, device=device)
    weight = torch.tensor([1.0 + 2**-8 + 2**-10, 1.0], device=device)
    bias = torch.tensor([2**-8, 0.0], device=device)
    normed = raw.gated_residual_layer_norm(residual, branch, weight, bias, 0.0)[0]
    assert normed[0, 0].item() == 1.0078125  # product rounded first: 1.0078125 + 0.00390625 = 1.015625


@pytest.mark.parametrize(("residual_dtype", "branch_dtype"), DTYPE_PAIRS)
@pytest.mark.parametrize("shape", [(3, 63), (2, 5, 1023), (7,), (1, 1, 1), (9, 64)])
def test_matches_float64(backend, device, poisoned, shape, residual_dtype, branch_dtype):
    residual, branch = make(shape, residual_dtype, device=device), make(shape, branch_dtype, device=device)
    weight, bias = (make(shape[-1:], branch_dtype, device=device) for _ in range(2))
    grads = make(shape, branch_dtype, device=device), make(shape, residual_dtype, device=device)
    check(residual, branch, weight, bias, *grads)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape_stride_and_dtype(backend, device, data):
    shape = data.draw(st.lists(st.integers(1, 6), min_size=0, max_size=2), label="shape")
    shape = (*shape, data.draw(st.integers(1, 70), label="width"))
    residual_dtype, branch_dtype = data.draw(st.sampled_from(DTYPE_PAIRS), label="dtypes")
    dtypes = residual_dtype, branch_dtype, branch_dtype, residual_dtype
    layout = st.sampled_from(LAYOUTS)
    tensors = [make(shape, dtype, data.draw(layout, label="layout"), device) for dtype in dtypes]
    weight_dtype = data.draw(st.sampled_from((torch.float32, branch_dtype)), label="weight dtype")
    weight, bias = (make((2, shape[-1]), weight_dtype, data.draw(layout), device)[0] for _ in range(2))
    check(*tensors[:2], weight, bias, *tensors[2:], data.draw(st.sampled_from((1e-5, 1e-3))))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 0, 4)])
def test_empty(backend, device, shape):
    residual, weight = torch.zeros(shape, device=device), torch.ones(shape[-1:], device=device)
    normed, new_residual, mean, rstd = raw.gated_residual_layer_norm(residual, residual, weight, weight, 1e-5)
    assert normed.shape == new_residual.shape == shape
    assert mean.shape == rstd.shape == shape[:-1]
    assert mean.tolist() == torch.zeros(shape[:-1]).tolist()
    grad, *grads = raw.gated_residual_layer_norm_backward(normed, None, residual, weight, mean, rstd, True, True)
    assert grad.shape == shape
    assert all(torch.equal(tensor, torch.zeros_like(weight)) for tensor in grads)


def test_many_rows_and_wide_rows(backend, device, in_chunks):
    """More rows than programs or threads; rows that a Triton program reads in chunks."""
    many, some = (9, 5) if backend == "triton" else (23, 13)  # four programs in the interpreter, where each row counts
    for shape, dtype in (((many, 33), torch.float32), ((some, 100), torch.bfloat16), ((3, 64), torch.float64)):
        tensors = [make(shape, dtype, device=device) for _ in range(4)]
        weight, bias = (make(shape[-1:], dtype, device=device) for _ in range(2))
        check(*tensors[:2], weight, bias, *tensors[2:])


@pytest.mark.parametrize("width", [65536, 65535])
def test_widest_rows(backend, device, width):
    tensors = [make((2 if backend == "triton" else 3, width), torch.bfloat16, device=device) for _ in range(4)]
    weight, bias = (make((width,), torch.bfloat16, device=device) for _ in range(2))
    check(*tensors[:2], weight, bias, *tensors[2:])


@pytest.mark.parametrize("width", [64, 1000])
def test_large_mean_does_not_cost_the_variance(backend, device, in_chunks, width):
    """Squares of 4096 leave a float32 no digit for a variance of 1."""
    residual = 4096 + torch.randn(4, width, dtype=torch.float64, device=device).float()
    weight = torch.ones(width, device=device)
    normed, new_residual, mean, rstd = raw.gated_residual_layer_norm(
        residual, torch.zeros_like(residual), weight, None, 0.0
    )
    exact = new_residual.double()
    torch.testing.assert_close(mean.double(), exact.mean(-1), rtol=1e-6, atol=0)
    torch.testing.assert_close(rstd.double(), exact.var(-1, correction=0).rsqrt(), rtol=1e-4, atol=0)
    torch.testing.assert_close(normed.double(), F.layer_norm(exact, (width,), eps=0.0), rtol=0, atol=2e-3)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # NumPy, in the interpreter
@pytest.mark.parametrize("width", [70, 1000])
def test_what_is_behind_a_row_reaches_no_gradient(backend, device, in_chunks, width):
    """There x is zero for a kernel, and (x - mean) * rstd infinite, times a gradient of zero."""
    x, ones = torch.full((3, width), 2e36, device=device), torch.ones(3, device=device)
    arguments = torch.randn_like(x), None, x, torch.ones(width, device=device), 2e36 * ones, 300 * ones, True, True
    results = raw.gated_residual_layer_norm_backward(*arguments)
    for ours, theirs in zip(results, reference.gated_residual_layer_norm_backward_reference(*arguments), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-2)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # NumPy, in the interpreter
@pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning")
def test_extreme_values(backend, device):
    weight = torch.ones(4, device=device)

    def run(row, dtype=torch.float32, eps=1e-5):
        residual = torch.tensor([row], dtype=dtype, device=device)
        zero = torch.zeros_like(residual)
        return raw.gated_residual_layer_norm(residual, zero, weight.to(dtype), None, eps)

    assert run([3.0] * 4)[0].tolist() == [[0.0] * 4]
    # Squares overflow float16 and are far below its smallest number: statistics are float32.
    signs = torch.tensor([[1.0, -1.0, 1.0, -1.0]], device=device)
    torch.testing.assert_close(run([6e4, -6e4, 6e4, -6e4], torch.float16)[0].float(), signs)
    torch.testing.assert_close(run([1e-4, -1e-4, 1e-4, -1e-4], torch.float16, 0.0)[0].float(), signs)
    # The sum of two finite numbers overflows as PyTorch's does.
    big = torch.full((1, 4), 6e4, dtype=torch.float16, device=device)
    assert raw.gated_residual_layer_norm(big, big, weight.half(), None, 1e-5)[1].isinf().all()
    assert run([1.0, float("nan"), 1.0, 1.0])[0].isnan().all()
    # Rows do not touch each other.
    residual = torch.randn(3, 4, device=device)
    residual[1] = float("inf")
    normed, new_residual, mean, rstd = raw.gated_residual_layer_norm(
        residual, torch.zeros_like(residual), weight, None, 1e-5
    )
    grad, *_ = raw.gated_residual_layer_norm_backward(normed, None, new_residual, weight, mean, rstd, True, True)
    assert normed[[0, 2]].isfinite().all()
    assert grad[[0, 2]].isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", ["triton", "cuda"], indirect=True)
def test_indices_beyond_2_31(backend):
    if torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("needs 40 GB of GPU memory")
    width = 8192
    residual = torch.zeros(2**18 + 1, width, dtype=torch.bfloat16, device="cuda")
    residual[-1, ::2], residual[-1, 1::2] = 2.0, 4.0
    weight = torch.ones(width, dtype=torch.bfloat16, device="cuda")
    normed, new_residual, mean, rstd = raw.gated_residual_layer_norm(
        residual, torch.zeros_like(residual), weight, None, 3.0
    )
    assert torch.equal(new_residual[-1], residual[-1])
    assert (mean[-1].item(), rstd[-1].item()) == (3.0, 0.5)
    assert normed[-1, :2].tolist() == [-0.5, 0.5]
    saved = new_residual, weight, mean, rstd
    grad, grad_weight, grad_bias = raw.gated_residual_layer_norm_backward(residual, None, *saved, True, True)
    # g = (2, 4): mean 3, mean(g * n) = 0.5; grad = 0.5 * (g - 3 - 0.5 n) = (-0.375, 0.375).
    assert grad[-1, :2].tolist() == [-0.375, 0.375]
    assert grad_weight[:2].tolist() == [-1.0, 2.0]
    assert grad_bias[:2].tolist() == [2.0, 4.0]


def test_wrong_bias():
    residual, weight, bias = torch.randn(3, 4), torch.randn(4), torch.randn(4)
    with pytest.raises(ValueError, match=r"bias: expected weight's shape \(4,\), got \(5,\)"):
        gated_residual_layer_norm(residual, residual, weight, torch.randn(5))
    with pytest.raises(TypeError, match=r"bias: expected weight's dtype torch.float32, got torch.bfloat16"):
        gated_residual_layer_norm(residual, residual, weight, bias.bfloat16())
    with pytest.raises(ValueError, match="bias: expected on weight's device cpu, got meta"):
        gated_residual_layer_norm(residual, residual, weight, bias.to("meta"))
