"""gated_residual_layer_norm: add and normalise at the boundary of two branches, in the four states of who is kept."""

import math

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inputs import LAYOUTS, make
from tolerances import ATOL, DTYPE_PAIRS, assert_as_exact
from torch.utils._python_dispatch import TorchDispatchMode

from dropbp_kernels import reference
from dropbp_kernels.measure import num_autograd_nodes, saved_bytes
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


def test_norm_reads_the_rounded_sum(backend, device):
    residual = torch.tensor([[1.0, 3.0]], dtype=torch.bfloat16, device=device)
    branch = torch.tensor([[2.0**-9, 0.0]], dtype=torch.bfloat16, device=device)  # lost in the sum's rounding
    weight = torch.ones(2, dtype=torch.bfloat16, device=device)
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
    for shape, dtype in (((67, 33), torch.float32), ((13, 100), torch.bfloat16), ((3, 64), torch.float64)):
        tensors = [make(shape, dtype, device=device) for _ in range(4)]
        weight, bias = (make(shape[-1:], dtype, device=device) for _ in range(2))
        check(*tensors[:2], weight, bias, *tensors[2:])


@pytest.mark.parametrize("width", [65536, 65535])
def test_widest_rows(backend, device, width):
    tensors = [make((3, width), torch.bfloat16, device=device) for _ in range(4)]
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


def test_repeats_bit_for_bit(backend, device):
    tensors = [make((97, 130), torch.bfloat16, device=device) for _ in range(4)]
    weight, bias = (make((130,), torch.bfloat16, device=device) for _ in range(2))
    runs = []
    for _ in range(3):
        normed, new_residual, *statistics = raw.gated_residual_layer_norm(*tensors[:2], weight, bias, 1e-5)
        saved = new_residual, weight, *statistics
        grads = raw.gated_residual_layer_norm_backward(*tensors[2:], *saved, True, True)
        runs.append((normed, new_residual, *statistics, *grads))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_does_not_depend_on_the_number_of_threads():
    tensors = [make((301, 130), torch.float32) for _ in range(4)]
    weight = make((130,), torch.float32)
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            _, new_residual, *statistics = raw.gated_residual_layer_norm(*tensors[:2], weight, None, 1e-5)
            saved = new_residual, weight, *statistics
            runs.append(raw.gated_residual_layer_norm_backward(*tensors[2:], *saved, True, True))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


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


def test_opcheck(backend, device):
    residual, branch = make((3, 2, 5), torch.float32, device=device), make((3, 2, 5), torch.bfloat16, device=device)
    weight, bias = (make((5,), torch.bfloat16, device=device) for _ in range(2))
    strided = residual.transpose(0, 1), branch.transpose(0, 1)
    for first, second, shift in ((residual, branch, bias), (*strided, None), (branch, branch, bias)):
        torch.library.opcheck(raw.gated_residual_layer_norm, (first, second, weight, shift, 1e-5))
    _, new_residual, mean, rstd = raw.gated_residual_layer_norm(residual, branch, weight, bias, 1e-5)
    for wanted in ((False, True), (True, False)):
        arguments = branch, residual, new_residual, weight, mean, rstd, *wanted
        torch.library.opcheck(raw.gated_residual_layer_norm_backward, arguments)
    torch.library.opcheck(
        raw.gated_residual_layer_norm_backward,
        (strided[1], None, strided[0], weight, mean.t(), rstd.t(), True, True),
    )


# The public function.


def leaves(dtype=torch.float32, device="cpu", shape=(3, 2, 5)):
    """residual, branch, weight, bias."""
    tensors = [torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for _ in range(2)]
    return *tensors, *(torch.randn(shape[-1], dtype=dtype, device=device, requires_grad=True) for _ in range(2))


STATES = [(kept, next_kept) for kept in (True, False) for next_kept in (True, False)]


