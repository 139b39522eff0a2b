"""What the two norms at the boundary of branches share: the four states of who is kept, what each saves and aliases.

Their numbers are tested in test_gated_residual_rms_norm.py and test_gated_residual_layer_norm.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dropbp_kernels.measure import num_autograd_nodes, saved_bytes
from dropbp_kernels.ops import gated_residual_layer_norm, gated_residual_rms_norm

raw = torch.ops.dropbp_kernels


def plain_rms(residual, branch, weight):
    x = residual + branch
    return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6), x


def plain_gemma(residual, branch, weight):
    return plain_rms(residual, branch, 1 + weight)


def plain_layer(residual, branch, weight, bias=None):
    x = residual + branch
    return F.layer_norm(x, weight.shape, weight, bias, 1e-5), x


@dataclass(frozen=True)
class Norm:
    function: Callable[..., Any]
    plain: Callable[..., Any]
    num_parameters: int
    num_statistics: int  # saved for each row
    backward: Any
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, *inputs, **options):
        return self.function(*inputs, **self.options, **options)

    def leaves(self, dtype=torch.float32, device="cpu"):
        """residual, branch, and the norm's parameters."""
        shapes = [(3, 2, 5)] * 2 + [(5,)] * self.num_parameters
        return [torch.randn(s, dtype=dtype, device=device, requires_grad=True) for s in shapes]


RMS = gated_residual_rms_norm, plain_rms, 1, 1, raw.gated_residual_rms_norm_backward.default
LAYER = raw.gated_residual_layer_norm_backward.default
NORMS = {
    "rms": Norm(*RMS),
    "gemma": Norm(RMS[0], plain_gemma, *RMS[2:], {"casting": "gemma"}),
    "layer": Norm(gated_residual_layer_norm, plain_layer, 2, 2, LAYER),
    "layer without bias": Norm(gated_residual_layer_norm, plain_layer, 1, 2, LAYER),
}
norms = pytest.mark.parametrize("norm", [pytest.param(norm, id=name) for name, norm in NORMS.items()])
both = pytest.mark.parametrize("norm", [pytest.param(NORMS[name], id=name) for name in ("rms", "layer")])
STATES = [(kept, next_kept) for kept in (True, False) for next_kept in (True, False)]
states = pytest.mark.parametrize(("is_kept", "next_kept"), STATES)


@norms
@pytest.mark.parametrize("grad_scale", [1.0, 2.5])
@states
def test_gradients_in_the_four_states(backend, device, norm, is_kept, next_kept, grad_scale):
    inputs = norm.leaves(device=device)
    residual, branch, *parameters = inputs
    grads = torch.randn(2, 3, 2, 5, device=device)
    used = branch if is_kept else branch.detach()
    normed, new_residual = norm(residual, used, *parameters, next_kept=next_kept, grad_scale=grad_scale)
    assert normed.requires_grad == next_kept
    ((normed * grads[0]).sum() + (new_residual * grads[1]).sum()).backward()
    actual = [tensor.grad for tensor in inputs]

    for tensor in inputs:
        tensor.grad = None
    normed_plain, new_plain = norm.plain(residual, used, *parameters)
    torch.testing.assert_close((normed, new_residual), (normed_plain, new_plain))
    if not next_kept:
        normed_plain = normed_plain.detach()
    ((normed_plain * grads[0]).sum() + (new_plain * grads[1]).sum()).backward()
    assert (branch.grad is not None) == is_kept
    assert all((tensor.grad is not None) == next_kept for tensor in parameters)
    if is_kept:
        branch.grad *= grad_scale
    torch.testing.assert_close(actual, [tensor.grad for tensor in inputs])


@both
@pytest.mark.parametrize("next_kept", [True, False])
def test_only_one_output_gets_a_gradient(backend, device, norm, next_kept):
    residual, branch, *parameters = norm.leaves(device=device)
    normed, new_residual = norm(residual, branch, *parameters, next_kept=next_kept)
    new_residual.sum().backward(retain_graph=True)
    assert torch.equal(residual.grad, torch.ones_like(residual))
    assert torch.equal(branch.grad, torch.ones_like(residual))
    assert all(tensor.grad is None for tensor in parameters)
    if next_kept:
        (grad,) = torch.autograd.grad(normed.square().sum(), residual)
        (expected,) = torch.autograd.grad(norm.plain(residual, branch, *parameters)[0].square().sum(), residual)
        torch.testing.assert_close(grad, expected)


@both
@pytest.mark.parametrize("is_kept", [True, False])
def test_next_dropped_saves_nothing_and_aliases(backend, device, norm, is_kept):
    residual, branch, *parameters = norm.leaves(device=device)
    inputs = (residual * 1, (branch * 1) if is_kept else branch.detach(), *parameters)
    before = num_autograd_nodes(*inputs[:2])
    with saved_bytes() as saved:
        normed, new_residual = norm(*inputs, next_kept=False)
    assert (saved.num_bytes, saved.num_tensors) == (0, 0)
    assert num_autograd_nodes(new_residual) - before == 1
    assert sum(node is not None for node, _ in new_residual.grad_fn.next_functions) == 1 + is_kept  # none of the norm's
    assert normed.grad_fn is None
    grad = torch.randn_like(residual)
    grads = torch.autograd.grad(new_residual, inputs[: 1 + is_kept], grad)
    assert all(tensor.data_ptr() == grad.data_ptr() for tensor in grads)


@both
def test_next_kept_saves_the_new_residual_and_the_statistics(backend, device, norm):
    residual, branch, *parameters = norm.leaves(device=device)
    parameters = [torch.nn.Parameter(tensor.detach()) for tensor in parameters]
    for is_kept in (True, False):
        with saved_bytes() as saved:
            _, new_residual = norm(residual, branch if is_kept else branch.detach(), *parameters)
        assert saved.num_bytes == new_residual.nbytes + 4 * norm.num_statistics * new_residual[..., 0].numel()


