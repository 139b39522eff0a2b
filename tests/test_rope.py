"""rope: pairs of channels turned by their position's angle; in place without autograd; turned back in the backward."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inputs import LAYOUTS, make
from tolerances import assert_as_exact

from dropbp_kernels import reference
from dropbp_kernels.measure import num_autograd_nodes, saved_bytes
from dropbp_kernels.ops import rope

raw = torch.ops.dropbp_kernels
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def plain(x, cos, sin):
    """As transformers' models do, on the first R channels."""
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    return torch.cat((turned * cos + torch.cat((-second, first), dim=-1) * sin, rest), dim=-1)


def plain_backward(grad, x, cos, sin):
    x = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(plain(x, cos, sin), x, grad)[0]


def tables(shape, dtype, device="cpu", layouts=("contiguous", "contiguous")):
    """Not of an angle: the two halves differ, and cos is no cosine of sin's angle."""
    return (make(shape, dtype, layout, device) for layout in layouts)


def check(grad, x, cos, sin, backend):
    """Both raw ops and the backward against float64."""
    wide = [tensor.double() for tensor in (grad, x, cos, sin)]
    narrow_cos, narrow_sin = cos.to(x.dtype), sin.to(x.dtype)
    output = raw.rope(x, cos, sin, False)
    assert output.is_contiguous()
    magnitude = 4 * max(wide[1].abs().max().item(), 1) if x.numel() else 1
    assert_as_exact(output, plain(x, narrow_cos, narrow_sin).to(x.dtype), plain(*wide[1:]), "output", magnitude)
    target = x.clone()
    raw.rope_(target, cos, sin)
    assert torch.equal(target, output)
    back = raw.rope(grad, cos, sin, True)
    assert back.is_contiguous()
    eager = plain_backward(grad, x, narrow_cos, narrow_sin)
    assert_as_exact(back, eager, plain_backward(*wide), "gradient", magnitude)


def test_reference_by_hand():
    # A quarter turn of (3, 5) is (-5, 3); half a turn of (1, 2) is (-1, -2); the last channel stays.
    x = torch.tensor([3.0, 1.0, 5.0, 2.0, 7.0]).double().view(1, 1, 1, 5)
    cos, sin = torch.tensor([[0.0, -1.0, 0.0, -1.0]]).double(), torch.tensor([[1.0, 0.0, 1.0, 0.0]]).double()
    turned = reference.rope_reference(x, cos, sin, False)
    assert turned.flatten().tolist() == [-5.0, -1.0, 3.0, -2.0, 7.0]
    assert torch.equal(reference.rope_reference(turned, cos, sin, True), x)
    copy = x.clone()
    reference.rope__reference(copy, cos, sin)
    assert torch.equal(copy, turned)


def test_keeps_lengths_and_relative_positions():
    """What the method is for: scores depend on the distance of two positions."""
    angle = torch.outer(torch.arange(8.0).double(), 10.0 ** -torch.arange(3.0).double()).repeat(1, 2)
    query, key = (torch.randn(6, dtype=torch.float64).expand(1, 8, 1, 6) for _ in range(2))
    query, key = (rope(x, angle.cos(), angle.sin()).view(8, 6) for x in (query, key))
    torch.testing.assert_close(query.norm(dim=-1), query[0].norm().expand(8))
    scores = query @ key.T
    torch.testing.assert_close(scores[2:, 2:], scores[:-2, :-2])


