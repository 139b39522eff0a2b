"""Branches by rows, behind norms that read rows through the permutation, against the dense model with detached rows."""

import sys

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, create_mask

from dropbp_kernels import DropBP
from dropbp_kernels.by_rows import RowSplit
from dropbp_kernels.measure import saved_bytes
from dropbp_kernels.ops import permuted_layer_norm, permuted_rms_norm
from dropbp_kernels.permutation import draw_permutation
from dropbp_kernels.row_plan import Batch, ChosenRows, Rows

BATCH, SEQ, WIDTH = 4, 3, 8


class Block(nn.Module):
    """An attention that mixes the tokens of a sample and an MLP, each behind a norm."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([nn.RMSNorm(WIDTH, eps=1e-6), nn.LayerNorm(WIDTH)])
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.gate = DropBP()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.SiLU(), nn.Linear(2 * WIDTH, WIDTH))

    def attention(self, x, bias):
        """x (K, S, D), bias (K, S, S): a mask that belongs to the sample."""
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(((q @ k.mT) + bias).softmax(-1) @ v)

    def by_rows(self, x, bias, plans):
        rms, layer = self.norms
        batch, (samples, tokens) = Batch(BATCH, SEQ, x.device), plans
        rows = permuted_rms_norm(x, rms.weight, *samples[:2])
        x = self.gate.add_rows(RowSplit(samples, batch, x), rows, self.attention, bias)
        rows = permuted_layer_norm(x, layer.weight, layer.bias, *tokens[:2])
        return self.gate.add_rows(RowSplit(tokens, batch, x), rows, self.mlp)

    def dense(self, x, bias, plans):
        for norm, branch, rows in zip(self.norms, (lambda x: self.attention(x, bias), self.mlp), plans, strict=True):
            is_kept = torch.zeros(rows.num_rows, dtype=torch.bool, device=x.device)
            is_kept[rows.permutation[: rows.num_kept]] = True
            is_kept = is_kept.reshape(BATCH, -1, 1)
            # Detached as a whole, norm included, row by row.
            with_graph, without = branch(norm(x)), branch(norm(x.detach())).detach()
            x = x + torch.where(is_kept, with_graph, without)
        return x


def plans(share, device, step=0):
    """Samples for attention and tokens for the MLP."""
    return [
        Rows(
            draw_permutation(num_rows, seed=0, step=step, branch=branch, device=device),
            round(share * num_rows),
            num_rows,
            by_token=branch == 1,
        )
        for branch, num_rows in enumerate((BATCH, BATCH * SEQ))
    ]


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_gradients_are_those_of_detached_rows(backend, device, share):
    torch.manual_seed(1)
    blocks = nn.ModuleList([Block(), Block()]).double().to(device)
    x = torch.randn(BATCH, SEQ, WIDTH, dtype=torch.float64, device=device, requires_grad=True)
    bias = torch.randn(BATCH, SEQ, SEQ, dtype=torch.float64, device=device)
    results = []
    for form in ("by_rows", "dense"):
        stream = x
        for step, block in enumerate(blocks):
            stream = getattr(block, form)(stream, bias, plans(share, device, step))
        inputs = [x, *blocks.parameters()]
        grads = torch.autograd.grad(stream.square().sum(), inputs, allow_unused=True, materialize_grads=True)
        results.append((stream.detach(), *grads))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


def test_dropped_rows_save_nothing(device, backend):
    block = Block().to(device)
    x = torch.randn(BATCH, SEQ, WIDTH, device=device, requires_grad=True)
    bias = torch.zeros(BATCH, SEQ, SEQ, device=device)
    counts = {}
    for share in (0.25, 0.5):
        with saved_bytes() as saved:
            block.by_rows(x * 1, bias, plans(share, device))
        counts[share] = saved.num_bytes
    fixed = 8 * (BATCH + BATCH * SEQ)  # the permutations
    assert counts[0.25] - fixed == (counts[0.5] - fixed) / 2


def test_each_branch_is_called_with_its_rows():
    x = torch.arange(4.0).reshape(4, 1, 1).requires_grad_()
    calls = []

    def branch(rows, numbers):
        calls.append((rows.flatten().tolist(), numbers.flatten().tolist(), torch.is_grad_enabled()))
        return 10 * rows

    permutation = torch.tensor([2, 0, 3, 1])
    split = RowSplit(Rows(permutation, 1, 4, by_token=False), Batch(4, 1, x.device), x)
    rows = x[permutation[:1]], x[permutation[1:]].detach(), x
    output = DropBP(grad_scale=0.5).add_rows(split, rows, branch, torch.arange(4).reshape(4, 1))
    assert calls == [([0.0, 3.0, 1.0], [0, 3, 1], False), ([2.0], [2], True)]
    assert output.flatten().tolist() == [0.0, 11.0, 22.0, 33.0]
    output.sum().backward()
    assert x.grad.flatten().tolist() == [1.0, 1.0, 6.0, 1.0]


@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("is_flat", [False, True])
def test_a_call_is_taken_apart_and_put_together(is_flat, by_token):
    """The stream, and what a branch returns beside it: scores of flattened tokens, a table for all, a loss or None."""
    stream = torch.arange(BATCH * SEQ * WIDTH).double().view(BATCH, SEQ, WIDTH).requires_grad_()
    call = stream.flatten(0, 1) if is_flat else stream
    rows = plans(0.25, "cpu")[by_token]
    split = RowSplit(rows, Batch(BATCH, SEQ, stream.device), call)
    kept, dropped, call = split.take(call)
    parts = [split.shaped(part) for part in (kept, dropped)]
    shape = (-1, WIDTH) if is_flat else (1, -1, WIDTH) if by_token else (-1, SEQ, WIDTH)
    for part, which in zip(parts, (split.kept, split.dropped), strict=True):
        assert torch.equal(part, call.reshape(rows.num_rows, -1)[which].reshape(shape))
    (given,) = split.arguments((call.detach()[..., :2],), split.kept)
    assert torch.equal(given, parts[0][..., :2])

    def branch(part, loss):
        return part, part.reshape(-1, WIDTH)[:, :2], torch.ones(3, 2), loss

    merged, scores, table, loss = split.merge(branch(parts[0], torch.tensor(1.0)), branch(parts[1], None))
    assert torch.equal(merged, call)
    assert torch.equal(scores, stream.reshape(-1, WIDTH)[:, :2])
    assert (table.shape, loss) == ((3, 2), 1.0)
    merged.sum().backward()
    is_kept = torch.zeros(rows.num_rows).index_fill(0, split.kept, 1.0).view(BATCH, -1, 1)
    assert torch.equal(stream.grad, is_kept.expand_as(stream).double())


def test_a_whole_output_and_what_modules_recorded_are_put_together():
    gate, recorded = DropBP(), {"scores": [torch.zeros(1)]}
    gate.kept, gate.records = ChosenRows(torch.tensor([False, True, False, True])), lambda: recorded
    x = torch.randn(4, 3, 2)

    def branch(rows):
        recorded["scores"].append(rows.flatten(0, 1)[:, :1])
        return 2 * rows

    assert torch.equal(gate.run(x, branch), 2 * x)
    assert len(recorded["scores"]) == 2  # one more
    assert torch.equal(recorded["scores"][1], x.flatten(0, 1)[:, :1])


def test_a_block_mask_of_flex_attention_is_taken_apart_by_samples():
    """Its blocks, and what is masked inside of them; a mask that is the same for all samples stays as it is."""
    lengths, seen = torch.tensor([48, 20, 6, 40]), []

    def is_seen(sample, head, query, key):
        return (query >= key) & (key < lengths[sample])

    def branch(x, mask, shared):
        whole = create_mask(mask.mask_mod, len(x), 1, 48, 48, device="cpu")
        seen.append((mask.to_dense(), whole, shared))
        return x

    mask = create_block_mask(is_seen, 4, None, 48, 48, device="cpu", BLOCK_SIZE=16)
    shared = create_block_mask(lambda sample, head, query, key: query >= key, 1, None, 48, 48, "cpu", BLOCK_SIZE=16)
    gate = DropBP()
    gate.kept = ChosenRows(torch.tensor([False, True, False, True]))
    gate.residual_add(torch.randn(4, 48, 16), branch, mask, shared)
    for (blocks, pairs, other), rows in zip(seen, ([0, 2], [1, 3]), strict=True):
        assert torch.equal(blocks, mask.to_dense()[rows])
        assert torch.equal(pairs, create_mask(is_seen, 4, 1, 48, 48, device="cpu")[rows])
        assert other is shared


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions take notes since Python 3.11")
def test_a_branch_that_closes_over_what_each_sample_needs_is_told_how_to_get_it():
    gate = DropBP()
    gate.kept = ChosenRows(torch.tensor([True, False, False, True]))
    x, mask = torch.ones(4, 3, 2), torch.ones(4, 3, 1)
    with pytest.raises(RuntimeError) as raised:
        gate.residual_add(x, lambda x: x * mask)
    (note,) = raised.value.__notes__
    assert note.startswith("The gate ran its branch by rows: 2 dropped and 2 kept ones. What a branch needs of each ")
    assert torch.equal(gate.residual_add(x, lambda x, mask: x * mask, mask), 2 * x)

    for error in (ValueError, TypeError, IndexError):  # as of a diffusion model's modulation of each sample

        def fail(x, error=error):
            raise error("not enough values to unpack")

        with pytest.raises(error) as raised:
            gate.residual_add(x, fail)
        assert raised.value.__notes__ == [note]

    of_compiled_op = RuntimeError("CUDA out of memory. Tried to allocate 20 GiB")
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**48)
    for error in (torch.OutOfMemoryError("tried to allocate 20 GiB"), of_compiled_op, raised.value):

        def out_of_memory(x, error=error):
            raise error

        with pytest.raises(RuntimeError) as raised:
            gate.residual_add(x, out_of_memory)
        assert raised.value is error
        assert not hasattr(error, "__notes__")
