"""permuted_rms_norm and permuted_layer_norm: rows read through a permutation, kept rows first, their gradient alone."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inputs import LAYOUTS, make
from tolerances import ATOL, DTYPE_PAIRS, assert_as_exact
from traffic import counted_traffic, needs_the_interpreter

from dropbp_kernels import reference
from dropbp_kernels.measure import saved_bytes
from dropbp_kernels.ops import permuted_layer_norm, permuted_rms_norm
from dropbp_kernels.permutation import draw_permutation, row_shape

raw = torch.ops.dropbp_kernels
KINDS = {"llama": (False, False), "gemma": (False, True), "layer": (True, False)}  # centered, gemma
kinds = pytest.mark.parametrize("kind", KINDS)


def plain(residual, weight, bias, permutation, eps, kind, dtype):
    """The norm of the permuted rows in plain PyTorch, kept and dropped alike."""
    x = residual.reshape(row_shape(residual.shape, len(permutation)))[permutation]
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    weight = weight.to(x.dtype)
    if kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    normalized = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    if kind == "llama":
        normed = weight * normalized.to(dtype)
    else:
        normed = normalized * (1 + weight if kind == "gemma" else weight)
    return (normed if bias is None else normed + bias.to(x.dtype)).to(dtype)


def plain_with_gradients(residual, weight, bias, permutation, grad_kept, grad_residual, eps, kind, dtype):
    """(normed, grad_residual + the norm's, grad_weight, grad_bias)."""
    residual, weight = residual.detach().requires_grad_(), weight.detach().requires_grad_()
    bias = None if bias is None else bias.detach().requires_grad_()
    normed = plain(residual, weight, bias, permutation, eps, kind, dtype)
    inputs = (residual, weight) if bias is None else (residual, weight, bias)
    grads = torch.autograd.grad(normed[: len(grad_kept)], inputs, grad_kept, allow_unused=True)
    return normed.detach(), grad_residual + grads[0], *grads[1:]


def check(residual, weight, bias, permutation, num_kept, grad_kept, grad_residual, eps, kind, dtype):
    """Both raw ops against float64; the rows of dropped samples keep their bits."""
    arguments = eps, *KINDS[kind], dtype
    inputs = residual, weight, bias, permutation, grad_kept, grad_residual
    doubles = [t if t is None or t is permutation else t.double() for t in inputs]
    exact = plain_with_gradients(*doubles, eps, kind, torch.float64)
    expected = plain_with_gradients(*inputs, eps, kind, dtype)

    kept, dropped, rows, mean, rstd = raw.permuted_norm(residual, weight, bias, permutation, num_kept, *arguments)
    assert all(tensor.is_contiguous() for tensor in (kept, dropped, rows, mean, rstd))
    by_rows = residual.reshape(row_shape(residual.shape, len(permutation)))
    assert torch.equal(rows, by_rows[permutation[:num_kept]])
    assert_as_exact(kept, expected[0][:num_kept], exact[0][:num_kept], "kept")
    assert_as_exact(dropped, expected[0][num_kept:], exact[0][num_kept:], "dropped")
    # Which rows are kept changes no value.
    everything = raw.permuted_norm(residual, weight, bias, permutation, 0, *arguments)[1]
    assert torch.equal(everything, torch.cat((kept, dropped)))

    total = grad_residual.clone() if grad_residual.numel() else grad_residual.contiguous()
    saved = rows, weight, mean, rstd, permutation, *KINDS[kind]
    grads = raw.permuted_norm_backward_(total, grad_kept, *saved, True, bias is not None)
    centered = rows.double() - (mean.double().unsqueeze(-1) if kind == "layer" else 0.0)
    normalized = centered * rstd.double().unsqueeze(-1)
    scaled = grad_kept.double() * ((kind == "gemma") + weight.double())
    terms = (scaled, normalized * (scaled * normalized).mean(-1, keepdim=True))
    largest = max([(rstd.unsqueeze(-1) * term).abs().max().item() for term in terms] if rows.numel() else [0.0])
    assert_as_exact(total, expected[1].to(total.dtype), exact[1], "grad_residual", largest)
    untouched = permutation[num_kept:]
    before, after = (t.reshape(by_rows.shape)[untouched] for t in (grad_residual, total))
    assert torch.equal(before, after)
    coarsest = max((residual.dtype, weight.dtype, grad_kept.dtype), key=ATOL.get)
    sums = (grad_kept * normalized).abs(), grad_kept.double().abs()
    names = "grad_weight", "grad_bias"
    for name, actual, summed, *others in zip(names, grads, sums, expected[2:], exact[2:], strict=False):
        magnitude = summed.reshape(-1, len(weight)).sum(0).max().item() if summed.numel() else 0.0
        assert_as_exact(actual, *others, name, magnitude, coarsest)
    # Frozen parameters: the same gradient of the stream, and nothing else.
    again = grad_residual.clone() if grad_residual.numel() else grad_residual.contiguous()
    nothing = raw.permuted_norm_backward_(again, grad_kept, *saved, False, False)
    assert torch.equal(again, total)
    assert [(grad.shape, grad.dtype) for grad in nothing] == [((0,), weight.dtype)] * 2


def problem(shape, residual_dtype, dtype, num_kept, kind, device, permutation=None, layouts=("contiguous",) * 4):
    """Random arguments of `check`."""
    if permutation is None:
        permutation = draw_permutation(shape[0], seed=0, step=0, branch=0, device=device)
    rows = row_shape(shape, len(permutation))
    weight = make((2, shape[-1]), dtype, layouts[1], device)[0]
    return (
        make(shape, residual_dtype, layouts[0], device),
        weight,
        make(shape[-1:], dtype, device=device) if kind == "layer" else None,
        permutation,
        num_kept,
        make((num_kept, *rows[1:]), dtype, layouts[2], device),
        make(shape, residual_dtype, layouts[3], device),
        1e-5,
        kind,
        dtype,
    )


# By hand, RMS: x = (3, 4), mean square 12.5, rstd = sqrt(0.08), n = x * rstd = (0.6, 0.8) * sqrt(2).
# Layer: x = (3, 5), mean 4, variance 1, n = (-1, 1).


@pytest.mark.parametrize("op", [reference.permuted_norm_reference, raw.permuted_norm])
def test_forward_by_hand(op):
    residual = torch.tensor([[3.0, 5.0], [0.0, 0.0], [3.0, 4.0]])
    weight, bias, permutation = torch.tensor([1.0, -2.0]), torch.tensor([10.0, 20.0]), torch.tensor([2, 0, 1])
    root = math.sqrt(2)
    kept, dropped, rows, mean, rstd = op(
        residual, weight, None, permutation, 1, 3.5, False, False, torch.float32
    )  # 12.5 + 3.5 = 16
    torch.testing.assert_close(kept, torch.tensor([[0.75, -2.0]]))
    torch.testing.assert_close(dropped[1], torch.zeros(2))
    assert (rows.tolist(), rstd.tolist(), mean.shape) == ([[3.0, 4.0]], [0.25], (0,))
    kept, *_ = op(residual, weight, None, permutation, 1, 0.0, False, True, torch.float32)
    torch.testing.assert_close(kept, torch.tensor([[1.2 * root, -0.8 * root]]))
    kept, dropped, rows, mean, rstd = op(residual, weight, bias, permutation, 2, 0.0, True, False, torch.float32)
    torch.testing.assert_close(kept[1], torch.tensor([9.0, 18.0]))
    assert (rows[1].tolist(), mean.tolist()[1], rstd.tolist()[1]) == ([3.0, 5.0], 4.0, 1.0)


@pytest.mark.parametrize("op", [reference.permuted_norm_backward__reference, raw.permuted_norm_backward_])
def test_backward_by_hand(op):
    # g = (1, 0), n = (0.6, 0.8) * sqrt(2): mean(g * n) = 0.3 * sqrt(2); gains rstd * (1 - 0.36, -0.48).
    rstd, grad_kept = math.sqrt(0.08), torch.tensor([[1.0, 0.0]])
    weight, permutation = torch.tensor([1.0, -2.0]), torch.tensor([2, 0, 1])
    total = torch.full((3, 2), 10.0)
    saved = torch.tensor([[3.0, 4.0]]), weight, torch.empty(0), torch.tensor([rstd]), permutation
    grad_weight, _ = op(total, grad_kept, *saved, False, False, True, False)
    torch.testing.assert_close(total[2], torch.tensor([10 + 0.64 * rstd, 10 - 0.48 * rstd]))
    assert total[:2].tolist() == [[10.0, 10.0]] * 2
    torch.testing.assert_close(grad_weight, torch.tensor([0.6 * math.sqrt(2), 0.0]))
    # Layer norm of two numbers is a sign: its gradient is zero. n = (-1, 1), g = (1, 0): 1 - 0.5 - 0.5, 0 + 0.5 - 0.5.
    total.zero_()
    saved = torch.tensor([[3.0, 5.0]]), weight, torch.tensor([4.0]), torch.tensor([1.0]), permutation
    grads = op(total, grad_kept, *saved, True, False, True, True)
    torch.testing.assert_close(total, torch.zeros(3, 2))
    assert [grad.tolist() for grad in grads] == [[-1.0, 0.0], [1.0, 0.0]]


@kinds
@pytest.mark.parametrize(("residual_dtype", "dtype"), DTYPE_PAIRS)
# Of three rows the permutation is its own inverse, of four it is not.
@pytest.mark.parametrize("shape", [(3, 63), (4, 2, 130), (1, 1)])
def test_matches_float64(backend, device, poisoned, shape, residual_dtype, dtype, kind):
    for num_kept in {0, (shape[0] + 1) // 2, shape[0]}:
        check(*problem(shape, residual_dtype, dtype, num_kept, kind, device))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_permutation_stride_and_dtype(backend, device, data):
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=2), label="shape")
    shape = (*shape, data.draw(st.integers(1, 70), label="width"))
    num_rows = shape[0] * (shape[1] if len(shape) == 3 and data.draw(st.booleans(), label="tokens") else 1)
    permutation = torch.tensor(data.draw(st.permutations(range(num_rows)), label="permutation"), device=device)
    dtypes = data.draw(st.sampled_from(DTYPE_PAIRS), label="dtypes")
    num_kept = data.draw(st.integers(0, num_rows), label="num_kept")
    layouts = [data.draw(st.sampled_from(LAYOUTS), label="layout") for _ in range(4)]
    kind = data.draw(st.sampled_from(list(KINDS)), label="kind")
    check(*problem(shape, *dtypes, num_kept, kind, device, permutation, layouts))


