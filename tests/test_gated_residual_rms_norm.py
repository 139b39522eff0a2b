"""gated_residual_rms_norm: add and normalise at the boundary of two branches, in the four states of who is kept."""

import math

import pytest
import torch
import torch._dynamo.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inputs import LAYOUTS, make
from tolerances import ATOL, DTYPE_PAIRS, assert_as_exact

from dropbp_kernels import reference
from dropbp_kernels.measure import num_autograd_nodes, saved_bytes
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


def test_norm_reads_the_rounded_sum(backend, device):
    residual = torch.tensor([[1.0, 3.0]], dtype=torch.bfloat16, device=device)
    branch = torch.tensor([[2.0**-9, 0.0]], dtype=torch.bfloat16, device=device)  # lost in the sum's rounding
    weight = torch.ones(2, dtype=torch.bfloat16, device=device)
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
    tensors = [make((3, width), torch.bfloat16, device=device) for _ in range(4)]
    check(*tensors[:2], make((width,), torch.bfloat16, device=device), *tensors[2:], 1e-6, False)


def test_many_rows_and_wide_rows(backend, device, in_chunks):
    """More rows than programs or threads; rows that a Triton program reads in chunks."""
    for shape, dtype in (((67, 33), torch.float32), ((13, 100), torch.bfloat16), ((3, 64), torch.float64)):
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


def test_repeats_bit_for_bit(backend, device):
    tensors = [make((97, 130), torch.bfloat16, device=device) for _ in range(4)]
    weight = make((130,), torch.bfloat16, device=device)
    runs = []
    for _ in range(3):
        normed, new_residual, rstd = raw.gated_residual_rms_norm(*tensors[:2], weight, 1e-6, False)
        grads = raw.gated_residual_rms_norm_backward(*tensors[2:], new_residual, weight, rstd, False, True)
        runs.append((normed, new_residual, rstd, *grads))
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


def test_opcheck(backend, device):
    residual, branch = make((3, 2, 5), torch.float32, device=device), make((3, 2, 5), torch.bfloat16, device=device)
    weight = make((5,), torch.bfloat16, device=device)
    for gemma in (False, True):
        torch.library.opcheck(raw.gated_residual_rms_norm, (residual, branch, weight, 1e-6, gemma))
    strided = residual.transpose(0, 1), branch.transpose(0, 1)
    torch.library.opcheck(raw.gated_residual_rms_norm, (*strided, weight, 1e-6, False))
    torch.library.opcheck(raw.gated_residual_rms_norm, (branch, branch, weight, 1e-6, False))
    _, new_residual, rstd = raw.gated_residual_rms_norm(residual, branch, weight, 1e-6, False)
    for weight_grad in (False, True):
        arguments = branch, residual, new_residual, weight, rstd, False, weight_grad
        torch.library.opcheck(raw.gated_residual_rms_norm_backward, arguments)
    torch.library.opcheck(
        raw.gated_residual_rms_norm_backward, (strided[1], None, strided[0], weight, rstd.t(), True, True)
    )


# The public function.


def leaves(dtype=torch.float32, device="cpu", shape=(3, 2, 5)):
    tensors = [torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for _ in range(2)]
    return *tensors, torch.randn(shape[-1], dtype=dtype, device=device, requires_grad=True)


STATES = [(kept, next_kept) for kept in (True, False) for next_kept in (True, False)]


@pytest.mark.parametrize("casting", ["llama", "gemma"])
@pytest.mark.parametrize("grad_scale", [1.0, 2.5])
@pytest.mark.parametrize(("is_kept", "next_kept"), STATES)
def test_gradients_in_the_four_states(backend, device, is_kept, next_kept, grad_scale, casting):
    inputs = leaves(device=device)
    residual, branch, weight = inputs
    grads = torch.randn(2, 3, 2, 5, device=device)
    normed, new_residual = gated_residual_rms_norm(
        residual,
        branch if is_kept else branch.detach(),
        weight,
        next_kept=next_kept,
        grad_scale=grad_scale,
        casting=casting,
    )
    assert normed.requires_grad == next_kept
    ((normed * grads[0]).sum() + (new_residual * grads[1]).sum()).backward()
    actual = [tensor.grad for tensor in inputs]

    for tensor in inputs:
        tensor.grad = None
    normed_plain, new_plain = plain(residual, branch if is_kept else branch.detach(), weight, 1e-6, casting == "gemma")
    torch.testing.assert_close((normed, new_residual), (normed_plain, new_plain))
    if not next_kept:
        normed_plain = normed_plain.detach()
    ((normed_plain * grads[0]).sum() + (new_plain * grads[1]).sum()).backward()
    assert (branch.grad is not None) == is_kept
    assert (weight.grad is not None) == next_kept
    if is_kept:
        branch.grad *= grad_scale
    torch.testing.assert_close(actual, [tensor.grad for tensor in inputs])


