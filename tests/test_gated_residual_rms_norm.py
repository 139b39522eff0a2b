"""gated_residual_rms_norm: the numbers of add and norm. Who is kept and what is saved: test_boundary_norms.py."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inputs import LAYOUTS, make
from tolerances import ATOL, DTYPE_PAIRS, assert_as_exact

from dropbp_kernels import reference
from dropbp_kernels.ops import gated_residual_rms_norm

raw = torch.ops.dropbp_kernels


def plain(residual, branch, weight, eps, gemma):
    """The op in plain PyTorch, as Llama and Gemma models write it."""
    new_residual = residual + branch
    x = new_residual.to(torch.promote_types(new_residual.dtype, torch.float32))
    normalized = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    if gemma:
        return (normalized * (1 + weight.to(x.dtype))).to(branch.dtype), new_residual
    return (weight * normalized.to(branch.dtype)).to(branch.dtype), new_residual


def plain_with_gradients(residual, branch, weight, grad_normed, grad_new_residual, eps, gemma):
    residual, branch, weight = (tensor.detach().requires_grad_() for tensor in (residual, branch, weight))
    outputs = plain(residual, branch, weight, eps, gemma)
    grads = torch.autograd.grad(outputs, (residual, weight), (grad_normed, grad_new_residual))
    return *(tensor.detach() for tensor in outputs), *grads


def check(residual, branch, weight, grad_normed, grad_new_residual, eps, gemma):
    """Both raw ops against float64."""
    inputs = residual, branch, weight, grad_normed, grad_new_residual
    exact = plain_with_gradients(*(tensor.double() for tensor in inputs), eps, gemma)
    expected = plain_with_gradients(*inputs, eps, gemma)
    normed, new_residual, rstd = raw.gated_residual_rms_norm(residual, branch, weight, eps, gemma)
    backward = raw.gated_residual_rms_norm_backward(
        grad_normed, grad_new_residual, new_residual, weight, rstd, gemma, True
    )
    normalized = exact[1] * rstd.double().unsqueeze(-1)
    scaled = grad_normed.double() * (gemma + weight.double())
    terms = scaled, normalized * (scaled * normalized).mean(-1, keepdim=True)
    magnitudes = {
        "grad_residual": max((rstd.unsqueeze(-1) * term).abs().max().item() for term in terms),
        "grad_weight": (grad_normed * normalized).abs().reshape(-1, len(weight)).sum(0).max().item(),
    }
    coarsest = max((tensor.dtype for tensor in inputs), key=ATOL.get)
    names = "normed", "new_residual", "grad_residual", "grad_weight"
    for name, actual, *others in zip(names, (normed, new_residual, *backward), expected, exact, strict=True):
        assert actual.is_contiguous(), name
        dtype = coarsest if name == "grad_weight" else None
        assert_as_exact(actual, *others, name, magnitudes.get(name, 1.0), dtype)
    frozen, nothing = raw.gated_residual_rms_norm_backward(
        grad_normed, grad_new_residual, new_residual, weight, rstd, gemma, False
    )
    assert torch.equal(frozen, backward[0])
    assert (nothing.shape, nothing.dtype) == ((0,), weight.dtype)


# By hand: x = (3, 4), mean square 12.5, rstd = sqrt(0.08), n = x * rstd = (0.6, 0.8) * sqrt(2).


@pytest.mark.parametrize("op", [reference.gated_residual_rms_norm_reference, raw.gated_residual_rms_norm])
def test_forward_by_hand(op):
    residual, branch = torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 2.0]])
    weight = torch.tensor([1.0, -2.0])
    root = math.sqrt(2)
    for gemma, expected in ((False, [0.6 * root, -1.6 * root]), (True, [1.2 * root, -0.8 * root])):
        normed, new_residual, rstd = op(residual, branch, weight, 0.0, gemma)
        torch.testing.assert_close(normed, torch.tensor([expected]))
        assert new_residual.tolist() == [[3.0, 4.0]]
        torch.testing.assert_close(rstd, torch.tensor([math.sqrt(0.08)]))
    # eps joins the mean square: 12.5 + 3.5 = 16.
    assert op(residual, branch, weight, 3.5, False)[2].tolist() == [0.25]


@pytest.mark.parametrize(
    "op", [reference.gated_residual_rms_norm_backward_reference, raw.gated_residual_rms_norm_backward]
)
def test_backward_by_hand(op):
    # g = (1, 0): mean(g * n) = 0.3 * sqrt(2); grad = rstd * (1 - 0.36, -0.48); weight's gradient g * n.
    rstd = math.sqrt(0.08)
    x, weight = torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, -2.0])
    grad_normed, grad_new = torch.tensor([[1.0, 0.0]]), torch.tensor([[10.0, 20.0]])
    norm = torch.tensor([rstd])
    grad_residual, grad_weight = op(grad_normed, grad_new, x, weight, norm, False, True)
    torch.testing.assert_close(grad_residual, torch.tensor([[10 + 0.64 * rstd, 20 - 0.48 * rstd]]))
    torch.testing.assert_close(grad_weight, torch.tensor([0.6 * math.sqrt(2), 0.0]))
    # Gemma scales by 1 + weight = 2.
    grad_residual, _ = op(grad_normed, None, x, weight, norm, True, False)
    torch.testing.assert_close(grad_residual, torch.tensor([[1.28 * rstd, -0.96 * rstd]]))


@pytest.mark.parametrize(("dtype", "lost"), [(torch.bfloat16, 2**-9), (torch.float16, 2**-12)])  # by rounding
def test_norm_reads_the_rounded_sum(backend, device, dtype, lost):
    residual = torch.tensor([[1.0, 3.0]], dtype=dtype, device=device)
    branch = torch.tensor([[lost, 0.0]], dtype=dtype, device=device)
    weight = torch.ones(2, dtype=dtype, device=device)
    _, new_residual, rstd = raw.gated_residual_rms_norm(residual, branch, weight, 0.0, False)
    assert new_residual.tolist() == [[1.0, 3.0]]
    assert rstd.item() == pytest.approx(1 / math.sqrt(5), rel=1e-6)


def test_llama_rounds_before_the_weight_and_gemma_after(backend, device):
    # Mean square 1. In bfloat16 1.0035 is 1; times the largest number below 2 it is that number, or rounded later, 2.
    residual = torch.tensor([[1.0035, 0.99649]], device=device)
    branch = torch.zeros(1, 2, dtype=torch.bfloat16, device=device)
    weight = torch.full((2,), 1.9921875, dtype=torch.bfloat16, device=device)
    assert raw.gated_residual_rms_norm(residual, branch, weight, 0.0, False)[0][0, 0].item() == 1.9921875
    assert raw.gated_residual_rms_norm(residual, branch, weight - 1, 0.0, True)[0][0, 0].item() == 2.0


@pytest.mark.parametrize("gemma", [False, True])
@pytest.mark.parametrize(("residual_dtype", "branch_dtype"), DTYPE_PAIRS)
@pytest.mark.parametrize("shape", [(3, 63), (2, 5, 1023), (7,), (1, 1, 1), (9, 64)])
def test_matches_float64(backend, device, poisoned, shape, residual_dtype, branch_dtype, gemma):
    residual, branch = make(shape, residual_dtype, device=device), make(shape, branch_dtype, device=device)
    weight = make(shape[-1:], branch_dtype, device=device)
    grads = make(shape, branch_dtype, device=device), make(shape, residual_dtype, device=device)
    check(residual, branch, weight, *grads, 1e-5, gemma)


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
    weight = make((2, shape[-1]), weight_dtype, data.draw(layout, label="layout"), device)[0]
    check(*tensors[:2], weight, *tensors[2:], data.draw(st.sampled_from((1e-6, 1e-3))), data.draw(st.booleans()))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 0, 4)])
def test_empty(backend, device, shape):
    residual, weight = torch.zeros(shape, device=device), torch.ones(shape[-1:], device=device)
    normed, new_residual, rstd = raw.gated_residual_rms_norm(residual, residual, weight, 1e-6, False)
    assert normed.shape == new_residual.shape == shape
    assert rstd.shape == shape[:-1]
    grad, grad_weight = raw.gated_residual_rms_norm_backward(normed, None, residual, weight, rstd, False, True)
    assert grad.shape == shape
    assert torch.equal(grad_weight, torch.zeros_like(weight))


@pytest.mark.parametrize("width", [65536, 65535])
def test_widest_rows(backend, device, width):
    tensors = [make((2 if backend == "triton" else 3, width), torch.bfloat16, device=device) for _ in range(4)]
    check(*tensors[:2], make((width,), torch.bfloat16, device=device), *tensors[2:], 1e-6, False)


def test_many_rows_and_wide_rows(backend, device, in_chunks):
    """More rows than programs or threads; rows that a Triton program reads in chunks."""
    many, some = (9, 5) if backend == "triton" else (23, 13)  # four programs in the interpreter, where each row counts
    for shape, dtype in (((many, 33), torch.float32), ((some, 100), torch.bfloat16), ((3, 64), torch.float64)):
        tensors = [make(shape, dtype, device=device) for _ in range(4)]
        for gemma in (False, True):
            check(*tensors[:2], make(shape[-1:], dtype, device=device), *tensors[2:], 1e-6, gemma)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # NumPy, in the interpreter
@pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning")
def test_extreme_values(backend, device):
    weight = torch.ones(4, device=device)

    def run(row, dtype=torch.float32, eps=1e-6):
        residual = torch.tensor([row], dtype=dtype, device=device)
        zero = torch.zeros_like(residual)
        return raw.gated_residual_rms_norm(residual, zero, weight.to(dtype), eps, False)

    assert run([0.0] * 4)[0].tolist() == [[0.0] * 4]
    # Squares overflow float16 and are far below its smallest number: statistics are float32.
    torch.testing.assert_close(run([6e4] * 4, torch.float16)[0].float(), torch.ones(1, 4, device=device))
    torch.testing.assert_close(run([1e-4] * 4, torch.float16, 0.0)[0].float(), torch.ones(1, 4, device=device))
    # The sum of two finite numbers overflows as PyTorch's does.
    big = torch.full((1, 4), 6e4, dtype=torch.float16, device=device)
    assert raw.gated_residual_rms_norm(big, big, weight.half(), 1e-6, False)[1].isinf().all()
    assert run([1.0, float("nan"), 1.0, 1.0])[0].isnan().all()
    # Rows do not touch each other.
    residual = torch.ones(3, 4, device=device)
    residual[1] = float("nan")
    normed, new_residual, rstd = raw.gated_residual_rms_norm(residual, torch.zeros_like(residual), weight, 1e-6, False)
    grad, _ = raw.gated_residual_rms_norm_backward(normed, None, new_residual, weight, rstd, False, True)
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
    residual[-1] = 3.0
    weight = torch.ones(width, dtype=torch.bfloat16, device="cuda")
    _, new_residual, rstd = raw.gated_residual_rms_norm(residual, torch.zeros_like(residual), weight, 0.5, False)
    assert (new_residual[-1] == 3.0).all()
    assert rstd[-1].item() == pytest.approx(9.5**-0.5, rel=1e-5)
    grad, grad_weight = raw.gated_residual_rms_norm_backward(residual, None, new_residual, weight, rstd, False, True)
    # n = 3 * rstd, g = 3: grad = rstd * (3 - n * 3 * n), weight's gradient 3 * n.
    n = 3 * 9.5**-0.5
    torch.testing.assert_close(
        grad[-1].float(), torch.full((width,), 9.5**-0.5 * (3 - 3 * n * n), device="cuda"), rtol=1e-2, atol=1e-3
    )
    torch.testing.assert_close(grad_weight.float(), torch.full((width,), 3 * n, device="cuda"), rtol=1e-2, atol=0)


def test_agrees_with_torch_rms_norm(backend, device):
    residual, branch, weight = (torch.randn(shape, device=device) for shape in ((3, 2, 5), (3, 2, 5), (5,)))
    normed, _ = gated_residual_rms_norm(residual, branch, weight, eps=1e-3)
    torch.testing.assert_close(normed, torch.nn.functional.rms_norm(residual + branch, (5,), weight, 1e-3))


def test_wrong_casting():
    with pytest.raises(ValueError, match="casting: expected one of llama, gemma, got 'phi'"):
        gated_residual_rms_norm(torch.randn(3, 4), torch.randn(3, 4), torch.randn(4), casting="phi")
