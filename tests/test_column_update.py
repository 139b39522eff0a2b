"""column_update and column_restore: columns of a weight changed in place for a while, and put back to the bit."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inputs import make
from tolerances import assert_as_exact

from dropbp_kernels import _backend, reference
from dropbp_kernels.measure import PeakLiveBytes
from dropbp_kernels.ops import column_restore, column_update

# NumPy, in Triton's interpreter.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")

raw = torch.ops.dropbp_kernels

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def bits(tensor):
    """The memory of a tensor as integers, in its order: NaNs and signs of zero count."""
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])


def plain(weight, delta, index, scale):
    """The weight afterwards, in plain PyTorch."""
    result = weight.clone()
    result[:, index] = torch.add(weight[:, index], delta, alpha=scale).to(weight.dtype)
    return result


def check(weight, delta, index, scale):
    before = weight.clone()
    exact = plain(before.double(), delta.double(), index, scale)
    original = raw.column_update_(weight, delta, index, scale)
    assert original.is_contiguous()
    assert torch.equal(bits(original), bits(before[:, index]))
    magnitude = exact.abs().max().item() if exact.numel() else 0.0
    assert_as_exact(weight, plain(before, delta, index, scale), exact, "weight", magnitude)
    others = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    others[index] = False
    assert torch.equal(bits(weight[:, others]), bits(before[:, others]))
    raw.column_restore_(weight, original, index)
    assert torch.equal(bits(weight), bits(before))


def strided(shape, dtype, layout, device="cpu"):
    """A weight (out, in): of nn.Linear, of GPT-2's Conv1D (transposed), or inside a larger tensor."""
    if layout == "transposed":
        return make((shape[1], shape[0]), dtype, device=device).t()
    if layout == "inside":
        return make((shape[0], 2 * shape[1] + 3), dtype, device=device)[:, 1 : 2 * shape[1] + 1 : 2]
    return make(shape, dtype, device=device)


@pytest.mark.parametrize("op", [reference.column_update__reference, raw.column_update_])
def test_by_hand(op):
    weight = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    original = op(weight, torch.tensor([[10.0, 20.0], [30.0, 40.0]]), torch.tensor([2, 0]), 0.5)
    assert original.tolist() == [[3.0, 1.0], [6.0, 4.0]]
    assert weight.tolist() == [[11.0, 2.0, 8.0], [24.0, 5.0, 21.0]]
    reference.column_restore__reference(weight, original, torch.tensor([2, 0]))
    assert weight.tolist() == [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]


