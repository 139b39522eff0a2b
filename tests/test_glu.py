"""swiglu and geglu: activation(gate) * up, saved inputs only, in place where nobody else looks."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inputs import LAYOUTS, make
from tolerances import assert_as_exact

from dropbp_kernels import reference
from dropbp_kernels.measure import num_autograd_nodes, saved_bytes
from dropbp_kernels.ops import geglu, swiglu

# NumPy, in Triton's interpreter.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")

raw = torch.ops.dropbp_kernels

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
PLAIN = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}
ACTIVATIONS = list(PLAIN)
PUBLIC = {"silu": swiglu, "gelu": geglu, "gelu_tanh": lambda *a, **k: geglu(*a, approximate="tanh", **k)}


def plain(gate, up, activation):
    """The op in plain PyTorch."""
    return PLAIN[activation](gate) * up


def plain_backward(grad, gate, up, activation):
    gate, up = gate.detach().clone().requires_grad_(), up.detach().clone().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(plain(gate, up, activation), (gate, up), grad)


def largest(tensor):
    return tensor.abs().max().item() if tensor.numel() else 0.0


def assert_same(actual, expected, backend):
    """Bit for bit, but for the reference: PyTorch's own functions may differ in the last bit between layouts."""
    if backend == "reference":
        torch.testing.assert_close(actual, expected)
    else:
        assert torch.equal(actual, expected)


def check(grad, gate, up, activation, backend):
    """All four raw ops against float64."""
    output = raw.glu(gate, up, activation)
    assert output.is_contiguous()
    wide = [tensor.double() for tensor in (grad, gate, up)]
    exact = plain(*wide[1:], activation)
    assert_as_exact(output, plain(gate, up, activation), exact, "value", largest(exact))
    target = gate.clone()
    raw.glu_(target, up, activation)
    assert_same(target, output, backend)

    grads = raw.glu_backward(grad, gate, up, activation)
    eager, exact = plain_backward(grad, gate, up, activation), plain_backward(*wide, activation)
    # grad_gate is grad * up times a slope that cancels where it is small.
    magnitudes = largest(wide[0] * wide[2]), largest(exact[1])
    names = ("grad_gate", "grad_up")
    for ours, theirs, truth, name, magnitude in zip(grads, eager, exact, names, magnitudes, strict=True):
        assert ours.is_contiguous()
        assert_as_exact(ours, theirs, truth, name, max(magnitude, largest(truth)))
    targets = gate.clone(), up.clone()
    raw.glu_backward_(grad, *targets, activation)
    assert_same(targets[0], grads[0], backend)
    assert_same(targets[1], grads[1], backend)


def test_reference_by_hand():
    # sigmoid(log 3) = 3/4; the normal distribution function at 1 is 0.8413447461 and its density 0.2419707245.
    gate, up = torch.tensor([0.0, math.log(3)], dtype=torch.float64), torch.tensor([5.0, 8.0], dtype=torch.float64)
    assert reference.glu_reference(gate, up, "silu").tolist() == pytest.approx([0.0, 6 * math.log(3)])
    grads = reference.glu_backward_reference(torch.ones_like(gate), gate, up, "silu")
    assert grads[0].tolist() == pytest.approx([2.5, 8 * (0.75 + math.log(3) * 0.75 * 0.25)])
    assert grads[1].tolist() == pytest.approx([0.0, 0.75 * math.log(3)])

    gate, up = torch.tensor([1.0, -1.0, 0.0]).double(), torch.tensor([2.0, 2.0, 2.0]).double()
    assert reference.glu_reference(gate, up, "gelu").tolist() == pytest.approx([1.6826894921, -0.3173105079, 0.0])
    grads = reference.glu_backward_reference(torch.ones_like(gate), gate, up, "gelu")
    assert grads[0].tolist() == pytest.approx([2.1666309412, -0.1666309412, 1.0])
    # tanh(sqrt(2 / pi) * 1.044715) = 0.6823840; 1 + that, halved, is 0.8411920.
    assert reference.glu_reference(gate, up, "gelu_tanh").tolist() == pytest.approx([1.6823840, -0.3176160, 0.0], 1e-6)
    copies = gate.clone(), up.clone()
    reference.glu__reference(copies[0], copies[1], "gelu")
    assert torch.equal(copies[0], reference.glu_reference(gate, up, "gelu"))
    with pytest.raises(ValueError, match="activation: expected silu, gelu or gelu_tanh, got relu"):
        reference.glu_reference(gate, up, "relu")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_slope_is_the_derivative(activation):
    x = torch.linspace(-30, 30, 121, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(plain(x, torch.ones_like(x), activation).sum(), x)
    slope, _ = reference.glu_backward_reference(torch.ones_like(x), x.detach(), torch.ones_like(x), activation)
    torch.testing.assert_close(slope, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 63), (2, 5, 1023), (7,), (1, 1, 1), (4, 2, 0), (0, 5), ()])