@kinds
def test_many_rows_and_wide_rows(backend, device, in_chunks, kind):
    """More rows than programs or threads; rows that a Triton program reads in chunks."""
    num_rows = 9 if backend == "triton" else 67
    for shape, dtype in (((num_rows, 33), torch.float32), ((3, 2, 100), torch.bfloat16), ((3, 64), torch.float64)):
        check(*problem(shape, dtype, dtype, shape[0] - 1, kind, device))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 0, 4), (0, 3, 4)])
def test_empty(backend, device, shape):
    residual, weight = torch.zeros(shape, device=device), torch.ones(shape[-1:], device=device)
    permutation = torch.arange(shape[0], device=device)
    num_kept = shape[0] // 2
    kept, dropped, rows, mean, rstd = raw.permuted_norm(
        residual, weight, None, permutation, num_kept, 1e-6, True, False, torch.float32
    )
    assert kept.shape == rows.shape == (num_kept, *shape[1:])
    assert dropped.shape == (shape[0] - num_kept, *shape[1:])
    assert rstd.shape == mean.shape == kept.shape[:-1]
    grads = raw.permuted_norm_backward_(residual, kept, rows, weight, mean, rstd, permutation, True, False, True, True)
    assert all(torch.equal(grad, torch.zeros_like(weight)) for grad in grads)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # NumPy, in the interpreter
