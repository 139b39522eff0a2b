"""linear_cross_entropy against F.cross_entropy of the whole logits, and what it holds in memory."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from dropbp_kernels import losses
from dropbp_kernels.losses import linear_cross_entropy
from dropbp_kernels.measure import PeakLiveBytes

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture
def small_slices(monkeypatch):
    """Three rows at a time, so that small inputs have several slices and a last one that is not full."""
    monkeypatch.setattr(losses, "rows_of_slice", lambda num_classes: 3)


def inputs(num_rows=10, width=6, num_classes=11, dtype=torch.float64, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_rows, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(num_classes, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    offset = torch.randn(num_classes, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    target = torch.randint(num_classes, (num_rows,), generator=generator)
    return hidden, weight, target, offset if bias else None


def whole(hidden, weight, target, bias=None, scale=1.0, softcap=None, **options):
    logits = F.linear(hidden, weight, bias) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), target, **options)


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, [tensor for tensor in tensors if tensor is not None])


@pytest.mark.usefixtures("small_slices")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.3, None), (1.0, 2.0), (1.7, 3.0)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_and_gradients_in_float64(reduction, scale, softcap, bias):
    hidden, weight, target, offset = inputs(bias=bias)
    target[4] = target[7] = -100
    options = {"reduction": reduction, "scale": scale, "softcap": softcap}
    ours = linear_cross_entropy(hidden, weight, target, offset, **options)
    expected = whole(hidden, weight, target, offset, **options)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    grads = zip(
        gradients(3 * ours, hidden, weight, offset), gradients(3 * expected, hidden, weight, offset), strict=True
    )
    for grad, other in grads:
        torch.testing.assert_close(grad, other, rtol=1e-11, atol=1e-12)


@pytest.mark.usefixtures("small_slices")
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    num_rows=st.integers(1, 20),
    width=st.integers(1, 9),
    num_classes=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    num_ignored=st.integers(0, 3),
    seed=st.integers(0, 100),
)
def test_no_less_exact_than_the_whole(num_rows, width, num_classes, dtype, num_ignored, seed):
    """The error against float64 is at most twice that of F.cross_entropy in the same dtype, and a rounding."""
    hidden, weight, target, bias = inputs(num_rows, width, num_classes, dtype, seed=seed)
    target[: min(num_ignored, num_rows - 1)] = -100
    tensors = (hidden, weight, bias)
    exact_tensors = [tensor.detach().double().requires_grad_() for tensor in tensors]
    exact = whole(exact_tensors[0], exact_tensors[1], target, exact_tensors[2])
    results = {}
    for name, function in (("ours", linear_cross_entropy), ("whole", whole)):
        loss = function(hidden, weight, target, bias)
        results[name] = (loss, *gradients(loss, *tensors))
    assert results["ours"][0].dtype == torch.promote_types(dtype, torch.float32)
    for ours, other, reference in zip(
        results["ours"], results["whole"], (exact, *gradients(exact, *exact_tensors)), strict=True
    ):
        error, allowed = ((t.double() - reference).abs().max().item() for t in (ours, other))
        size = reference.abs().max().item()
        assert error <= 2 * allowed + 4 * torch.finfo(dtype).eps * max(size, 1e-2)


def test_a_number_worked_by_hand():
    """Logits 0 and log 3 have probabilities 1/4 and 3/4."""
    hidden = torch.tensor([[1.0]], requires_grad=True)
    weight = torch.tensor([[0.0], [math.log(3.0)]], requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.tensor([0]))
    assert loss.item() == pytest.approx(math.log(4.0))
    grad_hidden, grad_weight = gradients(loss, hidden, weight)
    assert grad_hidden.item() == pytest.approx(0.75 * math.log(3.0))
    torch.testing.assert_close(grad_weight, torch.tensor([[-0.75], [0.75]]))


@pytest.mark.usefixtures("small_slices")
def test_gradcheck():
    hidden, weight, target, bias = inputs()
    target[2] = -100
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_cross_entropy(h, w, target, b, scale=1.3, softcap=2.5), (hidden, weight, bias)
    )


def test_only_what_is_asked_for_is_computed():
    hidden, weight, target, _ = inputs(bias=False)
    assert not linear_cross_entropy(hidden.detach(), weight.detach(), target).requires_grad
    (grad,) = gradients(linear_cross_entropy(hidden, weight.detach(), target), hidden)
    torch.testing.assert_close(grad, gradients(whole(hidden, weight, target), hidden)[0])
    (grad,) = gradients(linear_cross_entropy(hidden.detach(), weight, target), weight)
    torch.testing.assert_close(grad, gradients(whole(hidden, weight, target), weight)[0])


@pytest.mark.usefixtures("small_slices")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_under_autocast_it_is_a_linear_layer(dtype):
    """Of float32 weights; the input may be in autocast's dtype already. Float64 stays what it is."""
    hidden, weight, target, bias = inputs(40, 16, 20, dtype=torch.promote_types(dtype, torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_cross_entropy(hidden.to(dtype), weight, target, bias)
        expected = F.cross_entropy(F.linear(hidden.to(dtype), weight, bias), target)
    assert ours.dtype == expected.dtype
    torch.testing.assert_close(ours, expected)
    grads = zip(gradients(ours, hidden, weight, bias), gradients(expected, hidden, weight, bias), strict=True)
    for grad, other in grads:
        torch.testing.assert_close(grad, other, atol=1e-4, rtol=2e-2)


def test_without_autograd_no_gradient_is_computed():
    hidden, weight, target, bias = inputs(64, 32, 200)
    expected = linear_cross_entropy(hidden, weight, target, bias)
    with torch.no_grad(), FlopCounterMode(display=False) as flops, PeakLiveBytes() as live:
        loss = linear_cross_entropy(hidden, weight, target, bias)
    assert torch.equal(loss, expected)
    assert flops.get_total_flops() == 2 * 64 * 32 * 200
    assert live.live_bytes == loss.nbytes


def test_repeatable_and_retained():
    hidden, weight, target, bias = inputs(dtype=torch.float32)
    losses_ = [linear_cross_entropy(hidden, weight, target, bias) for _ in range(2)]
    first = torch.autograd.grad(losses_[0], [hidden, weight, bias], retain_graph=True)
    for grads in (
        torch.autograd.grad(losses_[0], [hidden, weight, bias]),
        torch.autograd.grad(losses_[1], [hidden, weight, bias]),
    ):
        assert all(torch.equal(a, b) for a, b in zip(first, grads, strict=True))
    for factor in (1.0, torch.ones((), requires_grad=True)):
        loss = linear_cross_entropy(hidden, weight, target, bias) * factor
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(loss, hidden, create_graph=True)


@pytest.mark.parametrize("value", [1e4, -1e4])
def test_extreme_logits(value):
    hidden, weight, target, _ = inputs(dtype=torch.float32, bias=False)
    bias = torch.zeros(11)
    bias[target[0]] = value
    loss = linear_cross_entropy(hidden, weight, target, bias)
    torch.testing.assert_close(loss, whole(hidden, weight, target, bias))
    assert gradients(loss, hidden)[0].isfinite().all()


def test_shapes_and_empty_inputs():
    hidden, weight, target, _ = inputs(num_rows=12)
    loss = linear_cross_entropy(hidden.reshape(3, 4, 6), weight, target.reshape(3, 4))
    torch.testing.assert_close(loss, whole(hidden, weight, target))
    target[:] = -100
    nothing = linear_cross_entropy(hidden, weight, target, reduction="sum")
    assert nothing.item() == 0
    assert torch.equal(gradients(nothing, hidden)[0], torch.zeros_like(hidden))
    assert linear_cross_entropy(hidden, weight, target).isnan()
    assert linear_cross_entropy(hidden, weight, target + 107, ignore_index=7).isnan()
    strided = torch.randn(6, 12).T.requires_grad_()
    torch.testing.assert_close(
        gradients(linear_cross_entropy(strided, weight.float(), target + 101), strided)[0],
        gradients(whole(strided, weight.float(), target + 101), strided)[0],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_never_whole(dtype, monkeypatch):
    monkeypatch.setattr(losses, "rows_of_slice", lambda num_classes: 32)
    hidden, weight, target, _ = inputs(512, 16, 2000, dtype, bias=False)
    weight.requires_grad_(False)
    peaks = {}
    for name, function in (("ours", linear_cross_entropy), ("whole", whole)):
        with PeakLiveBytes() as live:
            function(hidden, weight, target).backward()
        peaks[name] = live.peak_bytes
    slice_bytes, grads = 32 * 2000 * 4, 3 * hidden.nbytes + target.nbytes
    assert peaks["ours"] <= 1.5 * slice_bytes + grads  # in bfloat16 a slice and its copy of half the size
    assert peaks["whole"] >= 2 * 512 * 2000 * 4


def test_ignored_rows_cost_nothing():
    hidden, weight, target, _ = inputs(400, 16, 500, torch.float32, bias=False)
    weight.requires_grad_(False)
    with FlopCounterMode(display=False) as all_rows:
        linear_cross_entropy(hidden, weight, target)
    target[100:] = -100
    with FlopCounterMode(display=False) as a_quarter:
        linear_cross_entropy(hidden, weight, target)
    assert 4 * a_quarter.get_total_flops() == all_rows.get_total_flops() == 4 * 400 * 16 * 500


@pytest.mark.parametrize(
    ("num_classes", "num_rows"), [(32_000, 1024), (50_257, 512), (128_256, 256), (2**17, 256), (2**20, 256)]
)
def test_slices_are_whole_tiles_of_a_gpu(num_classes, num_rows):
    """At most 128 MiB, or 256 rows."""
    assert losses.rows_of_slice(num_classes) == num_rows
    assert num_rows == 256 or 4 * num_rows * num_classes <= losses.SLICE_BYTES


def test_in_a_simulation():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        hidden, weight = torch.empty(4, 8, 6, requires_grad=True), torch.empty(50, 6, requires_grad=True)
        linear_cross_entropy(hidden, weight, torch.zeros(4, 8, dtype=torch.int64)).backward()
        assert hidden.grad.shape == hidden.shape


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"reduction": "none"}, ValueError, "reduction: expected one of mean, sum, got 'none'"),
        ({"target": torch.zeros(10)}, TypeError, "target: expected int64 class indices, got torch.float32"),
        ({"target": torch.zeros(9, dtype=torch.int64)}, ValueError, r"target: expected the shape \(10,\) of hidden"),
        ({"weight": torch.zeros(11, 5)}, ValueError, r"weight: expected \(classes, 6\) to fit hidden, got \(11, 5\)"),
        ({"weight": torch.zeros(11, 6)}, ValueError, "weight: expected torch.float64, the dtype of hidden"),
        ({"bias": torch.zeros(5)}, ValueError, r"bias: expected shape \(11,\), got \(5,\)"),
    ],
)
def test_bad_arguments(change, error, message):
    hidden, weight, target, bias = inputs()
    with pytest.raises(error, match=message):
        linear_cross_entropy(**{"hidden": hidden, "weight": weight, "target": target, "bias": bias, **change})