def test_matches_float64(backend, device, poisoned, shape, dtype, activation):
    grad, gate, up = (make(shape, dtype, device=device) for _ in range(3))
    check(grad, 3 * gate, up, activation, backend)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape_stride_and_dtype(backend, device, data):
    shape = data.draw(st.lists(st.integers(0, 6), max_size=3), label="shape")
    shape = (*shape, data.draw(st.integers(0, 70), label="width"))
    dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
    layouts = [data.draw(st.sampled_from([*LAYOUTS, "packed"]), label="layout") for _ in range(3)]
    tensors = []
    for layout in layouts:
        if layout == "packed":  # the second half of a projection of twice the width
            tensors.append(make((*shape[:-1], 2 * shape[-1]), dtype, device=device)[..., shape[-1] :])
        else:
            tensors.append(make(shape, dtype, layout, device))
    check(*tensors, data.draw(st.sampled_from(ACTIVATIONS), label="activation"), backend)


def test_halves_of_a_packed_projection_are_not_copied():
    """Strides are handed to the kernels: nothing but the results is allocated."""
    packed = torch.randn(4, 3, 128)
    gate, up = packed.chunk(2, dim=-1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        raw.glu(gate, up, "silu")
        raw.glu(gate[:, :1], up[:, :1], "silu")
        raw.glu_backward(gate, gate, up, "silu")
        raw.glu_(gate, up, "silu")
        raw.glu_backward_(up, gate, up, "silu")
    names = {event.name for event in profile.events()}
    assert not names & {"aten::contiguous", "aten::clone", "aten::copy_"}, names


def test_strides_of_an_empty_result_are_those_of_its_fake(backend, device):
    empty = torch.empty(3, 0, device=device)
    assert raw.glu(empty, empty, "silu").stride() == torch.empty(3, 0, device="meta").stride()


def test_rows_at_uneven_distances(backend, device):
    gate, up = torch.randn(3, 4, 8, device=device)[:, 1:3, :5], torch.randn(3, 2, 5, device=device)
    torch.testing.assert_close(raw.glu(gate, up, "silu"), plain(gate, up, "silu"))


def test_in_place_writes_into_strided_memory(backend, device):
    memory = torch.randn(5, 8, device=device)
    for gate in (memory.t()[1:5:2], memory[:, 4:], memory[1:4, 2:7].unsqueeze(0)):
        before, up = memory.clone(), torch.randn(gate.shape, device=device)
        expected = plain(gate, up, "silu")
        raw.glu_(gate, up, "silu")
        torch.testing.assert_close(gate, expected)
        gate.zero_()
        outside = memory != 0
        assert outside.sum() == memory.numel() - gate.numel()
        assert torch.equal(memory[outside], before[outside])
        memory.normal_()
    if device.type == "cpu":  # on a GPU nobody says which of two writes stays, of PyTorch's own copy either
        # Rows that share elements: what a shared one was is read for both, and the last row's value stays.
        for distance in (5, 7):
            before, up = memory.clone(), torch.randn(3, 8, device=device)
            rows = memory.as_strided((3, 8), (distance, 1))
            before.as_strided((3, 8), (distance, 1)).copy_(plain(rows, up, "silu"))
            raw.glu_(rows, up, "silu")
            torch.testing.assert_close(memory, before)
    gate, up = memory[:, :4], memory[:, 4:]  # both halves are written
    grads = raw.glu_backward(up.clone(), gate, up, "gelu")
    raw.glu_backward_(up.clone(), gate, up, "gelu")
    assert torch.equal(memory, torch.cat(grads, dim=1))


def test_in_place_on_memory_shared_by_rows_is_refused(backend, device):
    gate, up = torch.randn(1, 4, device=device).expand(3, 4), torch.randn(3, 4, device=device)
    with pytest.raises(RuntimeError, match="memory"):
        raw.glu_(gate, up, "silu")
    with pytest.raises(RuntimeError, match="memory"):
        raw.glu_backward_(up, up.clone(), gate, "silu")
    for rows, columns in ((3, 0), (1, 4)):  # nothing is shared
        raw.glu_(gate[:rows, :columns], up[:rows, :columns], "silu")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_extreme_values(backend, device, activation):
    """Large gates give the limits, not NaN; infinity times zero is NaN, as in PyTorch."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        big = torch.finfo(dtype).max
        gate = torch.tensor([-big, -1e4, -104.0, -89.0, big, 1e4, 104.0, -0.0], dtype=dtype, device=device)
        one = torch.ones_like(gate)
        value, (slope, _) = raw.glu(gate, one, activation), raw.glu_backward(one, gate, one, activation)
        torch.testing.assert_close(value, gate.clamp(min=0), rtol=0, atol=0 if dtype == torch.float16 else 1e-30)
        expected = torch.tensor([0.0] * 4 + [1.0] * 3 + [0.5], dtype=dtype, device=device)
        torch.testing.assert_close(slope, expected, rtol=0, atol=1e-7)
        gate = torch.tensor([float("inf"), float("-inf"), float("nan"), 1.0, 1.0], dtype=dtype, device=device)
        up = torch.tensor([1.0, 1.0, 1.0, float("inf"), float("nan")], dtype=dtype, device=device)
        value = raw.glu(gate, up, activation)
        assert value[0] == value[3] == float("inf")
        assert value[[1, 2, 4]].isnan().all()
        assert raw.glu_backward(torch.ones_like(gate), gate, up, activation)[0][[2, 4]].isnan().all()


def test_float32_has_no_polynomial_of_16_bits(backend, device):
    gate = torch.linspace(-4, 4, 1001, device=device)
    value = raw.glu(gate, torch.ones_like(gate), "silu")
    torch.testing.assert_close(value.double(), F.silu(gate.double()), rtol=1e-6, atol=0)


def test_a_row_does_not_depend_on_its_place(backend, device):
    """Vectors, ends of rows and threads: an element gives the same bits wherever it stands."""
    row = make((1, 1031), torch.float32, device=device)
    if backend == "reference":
        pytest.skip("PyTorch's own vectors and ends of vectors differ in the last bit")
    many = row.expand(70, 1031).contiguous()
    for activation in ACTIVATIONS:
        output = raw.glu(many, many, activation)
        assert torch.equal(output, raw.glu(row, row, activation).expand(70, 1031))
        shifted = torch.cat((row[:, 3:], row[:, :3]), dim=1)
        assert torch.equal(raw.glu(shifted, shifted, activation)[:, :-3], output[:1, 3:])


def test_indices_beyond_2_31(backend, device):
    if device.type == "cuda" and torch.cuda.mem_get_info()[0] < 16e9:
        pytest.skip("needs 16 GB of GPU memory")
    # Two rows of 4 GB that nobody touches but for their ends: the system hands out pages on first use.
    memory = torch.empty(2, 2**31 + 64, dtype=torch.float16, device=device)
    gate = memory[:, -48:]
    gate.fill_(1.0)
    output = raw.glu(gate, gate, "silu")
    torch.testing.assert_close(output, torch.full_like(output, 1 / (1 + math.exp(-1))))
    raw.glu_(gate, output, "silu")
    torch.testing.assert_close(gate, output * output)


def test_unknown_activation(backend, device):
    one = torch.ones(2, device=device)
    if backend == "triton":
        pytest.skip("the launcher trusts ops/glu.py")
    with pytest.raises((ValueError, RuntimeError), match="activation: expected silu, gelu or gelu_tanh, got relu"):
        raw.glu(one, one, "relu")


# The public functions.


def leaves(dtype=torch.float32, device="cpu"):
    return tuple(torch.randn(3, 2, 5, device=device).to(dtype).requires_grad_() for _ in range(2))


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients(backend, device, activation, donate):
    gate, up = leaves(device=device)
    grad = torch.randn(3, 2, 5, device=device)
    output = PUBLIC[activation](gate * 1, up * 1, donate=donate)
    torch.testing.assert_close(output, plain(gate, up, activation))
    output.backward(grad)
    expected = plain_backward(grad, gate, up, activation)
    torch.testing.assert_close((gate.grad, up.grad), expected)


def test_saves_its_two_inputs_exactly(backend, device):
    gate, up = leaves(torch.bfloat16, device)
    for function in PUBLIC.values():
        with saved_bytes() as saved:
            output = function(gate * 1, up * 1, donate=True)
        assert (saved.num_bytes, saved.num_tensors) == (2 * gate.nbytes, 2)
        assert num_autograd_nodes(output) == 3
    packed = torch.randn(3, 8, device=device, requires_grad=True)
    with saved_bytes() as saved:
        swiglu(*(packed * 1).chunk(2, dim=-1))
    assert saved.num_bytes == packed.nbytes
    with saved_bytes() as saved:  # plain PyTorch saves silu(gate) too
        F.silu(gate * 1) * (up * 1)
    assert saved.num_bytes == 3 * gate.nbytes


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_dropped_is_in_place_and_saves_nothing(backend, device, activation):
    gate, up = leaves(device=device)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context, saved_bytes() as saved:
            owned = gate * 1
            expected = PUBLIC[activation](owned, up)
            version = None if owned.is_inference() else owned._version
            output = PUBLIC[activation](owned, up, inplace=True)
            assert output is owned
            assert torch.equal(output, expected)
            assert version is None or owned._version > version
        assert saved.num_tensors == 0
    with torch.no_grad():
        assert not swiglu(gate, up).requires_grad  # not in place: nothing is written


def test_in_place_is_refused_where_a_gradient_is_required(backend, device):
    gate, up = leaves(device=device)
    message = "gate, up: expected tensors that require no gradient for inplace=True, got gate.requires_grad="
    with pytest.raises(ValueError, match=message + "True, up.requires_grad=True"):
        swiglu(gate, up, inplace=True)
    with pytest.raises(ValueError, match=message + "False, up.requires_grad=True"):
        swiglu(gate.detach(), up, inplace=True)
    with torch.no_grad(), pytest.raises(ValueError, match=message + "True"):  # someone's parameter, or saved
        geglu(gate, up, inplace=True)
    assert torch.equal(swiglu(gate.detach().clone(), up.detach(), inplace=True), swiglu(gate, up))


def test_in_place_on_a_saved_tensor_is_caught(backend, device):
    gate, up = leaves(device=device)
    constant = torch.randn(3, 2, 5, device=device)
    output = gate * constant  # saves constant
    swiglu(constant, up.detach(), inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_only_one_input_needs_a_gradient(backend, device):
    gate, up = leaves(device=device)
    for donate in (False, True):
        (grad,) = torch.autograd.grad(swiglu(gate.detach() * 1, up * 1, donate=donate).sum(), up)
        torch.testing.assert_close(grad, F.silu(gate))
        (grad,) = torch.autograd.grad(swiglu(gate * 1, up.detach() * 1, donate=donate).sum(), gate)
        torch.testing.assert_close(grad, plain_backward(torch.ones_like(gate), gate, up, "silu")[0])


@pytest.mark.parametrize(
    ("gate", "up", "error", "message"),
    [
        (torch.ones(3, 4), torch.ones(3, 5), ValueError, r"up: expected gate's shape \(3, 4\), got \(3, 5\)"),
        (torch.ones(3, 4), torch.ones(4), ValueError, "up: expected gate's shape"),
        (torch.ones(3), torch.ones(3).half(), TypeError, "up: expected gate's dtype torch.float32, got torch.float16"),
        (torch.ones(3).int(), torch.ones(3).int(), TypeError, "gate: expected dtype float32, .* got torch.int32"),
        (torch.ones(3), torch.ones(3, device="meta"), ValueError, "up: expected on gate's device cpu, got meta"),
    ],
)
def test_wrong_inputs(gate, up, error, message):
    for function in (swiglu, geglu):
        with pytest.raises(error, match=message):
            function(gate, up)


def test_wrong_approximation():
    with pytest.raises(ValueError, match="approximate: expected one of none, tanh, got 'exact'"):
        geglu(torch.ones(2), torch.ones(2), approximate="exact")