@kinds
def test_extreme_values_stay_in_their_rows(backend, device, kind):
    residual = torch.ones(4, 6, device=device)
    residual[0], residual[1, 0], residual[3, ::2] = float("nan"), float("inf"), 1e4
    weight, permutation = torch.ones(6, device=device), torch.tensor([3, 0, 1, 2], device=device)
    kept, dropped, rows, mean, rstd = raw.permuted_norm(
        residual, weight, None, permutation, 1, 1e-6, *KINDS[kind], torch.float32
    )
    assert kept.isfinite().all()
    assert dropped[0].isnan().all()
    assert dropped[1].isnan().any()
    assert dropped[2].isfinite().all()
    grad = residual.clone()
    raw.permuted_norm_backward_(grad, kept, rows, weight, mean, rstd, permutation, *KINDS[kind], False, False)
    assert grad[3].isfinite().all()
    assert torch.equal(grad[:3].nan_to_num(), residual[:3].nan_to_num())
    half = torch.full((1, 6), 6e4, dtype=torch.float16, device=device)  # its square overflows: statistics are float32
    half[0, 0] = -6e4
    outputs = raw.permuted_norm(half, weight.half(), None, permutation[3:] - 2, 1, 1e-6, *KINDS[kind], torch.float16)
    assert outputs[0].isfinite().all()


