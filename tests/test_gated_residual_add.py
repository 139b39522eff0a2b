"""gated_residual_add: residual + branch, at rows, with a scaled gradient, in place."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inputs import LAYOUTS, make
from tolerances import DTYPE_PAIRS, assert_as_exact

from dropbp_kernels import reference
from dropbp_kernels.measure import num_autograd_nodes, saved_bytes
from dropbp_kernels.ops import gated_residual_add

raw = torch.ops.dropbp_kernels


def plain(residual, branch, rows=None):
    """The op in plain PyTorch."""
    if rows is None:
        return residual + branch
    return residual.index_add(0, rows, branch.to(residual.dtype))


def plain_backward(grad_output, rows, row_scale, grad_scale, dtype):
    grad = grad_output if rows is None else grad_output[rows]
    if row_scale is not None:
        grad = grad * row_scale.to(grad.dtype).view(-1, *[1] * (grad.dim() - 1))
    return (grad * grad_scale).to(dtype)


def check(residual, branch, rows, row_scale, grad_scale, backend):
    """All three raw ops against float64."""
    exact = plain(residual.double(), branch.double(), rows)
    output = raw.gated_residual_add(residual, branch, rows)
    assert output.is_contiguous()
    assert_as_exact(output, plain(residual, branch, rows), exact, "sum")

    target = residual.clone() if residual.numel() else residual.clone(memory_format=torch.contiguous_format)
    raw.gated_residual_add_(target, branch, rows)
    assert torch.equal(target, output)

    arguments = rows, row_scale, grad_scale
    grad = raw.gated_residual_add_backward(residual, *arguments, branch.dtype)
    assert grad.is_contiguous()
    exact = plain_backward(residual.double(), *arguments, torch.float64)
    assert_as_exact(grad, plain_backward(residual, *arguments, branch.dtype), exact, "grad_branch")


def test_reference_by_hand():
    residual = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    branch = torch.tensor([[10.0, 20.0], [30.0, 40.0]])
    rows = torch.tensor([2, 0])
    expected = [[31.0, 42.0], [3.0, 4.0], [15.0, 26.0]]
    assert reference.gated_residual_add_reference(residual, branch, rows).tolist() == expected
    assert reference.gated_residual_add_reference(residual, residual, None).tolist() == (2 * residual).tolist()
    scale = torch.tensor([0.5, 0.0])
    grad = reference.gated_residual_add_backward_reference(residual, rows, scale, 4.0, torch.bfloat16)
    assert grad.tolist() == [[10.0, 12.0], [0.0, 0.0]]
    assert grad.dtype == torch.bfloat16
    reference.gated_residual_add__reference(residual, branch, rows)
    assert residual.tolist() == expected


def test_reference_rounds_once():
    # In bfloat16 1 + 2^-8 is halfway between two numbers: a sum in float32 keeps the third term that decides.
    residual = torch.tensor([1.0 + 2**-8], dtype=torch.float32)
    branch = torch.tensor([2.0**-16], dtype=torch.bfloat16)
    assert reference.gated_residual_add_reference(residual, branch, None).item() == 1 + 2**-8 + 2**-16


@pytest.mark.parametrize(("residual_dtype", "branch_dtype"), DTYPE_PAIRS)
@pytest.mark.parametrize("shape", [(3, 63), (2, 5, 1023), (7,), (1, 1, 1), (4, 2, 0), (0, 5)])
def test_matches_float64(backend, device, poisoned, shape, residual_dtype, branch_dtype):
    residual, branch = make(shape, residual_dtype, device=device), make(shape, branch_dtype, device=device)
    check(residual, branch, None, None, 0.3, backend)
    rows = torch.randperm(shape[0], device=device)[: (shape[0] + 1) // 2]
    branch = branch[: len(rows)]
    check(residual, branch, rows, None, 1.0, backend)
    check(residual, branch, rows, torch.rand(len(rows), device=device), 1.0, backend)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape_stride_and_dtype(backend, device, data):
    shape = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=3), label="shape")
    shape = (*shape, data.draw(st.integers(0, 70), label="width"))
    residual_dtype, branch_dtype = data.draw(st.sampled_from(DTYPE_PAIRS), label="dtypes")
    layouts = [data.draw(st.sampled_from(LAYOUTS), label="layout") for _ in range(2)]
    residual = make(shape, residual_dtype, layouts[0], device)
    rows = row_scale = None
    if data.draw(st.booleans(), label="rows"):
        order = data.draw(st.permutations(range(shape[0])), label="order")
        rows = torch.tensor(order[: data.draw(st.integers(0, shape[0]))], dtype=torch.int64, device=device)
        if data.draw(st.booleans(), label="row_scale"):
            row_scale = torch.rand(len(rows), device=device) * (torch.rand(len(rows), device=device) < 0.5)
    branch = make((shape[0] if rows is None else len(rows), *shape[1:]), branch_dtype, layouts[1], device)
    check(residual, branch, rows, row_scale, data.draw(st.floats(-3, 3, width=32), label="grad_scale"), backend)


def test_in_place_writes_into_strided_memory(backend, device):
    memory = torch.randn(5, 8, device=device)
    before = memory.clone()
    residual, branch = memory.t()[1:5:2], torch.randn(2, 5, device=device)
    raw.gated_residual_add_(residual, branch, None)
    assert torch.equal(residual, before.t()[1:5:2] + branch)
    raw.gated_residual_add_(residual, branch[:1], torch.tensor([1], device=device))
    before[:, 1] += branch[0]
    before[:, 3] += branch[1]
    before[:, 3] += branch[0]
    torch.testing.assert_close(memory, before)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # NumPy, in the interpreter
def test_extreme_values(backend, device):
    values = [float("inf"), float("-inf"), float("nan"), 6e4, 1e-7, -0.0]
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        tensor = torch.tensor([values, values], dtype=dtype, device=device)
        actual = raw.gated_residual_add(tensor, tensor.flip(-1), None)
        torch.testing.assert_close(actual, tensor + tensor.flip(-1), equal_nan=True, rtol=0, atol=0)
        scale = torch.tensor([0.0, 2.0], device=device)
        grad = raw.gated_residual_add_backward(tensor, None, scale, 1.0, dtype)
        assert grad[0].tolist() == [0.0] * len(values)  # not 0 * inf
        torch.testing.assert_close(grad[1], tensor[1] * 2, equal_nan=True, rtol=0, atol=0)
        for scale in (float("inf"), float("-inf")):  # as a loss scaler that overflowed hands it on
            grad = raw.gated_residual_add_backward(tensor, None, None, scale, dtype)
            torch.testing.assert_close(grad, tensor * scale, equal_nan=True, rtol=0, atol=0)


def test_grad_scale_is_not_rounded_to_float32(backend, device):
    one = torch.ones(1, dtype=torch.float64, device=device)
    assert raw.gated_residual_add_backward(one, None, None, 0.1, torch.float64).item() == 0.1


def test_indices_beyond_2_31(backend, device):
    if device.type == "cuda" and torch.cuda.mem_get_info()[0] < 8e9:
        pytest.skip("needs 8 GB of GPU memory")
    # 4 GB that nobody touches but for the last two rows: the system hands out pages on first use.
    width, last = 1024, 2**21 + 1
    residual = torch.empty(last + 1, width, dtype=torch.float16, device=device)
    residual[last - 1 :] = 1.0
    rows = torch.tensor([last], device=device)
    raw.gated_residual_add_(residual, torch.full((1, width), 2.0, dtype=torch.float16, device=device), rows)
    assert residual[last].tolist() == [3.0] * width
    assert residual[last - 1].tolist() == [1.0] * width
    grad = raw.gated_residual_add_backward(residual, rows, None, 2.0, torch.float16)
    assert grad.tolist() == [[6.0] * width]


# The public function.


def leaves(branch_dtype=torch.float32, num_rows=3, device="cpu"):
    residual = torch.randn(3, 2, 5, device=device, requires_grad=True)
    return residual, torch.randn(num_rows, 2, 5, device=device).to(branch_dtype).requires_grad_()


OPTIONS = {
    "plain": {},
    "scaled": {"grad_scale": 1.75},
    "scaled_rows": {"grad_scale": torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)},
    "rows": {"rows": torch.tensor([2, 0])},
    "rows_scaled": {"rows": torch.tensor([2, 0]), "grad_scale": 3.0},
    "rows_scaled_rows": {"rows": torch.tensor([2, 0]), "grad_scale": torch.tensor([0.0, 4.0])},
}


def on(device, options):
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in options.items()}


def count(options):
    return 2 if "rows" in options else 3


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_gradients(backend, device, options, inplace):
    options = on(device, options)
    residual, branch = leaves(num_rows=count(options), device=device)
    grad = torch.randn(3, 2, 5, device=device)
    output = gated_residual_add(residual * 1, branch, inplace=inplace, **options)
    output.backward(grad)
    rows = options.get("rows", torch.arange(3, device=device))
    scale = torch.as_tensor(options.get("grad_scale", 1.0), device=device, dtype=torch.float32).view(-1, 1, 1)
    torch.testing.assert_close(output, plain(residual, branch, rows))
    assert torch.equal(residual.grad, grad)
    torch.testing.assert_close(branch.grad, grad[rows] * scale)


def test_mixed_dtypes_round_each_gradient_to_its_own(backend, device):
    for options in ({}, {"grad_scale": 0.5}, {"rows": torch.tensor([1, 2, 0], device=device)}):
        residual, branch = leaves(torch.bfloat16, device=device)
        output = gated_residual_add(residual, branch, **options)
        assert output.dtype == torch.float32
        output.sum().backward()
        assert (residual.grad.dtype, branch.grad.dtype) == (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_dropped_branch_costs_one_node_and_nothing_saved(backend, device, options):
    options = on(device, options)
    residual, branch = leaves(num_rows=count(options), device=device)
    residual = residual * 1
    before = num_autograd_nodes(residual)
    with saved_bytes() as saved:
        output = gated_residual_add(residual, branch.detach(), **options)
    assert num_autograd_nodes(output) - before == 1
    assert (saved.num_bytes, saved.num_tensors) == (0, 0)
    with saved_bytes() as saved:
        output = gated_residual_add(residual, branch.detach(), inplace=True, **options)
    assert output is residual
    assert num_autograd_nodes(output) == before
    assert saved.num_tensors == 0


def test_kept_branch_saves_nothing_but_its_rows(backend, device):
    for options in OPTIONS.values():
        residual, branch = leaves(num_rows=count(options), device=device)
        with saved_bytes() as saved:
            gated_residual_add(residual, branch, **on(device, options))
        kept = [value for value in options.values() if isinstance(value, torch.Tensor)]
        assert saved.num_bytes == sum(value.nbytes for value in kept)


def test_nothing_recorded_without_grad_mode(backend, device):
    residual, branch = leaves(device=device)
    with torch.no_grad():
        assert not gated_residual_add(residual, branch, grad_scale=2.0).requires_grad
        gated_residual_add(residual, branch, inplace=True)  # legal for a leaf under no_grad, as residual.add_ is


def test_only_the_branch_needs_a_gradient(backend, device):
    residual, branch = leaves(device=device)
    output = gated_residual_add(residual.detach(), branch, grad_scale=2.0)
    output.sum().backward()
    assert torch.equal(branch.grad, torch.full_like(branch, 2.0))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_in_place_on_a_constant_or_a_view(backend, device, options):
    options = on(device, options)
    _, branch = leaves(num_rows=count(options), device=device)
    constant = torch.zeros(3, 2, 5, device=device)
    output = gated_residual_add(constant, branch, inplace=True, **options)
    assert output is constant
    (expected,) = torch.autograd.grad(output.sum(), branch)

    memory = torch.zeros(3, 2, 10, device=device, requires_grad=True)
    whole = memory * 1
    gated_residual_add(whole[..., ::2], branch, inplace=True, **options)
    grads = torch.autograd.grad(whole.sum(), (memory, branch))
    assert torch.equal(grads[0], torch.ones_like(memory))
    assert torch.equal(grads[1], expected)
    torch.testing.assert_close(whole[..., ::2], output)
    assert whole[..., 1::2].abs().max() == 0


@pytest.mark.parametrize("options", [{}, {"rows": torch.tensor([0, 2])}])
@pytest.mark.parametrize("is_kept", [True, False])
def test_in_place_on_a_saved_residual_is_caught(backend, device, options, is_kept):
    residual, branch = leaves(num_rows=count(options), device=device)
    saved = residual.exp()  # exp keeps its result for backward
    output = gated_residual_add(saved, branch if is_kept else branch.detach(), inplace=True, **on(device, options))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_gradients_share_no_memory_that_is_written(backend, device):
    """The alias of the two gradients must not be seen by hooks, accumulation or an optimizer."""
    for options in ({}, {"grad_scale": 2.0}):
        factor = options.get("grad_scale", 1.0)
        residual, branch = leaves(device=device)
        seen = []
        middle = branch * 1
        middle.register_hook(lambda grad, seen=seen: seen.append(grad.clone()))
        output = gated_residual_add(residual, middle, **options)
        (output + residual + branch).sum().backward(
            retain_graph=True
        )  # residual and branch also get gradients elsewhere
        assert torch.equal(residual.grad, torch.full_like(residual, 2.0))
        assert torch.equal(branch.grad, torch.full_like(residual, 1.0 + factor))
        assert torch.equal(seen[0], torch.full_like(residual, factor))
        output.sum().backward()
        assert torch.equal(residual.grad, torch.full_like(residual, 3.0))

        residual, branch = leaves(device=device)
        gated_residual_add(residual, branch, **options).sum().backward()
        residual.grad.mul_(0.0)  # as an optimizer or a clipper does
        assert torch.equal(branch.grad, torch.full_like(branch, factor))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (((3, 4), (3, 5)), {}, ValueError, r"branch: expected residual's shape \(3, 4\), got \(3, 5\)"),
        (((3, 4), (4,)), {}, ValueError, "branch: expected residual's shape"),
        (((3, 4), (2, 5)), {"rows": [0, 1]}, ValueError, r"branch: expected shape \(K, 4\), got \(2, 5\)"),
        (((3, 4), (2, 4)), {"rows": [0]}, ValueError, r"rows: expected shape \(2,\) as branch has, got \(1,\)"),
        (((3, 4), (4, 4)), {"rows": [0, 1, 2, 0]}, ValueError, "rows: expected at most residual's 3, got 4"),
        (((3, 4), (2, 4)), {"rows": [0.0, 1.0]}, TypeError, "rows: expected dtype int64, got torch.float32"),
        (
            ((3, 4), (3, 4)),
            {"grad_scale": torch.ones(2)},
            ValueError,
            r"grad_scale: expected .* \(3,\), got shape \(2,\)",
        ),
        (((3, 4), (3, 4)), {"grad_scale": "2"}, TypeError, "grad_scale: expected a number or a tensor, got str"),
        (((3, 4), (3, 4)), {"grad_scale": torch.ones(3).int()}, TypeError, "grad_scale: expected a float dtype"),
    ],
)
def test_wrong_shapes(arguments, options, error, message):
    residual, branch = (torch.randn(shape) for shape in arguments)
    if "rows" in options:
        options = {"rows": torch.tensor(options["rows"])}
    with pytest.raises(error, match=message):
        gated_residual_add(residual, branch, **options)


@pytest.mark.parametrize(
    ("residual_dtype", "branch_dtype", "message"),
    [
        (
            torch.bfloat16,
            torch.float32,
            "residual: expected a dtype that holds branch's torch.float32, got torch.bfloat16",
        ),
        (torch.float16, torch.bfloat16, "residual: expected a dtype that holds"),
        (torch.int64, torch.int64, "residual: expected dtype float32, float16, bfloat16 or float64, got torch.int64"),
        (torch.float32, torch.int64, "branch: expected dtype"),
        (torch.complex64, torch.complex64, "residual: expected dtype"),
    ],
)
def test_wrong_dtypes(residual_dtype, branch_dtype, message):
    with pytest.raises(TypeError, match=message):
        gated_residual_add(torch.zeros(2, 3, dtype=residual_dtype), torch.zeros(2, 3, dtype=branch_dtype))


def test_wrong_device_and_leaf():
    residual, branch = leaves()
    with pytest.raises(ValueError, match="branch: expected on residual's device cpu, got meta"):
        gated_residual_add(residual, branch.to("meta"))
    with pytest.raises(ValueError, match="residual: expected a tensor that is no leaf"):
        gated_residual_add(residual, branch, inplace=True)


def test_rows_out_of_range(backend, device):
    if backend == "cuda":
        pytest.skip("a wrong index stops the program: test_on_gpu.py")
    residual, branch = torch.zeros(3, 4, device=device), torch.ones(2, 4, device=device)
    for rows in (torch.tensor([0, 3], device=device), torch.tensor([0, -1], device=device)):
        if backend == "triton":  # a GPU cannot raise: such a row is skipped and nothing is written outside
            output = raw.gated_residual_add(residual, branch, rows)
            assert output.sum().item() == 4.0
        else:
            with pytest.raises((IndexError, RuntimeError), match=r"index|rows"):
                raw.gated_residual_add(residual, branch, rows)


def test_threads_may_share_a_row(backend, device):
    """More elements than a thread takes, cut within a row."""
    residual, branch = torch.randn(5, 30001, device=device), torch.randn(3, 30001, device=device)
    rows, row_scale = torch.tensor([4, 0, 2], device=device), torch.tensor([2.0, 0.0, 0.5], device=device)
    expected = residual.index_add(0, rows, branch)
    assert torch.equal(raw.gated_residual_add(residual, branch, rows), expected)
    grad = raw.gated_residual_add_backward(residual, rows, row_scale, 1.0, torch.float32)
    assert torch.equal(grad, residual[rows] * row_scale[:, None])
    raw.gated_residual_add_(residual, branch, rows)
    assert torch.equal(residual, expected)
