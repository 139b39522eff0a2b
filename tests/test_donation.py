"""A backward writes into what its forward saved only where nobody can tell."""

import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from dropbp_kernels import donation
from dropbp_kernels.measure import PeakLiveBytes
from dropbp_kernels.ops import swiglu

pytestmark = pytest.mark.skipif(
    donation._counts_of_a_sole_owner() is None, reason="this PyTorch has no reference counts to tell owners by"
)


@pytest.fixture
def decisions(monkeypatch):
    """What the backwards of the test decided, in order."""
    found = []

    def decide(ctx):
        found.append(donation.is_sole_owner(ctx))
        return found[-1]

    monkeypatch.setattr("dropbp_kernels.ops.glu.is_sole_owner", decide)
    return found


def leaf():
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(3)).requires_grad_()


def expected(x):
    (grad,) = torch.autograd.grad((F.silu(x * 2) * (x + 1)).sum(), x)
    return grad


def test_overwrites_where_the_graph_alone_owns_the_inputs(decisions):
    x = leaf()
    swiglu(x * 2, x + 1, donate=True).sum().backward()
    assert decisions == [True]
    torch.testing.assert_close(x.grad, expected(x))


def test_gradients_lie_in_the_saved_buffers(decisions):
    x = leaf()
    gate = x * 2
    pointers, seen = [gate.data_ptr()], []
    gate.register_hook(lambda grad: seen.append(grad.data_ptr()))
    output = swiglu(gate, x + 1, donate=True)
    del gate
    output.sum().backward()
    assert decisions == [True]
    assert seen == pointers


def test_backward_allocates_nothing():
    peaks = {}
    for donate in (False, True):
        x = leaf()
        output = swiglu(x.clone(), x.clone(), donate=donate)  # whose backward is an alias
        grad = torch.ones_like(output)
        with PeakLiveBytes() as live:
            torch.autograd.grad(output, x, grad)
        peaks[donate] = live.peak_bytes // x.nbytes
    assert peaks[False] - peaks[True] == 2, peaks


def test_off_without_donate(decisions):
    x = leaf()
    swiglu(x * 2, x + 1).sum().backward()
    assert decisions == []


def holds_a_name(gate):
    return gate


def holds_a_container(gate):
    return {"activations": [gate]}


def holds_a_closure(gate):
    return lambda: gate


def holds_a_view(gate):
    return gate[1:]


def holds_a_detached_alias(gate):
    return gate.detach()


def holds_an_array(gate):
    return gate.detach().numpy()


def holds_a_capsule(gate):
    return torch.utils.dlpack.to_dlpack(gate.detach())


def holds_the_storage(gate):
    return gate.untyped_storage()


def holds_another_graph(gate):
    return gate * gate.detach()


HOLDERS = [
    holds_a_name,
    holds_a_container,
    holds_a_closure,
    holds_a_view,
    holds_a_detached_alias,
    holds_an_array,
    holds_a_capsule,
    holds_the_storage,
    holds_another_graph,
]


@pytest.mark.parametrize("which", ["gate", "up"])
@pytest.mark.parametrize("hold", HOLDERS)
def test_off_while_someone_holds_an_input(decisions, hold, which):
    x = leaf()
    gate, up = x * 2, x + 1
    before = {"gate": gate.tolist(), "up": up.tolist()}[which]
    held = hold({"gate": gate, "up": up}[which])
    pointer = {"gate": gate, "up": up}[which].data_ptr()
    output = swiglu(gate, up, donate=True)
    del gate, up
    output.sum().backward()
    assert decisions == [False]
    torch.testing.assert_close(x.grad, expected(x))
    if isinstance(held, torch.Tensor) and held.data_ptr() == pointer:
        assert held.tolist() == before


def test_off_while_the_graph_is_retained(decisions):
    x = leaf()
    output = swiglu(x * 2, x + 1, donate=True)
    for _ in range(2):
        x.grad = None
        output.sum().backward(retain_graph=True)
        torch.testing.assert_close(x.grad, expected(x))
    x.grad = None
    output.sum().backward()  # the last one may
    torch.testing.assert_close(x.grad, expected(x))
    assert decisions == [False, False, True]


def test_off_with_create_graph(decisions):
    x = leaf()
    torch.autograd.grad(swiglu(x * 2, x + 1, donate=True).sum(), x, create_graph=True)
    assert decisions == [False]