@needs_the_interpreter
@kinds
def test_traffic_of_the_kernels(kind):
    """Forward: read N, write N + K rows; backward: read 3 K, write K; and what is small next to a row, by name."""
    from dropbp_kernels._triton import permuted_norm as kernels

    num_rows, num_kept, seq_len, width = 6, 2, 3, 40
    arguments = problem((num_rows, seq_len, width), torch.float32, torch.bfloat16, num_kept, kind, "cpu")
    residual, weight, bias, permutation, _, grad_kept, grad_residual, *_ = arguments
    row, narrow_row = residual.nbytes // (num_rows * seq_len), grad_kept.nbytes // (num_kept * seq_len)
    parameters = (2 if kind == "layer" else 1) * narrow_row  # from the cache: every row reads the same
    statistics = 8 if kind == "layer" else 4
    all_rows, kept_rows = num_rows * seq_len, num_kept * seq_len
    with counted_traffic() as forward:
        _, _, rows, mean, rstd = kernels.launch_permuted_norm(
            residual, weight, bias, permutation, num_kept, 1e-5, *KINDS[kind], torch.bfloat16
        )
    assert forward.read == all_rows * (row + parameters + 8)
    assert forward.written == all_rows * narrow_row + kept_rows * (row + statistics)
    with counted_traffic() as backward:
        kernels.launch_permuted_norm_backward_(
            grad_residual, grad_kept, rows, weight, mean, rstd, permutation, *KINDS[kind], False, False
        )
    programs = min(kept_rows, kernels.max_programs(residual.device, 2))
    assert backward.read == kept_rows * (2 * row + narrow_row + statistics + 8) + programs * narrow_row
    assert backward.written == kept_rows * row


# The public functions.


def leaves(dtype=torch.float32, device="cpu", shape=(4, 3, 5)):
    """residual, weight, bias, and a permutation of the samples."""
    parameters = [torch.randn(shape[-1], dtype=dtype, device=device, requires_grad=True) for _ in range(2)]
    permutation = draw_permutation(shape[0], seed=0, step=0, branch=0, device=device)
    return torch.randn(shape, dtype=dtype, device=device, requires_grad=True), *parameters, permutation


