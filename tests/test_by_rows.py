"""add_by_rows against the dense model in which the dropped rows are detached, in float64."""

import pytest
import torch
from torch import nn

from dropbp_kernels.by_rows import add_by_rows
from dropbp_kernels.measure import saved_bytes
from dropbp_kernels.ops import permuted_layer_norm, permuted_rms_norm
from dropbp_kernels.permutation import draw_permutation

BATCH, SEQ, WIDTH = 4, 3, 8


class Block(nn.Module):
    """An attention that mixes the tokens of a sample and an MLP, each behind a norm."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([nn.RMSNorm(WIDTH, eps=1e-6), nn.LayerNorm(WIDTH)])
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.SiLU(), nn.Linear(2 * WIDTH, WIDTH))

    def attention(self, x, bias):
        """x (K, S, D), bias (K, S, S): a mask that belongs to the sample."""
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(((q @ k.mT) + bias).softmax(-1) @ v)

    def by_rows(self, x, bias, plans):
        rms, layer = self.norms
        x = add_by_rows(
            x,
            *plans[0],
            lambda x, p, k: permuted_rms_norm(x, rms.weight, p, k),
            lambda rows, places: self.attention(rows, bias[places]),
        )
        return add_by_rows(
            x,
            *plans[1],
            lambda x, p, k: permuted_layer_norm(x, layer.weight, layer.bias, p, k),
            lambda rows, places: self.mlp(rows),
        )

    def dense(self, x, bias, plans):
        for norm, branch, (permutation, num_kept) in zip(
            self.norms, (lambda x: self.attention(x, bias), self.mlp), plans, strict=True
        ):
            is_kept = torch.zeros(len(permutation), dtype=torch.bool, device=x.device)
            is_kept[permutation[:num_kept]] = True
            is_kept = is_kept.reshape(-1, 1, 1) if len(permutation) == BATCH else is_kept.reshape(BATCH, SEQ, 1)
            # Detached as a whole, norm included, row by row.
            with_graph, without = branch(norm(x)), branch(norm(x.detach())).detach()
            x = x + torch.where(is_kept, with_graph, without)
        return x


def plans(share, device, step=0):
    """(permutation, num_kept) of the samples for attention and of the tokens for the MLP."""
    orders = [
        draw_permutation(num_rows, seed=0, step=step, branch=branch, device=device)
        for branch, num_rows in enumerate((BATCH, BATCH * SEQ))
    ]
    return [(order, round(share * len(order))) for order in orders]


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
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
    for share in (0.25, 0.5, 1.0):
        with saved_bytes() as saved:
            block.by_rows(x * 1, bias, plans(share, device))
        counts[share] = saved.num_bytes
    fixed = 8 * (BATCH + BATCH * SEQ)  # the permutations
    for share in (0.25, 0.5):
        assert counts[share] - fixed == share * (counts[1.0] - fixed)


def test_each_branch_is_called_with_its_rows():
    x = torch.arange(4.0).reshape(4, 1).requires_grad_()
    calls = []

    def branch(rows, places):
        calls.append((rows.flatten().tolist(), places.tolist(), torch.is_grad_enabled()))
        return 10 * rows

    def norm(x, permutation, num_kept):  # none: the rows themselves
        rows = x[permutation]
        return rows[:num_kept], rows[num_kept:].detach(), x

    permutation = torch.tensor([2, 0, 3, 1])
    output = add_by_rows(x, permutation, 1, norm, branch, grad_scale=0.5)
    assert calls == [([0.0, 3.0, 1.0], [0, 3, 1], False), ([2.0], [2], True)]
    assert output.flatten().tolist() == [0.0, 11.0, 22.0, 33.0]
    output.sum().backward()
    assert x.grad.flatten().tolist() == [1.0, 1.0, 6.0, 1.0]
    calls.clear()
    add_by_rows(x, permutation, 0, norm, branch)
    add_by_rows(x, permutation, 4, norm, branch)
    assert [len(rows) for rows, _, _ in calls] == [4, 4]