@pytest.mark.parametrize("casting", ["llama", "gemma"])
@pytest.mark.parametrize(("is_kept", "next_kept"), STATES)
def test_gradcheck(backend, device, is_kept, next_kept, casting):
    residual, branch, weight = leaves(torch.float64, device, shape=(2, 1, 3))
    inputs = [residual]
    if is_kept:
        inputs.append(branch)
    if next_kept:
        inputs.append(weight)

    def run(*_):
        outputs = gated_residual_rms_norm(
            residual, branch if is_kept else branch.detach(), weight, next_kept=next_kept, casting=casting
        )
        return outputs if next_kept else outputs[1]

    torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("next_kept", [True, False])
def test_only_one_output_gets_a_gradient(backend, device, next_kept):
    residual, branch, weight = leaves(device=device)
    normed, new_residual = gated_residual_rms_norm(residual, branch, weight, next_kept=next_kept)
    new_residual.sum().backward(retain_graph=True)
    assert torch.equal(residual.grad, torch.ones_like(residual))
    assert torch.equal(branch.grad, torch.ones_like(residual))
    assert weight.grad is None
    if next_kept:
        (grad,) = torch.autograd.grad(normed.sum(), residual)
        (expected,) = torch.autograd.grad(plain(residual, branch, weight, 1e-6, False)[0].sum(), residual)
        torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("is_kept", [True, False])
def test_next_dropped_saves_nothing_and_aliases(backend, device, is_kept):
    residual, branch, weight = leaves(device=device)
    inputs = (residual * 1, (branch * 1) if is_kept else branch.detach(), weight)
    before = num_autograd_nodes(*inputs[:2])
    with saved_bytes() as saved:
        normed, new_residual = gated_residual_rms_norm(*inputs, next_kept=False)
    assert (saved.num_bytes, saved.num_tensors) == (0, 0)
    assert num_autograd_nodes(new_residual) - before == 1
    assert normed.grad_fn is None
    grad = torch.randn_like(residual)
    grads = torch.autograd.grad(new_residual, inputs[: 1 + is_kept], grad)
    assert all(tensor.data_ptr() == grad.data_ptr() for tensor in grads)


def test_next_kept_saves_the_new_residual_and_rstd(backend, device):
    residual, branch, weight = leaves(device=device)
    weight = torch.nn.Parameter(weight.detach())
    for is_kept in (True, False):
        with saved_bytes() as saved:
            _, new_residual = gated_residual_rms_norm(residual, branch if is_kept else branch.detach(), weight)
        assert saved.num_bytes == new_residual.nbytes + 4 * new_residual[..., 0].numel()


def test_frozen_weight_gets_no_gradient(backend, device):
    residual, branch, weight = leaves(device=device)
    normed, _ = gated_residual_rms_norm(residual, branch, weight.detach())
    normed.square().sum().backward()
    (expected,) = torch.autograd.grad(plain(residual, branch, weight, 1e-6, False)[0].square().sum(), residual)
    torch.testing.assert_close(residual.grad, expected)
    torch.testing.assert_close(branch.grad, expected)


def test_only_the_weight_is_trained(backend, device):
    residual, branch, weight = (tensor.detach() for tensor in leaves(device=device))
    weight.requires_grad_()
    normed, _ = gated_residual_rms_norm(residual, branch, weight)
    assert not gated_residual_rms_norm(residual, branch, weight, next_kept=False)[0].requires_grad
    (grad,) = torch.autograd.grad(normed.sum(), weight)
    (expected,) = torch.autograd.grad(plain(residual, branch, weight, 1e-6, False)[0].sum(), weight)
    torch.testing.assert_close(grad, expected)


def test_nothing_recorded_without_grad_mode(backend, device):
    with torch.no_grad():
        outputs = gated_residual_rms_norm(*leaves(device=device))
    assert not any(tensor.requires_grad for tensor in outputs)


@pytest.mark.parametrize("next_kept", [True, False])
def test_gradients_share_no_memory_that_is_written(backend, device, next_kept):
    residual, branch, weight = leaves(device=device)
    inputs = residual * 1, branch * 1
    seen = [[], []]
    for tensor, grads in zip(inputs, seen, strict=True):
        tensor.register_hook(lambda grad, grads=grads: grads.append(grad.clone()))
    normed, new_residual = gated_residual_rms_norm(*inputs, weight, next_kept=next_kept)
    loss = (normed * normed.detach()).sum() + new_residual.square().sum() + (residual + 2 * branch).sum()
    loss.backward(retain_graph=True)
    assert torch.equal(seen[0][0], seen[1][0])
    assert torch.equal(residual.grad, seen[0][0] + 1)
    assert torch.equal(branch.grad, seen[0][0] + 2)
    loss.backward()
    assert torch.equal(seen[0][1], seen[0][0])
    torch.testing.assert_close(residual.grad, 2 * (seen[0][0] + 1))

    residual, branch, weight = leaves(device=device)
    gated_residual_rms_norm(residual, branch, weight, next_kept=next_kept)[1].sum().backward()
    residual.grad.mul_(0.0)  # as an optimizer or a clipper does
    assert torch.equal(branch.grad, torch.ones_like(branch))


def test_writing_into_a_saved_output_is_caught(backend, device):
    normed, new_residual = gated_residual_rms_norm(*leaves(device=device))
    new_residual.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        normed.sum().backward()


