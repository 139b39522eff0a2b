"""The gate: values, gradients, what a dropped branch saves, and torch.compile."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from models import ToyBlock, gradients

from dropbp_kernels import DropBP, layer
from dropbp_kernels.measure import PeakLiveBytes, num_autograd_nodes, saved_bytes


def run(block, x):
    block.zero_grad()
    out = block(x)
    if out.requires_grad:
        out.square().sum().backward()
    return out.detach(), gradients(block)


def test_kept_branch_equals_plain_residual_bit_for_bit():
    block, x = ToyBlock(), torch.randn(2, 3, 8)
    out, grads = run(block, x)
    block.zero_grad()
    plain = x + block.down(torch.relu(block.up(block.norm(x))))
    plain.square().sum().backward()
    assert torch.equal(out, plain.detach())
    for name, expected in gradients(block).items():
        assert torch.equal(grads[name], expected), name


def test_dropped_branch_has_the_same_value_and_only_the_residual_gets_a_gradient():
    block, x = ToyBlock(), torch.randn(2, 3, 8, requires_grad=True)
    kept, _ = run(block, x)
    block.gate.kept = False
    x.grad = None
    dropped, grads = run(block, x)
    assert torch.equal(kept, dropped)
    assert all(grad is None for grad in grads.values())
    assert torch.equal(x.grad, 2 * dropped)


def test_a_dropped_branch_that_computes_nothing_is_a_constant_too():
    """An identity, as dropout at rate 0 is, and what somebody computed before the gate."""
    gate, x = DropBP(), torch.randn(2, 3, 8, requires_grad=True)
    gate.kept = False
    before = x.tanh()
    for branch in (torch.nn.Identity(), torch.nn.Dropout(0.0), lambda x: before):
        (grad,) = torch.autograd.grad(gate.residual_add(x, branch).sum(), x)
        assert torch.equal(grad, torch.ones_like(x))


@pytest.mark.parametrize("dropped_runs", ["inference", "detach"])
def test_what_a_dropped_branch_saves(dropped_runs):
    block, x = ToyBlock(), torch.randn(2, 3, 8, requires_grad=True)
    block.gate.kept = False
    block.gate.dropped_runs = dropped_runs
    with saved_bytes() as saved:
        out = block(x)
    # The one node is the residual's add; nothing of the branch is left in the graph in either mode.
    assert num_autograd_nodes(out) == 1
    if dropped_runs == "inference":
        assert saved.num_bytes == 0
        assert saved.num_tensors == 0
    else:  # the control: the branch saves while it runs, the detach frees it afterwards
        assert saved.num_bytes > 0


def test_under_autocast_a_dropped_run_leaves_no_cast_weights_behind():
    """Autocast keeps those that it casts until its region ends; a kept run needs its own for the backward."""
    block = ToyBlock(64)
    block.gate.kept = False
    with torch.autocast("cpu", torch.bfloat16), PeakLiveBytes() as live:
        out = block(torch.randn(2, 1, 64))
        num_bytes = live.live_bytes
    assert num_bytes < 4 * out.nbytes < block.up.weight.nbytes / 2


def test_nothing_to_train_below_adds_no_node_at_all():
    block, x = ToyBlock(), torch.randn(2, 3, 8)
    block.gate.kept = False
    assert num_autograd_nodes(block(x)) == 0
    assert not block(x).requires_grad


def test_grad_scale_scales_the_branch_only():
    block, x = ToyBlock(), torch.randn(2, 3, 8, requires_grad=True)

    def gradient_at(scale):
        block.zero_grad()
        x.grad = None
        block.gate.grad_scale = scale
        block(x).sum().backward()
        return x.grad.clone(), block.down.bias.grad.clone()

    x_1, bias_1 = gradient_at(1.0)
    x_4, bias_4 = gradient_at(4.0)
    torch.testing.assert_close(bias_4, 4 * bias_1)
    torch.testing.assert_close(x_4 - 1, 4 * (x_1 - 1), atol=1e-5, rtol=1e-5)


def test_evaluation_does_not_count_as_a_call():
    block = ToyBlock()
    with torch.no_grad():
        block(torch.randn(2, 3, 8))
    assert not block.gate.was_called
    block(torch.randn(2, 3, 8))
    assert block.gate.was_called
    assert (block.gate.batch_size, block.gate.seq_len) == (2, 3)


def test_the_batch_of_a_flattened_stream():
    """It is that of the model where the gate was told of one that fits; else each row is a sample of one token."""
    gate, stream = DropBP(), torch.zeros(6, 8)
    assert gate.batch_of(stream)[:2] == (6, 1)
    gate.num_samples, gate.is_real = 2, torch.ones(2, 3, dtype=torch.bool)
    assert gate.batch_of(stream)[:2] == gate.batch_of(stream.view(2, 3, 8))[:2] == (2, 3)
    assert gate.batch_of(stream).is_real is gate.is_real
    gate.num_samples = 4
    assert gate.batch_of(stream)[:2] == (6, 1)
    assert gate.batch_of(stream).is_real is None


def test_the_gate_adds_nothing_to_state_dict_and_does_not_own_its_modules():
    norm, linear = torch.nn.LayerNorm(4), torch.nn.Linear(4, 4)
    gate = DropBP(modules=(norm, linear))
    assert not gate.state_dict()
    assert not list(gate.parameters())
    assert gate.is_trainable()
    norm.requires_grad_(False)
    linear.requires_grad_(False)
    assert not gate.is_trainable()
    assert DropBP().is_trainable()


def test_deepcopy_refers_to_the_copied_modules():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(2, 2)
            self.gate = DropBP(modules=(self.linear,))

    twin = copy.deepcopy(Block())
    assert twin.gate.modules_of_branch[0] is twin.linear


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_mixed_dtypes_promote_as_a_plain_sum(kept, dtypes):
    gate = DropBP()
    gate.kept = kept
    x, weight = torch.randn(2, 3, 8, dtype=dtypes[0]), torch.randn(8, dtype=dtypes[1], requires_grad=True)
    out = gate.residual_add(x, lambda x: x.to(dtypes[1]) * weight)
    assert out.dtype == torch.float32
    assert torch.equal(out, x + x.to(dtypes[1]) * weight)
    assert out.requires_grad == kept


def test_unknown_dropped_runs_is_refused():
    with pytest.raises(ValueError, match=r"dropped_runs: expected one of inference, detach, got 'fast'"):
        DropBP(dropped_runs="fast")


@pytest.mark.parametrize("kept", [True, False])
def test_compiles_fullgraph_with_equal_gradients(kept):
    block, x = ToyBlock(), torch.randn(2, 3, 8, requires_grad=True)
    block.gate.kept = kept
    out, grads = run(block, x)
    grad_x, x.grad = x.grad, None
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    block.zero_grad()
    out_compiled = compiled(x)
    out_compiled.square().sum().backward()
    torch.testing.assert_close(out_compiled.detach(), out)
    torch.testing.assert_close(x.grad, grad_x)
    for name, grad in gradients(block).items():
        assert (grad is None) == (grads[name] is None), name
        if grad is not None:
            torch.testing.assert_close(grad, grads[name])


def test_new_plans_compile_each_block_at_most_twice():
    """One graph for kept, one for dropped, and one for both without gradients; no step after those recompiles."""
    torch.compiler.reset()
    block, x = ToyBlock(), torch.randn(2, 3, 8, requires_grad=True)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, backend=counter)
    for step in range(8):
        block.gate.kept = step % 3 != 0
        compiled(x).sum().backward()
    assert counter.frame_count == 2
    with torch.no_grad():
        for block.gate.kept in (True, False):
            compiled(x)
    assert counter.frame_count == 3


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("returned", [(torch.ones(2, 3, 8), None), None])
def test_a_branch_that_returns_no_tensor(kept, returned):
    gate = DropBP()
    gate.kept = kept
    with pytest.raises(TypeError, match=r"branch: expected it to return a tensor, got (tuple|NoneType)"):
        gate.residual_add(torch.ones(2, 3, 8), lambda x: returned)


def test_what_a_gate_is_given_by_mistake():
    with pytest.raises(TypeError, match=r"flops: expected a function .* got 0\.5"):
        DropBP(0.5)
    with pytest.raises(TypeError, match="modules: expected a list of modules, got one Linear"):
        DropBP(modules=torch.nn.Linear(2, 2))
    x = torch.ones(2, 3)
    with pytest.raises(TypeError, match="branch: expected a function of the residual"):
        DropBP().residual_add(x, x + 1)


@pytest.mark.parametrize(("is_kept", "num_calls"), [(True, 11), (False, 13)])
def test_what_a_call_of_the_gate_costs_the_host(is_kept, num_calls):
    """Counted, since times depend on machines: functions of this package; of nn.Module and contextlib none."""
    gate, x = DropBP(), torch.ones(2, 3, 4, requires_grad=True)
    gate.kept = is_kept
    gate.residual_add(x, torch.neg)
    called = []

    def note(frame, event, _):
        if event == "call":
            called.append((Path(frame.f_code.co_filename), frame.f_code.co_name))

    sys.setprofile(note)
    try:
        gate.residual_add(x, torch.neg)
    finally:
        sys.setprofile(None)
    package = Path(layer.__file__).parent
    ours = [name for path, name in called if package in path.parents]
    assert len(ours) == num_calls, ours
    assert not {path.name for path, _ in called} & {"module.py", "contextlib.py"}, called