@pytest.mark.parametrize("delta_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_update_is_right_and_undone_to_the_bit(backend, device, poisoned, dtype, delta_dtype):
    for shape, num_columns, layout in (
        ((5, 63), 7, "plain"),
        ((33, 40), 40, "transposed"),
        ((3, 6), 2, "inside"),
        ((1, 1), 1, "transposed"),
        ((4, 6), 0, "plain"),
        ((0, 3), 2, "plain"),
    ):
        weight, delta = strided(shape, dtype, layout, device), make((shape[0], num_columns), delta_dtype, device=device)
        check(weight, delta, torch.randperm(shape[1], device=device)[:num_columns], 0.3)


def test_many_columns(backend, device):
    """More than the C++ kernel holds of a row at a time, and than a Triton program takes."""
    index = torch.randperm(1023, device=device)[:700]
    check(make((3, 1023), torch.bfloat16, device=device), make((3, 700), torch.float32, device=device), index, 2.0)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape_stride_and_dtype(backend, device, data):
    shape = data.draw(st.tuples(st.integers(0, 9), st.integers(1, 70)), label="shape")
    layout = data.draw(st.sampled_from(["plain", "transposed", "inside"]), label="layout")
    places = st.lists(st.integers(0, shape[1] - 1), max_size=20, unique=True)
    index = torch.tensor(data.draw(places, label="index"), dtype=torch.int64, device=device)
    weight = strided(shape, data.draw(st.sampled_from(DTYPES), label="dtype"), layout, device)
    delta = make((len(index), shape[0]), data.draw(st.sampled_from(DTYPES), label="delta"), device=device).t()
    check(weight, delta, index, data.draw(st.sampled_from([0.0, 1.0, -0.1, 16.0]), label="scale"))


def test_originals_may_be_strided(backend, device):
    weight, index = torch.zeros(3, 5, device=device), torch.tensor([4, 1], device=device)
    original = torch.randn(2, 3, device=device).t()
    column_restore(weight, original, index)
    assert torch.equal(weight[:, index], original)


def test_what_cannot_be_subtracted_again_is_restored(backend, device):
    """The sums are infinite, or have lost all digits of the weight."""
    weight = torch.tensor([[1e-3, -0.0, float("nan"), 6e4]], dtype=torch.float16, device=device)
    before, index = weight.clone(), torch.arange(4, device=device)
    delta = torch.tensor([[6e4, 1.0, 1.0, 6e4]], device=device)
    original = column_update(weight, delta, index)
    assert weight[0, 0] == 6e4
    assert weight[0, 3].isinf()
    column_restore(weight, original, index)
    assert torch.equal(bits(weight), bits(before))


def test_scale_is_not_rounded_to_float32(backend, device):
    weight = torch.zeros(2, 3, dtype=torch.float64, device=device)
    column_update(
        weight, torch.ones(2, 1, dtype=torch.float64, device=device), torch.tensor([1], device=device), scale=0.1
    )
    assert weight[:, 1].tolist() == [0.1, 0.1]


@pytest.mark.parametrize("bad", [[0, 5], [0, -1], [3, 3]])
def test_wrong_index_on_a_cpu_leaves_the_weight_untouched(bad):
    for backend in ("reference", "cpp"):
        if _backend.why_not(backend, "column_update") is None:
            weight, columns, index = torch.zeros(2, 5), torch.ones(2, 2), torch.tensor(bad)
            with _backend.use_backend(backend):
                with pytest.raises(IndexError, match="index"):
                    column_update(weight, columns, index)
                with pytest.raises(IndexError, match="index"):
                    column_restore(weight, columns, index)
            assert torch.equal(weight, torch.zeros(2, 5))


def test_rows_that_share_elements_are_refused():
    for backend in ("reference", "cpp"):
        if _backend.why_not(backend, "column_update") is None:
            weight, columns, index = torch.zeros(1, 5).expand(3, 5), torch.ones(3, 2), torch.tensor([0, 4])
            with _backend.use_backend(backend):
                with pytest.raises(RuntimeError, match=r"memory of their own|single memory location"):
                    column_update(weight, columns, index)
                with pytest.raises(RuntimeError, match=r"memory of their own|single memory location"):
                    column_restore(weight, columns, index)
            assert torch.equal(weight, torch.zeros(3, 5))


# The public functions.


@pytest.mark.parametrize("integer", [torch.int64, torch.int32])
def test_product_with_changed_columns(backend, device, integer):
    x, weight = torch.randn(6, 7, device=device), torch.randn(3, 7, device=device)
    index, delta = torch.tensor([5, 2], device=device), torch.randn(3, 2, device=device)
    expected = x @ plain(weight, delta, index, 4.0).t()
    original = column_update(weight, delta, index.to(integer), scale=4.0)
    torch.testing.assert_close(x @ weight.t(), expected)
    column_restore(weight, original, index.to(integer))


def test_allocates_the_result_alone_and_bumps_no_version(backend, device):
    weight, index = torch.randn(40, 30, device=device), torch.tensor([5, 2], device=device)
    delta, version = torch.randn(40, 2, device=device), weight._version
    with PeakLiveBytes() as live:
        original = column_update(weight, delta, index)
        column_restore(weight, original, index)
    if backend != "reference":
        assert live.peak_bytes == original.nbytes
        assert weight._version == version


def test_a_gradient_is_refused():
    weight, index = torch.randn(4, 3, requires_grad=True), torch.tensor([1])
    with pytest.raises(RuntimeError, match=r"weight, delta: expected none that requires a gradient, or torch\.no_grad"):
        column_update(weight, torch.zeros(4, 1), index)
    delta = torch.zeros(4, 1, requires_grad=True)
    with pytest.raises(RuntimeError, match="weight, delta: expected none"):
        column_update(weight.detach(), delta, index)
    with torch.no_grad():
        original = column_update(weight, delta, index)
        column_restore(weight, original, index)
    assert not original.requires_grad


COLUMNS = torch.zeros(4, 2)


@pytest.mark.parametrize(
    ("weight", "columns", "error", "message"),
    [
        (torch.zeros(4), COLUMNS, ValueError, r"weight: expected shape \(out, in\), got \(4,\)"),
        (torch.zeros(4, 3), COLUMNS.t(), ValueError, r"{}: expected shape \(4, 2\), got \(2, 4\)"),
        (torch.zeros(4, 3), COLUMNS.to("meta"), ValueError, "{}: expected on weight's device cpu, got meta"),
        (torch.zeros(4, 3).int(), COLUMNS, TypeError, "weight: expected dtype float32, .* got torch.int32"),
        (torch.zeros(4, 3), COLUMNS.int(), TypeError, "{}: expected .* got torch.int32"),
    ],
)
def test_bad_input(weight, columns, error, message):
    index = torch.tensor([0, 1])
    with pytest.raises(error, match=message.format("delta")):
        column_update(weight, columns, index)
    with pytest.raises(error, match=message.format("original")):
        column_restore(weight, columns, index)


def test_original_of_another_dtype():
    with pytest.raises(TypeError, match=r"original: expected weight's dtype torch\.float32, got torch\.float16"):
        column_restore(torch.zeros(4, 3), COLUMNS.half(), torch.tensor([0, 1]))