def test_second_derivative_is_refused(backend, device):
    residual, branch, weight = leaves(device=device)
    normed, _ = gated_residual_rms_norm(residual, branch, weight)
    (grad,) = torch.autograd.grad(normed.square().sum(), residual, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_mixed_dtypes(backend, device):
    residual, branch, weight = leaves(device=device)
    branch, weight = (tensor.detach().bfloat16().requires_grad_() for tensor in (branch, weight))
    for next_kept in (True, False):
        normed, new_residual = gated_residual_rms_norm(residual, branch, weight, next_kept=next_kept)
        assert (normed.dtype, new_residual.dtype) == (torch.bfloat16, torch.float32)
        grads = torch.autograd.grad(normed.sum() + new_residual.sum(), (residual, branch))
        assert [grad.dtype for grad in grads] == [torch.float32, torch.bfloat16]
        assert torch.equal(grads[0].bfloat16(), grads[1])


@pytest.mark.parametrize(("is_kept", "next_kept"), STATES)
def test_compiles_without_graph_breaks(is_kept, next_kept):
    def run(residual, branch, weight):
        with torch.set_grad_enabled(is_kept):
            branch = branch * 2
        normed, new_residual = gated_residual_rms_norm(
            residual.sin(), branch, weight, next_kept=next_kept, grad_scale=2.0
        )
        return normed.cos() + new_residual

    torch.compiler.reset()
    inputs = leaves()
    wanted = [tensor for tensor, is_wanted in zip(inputs, (True, is_kept, next_kept), strict=True) if is_wanted]
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
        normed, new_residual = gated_residual_rms_norm(*inputs, next_kept=next_kept)
        return normed + new_residual

    num_compiled = []
    for rows in (2, 3, 7, 16, 100):
        residual, branch, weight = leaves(shape=(rows, 5))
        output = run(residual, branch, weight)
        num_compiled.append(counter.frame_count)
        (grad,) = torch.autograd.grad(output.square().sum(), branch)
        normed, new_residual = plain(residual, branch, weight, 1e-6, False)
        expected = (normed if next_kept else normed.detach()) + new_residual
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(grad, torch.autograd.grad(expected.square().sum(), branch)[0])
    assert len(set(num_compiled)) == 1  # nothing after the first


def test_inductor_matches_eager():
    inputs = leaves()
    results = []
    for compiles in (False, True):
        torch.compiler.reset()
        function = torch.compile(gated_residual_rms_norm, fullgraph=True) if compiles else gated_residual_rms_norm
        normed, new_residual = function(*inputs)
        results.append((normed, *torch.autograd.grad(normed.square().sum() + new_residual.sum(), inputs)))
    torch.testing.assert_close(*results)


def test_agrees_with_torch_rms_norm(backend, device):
    residual, branch, weight = (tensor.detach() for tensor in leaves(device=device))
    normed, _ = gated_residual_rms_norm(residual, branch, weight, eps=1e-3)
    torch.testing.assert_close(normed, torch.nn.functional.rms_norm(residual + branch, (5,), weight, 1e-3))


@pytest.mark.parametrize(
    ("shapes", "options", "error", "message"),
    [
        (((3, 4), (3, 5), (4,)), {}, ValueError, r"branch: expected residual's shape \(3, 4\), got \(3, 5\)"),
        (((3, 4), (3, 4), (5,)), {}, ValueError, r"weight: expected shape \(4,\), got \(5,\)"),
        (((3, 4), (3, 4), (1, 4)), {}, ValueError, r"weight: expected shape \(4,\), got \(1, 4\)"),
        (((), (), (1,)), {}, ValueError, "weight: expected shape"),
        (((3, 4), (3, 4), (4,)), {"grad_scale": torch.ones(3)}, TypeError, "grad_scale: expected a number, got Tensor"),
        (((3, 4), (3, 4), (4,)), {"casting": "phi"}, ValueError, "casting: expected one of llama, gemma, got 'phi'"),
    ],
)
def test_wrong_shapes_and_options(shapes, options, error, message):
    with pytest.raises(error, match=message):
        gated_residual_rms_norm(*(torch.randn(shape) for shape in shapes), **options)


@pytest.mark.parametrize(
    ("dtypes", "message"),
    [
        (
            (torch.bfloat16, torch.float32, torch.float32),
            "residual: expected a dtype that holds branch's torch.float32",
        ),
        ((torch.int32, torch.int32, torch.float32), "residual: expected dtype"),
        ((torch.float32, torch.int32, torch.float32), "branch: expected dtype"),
        ((torch.float32, torch.float32, torch.int32), "weight: expected dtype"),
    ],
)
def test_wrong_dtypes(dtypes, message):
    shapes = (2, 3), (2, 3), (3,)
    with pytest.raises(TypeError, match=message):
        gated_residual_rms_norm(*(torch.zeros(s, dtype=dtype) for s, dtype in zip(shapes, dtypes, strict=True)))


def test_wrong_device():
    residual, branch, weight = leaves()
    with pytest.raises(ValueError, match="branch, weight: expected on cpu, got cpu, meta"):
        gated_residual_rms_norm(residual, branch, weight.to("meta"))
