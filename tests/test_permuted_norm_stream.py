"""The stream that a permuted norm hands on: whose gradient its backward may write into, and whose it must copy."""

import gc

import pytest
import torch

from dropbp_kernels import ownership
from dropbp_kernels.measure import PeakLiveBytes
from dropbp_kernels.ops import permuted_residual_add, permuted_rms_norm
from dropbp_kernels.permutation import draw_permutation


def leaves(device="cpu"):
    """residual, weight, and a permutation of the samples."""
    residual, weight = torch.randn(4, 3, 5, device=device), torch.randn(5, device=device)
    permutation = draw_permutation(4, seed=0, step=0, branch=0, device=device)
    return residual.requires_grad_(), weight.requires_grad_(), permutation


def plain(residual, weight, permutation, num_kept):
    """permuted_rms_norm in plain PyTorch, whose stream is the residual itself."""
    x = residual[permutation]
    normed = weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    return normed[:num_kept], normed[num_kept:].detach(), residual


def test_outputs_hold_only_their_own_memory(backend, device):
    """What a kept branch saves must not keep the dropped rows alive."""
    residual, weight, permutation = leaves(device)
    kept, dropped, stream = permuted_rms_norm(residual, weight, permutation, 1)
    assert kept.untyped_storage().nbytes() == kept.nbytes
    assert dropped.untyped_storage().nbytes() == dropped.nbytes
    assert stream.data_ptr() == residual.data_ptr()


def stream_gradient(follow, device, prepare=lambda stream: None):
    """Run a norm whose stream goes on into follow(stream); (gradient that arrived, gradient that left)."""
    residual, weight, permutation = leaves(device)
    kept, _, stream = permuted_rms_norm(residual * 1, weight, permutation, 2)
    middle = kept.grad_fn.next_functions[0][0]
    left = []
    middle.register_prehook(lambda grads: left.append(grads[0].data_ptr()))
    arrived = []
    loss = follow(stream) + (kept * kept.detach()).sum()
    stream.grad_fn.register_prehook(lambda grads: arrived.append(grads[2].data_ptr()))
    prepare(stream)
    loss.backward()
    return arrived[0], left[0], residual.grad


def test_an_exclusive_gradient_is_written_in_place(backend, device):
    if ownership._counts_of_a_sole_owner() is None:
        pytest.skip("this torch does not count references")
    arrived, left, _ = stream_gradient(lambda stream: (stream * 2).square().sum(), device)
    assert arrived == left


def held_by_hook(held):
    return lambda stream: stream.register_hook(lambda grad: held.append(grad))


def test_a_gradient_that_somebody_holds_is_copied(backend, device):
    held = []
    arrived, left, _ = stream_gradient(lambda stream: (stream * 2).sum(), device, held_by_hook(held))
    assert arrived != left
    assert torch.equal(held[0], torch.full_like(held[0], 2.0))


@pytest.mark.parametrize("way", ["sum", "leaf", "branch", "view", "retain_grad", "inputs", "argument", "expanded"])
def test_no_gradient_of_anybody_else_changes(backend, device, way):
    """However the stream goes on, whatever else gets the same gradient gets the same numbers as without the norm."""
    residual, weight, permutation = leaves(device)
    other = torch.randn_like(residual).requires_grad_()
    factor = torch.randn_like(residual)

    def run(norm):
        for tensor in (residual, other):
            tensor.grad = None
        x, y = residual * 1, other * 1
        kept, _, stream = norm(x, weight, permutation, 2)
        kept_loss = (kept * kept.detach().clone()).sum()
        if way == "argument":
            grad = factor.clone()
            torch.autograd.backward((stream, kept_loss), (grad, torch.ones_like(kept_loss)))
            return grad, residual.grad
        if way == "expanded":
            (stream.sum() + kept_loss).backward()
            return residual.grad, residual.grad
        if way == "inputs":
            total = stream + y
            return torch.autograd.grad((total * factor).sum() + kept_loss, (total, y, residual))
        if way == "retain_grad":
            stream.retain_grad()
            ((stream * factor).sum() + kept_loss).backward()
            return stream.grad if norm is permuted_rms_norm else factor, residual.grad  # plain's is the whole sum
        if way == "view":
            total = stream.view(-1, 5) + y.view(-1, 5)
        elif way == "leaf":
            total = stream + other
        elif way == "branch":  # the branch's backward comes after the norm's
            total = stream + y.exp()
        else:
            total = stream + y
        total.register_hook(lambda grad: None)
        ((total.view(4, 3, 5) * factor).square().sum() + kept_loss).backward()
        return other.grad, residual.grad

    actual = [tensor.clone() for tensor in run(permuted_rms_norm)]
    expected = run(plain)
    torch.testing.assert_close(actual, list(expected))


def test_retained_graph_and_accumulation(backend, device):
    residual, weight, permutation = leaves(device)
    kept, _, stream = permuted_rms_norm(residual * 1, weight, permutation, 2)
    loss = (kept * kept.detach()).sum() + (stream * 2).square().sum() + residual.sum()
    loss.backward(retain_graph=True)
    first = residual.grad.clone()
    loss.backward()
    torch.testing.assert_close(residual.grad, 2 * first)


def test_a_chain_of_norms_shares_one_gradient(backend, device):
    """Through adds and norms the stream's gradient stays one tensor, and every norm's kept rows are in it."""
    *_, permutation = leaves(device)
    x = torch.randn(4, 3, 5, dtype=torch.float64, device=device, requires_grad=True)
    weight = torch.ones(5, dtype=torch.float64, device=device)
    pointers = []

    def collect(grad):
        gc.collect()  # Triton's interpreter leaves a cycle that holds the storages it was given

    def run(norm, add):
        stream = x * 1
        for place in range(3):
            order = permutation.roll(place)
            kept, dropped, stream = norm(stream, weight, order, 2)
            stream.register_hook(collect)
            stream = add(stream, kept.sin(), dropped.sin(), order)
            stream.register_hook(lambda grad: pointers.append(grad.data_ptr()))
        return torch.autograd.grad((stream * 2).square().sum(), x)[0]

    def plain_add(stream, kept, dropped, order):
        return stream.index_add(0, order, torch.cat((kept, dropped.detach())))

    actual = run(permuted_rms_norm, permuted_residual_add)
    if ownership._counts_of_a_sole_owner() is not None:
        assert len(set(pointers)) == 1
    expected = run(plain, plain_add)
    torch.testing.assert_close(actual, expected)


def test_backward_allocates_nothing(backend, device):
    residual, weight, permutation = leaves(device)
    stream = residual * 1
    kept, _, passed = permuted_rms_norm(stream, weight.detach(), permutation, 2)
    grad_kept = torch.randn_like(kept)
    grad = torch.randn_like(passed)
    torch.autograd.grad((kept, passed), stream, (grad_kept, grad), retain_graph=True)  # fills caches
    doubled = passed * 2
    with PeakLiveBytes() as live:
        torch.autograd.grad((kept, doubled), stream, (grad_kept, grad))
    scratch = grad.nbytes  # the product's gradient, into which the norm's goes
    copies = 0 if ownership._counts_of_a_sole_owner() is not None else grad.nbytes
    assert live.peak_bytes == scratch + copies


def test_writing_into_the_stream_is_refused(backend, device):
    residual, weight, permutation = leaves(device)
    _, _, stream = permuted_rms_norm(residual * 1, weight, permutation, 2)
    with pytest.raises(RuntimeError, match="view and is being modified inplace"):
        stream.add_(1.0)