@pytest.mark.parametrize("grad_scale", [1.0, 2.5])
@pytest.mark.parametrize(("is_kept", "next_kept"), STATES)
def test_gradients_in_the_four_states(backend, device, is_kept, next_kept, grad_scale):
    inputs = leaves(device=device)
    residual, branch, weight, bias = inputs
    grads = torch.randn(2, 3, 2, 5, device=device)
    used = branch if is_kept else branch.detach()
    normed, new_residual = gated_residual_layer_norm(
        residual, used, weight, bias, next_kept=next_kept, grad_scale=grad_scale
    )
    assert normed.requires_grad == next_kept
    ((normed * grads[0]).sum() + (new_residual * grads[1]).sum()).backward()
    actual = [tensor.grad for tensor in inputs]

    for tensor in inputs:
        tensor.grad = None
    normed_plain, new_plain = plain(residual, used, weight, bias)
    torch.testing.assert_close((normed, new_residual), (normed_plain, new_plain))
    if not next_kept:
        normed_plain = normed_plain.detach()
    ((normed_plain * grads[0]).sum() + (new_plain * grads[1]).sum()).backward()
    assert (branch.grad is not None) == is_kept
    assert (weight.grad is not None) == (bias.grad is not None) == next_kept
    if is_kept:
        branch.grad *= grad_scale
    torch.testing.assert_close(actual, [tensor.grad for tensor in inputs])


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(("is_kept", "next_kept"), STATES)
def test_gradcheck(backend, device, is_kept, next_kept, has_bias):
    residual, branch, weight, bias = leaves(torch.float64, device, shape=(2, 1, 3))
    inputs = [residual]
    if is_kept:
        inputs.append(branch)
    if next_kept:
        inputs += [weight, bias] if has_bias else [weight]

    def run(*_):
        used = branch if is_kept else branch.detach()
        outputs = gated_residual_layer_norm(residual, used, weight, bias if has_bias else None, next_kept=next_kept)
        return outputs if next_kept else outputs[1]

    torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("next_kept", [True, False])
def test_only_one_output_gets_a_gradient(backend, device, next_kept):
    residual, branch, weight, bias = leaves(device=device)
    normed, new_residual = gated_residual_layer_norm(residual, branch, weight, bias, next_kept=next_kept)
    new_residual.sum().backward(retain_graph=True)
    assert torch.equal(residual.grad, torch.ones_like(residual))
    assert torch.equal(branch.grad, torch.ones_like(residual))
    assert weight.grad is bias.grad is None
    if next_kept:
        (grad,) = torch.autograd.grad(normed.square().sum(), residual)
        (expected,) = torch.autograd.grad(plain(residual, branch, weight, bias)[0].square().sum(), residual)
        torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("is_kept", [True, False])
def test_next_dropped_saves_nothing_and_aliases(backend, device, is_kept):
    residual, branch, weight, bias = leaves(device=device)
    inputs = (residual * 1, (branch * 1) if is_kept else branch.detach(), weight, bias)
    before = num_autograd_nodes(*inputs[:2])
    with saved_bytes() as saved:
        normed, new_residual = gated_residual_layer_norm(*inputs, next_kept=False)
    assert (saved.num_bytes, saved.num_tensors) == (0, 0)
    assert num_autograd_nodes(new_residual) - before == 1
    assert normed.grad_fn is None
    grad = torch.randn_like(residual)
    grads = torch.autograd.grad(new_residual, inputs[: 1 + is_kept], grad)
    assert all(tensor.data_ptr() == grad.data_ptr() for tensor in grads)


def test_next_kept_saves_the_new_residual_and_two_numbers_a_row(backend, device):
    residual, branch, *parameters = leaves(device=device)
    weight, bias = (torch.nn.Parameter(tensor.detach()) for tensor in parameters)
    for is_kept in (True, False):
        with saved_bytes() as saved:
            used = branch if is_kept else branch.detach()
            _, new_residual = gated_residual_layer_norm(residual, used, weight, bias)
        assert saved.num_bytes == new_residual.nbytes + 2 * 4 * new_residual[..., 0].numel()