class _SeeBackward(TorchDispatchMode):
    """Notes which parameter gradients the backward op is asked for."""

    def __init__(self, norm):
        super().__init__()
        self.norm, self.wanted = norm, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is self.norm.backward:
            self.wanted.append(args[-self.norm.num_parameters :])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("norm", "trained"),
    [("rms", (True,)), ("rms", (False,)), *(("layer", (a, b)) for a in (True, False) for b in (True, False))],
)
def test_a_frozen_parameter_computes_no_gradient(backend, device, norm, trained):
    norm = NORMS[norm]
    residual, branch, *parameters = norm.leaves(device=device)
    parameters = [tensor.detach().requires_grad_(t) for tensor, t in zip(parameters, trained, strict=True)]
    wanted = [tensor for tensor in (residual, branch, *parameters) if tensor.requires_grad]
    with _SeeBackward(norm) as seen:
        grads = torch.autograd.grad(norm(residual, branch, *parameters)[0].square().sum(), wanted)
    assert seen.wanted == [trained]
    expected = torch.autograd.grad(norm.plain(residual, branch, *parameters)[0].square().sum(), wanted)
    torch.testing.assert_close(grads, expected)


@pytest.mark.parametrize(("norm", "place"), [("rms", 0), ("layer", 0), ("layer", 1)])
def test_only_a_parameter_is_trained(backend, device, norm, place):
    norm = NORMS[norm]
    residual, branch, *parameters = (tensor.detach() for tensor in norm.leaves(device=device))
    parameters[place].requires_grad_()
    normed, _ = norm(residual, branch, *parameters)
    assert not norm(residual, branch, *parameters, next_kept=False)[0].requires_grad
    (grad,) = torch.autograd.grad(normed.square().sum(), parameters[place])
    (expected,) = torch.autograd.grad(norm.plain(residual, branch, *parameters)[0].square().sum(), parameters[place])
    torch.testing.assert_close(grad, expected)


@both
@pytest.mark.parametrize("next_kept", [True, False])
def test_gradients_share_no_memory_that_is_written(backend, device, norm, next_kept):
    residual, branch, *parameters = norm.leaves(device=device)
    inputs = residual * 1, branch * 1
    seen = [[], []]
    for tensor, grads in zip(inputs, seen, strict=True):
        tensor.register_hook(lambda grad, grads=grads: grads.append(grad.clone()))
    normed, new_residual = norm(*inputs, *parameters, next_kept=next_kept)
    loss = (normed * normed.detach()).sum() + new_residual.square().sum() + (residual + 2 * branch).sum()
    loss.backward(retain_graph=True)
    assert torch.equal(seen[0][0], seen[1][0])
    assert torch.equal(residual.grad, seen[0][0] + 1)
    assert torch.equal(branch.grad, seen[0][0] + 2)
    loss.backward()
    assert torch.equal(seen[0][1], seen[0][0])
    torch.testing.assert_close(residual.grad, 2 * (seen[0][0] + 1))

    residual, branch, *parameters = norm.leaves(device=device)
    norm(residual, branch, *parameters, next_kept=next_kept)[1].sum().backward()
    residual.grad.mul_(0.0)  # as an optimizer or a clipper does
    assert torch.equal(branch.grad, torch.ones_like(branch))


@both
def test_writing_into_a_saved_output_is_caught(backend, device, norm):
    normed, new_residual = norm(*norm.leaves(device=device))
    new_residual.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        normed.sum().backward()


@both
def test_mixed_dtypes(backend, device, norm):
    residual, *others = norm.leaves(device=device)
    others = [tensor.detach().bfloat16().requires_grad_() for tensor in others]
    for next_kept in (True, False):
        normed, new_residual = norm(residual, *others, next_kept=next_kept)
        assert (normed.dtype, new_residual.dtype) == (torch.bfloat16, torch.float32)
        grads = torch.autograd.grad(normed.sum() + new_residual.sum(), (residual, others[0]))
        assert [grad.dtype for grad in grads] == [torch.float32, torch.bfloat16]
        assert torch.equal(grads[0].bfloat16(), grads[1])


@both
@pytest.mark.parametrize(
    ("shapes", "options", "error", "message"),
    [
        (((3, 4), (3, 5), (4,)), {}, ValueError, r"branch: expected residual's shape \(3, 4\), got \(3, 5\)"),
        (((3, 4), (3, 4), (5,)), {}, ValueError, r"weight: expected shape \(4,\), got \(5,\)"),
        (((3, 4), (3, 4), (1, 4)), {}, ValueError, r"weight: expected shape \(4,\), got \(1, 4\)"),
        (((), (), (1,)), {}, ValueError, "weight: expected shape"),
        (((3, 4), (3, 4), (4,)), {"grad_scale": torch.ones(3)}, TypeError, "grad_scale: expected a number, got Tensor"),
    ],
)
def test_wrong_shapes_and_options(norm, shapes, options, error, message):
    with pytest.raises(error, match=message):
        norm(*(torch.randn(shape) for shape in shapes), **options)


@both
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
def test_wrong_dtypes(norm, dtypes, message):
    shapes = (2, 3), (2, 3), (3,)
    with pytest.raises(TypeError, match=message):
        norm(*(torch.zeros(s, dtype=dtype) for s, dtype in zip(shapes, dtypes, strict=True)))


@both
def test_wrong_device(norm):
    residual, branch, weight, *_ = norm.leaves()
    with pytest.raises(ValueError, match="branch, weight: expected on cpu, got cpu, meta"):
        norm(residual, branch, weight.to("meta"))