def call(kind, residual, weight, bias, permutation, num_kept, **options):
    if kind == "layer":
        return permuted_layer_norm(residual, weight, bias, permutation, num_kept, **options)
    return permuted_rms_norm(residual, weight, permutation, num_kept, casting=kind, **options)


def with_gradients(kind, num_kept, inputs, permutation, grads, function=call):
    """Outputs and gradients of one norm whose residual goes on; grads are those of kept and of the residual."""
    kept, dropped, stream = function(kind, *inputs, permutation, num_kept)
    loss = (stream * grads[1]).sum()
    if num_kept:
        loss = loss + (kept * grads[0]).sum()
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    return kept, dropped, *torch.autograd.grad(loss, wanted, allow_unused=True)


def plain_call(kind, residual, weight, bias, permutation, num_kept):
    eps = 1e-5 if kind == "layer" else 1e-6
    normed = plain(residual, weight, bias if kind == "layer" else None, permutation, eps, kind, residual.dtype)
    return normed[:num_kept], normed[num_kept:].detach(), residual


@kinds
@pytest.mark.parametrize("num_kept", [0, 2, 4])
@pytest.mark.parametrize("index", [torch.int64, torch.int32])
def test_gradients(backend, device, num_kept, kind, index):
    *inputs, permutation = leaves(device=device)
    grads = torch.randn(num_kept, 3, 5, device=device), torch.randn(4, 3, 5, device=device)
    actual = with_gradients(kind, num_kept, inputs, permutation.to(index), grads)
    expected = with_gradients(kind, num_kept, inputs, permutation, grads, plain_call)
    torch.testing.assert_close(actual, expected)


def test_agrees_with_torch(backend, device):
    residual, weight, bias, permutation = (tensor.detach() for tensor in leaves(device=device))
    kept, dropped, _ = permuted_layer_norm(residual, weight, bias, permutation, 3, eps=1e-3)
    expected = F.layer_norm(residual[permutation], (5,), weight, bias, 1e-3)
    torch.testing.assert_close(torch.cat((kept, dropped)), expected)
    kept, dropped, _ = permuted_rms_norm(residual, weight, permutation, 3, eps=1e-3)
    torch.testing.assert_close(torch.cat((kept, dropped)), F.rms_norm(residual[permutation], (5,), weight, 1e-3))


def test_dropped_rows_and_no_grad_record_nothing(backend, device):
    residual, weight, _, permutation = leaves(device=device)
    kept, dropped, stream = permuted_rms_norm(residual, weight, permutation, 2)
    assert (kept.requires_grad, dropped.requires_grad, stream.requires_grad) == (True, False, True)
    kept, _, stream = permuted_rms_norm(residual, weight, permutation, 0)
    assert not kept.requires_grad
    assert stream is residual
    with torch.no_grad():
        kept, dropped, stream = permuted_rms_norm(residual, weight, permutation, 2)
    assert [tensor.requires_grad for tensor in (kept, dropped)] == [False, False]
    # A frozen stream stays one, though the weight is trained.
    kept, _, stream = permuted_rms_norm(residual.detach(), weight, permutation, 2)
    assert kept.requires_grad
    assert not stream.requires_grad
    kept.sum().backward()
    assert weight.grad is not None


@kinds
def test_saves_the_kept_rows_alone(backend, device, kind):
    residual, weight, bias, permutation = leaves(device=device)
    weight, bias = torch.nn.Parameter(weight.detach()), torch.nn.Parameter(bias.detach())
    for num_kept in (1, 3):
        with saved_bytes() as saved:
            kept, *_ = call(kind, residual * 1, weight, bias, permutation, num_kept)
        statistics = (2 if kind == "layer" else 1) * kept[..., 0].numel() * 4
        assert saved.num_bytes == kept.nbytes + statistics + permutation.nbytes
    with saved_bytes() as saved:
        call(kind, residual * 1, weight, bias, permutation, 0)
    assert saved.num_tensors == 0