class _SeeBackward(TorchDispatchMode):
    """Notes which gradients the backward op is asked for."""

    def __init__(self):
        super().__init__()
        self.wanted = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is raw.gated_residual_layer_norm_backward.default:
            self.wanted.append(args[-2:])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("trained", [(True, True), (True, False), (False, True), (False, False)])
def test_a_frozen_weight_or_bias_computes_no_gradient(backend, device, trained):
    residual, branch, *parameters = leaves(device=device)
    weight, bias = (
        tensor.detach().requires_grad_(is_trained) for tensor, is_trained in zip(parameters, trained, strict=True)
    )
    wanted = [tensor for tensor in (residual, branch, weight, bias) if tensor.requires_grad]
    with _SeeBackward() as seen:
        loss = gated_residual_layer_norm(residual, branch, weight, bias)[0].square().sum()
        grads = torch.autograd.grad(loss, wanted)
    assert seen.wanted == [trained]
    torch.testing.assert_close(
        grads, torch.autograd.grad(plain(residual, branch, weight, bias)[0].square().sum(), wanted)
    )


@pytest.mark.parametrize("place", [0, 1])
def test_only_weight_or_bias_is_trained(backend, device, place):
    residual, branch, *parameters = (tensor.detach() for tensor in leaves(device=device))
    parameters[place].requires_grad_()
    normed, _ = gated_residual_layer_norm(residual, branch, *parameters)
    assert not gated_residual_layer_norm(residual, branch, *parameters, next_kept=False)[0].requires_grad
    (grad,) = torch.autograd.grad(normed.square().sum(), parameters[place])
    (expected,) = torch.autograd.grad(plain(residual, branch, *parameters)[0].square().sum(), parameters[place])
    torch.testing.assert_close(grad, expected)


def test_nothing_recorded_without_grad_mode(backend, device):
    with torch.no_grad():
        outputs = gated_residual_layer_norm(*leaves(device=device))
    assert not any(tensor.requires_grad for tensor in outputs)


@pytest.mark.parametrize("next_kept", [True, False])
def test_gradients_share_no_memory_that_is_written(backend, device, next_kept):
    residual, branch, *parameters = leaves(device=device)
    inputs = residual * 1, branch * 1
    seen = [[], []]
    for tensor, grads in zip(inputs, seen, strict=True):
        tensor.register_hook(lambda grad, grads=grads: grads.append(grad.clone()))
    normed, new_residual = gated_residual_layer_norm(*inputs, *parameters, next_kept=next_kept)
    loss = (normed * normed.detach()).sum() + new_residual.square().sum() + (residual + 2 * branch).sum()
    loss.backward(retain_graph=True)
    assert torch.equal(seen[0][0], seen[1][0])
    assert torch.equal(residual.grad, seen[0][0] + 1)
    assert torch.equal(branch.grad, seen[0][0] + 2)
    loss.backward()
    assert torch.equal(seen[0][1], seen[0][0])
    torch.testing.assert_close(residual.grad, 2 * (seen[0][0] + 1))

    residual, branch, *parameters = leaves(device=device)
    gated_residual_layer_norm(residual, branch, *parameters, next_kept=next_kept)[1].sum().backward()
    residual.grad.mul_(0.0)  # as an optimizer or a clipper does
    assert torch.equal(branch.grad, torch.ones_like(branch))


def test_writing_into_a_saved_output_is_caught(backend, device):
    normed, new_residual = gated_residual_layer_norm(*leaves(device=device))
    new_residual.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        normed.sum().backward()