@pytest.mark.parametrize("wide_tables", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "channels"),
    [
        ((2, 3, 4, 32), 32),
        ((1, 5, 2, 80), 32),
        ((2, 2, 3, 7), 6),
        ((1, 1, 1, 2), 2),
        ((2, 0, 1, 4), 4),
        ((2, 3, 0, 4), 4),
        ((1, 2, 1, 3), 0),
    ],
)
def test_matches_float64(backend, device, poisoned, shape, channels, dtype, wide_tables):
    table_dtype = torch.promote_types(dtype, torch.float32) if wide_tables else dtype
    cos, sin = tables((shape[1], channels), table_dtype, device)
    check(make(shape, dtype, device=device), make(shape, dtype, device=device), cos, sin, backend)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape_stride_and_dtype(backend, device, data):
    shape = [data.draw(st.integers(1, 4), label="size") for _ in range(3)]
    shape.append(data.draw(st.integers(1, 70), label="head_dim"))
    channels = 2 * data.draw(st.integers(0, shape[-1] // 2), label="half")
    dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
    operands = []
    for _ in range(2):
        layout = data.draw(st.sampled_from([*LAYOUTS, "heads first"]), label="layout")
        if layout == "heads first":  # what attention hands back
            operands.append(make((shape[0], shape[2], shape[1], shape[3]), dtype, device=device).transpose(1, 2))
        else:
            operands.append(make(shape, dtype, layout, device))
    samples = data.draw(st.sampled_from([(), (1,), (shape[0],)]), label="samples")
    layouts = [data.draw(st.sampled_from(LAYOUTS), label="layout of a table") for _ in range(2)]
    cos, sin = tables((*samples, shape[1], channels), dtype, device, layouts)
    check(*operands, cos, sin, backend)


def test_heads_are_read_where_they_lie():
    """Heads of a packed projection, and a gradient with the heads first: nothing but the result is allocated."""
    packed = torch.randn(2, 5, 12, 8)
    cos, sin = tables((5, 8), torch.float32)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        raw.rope(packed[:, :, :4], cos, sin, False)
        raw.rope(torch.randn(2, 4, 5, 8).transpose(1, 2), cos, sin, True)
        raw.rope_(packed[:, :, 4:8], cos, sin)
    names = {event.name for event in profile.events()}
    assert not names & {"aten::contiguous", "aten::clone", "aten::copy_"}, names


def test_kept_saves_the_tables_alone(backend, device):
    x = make((2, 6, 4, 16), torch.float32, device=device).requires_grad_()
    cos, sin = tables((6, 16), torch.float32, device)
    with saved_bytes() as saved:
        output = rope(x, cos, sin)
    assert saved.num_bytes == 2 * 6 * 16 * 4
    assert num_autograd_nodes(output) == 1
    grad = torch.randn_like(output)
    torch.testing.assert_close(torch.autograd.grad(output, x, grad)[0], plain_backward(grad, x, cos, sin))


def test_dropped_writes_in_place(backend, device):
    x = make((2, 6, 4, 16), torch.bfloat16, device=device)
    cos, sin = tables((6, 16), torch.bfloat16, device)
    expected, pointer, version = rope(x, cos, sin), x.data_ptr(), x._version
    output = rope(x, cos, sin, inplace=True)
    assert output is x
    assert x.data_ptr() == pointer
    assert x._version > version
    assert torch.equal(x, expected)


def test_who_saved_x_is_told_that_it_changed():
    weight, x = torch.ones(1, requires_grad=True), torch.randn(1, 2, 1, 4)
    output = weight * x
    rope(x, *tables((2, 4), torch.float32), inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


X = torch.zeros(2, 3, 4, 8)
TABLE = torch.zeros(3, 8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X.int(), TABLE, TABLE), TypeError, "x: expected dtype float32, .* or float64, got torch.int32"),
        ((X[0], TABLE, TABLE), ValueError, r"x: expected shape \(batch, seq, heads, head_dim\), got \(3, 4, 8\)"),
        ((X, TABLE.half(), TABLE.half()), TypeError, "cos: expected x's dtype torch.float32 or .*, got torch.float16"),
        ((X.half(), TABLE, TABLE.half()), TypeError, "sin: expected x's dtype torch.float16 or .*, as cos, got"),
        ((X, TABLE[:2], TABLE[:2]), ValueError, r"cos: expected shape \(seq, R\) or .*, got \(2, 8\)"),
        ((X, TABLE, TABLE[:, :6]), ValueError, r"sin: expected shape .* alike .*, got \(3, 6\)"),
        ((X, TABLE.expand(3, 3, 8), TABLE.expand(3, 3, 8)), ValueError, "cos: expected 1 or 2 samples, got 3"),
        ((X, TABLE[:, :5], TABLE[:, :5]), ValueError, "cos: expected an even R <= 8 of channels, got 5"),
        ((X, torch.zeros(3, 10), torch.zeros(3, 10)), ValueError, "cos: expected an even R <= 8 of channels, got 10"),
        ((X, TABLE.to("meta"), TABLE.to("meta")), ValueError, "cos: expected on x's device cpu, got meta"),
        ((X, TABLE, TABLE.clone().requires_grad_()), ValueError, "sin: expected a constant, got"),
    ],
)  # fmt: skip
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        rope(*arguments)


def test_in_place_refuses_what_it_cannot_undo():
    with pytest.raises(ValueError, match="x: expected a tensor that requires no gradient for inplace=True"):
        rope(X.clone().requires_grad_(), TABLE, TABLE, inplace=True)
    with pytest.raises(RuntimeError, match=r"memory of their own|single memory location"):
        rope(torch.zeros(1, 3, 1, 8).expand(2, 3, 4, 8), TABLE, TABLE, inplace=True)