@pytest.mark.parametrize("pack", [lambda t: t, lambda t: t.detach(), lambda t: t.clone()])
def test_off_with_saved_tensor_hooks(decisions, pack):
    x, kept = leaf(), []

    def keep(tensor):
        kept.append(pack(tensor))
        return len(kept) - 1

    for unpack in (lambda index: kept[index], lambda index: kept[index].detach()):
        with torch.autograd.graph.saved_tensors_hooks(keep, unpack):
            output = swiglu(x * 2, x + 1, donate=True)
        before = [tensor.clone() for tensor in kept]
        output.sum().backward()
        assert all(torch.equal(*pair) for pair in zip(before, kept, strict=True))
        kept.clear()
    assert decisions == [False, False]


def test_off_with_hooks_that_came_later(decisions):
    x = leaf()
    output = swiglu(x * 2, x + 1, donate=True)
    kept = []
    for saved in output.grad_fn._raw_saved_tensors:
        saved.register_hooks(lambda tensor: kept.append(tensor.detach()) or len(kept) - 1, lambda index: kept[index])
    output.sum().backward()
    assert decisions == [False]
    torch.testing.assert_close(kept[0], x * 2)


def test_off_for_one_tensor_as_both_inputs(decisions):
    x = leaf()
    swiglu(*[x * 2] * 2, donate=True).sum().backward()
    assert decisions == [False]
    reference = leaf()
    (F.silu(reference * 2) * (reference * 2)).sum().backward()
    torch.testing.assert_close(x.grad, reference.grad)


def test_off_for_leaves_and_for_halves_of_one_tensor(decisions):
    x = leaf()
    swiglu(x, x + 1, donate=True).sum().backward()
    swiglu(*(x * 2).chunk(2, dim=-1), donate=True).sum().backward()
    assert decisions == [False, False]


def test_off_where_the_maker_saved_its_output(decisions):
    x = leaf()
    swiglu(x.exp(), x + 1, donate=True).sum().backward()
    assert decisions == [False]
    other = leaf()
    (F.silu(other.exp()) * (other + 1)).sum().backward()
    torch.testing.assert_close(x.grad, other.grad)


def test_forward_hooks_that_keep_activations_keep_them(decisions):
    gate_proj, up_proj = torch.nn.Linear(6, 8), torch.nn.Linear(6, 8)
    kept = []
    gate_proj.register_forward_hook(lambda module, args, output: kept.append(output))
    swiglu(gate_proj(leaf()), up_proj(leaf()), donate=True).sum().backward()
    assert decisions == [False]
    torch.testing.assert_close(kept[0], gate_proj(leaf()))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_right_under_checkpointing(decisions, use_reentrant):
    x = leaf()
    checkpoint(lambda x: swiglu(x * 2, x + 1, donate=True), x, use_reentrant=use_reentrant).sum().backward()
    torch.testing.assert_close(x.grad, expected(x))
    assert decisions == [use_reentrant]  # the other kind is made of saved-tensor hooks


def test_a_modified_input_is_still_an_error():
    x = leaf()
    gate = x * 2
    output = swiglu(gate, x + 1, donate=True)
    gate.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_counts_are_found_out_unseen(decisions):
    """The experiment runs in a thread of its own: no mode, hook or gradient of the caller sees it, nor a leak."""
    seen = []
    donation._counts_of_a_sole_owner.cache_clear()
    x = leaf()
    num_threads = threading.active_count()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t), PeakLiveBytes() as live:
        assert donation._counts_of_a_sole_owner() is not None
    assert not seen
    assert live.peak_bytes == 0
    assert threading.active_count() == num_threads
    with torch.no_grad():
        donation._counts_of_a_sole_owner.cache_clear()
        assert donation._counts_of_a_sole_owner() is not None
    gate = x * 2
    alive = weakref.ref(gate)
    output = swiglu(gate, x + 1, donate=True)
    del gate
    output.sum().backward()
    del output
    assert decisions == [True]
    assert alive() is None


@pytest.mark.parametrize("missing", ["_storage_Use_Count", "_autograd"])
def test_never_where_a_count_is_missing(decisions, monkeypatch, missing):
    donation._counts_of_a_sole_owner.cache_clear()
    with monkeypatch.context() as patch:
        if missing == "_autograd":
            patch.setattr(donation, "_is_last_use", lambda ctx: True)  # neither hooks nor retained graphs are seen
        else:
            patch.delattr(torch._C, missing)
        x = leaf()
        swiglu(x * 2, x + 1, donate=True).sum().backward()
    donation._counts_of_a_sole_owner.cache_clear()
    assert decisions == [False]
    torch.testing.assert_close(x.grad, expected(x))