def test_mixed_dtypes(backend, device):
    residual, weight, _, permutation = leaves(device=device)
    kept, dropped, stream = permuted_rms_norm(residual, weight, permutation, 2, dtype=torch.bfloat16)
    assert (kept.dtype, dropped.dtype, stream.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    grads = torch.autograd.grad(kept.float().square().sum(), (residual, weight))
    assert [grad.dtype for grad in grads] == [torch.float32, torch.float32]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"permutation": torch.arange(3)}, ValueError, r"permutation: expected shape \(N,\), N = 4 or 12 for"),
        (
            {"permutation": torch.arange(4.0)},
            TypeError,
            "permutation: expected dtype int64 or int32, got torch.float32",
        ),
        ({"permutation": torch.arange(4, device="meta")}, ValueError, "permutation: expected on residual's device cpu"),
        ({"num_kept": 5}, ValueError, "num_kept: expected 0 to 4, got 5"),
        ({"num_kept": -1}, ValueError, "num_kept: expected 0 to 4, got -1"),
        ({"num_kept": torch.tensor(1)}, TypeError, "num_kept: expected an int of the host, got a tensor"),
        ({"weight": torch.ones(4)}, ValueError, r"weight: expected shape \(5,\), got \(4,\)"),
        ({"weight": torch.ones(5).int()}, TypeError, "weight: expected dtype float32"),
        ({"weight": torch.ones(5, device="meta")}, ValueError, "weight: expected on residual's device cpu, got meta"),
        ({"residual": torch.ones(4, 3, 5).int()}, TypeError, "residual: expected dtype float32"),
        ({"dtype": torch.float64}, TypeError, "dtype: expected one that residual's torch.float32 holds"),
        ({"casting": "phi"}, ValueError, "casting: expected one of llama, gemma, got 'phi'"),
    ],
)
def test_wrong_arguments(change, error, message):
    residual, weight, _, permutation = leaves()
    arguments = {"residual": residual, "weight": weight, "permutation": permutation, "num_kept": 2}
    with pytest.raises(error, match=message):
        permuted_rms_norm(**(arguments | change))


@pytest.mark.parametrize(
    ("bias", "error", "message"),
    [
        (torch.ones(4), ValueError, r"bias: expected weight's shape \(5,\), got \(4,\)"),
        (torch.ones(5).half(), TypeError, "bias: expected weight's dtype torch.float32, got torch.float16"),
        (torch.ones(5, device="meta"), ValueError, "bias: expected on weight's device cpu, got meta"),
    ],
)
def test_wrong_bias(bias, error, message):
    residual, weight, _, permutation = leaves()
    with pytest.raises(error, match=message):
        permuted_layer_norm(residual, weight, bias, permutation, 2)


@pytest.mark.parametrize("entries", [[0, 1, 2, 4], [0, -1, 2, 3]])
def test_entries_out_of_range(backend, device, entries):
    if backend == "cuda":
        pytest.skip("a wrong index stops the program: test_on_gpu.py")
    residual, weight, _, _ = leaves(device=device)
    permutation = torch.tensor(entries, device=device)
    arguments = residual.detach(), weight.detach(), None, permutation, 4, 1e-6, False, False, torch.float32
    if backend == "triton":  # a GPU cannot raise: such a row is skipped and nothing is written outside
        kept, _, rows, mean, rstd = raw.permuted_norm(*arguments)
        grad = torch.zeros_like(residual)
        raw.permuted_norm_backward_(
            grad, kept, rows, weight.detach(), mean, rstd, permutation, False, False, False, False
        )
        assert kept.isfinite().all()
    else:
        with pytest.raises(IndexError, match="permutation: expected each number from 0 to 3 once"):
            raw.permuted_norm(*arguments)
