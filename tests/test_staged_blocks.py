"""Target plans on our own blocks, against dense blocks whose context is cut off by hand, in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dropbp_kernels import DropBPHandler, blocks
from dropbp_kernels.layer import checkpoint_branch
from dropbp_kernels.losses import linear_cross_entropy
from dropbp_kernels.staged_blocks import run_by_targets, target_labels
from dropbp_kernels.targets import IGNORED, plan_targets

pytestmark = pytest.mark.usefixtures("turns_apart")

SEQ_LEN = 16


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(50, 32)
        self.blocks = nn.ModuleList(blocks.LlamaBlock(32, 48, 4, 2) for _ in range(3))
        self.norm = blocks.RMSNorm(32)
        self.head = nn.Linear(32, 50, bias=False)
        self.double()

    def dense(self, tokens, labels):
        rope = blocks.rotary_embedding(tokens.shape[1], 8, dtype=torch.float64)
        stream = blocks.Stream(self.embedding(tokens))
        for block in self.blocks:
            stream = block(stream, rope)
        hidden = blocks.finish(stream, self.norm)[:, :-1].flatten(0, 1)
        return F.cross_entropy(self.head(hidden), labels[:, 1:].flatten())

    def staged(self, tokens, labels, position_ids=None, context_gradient="none", max_rows=1000, **keep):
        plan = plan_targets(labels, position_ids=position_ids, **keep).with_slices(max_rows)
        rope = blocks.rotary_embedding(SEQ_LEN, 8, dtype=torch.float64)
        x = self.embedding(tokens)
        options = {"position_ids": position_ids, "context_gradient": context_gradient}
        hidden = run_by_targets(plan, x, self.blocks, self.norm, rope, **options)
        return linear_cross_entropy(hidden, self.head.weight, target_labels(plan))


def talks():
    """A prompt and a completion, the same with a tail that no target sees, and a talk of two turns."""
    tokens = torch.randint(3, 50, (3, SEQ_LEN), generator=torch.Generator().manual_seed(1))
    labels = tokens.clone()
    labels[0, :8] = IGNORED
    labels[1, :10] = labels[1, 13:] = IGNORED
    labels[2, :3] = labels[2, 6:11] = IGNORED
    return tokens, labels


def backward(model, loss):
    model.zero_grad()
    loss.backward()
    return loss.detach(), {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def assert_same(ours, dense):
    torch.testing.assert_close(ours[0], dense[0])
    for name, grad in dense[1].items():
        grads = [torch.zeros((), dtype=torch.float64) if g is None else g for g in (ours[1][name], grad)]
        torch.testing.assert_close(*torch.broadcast_tensors(*grads), msg=lambda m, name=name: f"{name}: {m}")


def is_target(labels):
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED) != IGNORED


def cut(module, args, targets):
    """The input of an attention, a constant at context rows."""
    return torch.where(targets[..., None], args[0], args[0].detach()), *args[1:]


@pytest.fixture
def cut_keys(monkeypatch):
    def arm(targets):
        def attend(query, key, value, **options):
            keep = targets[:, None, :, None]
            key, value = torch.where(keep, key, key.detach()), torch.where(keep, value, value.detach())
            return original(query, key, value, **options)

        original = F.scaled_dot_product_attention
        monkeypatch.setattr(F, "scaled_dot_product_attention", attend)

    yield arm
    monkeypatch.undo()


KEPT = {"all": (True,) * 6, "some": (True, False, False, True, True, True)}


@pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT)
def test_context_keys_and_values_are_constants(kept, cut_keys):
    model = Model()
    handler = DropBPHandler(model, 0.5)
    handler.set_plan(kept)
    tokens, labels = talks()
    full = backward(model, model.dense(tokens, labels))
    ours = backward(model, model.staged(tokens, labels))
    assert_same(backward(model, model.staged(tokens, labels, context_gradient="full")), full)
    for gate in handler.gates.values():
        gate.checkpoint = checkpoint_branch
    assert_same(backward(model, model.staged(tokens, labels)), ours)
    with pytest.raises(AssertionError):
        assert_same(ours, full)
    for gate in handler.gates.values():
        gate.checkpoint = None
    cut_keys(is_target(labels))
    assert_same(ours, backward(model, model.dense(tokens, labels)))


@pytest.mark.parametrize("context_gradient", ["none", "one_hop", "full"])
@pytest.mark.parametrize("checkpoint", [None, checkpoint_branch])
def test_rows_of_targets(context_gradient, checkpoint, cut_keys):
    """Rows by hand, of samples and of tokens of the batch: what is dropped is cut off behind the branch."""
    model, (tokens, labels) = Model(), talks()
    targets = is_target(labels)
    handler = DropBPHandler(model, 0.5)
    generator = torch.Generator().manual_seed(2)
    masks = [torch.rand(shape, generator=generator) < 0.5 for shape in (3, 48) * 3]
    handler.set_plan(masks)
    for gate in handler.gates.values():
        gate.checkpoint = checkpoint
    ours = backward(model, model.staged(tokens, labels, context_gradient=context_gradient))
    dense = copy.deepcopy(model)
    DropBPHandler(dense, 0.0).set_plan([True] * 6)
    modules = [module for block in dense.blocks for module in (block.self_attn, block.mlp)]
    for module, mask in zip(modules, masks, strict=True):
        kept = mask.view(3, -1, 1).expand(3, SEQ_LEN, 1)
        module.register_forward_hook(lambda _, args, out, kept=kept: torch.where(kept, out, out.detach()))
        if context_gradient == "one_hop" and isinstance(module, blocks.Attention):
            module.register_forward_pre_hook(lambda module, args: cut(module, args, targets))
    if context_gradient == "none":
        cut_keys(targets)
    assert_same(ours, backward(dense, dense.dense(tokens, labels)))


@pytest.mark.parametrize(("context_gradient", "of_context"), [("none", 0), ("one_hop", 0), ("full", 2)])
def test_of_context_the_last_block_makes_keys_alone(context_gradient, of_context):
    model, calls = Model(), []
    for block in model.blocks:
        block.mlp.register_forward_pre_hook(lambda module, args: calls.append(args[0].shape[:2]))
    model.staged(*talks(), context_gradient=context_gradient)
    num_stages = 4  # of context and of targets, of two turns
    assert len(calls) == 2 * num_stages + (num_stages - 2 + of_context)


def test_kept_and_sliced_context(cut_keys):
    model, (tokens, labels) = Model(), talks()
    full = backward(model, model.dense(tokens, labels))
    assert_same(backward(model, model.staged(tokens, labels, context_keep=1.0)), full)
    ours = backward(model, model.staged(tokens, labels))
    assert_same(backward(model, model.staged(tokens, labels, max_rows=6)), ours)
    some = backward(model, model.staged(tokens, labels, context_keep=0.3))
    for other in (full, ours):
        with pytest.raises(AssertionError):
            assert_same(some, other)
    plan = plan_targets(labels, context_keep=0.3)
    kept = is_target(labels)
    for stage in plan.stages:
        if stage.is_target:
            kept = kept.int().scatter_reduce(1, stage.rows, stage.is_row.int(), "amax")
    cut_keys(kept.bool())
    assert_same(some, backward(model, model.dense(tokens, labels)))


@pytest.mark.parametrize("context_gradient", ["none", "one_hop", "full"])
def test_targets_that_run_again_behind_the_context(context_gradient):
    """Against turns, where every drawn target is a stage of its own and runs once."""
    model, (tokens, labels) = Model(), talks()
    options = {"context_gradient": context_gradient}
    for ours in ({"target_keep": 0.4}, {"turns": "together"}):
        labels_left = F.pad(plan_targets(labels, **ours).shift_labels[:, :-1], (1, 0), value=IGNORED)
        together = backward(model, model.staged(tokens, labels, max_rows=9, **ours, **options))
        assert_same(together, backward(model, model.staged(tokens, labels_left, **options)))


def test_one_hop_keeps_the_gradient_of_the_projections():
    model, (tokens, labels) = Model(), talks()
    ours = backward(model, model.staged(tokens, labels, context_gradient="one_hop"))
    dense = copy.deepcopy(model)
    for block in dense.blocks:
        block.self_attn.register_forward_pre_hook(lambda module, args: cut(module, args, is_target(labels)))
    assert_same(ours, backward(dense, dense.dense(tokens, labels)))


def test_documents_of_a_packed_sequence_see_themselves_only():
    model, (tokens, _) = Model(), talks()
    position_ids = torch.tensor([[*range(7), *range(9)]])
    labels = tokens[:1].clone()
    labels[0, :4] = labels[0, 7:12] = IGNORED  # two documents, each with a prompt
    packed = backward(model, model.staged(tokens[:1], labels, position_ids, "full"))
    parts = [model.dense(tokens[:1, part], labels[:1, part]) for part in (slice(0, 7), slice(7, 16))]
    num = [(labels[:, part][:, 1:] != IGNORED).sum() for part in (slice(0, 7), slice(7, 16))]
    assert_same(packed, backward(model, (parts[0] * num[0] + parts[1] * num[1]) / sum(num)))


def test_bad_input():
    model, (tokens, labels) = Model(), talks()
    plan, x, rope = plan_targets(labels), model.embedding(tokens), blocks.rotary_embedding(SEQ_LEN, 8)
    with pytest.raises(ValueError, match=r"x: expected \(batch, seq_len\) of the plan, \(3, 16\), got \(3, 15, 32\)"):
        run_by_targets(plan, x[:, 1:], model.blocks, model.norm, rope)
    with pytest.raises(ValueError, match="context_gradient: expected one of none, one_hop, full, got 'some'"):
        run_by_targets(plan, x, model.blocks, model.norm, rope, context_gradient="some")
    same = plan_targets(labels[:1].expand(2, -1)).with_shared_context(
        tokens[:1].expand(2, -1), torch.arange(SEQ_LEN)[None]
    )
    with pytest.raises(ValueError, match="plan: expected one without shared context"):
        run_by_targets(same, x[:2], model.blocks, model.norm, rope)
    with pytest.raises(ValueError, match="plan: expected at least one target, got none"):
        run_by_targets(plan_targets(torch.full_like(labels, IGNORED)), x, model.blocks, model.norm, rope)