def test_second_derivative_is_refused(backend, device):
    residual, *others = leaves(device=device)
    normed, _ = gated_residual_layer_norm(residual, *others)
    (grad,) = torch.autograd.grad(normed.square().sum(), residual, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_mixed_dtypes(backend, device):
    residual, *others = leaves(device=device)
    branch, weight, bias = (tensor.detach().bfloat16().requires_grad_() for tensor in others)
    for next_kept in (True, False):
        normed, new_residual = gated_residual_layer_norm(residual, branch, weight, bias, next_kept=next_kept)
        assert (normed.dtype, new_residual.dtype) == (torch.bfloat16, torch.float32)
        grads = torch.autograd.grad(normed.sum() + new_residual.sum(), (residual, branch))
        assert [grad.dtype for grad in grads] == [torch.float32, torch.bfloat16]
        assert torch.equal(grads[0].bfloat16(), grads[1])


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(("is_kept", "next_kept"), STATES)
def test_compiles_without_graph_breaks(is_kept, next_kept, has_bias):
    def run(residual, branch, weight, bias):
        with torch.set_grad_enabled(is_kept):
            branch = branch * 2
        normed, new_residual = gated_residual_layer_norm(
            residual.sin(), branch, weight, bias if has_bias else None, next_kept=next_kept, grad_scale=2.0
        )
        return normed.cos() + new_residual

    torch.compiler.reset()
    inputs = leaves()
    trained = True, is_kept, next_kept, next_kept and has_bias
    wanted = [tensor for tensor, is_wanted in zip(inputs, trained, strict=True) if is_wanted]
    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        output = function(*inputs)
        results.append((output, *torch.autograd.grad(output.square().sum(), wanted)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("next_kept", [True, False])
def test_one_graph_serves_every_number_of_rows(next_kept):
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def run(*inputs):
        normed, new_residual = gated_residual_layer_norm(*inputs, next_kept=next_kept)
        return normed + new_residual

    num_compiled = []
    for rows in (2, 3, 7, 16, 100):
        residual, branch, *parameters = leaves(shape=(rows, 5))
        output = run(residual, branch, *parameters)
        num_compiled.append(counter.frame_count)
        (grad,) = torch.autograd.grad(output.square().sum(), branch)
        normed, new_residual = plain(residual, branch, *parameters)
        expected = (normed if next_kept else normed.detach()) + new_residual
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(grad, torch.autograd.grad(expected.square().sum(), branch)[0])
    assert len(set(num_compiled)) == 1  # nothing after the first


def test_inductor_matches_eager():
    inputs = leaves()
    results = []
    for compiles in (False, True):
        torch.compiler.reset()
        function = torch.compile(gated_residual_layer_norm, fullgraph=True) if compiles else gated_residual_layer_norm
        normed, new_residual = function(*inputs)
        results.append((normed, *torch.autograd.grad(normed.square().sum() + new_residual.sum(), inputs)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    ("shapes", "options", "error", "message"),
    [
        (((3, 4), (3, 5), (4,)), {}, ValueError, r"branch: expected residual's shape \(3, 4\), got \(3, 5\)"),
        (((3, 4), (3, 4), (5,)), {}, ValueError, r"weight: expected shape \(4,\), got \(5,\)"),
        (((3, 4), (3, 4), (4,), (5,)), {}, ValueError, r"bias: expected weight's shape \(4,\), got \(5,\)"),
        (((), (), (1,)), {}, ValueError, "weight: expected shape"),
        (((3, 4), (3, 4), (4,)), {"grad_scale": torch.ones(3)}, TypeError, "grad_scale: expected a number, got Tensor"),
    ],
)
def test_wrong_shapes_and_options(shapes, options, error, message):
    with pytest.raises(error, match=message):
        gated_residual_layer_norm(*(torch.randn(shape) for shape in shapes), **options)


def test_wrong_bias():
    residual, branch, weight, bias = leaves()
    with pytest.raises(TypeError, match=r"bias: expected weight's dtype torch.float32, got torch.bfloat16"):
        gated_residual_layer_norm(residual, branch, weight, bias.bfloat16())
    with pytest.raises(ValueError, match="bias: expected on cpu, got meta"):
        gated_residual_layer_norm(residual, branch, weight, bias.to("meta"))
