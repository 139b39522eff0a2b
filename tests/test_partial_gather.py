"""partial_gather: r channels of an input, saved in place of all of them."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inputs import LAYOUTS, make
from traffic import counted_traffic, needs_the_interpreter

from dropbp_kernels import _backend, reference
from dropbp_kernels.measure import PeakLiveBytes, saved_bytes
from dropbp_kernels.ops import partial_gather

raw = torch.ops.dropbp_kernels

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def check(input, index):
    """Bit for bit what indexing gives, NaNs too."""
    output = raw.partial_gather(input, index)
    assert output.is_contiguous()
    torch.testing.assert_close(output, input[..., index], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("op", [reference.partial_gather_reference, raw.partial_gather])
def test_by_hand(op):
    input = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    assert op(input, torch.tensor([2, 0])).tolist() == [[3.0, 1.0], [6.0, 4.0]]
    assert op(input, torch.tensor([1, 1, 1])).tolist() == [[2.0] * 3, [5.0] * 3]
    assert op(input[0], torch.tensor([1])).tolist() == [2.0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 63), (2, 5, 1023), (7,), (1, 1, 1, 1), (0, 5), (2, 0, 3)])
def test_equals_indexing(backend, device, poisoned, shape, dtype):
    input = make(shape, dtype, device=device)
    for num_channels in {0, 1, shape[-1] // 2, shape[-1]}:
        check(input, torch.randperm(shape[-1], device=device)[:num_channels])
    check(input, torch.full((70,), shape[-1] - 1, device=device))  # more than there are


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape_stride_and_dtype(backend, device, data):
    shape = data.draw(st.lists(st.integers(0, 6), max_size=3), label="shape")
    shape = (*shape, data.draw(st.integers(1, 70), label="width"))
    input = make(shape, data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(LAYOUTS), label="layout"), device)
    index = data.draw(st.lists(st.integers(0, shape[-1] - 1), max_size=20), label="index")
    check(input, torch.tensor(index, dtype=torch.int64, device=device).repeat_interleave(2)[::2])


def test_extreme_values_are_copied(backend, device):
    input = torch.tensor([[float("nan"), float("inf"), -0.0, 1e-45]], device=device)
    output = raw.partial_gather(input, torch.tensor([3, 2, 1, 0], device=device))
    assert output.view(torch.int32).tolist() == input.flip(1).view(torch.int32).tolist()


def test_rows_at_a_stride_are_read_where_they_are():
    """The half of a packed projection is not copied whole for a few of its channels."""
    half, index = torch.randn(64, 256)[:, 128:], torch.tensor([5, 7])
    with PeakLiveBytes() as live:
        output = raw.partial_gather(half, index)
    assert live.peak_bytes == output.nbytes
    assert torch.equal(output, half[:, index])


@needs_the_interpreter
def test_traffic_is_the_result_read_and_written():
    from dropbp_kernels._triton.partial_gather import launch_partial_gather

    input, index = make((6, 40), torch.bfloat16), torch.tensor([3, 30, 7])
    with counted_traffic() as traffic:
        output = launch_partial_gather(input, index)
    assert traffic.read == output.nbytes + output.numel() * index.itemsize  # the index from the cache
    assert traffic.written == output.nbytes


@pytest.mark.parametrize("bad", [5, -1])
def test_wrong_index_on_a_cpu(bad):
    for backend in ("reference", "cpp"):
        if _backend.why_not(backend, "partial_gather") is None:
            with _backend.use_backend(backend), pytest.raises(IndexError, match="index"):
                raw.partial_gather(torch.zeros(2, 5), torch.tensor([0, bad]))


# The public function.


def test_gradients(backend, device):
    input = torch.randn(4, 3, 5, device=device, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([4, 0, 4], device=device)
    torch.autograd.gradcheck(lambda x: partial_gather(x, index), input)
    (grad,) = torch.autograd.grad(partial_gather(input, index.int()).sum(), input)
    assert grad[0, 0].tolist() == [1.0, 0.0, 0.0, 0.0, 2.0]  # repeated entries add up


def test_saves_the_index_alone(backend, device):
    input, index = torch.randn(4, 3, 5, device=device, requires_grad=True), torch.tensor([4, 0], device=device)
    with saved_bytes() as saved:
        output = partial_gather(input, index)
    assert saved.num_bytes == index.nbytes
    with saved_bytes() as saved:
        assert not partial_gather(input.detach(), index).requires_grad
    assert saved.num_tensors == 0
    (grad,) = torch.autograd.grad(output.pow(2).sum(), input, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_gradient_of_columns_is_a_product_of_dense_matrices(backend, device):
    """What the op is for: the gradient of a few columns of a linear layer's weight."""
    x = torch.randn(6, 7, device=device, dtype=torch.float64)
    weight = torch.randn(3, 7, device=device, dtype=torch.float64, requires_grad=True)
    grad_y, index = torch.randn(6, 3, device=device, dtype=torch.float64), torch.tensor([5, 2], device=device)
    (dense,) = torch.autograd.grad(torch.nn.functional.linear(x, weight), weight, grad_y)
    torch.testing.assert_close(grad_y.t() @ partial_gather(x, index), dense[:, index])


@pytest.mark.parametrize(
    ("input", "index", "error", "message"),
    [
        (torch.zeros(2, 5), torch.zeros(2, 1, dtype=torch.int64), ValueError, r"index: expected shape \(r,\), got"),
        (torch.zeros(2, 5), torch.zeros(2), TypeError, "index: expected dtype int64 or int32, got torch.float32"),
        (torch.zeros(2, 5), torch.zeros(2, device="meta").long(), ValueError, "index: expected on input's device cpu"),
        (torch.zeros(2, 5).int(), torch.tensor([0]), TypeError, "input: expected dtype float32, .* got torch.int32"),
        (torch.tensor(1.0), torch.tensor([0]), ValueError, "input: expected at least one dimension"),
    ],
)
def test_bad_input(input, index, error, message):
    with pytest.raises(error, match=message):
        partial_gather(input, index)
