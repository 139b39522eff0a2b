"""A backward writes into what its forward saved only where nobody can tell. swiglu does.

Gradients that a backward was given: test_ownership_of_gradients.py.
"""

import threading
import time
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from owners import HOLDERS, NEEDS_COUNTS, leaf, norm_overwrites
from torch.utils.checkpoint import checkpoint

from dropbp_kernels import ownership
from dropbp_kernels.measure import PeakLiveBytes
from dropbp_kernels.ops import swiglu

pytestmark = NEEDS_COUNTS


@pytest.fixture
def decisions(monkeypatch):
    """What the backwards of the test decided, in order."""
    found = []

    def decide(ctx):
        found.append(ownership.owns_saved_tensors(ctx))
        return found[-1]

    monkeypatch.setattr("dropbp_kernels.ops.glu.owns_saved_tensors", decide)
    return found


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


@pytest.mark.parametrize("which", ["gate", "up"])
@pytest.mark.parametrize("holder", HOLDERS)
def test_off_while_someone_holds_an_input(decisions, holder, which):
    x = leaf()
    gate, up = x * 2, x + 1
    before = {"gate": gate.tolist(), "up": up.tolist()}[which]
    held = HOLDERS[holder]({"gate": gate, "up": up}[which])
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


def test_off_for_memory_that_is_not_pytorchs(decisions):
    array = np.ones((4, 6), np.float32)
    swiglu(torch.from_numpy(array), leaf() + 1, donate=True).sum().backward()
    assert decisions == [False]
    assert (array == 1).all()


def test_off_where_elements_overlap(decisions):
    gate = torch.empty(0).set_(torch.ones(6).untyped_storage(), 0, (4, 6), (0, 1))
    x = leaf()
    output = swiglu(gate, x * 2, donate=True)
    del gate
    output.sum().backward()
    assert decisions == [False]
    torch.testing.assert_close(x.grad, torch.full_like(x, 2 * F.silu(torch.ones(())).item()))


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


def test_the_experiment_runs_once_for_all_threads(monkeypatch):
    runs = []
    alone = ownership._counts_of_a_sole_owner()
    monkeypatch.setattr(ownership, "_experiment", lambda references: time.sleep(0.05) or runs.append(1) or alone)
    ownership._found_out.cache_clear()
    threads = [threading.Thread(target=ownership._counts_of_a_sole_owner) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(runs) == 1


def test_a_debugger_does_not_change_the_counts():
    """Its copies of local variables are references: counts found out under one would take a shared tensor for free."""
    alone, before = ownership._counts_of_a_sole_owner(), threading.gettrace()

    def trace(frame, event, arg):
        copies = frame.f_locals  # which the frame keeps, up to Python 3.12
        return trace if copies is not None else None

    ownership._found_out.cache_clear()
    threading.settrace(trace)
    try:
        assert ownership._counts_of_a_sole_owner() == alone
    finally:
        threading.settrace(before)


@pytest.fixture
def compiled_elsewhere():
    """Starts a thread that waits in a compiled function, and stops it."""
    entered, leave = threading.Event(), threading.Event()

    def function(x):
        y = x + 1
        entered.set()  # a graph break
        leave.wait(60)
        return y * 2

    compiled = torch.compile(function, backend="eager")
    leave.set()
    compiled(torch.ones(2))  # so that the thread has nothing to compile, where torch.compile comes and goes
    leave.clear()
    entered.clear()
    thread = threading.Thread(target=compiled, args=(torch.ones(2),))

    def stop():
        leave.set()
        thread.join()

    def start():
        thread.start()
        assert entered.wait(60)
        return stop

    yield start
    stop()


def test_a_compiled_function_in_another_thread_does_not_mix_up_the_counts(decisions, compiled_elsewhere):
    """Every Python call holds its arguments then: counts found out there would take shared tensors for free later."""

    def overwrites():
        swiglu(x * 2, x + 1, donate=True).sum().backward()
        return decisions.pop(), norm_overwrites()

    x = leaf()
    ownership._found_out.cache_clear()
    stop = compiled_elsewhere()
    assert overwrites() == (True, True)
    during = ownership._counts_of_a_sole_owner(), ownership._references(object())
    stop()
    for hold in HOLDERS.values():
        gate, up = x * 2, x + 1
        held = hold(gate), hold(up)
        output = swiglu(gate, up, donate=True)
        del gate, up
        output.sum().backward()
        assert not decisions.pop(), held
    assert overwrites() == (True, True)
    after = ownership._counts_of_a_sole_owner(), ownership._references(object())
    # Python 3.10 always holds them, and every Python after a function of torch.compile failed with fullgraph=True.
    assert (after[0] != during[0]) == (after[1] != during[1])


def test_counts_are_found_out_unseen(decisions):
    """The experiment runs in a thread of its own: no mode, hook or gradient of the caller sees it, nor a leak."""
    seen = []
    ownership._found_out.cache_clear()
    x = leaf()
    num_threads = threading.active_count()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t), PeakLiveBytes() as live:
        assert ownership._counts_of_a_sole_owner() is not None
    assert not seen
    assert live.peak_bytes == 0
    assert threading.active_count() == num_threads
    with torch.no_grad():
        ownership._found_out.cache_clear()
        assert ownership._counts_of_a_sole_owner() is not None
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
    """Neither for the one nor for the other: what cannot be told apart is not asked again."""
    ownership._found_out.cache_clear()
    with monkeypatch.context() as patch:
        if missing == "_autograd":
            patch.setattr(ownership, "_is_last_use", lambda ctx: True)  # neither hooks nor retained graphs are seen
        else:
            patch.delattr(torch._C, missing)
        x = leaf()
        swiglu(x * 2, x + 1, donate=True).sum().backward()
        assert not norm_overwrites()
    ownership._found_out.cache_clear()
    assert decisions == [False]
    torch.testing.assert_close(x.grad, expected(x))
