"""permuted_residual_add: a branch in permuted order, kept rows first, added into the residual in the stream's order."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inputs import LAYOUTS, make
from tolerances import DTYPE_PAIRS, assert_as_exact
from traffic import counted_traffic, needs_the_interpreter

from dropbp_kernels import reference
from dropbp_kernels.measure import PeakLiveBytes, num_autograd_nodes, saved_bytes
from dropbp_kernels.ops import permuted_residual_add
from dropbp_kernels.permutation import draw_permutation, row_shape

raw = torch.ops.dropbp_kernels


def plain(residual, kept, dropped, permutation):
    """The op in plain PyTorch, by the inverse permutation."""
    branch = torch.cat((kept, dropped))[permutation.argsort()]
    return residual + branch.reshape(residual.shape)


def check(residual, kept, dropped, permutation):
    exact = plain(residual.double(), kept.double(), dropped.double(), permutation)
    output = raw.permuted_residual_add(residual, kept, dropped, permutation)
    assert output.is_contiguous()
    assert_as_exact(output, plain(residual, kept, dropped, permutation), exact, "sum")


@pytest.mark.parametrize("op", [reference.permuted_residual_add_reference, raw.permuted_residual_add])
def test_by_hand(op):
    residual = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    kept, dropped = torch.tensor([[10.0, 20.0]]), torch.tensor([[30.0, 40.0], [50.0, 60.0]])
    expected = [[31.0, 42.0], [53.0, 64.0], [15.0, 26.0]]
    assert op(residual, kept, dropped, torch.tensor([2, 0, 1])).tolist() == expected
    # Two samples of three tokens, swapped.
    residual = torch.arange(6.0).reshape(2, 3, 1)
    kept, dropped = torch.full((1, 3, 1), 10.0), torch.full((1, 3, 1), 20.0)
    assert op(residual, kept, dropped, torch.tensor([1, 0])).flatten().tolist() == [20, 21, 22, 13, 14, 15]


def test_row_shape_by_hand():
    assert row_shape((4, 6, 8), 4) == (4, 6, 8)
    assert row_shape((4, 6, 8), 24) == (24, 8)
    assert row_shape((4, 6, 8), 6) is None
    assert row_shape((4, 6, 8), 192) is None  # the last dimension is no row
    assert row_shape((4, 1, 8), 4) == (4, 1, 8)
    assert row_shape((0, 6, 8), 0) == (0, 6, 8)
    assert row_shape((8,), 8) is None


@pytest.mark.parametrize(("residual_dtype", "branch_dtype"), DTYPE_PAIRS)
@pytest.mark.parametrize("shape", [(3, 63), (5, 2, 1023), (1, 1), (4, 2, 0), (0, 5), (0, 3, 5)])
def test_matches_float64(backend, device, poisoned, shape, residual_dtype, branch_dtype):
    residual, branch = make(shape, residual_dtype, device=device), make(shape, branch_dtype, device=device)
    permutation = draw_permutation(shape[0], seed=0, step=0, branch=0, device=device)
    for num_kept in {0, shape[0] // 2, shape[0]}:
        check(residual, branch[:num_kept], branch[num_kept:], permutation)
    if len(shape) == 3:  # tokens
        permutation = draw_permutation(shape[0] * shape[1], seed=0, step=0, branch=0, device=device)
        branch = branch.flatten(0, 1)
        check(residual, branch[:1], branch[1:], permutation)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_permutation_stride_and_dtype(backend, device, data):
    shape = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=2), label="shape")
    shape = (*shape, data.draw(st.integers(0, 70), label="width"))
    num_rows = shape[0] * (shape[1] if len(shape) == 3 and data.draw(st.booleans(), label="tokens") else 1)
    residual_dtype, branch_dtype = data.draw(st.sampled_from(DTYPE_PAIRS), label="dtypes")
    layouts = [data.draw(st.sampled_from(LAYOUTS), label="layout") for _ in range(3)]
    num_kept = data.draw(st.integers(0, num_rows), label="num_kept")
    rows = row_shape(shape, num_rows)
    permutation = torch.tensor(data.draw(st.permutations(range(num_rows))), dtype=torch.int64, device=device)
    check(
        make(shape, residual_dtype, layouts[0], device),
        make((num_kept, *rows[1:]), branch_dtype, layouts[1], device),
        make((num_rows - num_kept, *rows[1:]), branch_dtype, layouts[2], device),
        permutation,
    )


def test_extreme_values_stay_in_their_rows(backend, device):
    residual = torch.zeros(3, 4, dtype=torch.float16, device=device)
    branch = torch.zeros(3, 4, dtype=torch.float16, device=device)
    branch[1], branch[2] = float("nan"), float("inf")
    output = raw.permuted_residual_add(residual, branch[:1], branch[1:], torch.tensor([1, 2, 0], device=device))
    assert output[0].isinf().all()
    assert output[1].tolist() == [0.0] * 4
    assert output[2].isnan().all()


@needs_the_interpreter
def test_traffic_is_that_of_the_plain_sum():
    """Read residual and branch, write the sum, and 8 bytes of the permutation for each block of a row."""
    from dropbp_kernels._triton.permuted_residual_add import launch_permuted_residual_add

    residual, branch = make((6, 40), torch.float32), make((6, 40), torch.bfloat16)
    permutation = draw_permutation(6, seed=0, step=0, branch=0)
    with counted_traffic() as traffic:
        launch_permuted_residual_add(residual, branch[:2], branch[2:], permutation)
    assert traffic.read == residual.nbytes + branch.nbytes + permutation.nbytes
    assert traffic.written == residual.nbytes


def test_allocates_the_result_alone(backend, device):
    residual, branch = make((6, 40), torch.float32, device=device), make((6, 40), torch.float32, device=device)
    permutation = draw_permutation(6, seed=0, step=0, branch=0, device=device)
    with PeakLiveBytes() as live:
        permuted_residual_add(residual, branch[:2], branch[2:], permutation)
    assert live.peak_bytes == residual.nbytes


# The public function.


def leaves(device="cpu", num_kept=2, dtype=torch.float32, branch_dtype=None):
    """residual (4, 3, 5), kept, dropped of its samples, and a permutation of them."""
    residual = torch.randn(4, 3, 5, device=device, dtype=dtype, requires_grad=True)
    branch = torch.randn(4, 3, 5, device=device).to(branch_dtype or dtype)
    kept = branch[:num_kept].clone().requires_grad_()
    return residual, kept, branch[num_kept:].clone(), torch.tensor([2, 0, 3, 1], device=device)


@pytest.mark.parametrize("num_kept", [0, 2, 4])
@pytest.mark.parametrize("grad_scale", [1.0, 2.5, "rows"])
@pytest.mark.parametrize("index", [torch.int64, torch.int32])
def test_gradients(backend, device, num_kept, grad_scale, index):
    residual, kept, dropped, permutation = leaves(device, num_kept)
    scale = torch.arange(num_kept, device=device, dtype=torch.float64) if grad_scale == "rows" else grad_scale
    output = permuted_residual_add(residual, kept, dropped, permutation.to(index), grad_scale=scale)
    grad = torch.randn_like(output)
    grads = torch.autograd.grad(output, (residual, kept), grad)
    torch.testing.assert_close(output, plain(residual, kept, dropped, permutation))
    factor = torch.as_tensor(scale, device=device).float().view(-1, 1, 1)
    torch.testing.assert_close(grads[1], grad[permutation[:num_kept]] * factor)
    assert grads[0].data_ptr() == grad.data_ptr()  # an alias


def test_zero_rows_ignore_what_comes_in(backend, device):
    residual, kept, dropped, permutation = leaves(device)
    scale = torch.tensor([0.0, 2.0], device=device)
    output = permuted_residual_add(residual, kept, dropped, permutation, grad_scale=scale)
    grad = torch.ones_like(output)
    grad[2] = float("nan")  # where the first kept row belongs
    (grad_kept,) = torch.autograd.grad(output, kept, grad)
    assert torch.equal(grad_kept, torch.stack((torch.zeros_like(kept[0]), torch.full_like(kept[0], 2.0))))


def test_saves_the_permutation_and_nothing_of_the_branch(backend, device):
    residual, kept, dropped, permutation = leaves(device)
    residual = residual * 1
    before = num_autograd_nodes(residual)
    with saved_bytes() as saved:
        output = permuted_residual_add(residual, kept, dropped, permutation)
    assert saved.num_bytes == permutation.nbytes
    assert num_autograd_nodes(output) - before == 1
    with saved_bytes() as saved:
        output = permuted_residual_add(residual, kept.detach(), dropped, permutation)
    assert saved.num_tensors == 0
    assert num_autograd_nodes(output) - before == 1


def test_backward_is_one_op_that_allocates_the_kept_rows(backend, device):
    residual, kept, dropped, permutation = leaves(device, num_kept=1)
    output = permuted_residual_add(residual, kept, dropped, permutation, grad_scale=4.0)
    grad = torch.randn_like(output)
    with PeakLiveBytes() as live:
        torch.autograd.grad(output, (residual, kept), grad)
    assert live.peak_bytes == kept.nbytes


def test_dropped_gets_no_gradient(backend, device):
    residual, kept, dropped, permutation = leaves(device)
    dropped.requires_grad_()
    output = permuted_residual_add(residual, kept, dropped, permutation)
    output.sum().backward()
    assert dropped.grad is None
    assert not permuted_residual_add(residual.detach(), kept.detach(), dropped, permutation).requires_grad


def test_only_the_branch_needs_a_gradient(backend, device):
    residual, kept, dropped, permutation = leaves(device)
    permuted_residual_add(residual.detach(), kept, dropped, permutation).sum().backward()
    assert torch.equal(kept.grad, torch.ones_like(kept))


def test_mixed_dtypes(backend, device):
    residual, kept, dropped, permutation = leaves(device, branch_dtype=torch.bfloat16)
    output = permuted_residual_add(residual, kept, dropped, permutation)
    assert output.dtype == torch.float32
    output.sum().backward()
    assert (residual.grad.dtype, kept.grad.dtype) == (torch.float32, torch.bfloat16)


def test_gradients_share_no_memory_that_is_written(backend, device):
    residual, kept, dropped, permutation = leaves(device)
    loss = permuted_residual_add(residual, kept, dropped, permutation).sum() + residual.sum() + 2 * kept.sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert torch.equal(residual.grad, torch.full_like(residual, 4.0))
    assert torch.equal(kept.grad, torch.full_like(kept, 6.0))
    residual.grad.mul_(0.0)
    assert torch.equal(kept.grad, torch.full_like(kept, 6.0))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"permutation": torch.arange(3)}, ValueError, r"permutation: expected shape \(N,\), N = 4 or 12 for"),
        ({"permutation": torch.arange(4).reshape(2, 2)}, ValueError, r"permutation: .* got \(2, 2\)"),
        (
            {"permutation": torch.arange(4.0)},
            TypeError,
            "permutation: expected dtype int64 or int32, got torch.float32",
        ),
        ({"permutation": torch.arange(4, device="meta")}, ValueError, "permutation: expected on residual's device cpu"),
        ({"permutation": torch.arange(12)}, ValueError, r"kept: expected shape \(K, 5\), got \(2, 3, 5\)"),
        ({"kept": torch.zeros(1, 3, 5)}, ValueError, "kept, dropped: expected 4 rows in all, got 1 and 2"),
        ({"dropped": torch.zeros(2, 3, 4)}, ValueError, r"dropped: expected shape \(K, 3, 5\), got \(2, 3, 4\)"),
        ({"dropped": torch.zeros(2, 3, 5).half()}, TypeError, "dropped: expected kept's dtype torch.float32"),
        ({"residual": torch.zeros(4, 3, 5).half()}, TypeError, "residual: expected a dtype that holds kept's"),
        ({"kept": torch.zeros(2, 3, 5).int()}, TypeError, "kept: expected dtype float32"),
        (
            {"kept": torch.zeros(2, 3, 5, device="meta")},
            ValueError,
            "kept: expected on residual's device cpu, got meta",
        ),
        ({"grad_scale": torch.ones(4)}, ValueError, r"grad_scale: expected a number or shape \(2,\), got shape \(4,\)"),
        ({"grad_scale": torch.ones(2).int()}, TypeError, "grad_scale: expected a float dtype"),
        ({"grad_scale": "2"}, TypeError, "grad_scale: expected a number or a tensor, got str"),
    ],
)
def test_wrong_arguments(change, error, message):
    arguments = dict(zip(("residual", "kept", "dropped", "permutation"), leaves(), strict=True)) | change
    with pytest.raises(error, match=message):
        permuted_residual_add(**arguments)


@pytest.mark.parametrize("entries", [[0, 1, 2, 4], [0, -1, 2, 3]])
def test_entries_out_of_range(backend, device, entries):
    if backend == "cuda":
        pytest.skip("a wrong index stops the program: test_on_gpu.py")
    residual, kept, dropped, _ = leaves(device)
    permutation = torch.tensor(entries, device=device)
    if backend == "triton":  # a GPU cannot raise: such a row is skipped and nothing is written outside
        raw.permuted_residual_add(residual, kept, dropped, permutation)
    else:
        with pytest.raises(IndexError, match="permutation: expected each number from 0 to 3 once"):
            raw.permuted_residual_add(residual, kept, dropped, permutation)


def test_entries_given_twice(backend, device):
    if device.type == "cuda" or backend == "triton":
        pytest.skip("not looked at where the host would have to wait")
    residual, kept, dropped, _ = leaves(device)
    with pytest.raises(IndexError, match="permutation: expected each number from 0 to 3 once"):
        raw.permuted_residual_add(residual, kept, dropped, torch.tensor([0, 1, 1, 3]))


def test_a_permutation_may_be_strided(backend, device):
    residual, branch = torch.randn(4, 6, device=device), torch.randn(4, 6, device=device)
    strided = torch.tensor([[2, 0], [0, 1], [3, 2], [1, 3]], device=device)[:, 0]
    total = permuted_residual_add(residual, branch[:2], branch[2:], strided)
    assert torch.equal(total, residual.index_add(0, strided.contiguous(), branch))
