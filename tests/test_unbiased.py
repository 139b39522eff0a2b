"""grad_scale="unbiased": the mean of the gradient over all plans, by enumeration, and which draws lose it.

The net's branches follow each other, so gradients flow through several scaled gates; all is float64.
"""

import itertools
import math

import pytest
import torch
from models import toy_model

from dropbp_kernels import DropBPHandler
from dropbp_kernels.samplers import cyclic

NUM_BRANCHES = 4
X = torch.linspace(-1.0, 2.0, 16, dtype=torch.float64).view(1, 2, 8)


@pytest.fixture
def model():
    return toy_model(NUM_BRANCHES).double()


def gradient(model, handler, kept):
    """All gradients of a plan, by branch, one vector each."""
    handler.set_plan(kept)
    model.zero_grad()
    loss = model(X).square().sum()
    if loss.requires_grad:
        loss.backward()
    grads = [[torch.zeros_like(p) if p.grad is None else p.grad for p in block.parameters()] for block in model]
    return [torch.cat([grad.flatten() for grad in of_block]) for of_block in grads]


def mean_gradient(model, handler, probabilities):
    """The mean over plans: probabilities by tuple of kept branches."""
    assert math.fsum(probabilities.values()) == pytest.approx(1.0)
    total = None
    for kept, probability in probabilities.items():
        parts = [probability * part for part in gradient(model, handler, kept)]
        total = parts if total is None else [a + b for a, b in zip(total, parts, strict=True)]
    return total


def full_gradient(model):
    return gradient(model, DropBPHandler(model, 0.0), [True] * NUM_BRANCHES)


def of_independent_draws(rates):
    plans = itertools.product([True, False], repeat=len(rates))
    return {
        kept: math.prod(1 - rate if is_kept else rate for is_kept, rate in zip(kept, rates, strict=True))
        for kept in plans
    }


def errors(mean, full):
    """Of each branch's parameters, first to last."""
    return [float((a - b).norm() / b.norm()) for a, b in zip(mean, full, strict=True)]


def test_independent_draws_give_the_full_gradient(model):
    rates = [0.5, 0.25, 0.75, 0.6]
    full = full_gradient(model)
    handler = DropBPHandler(model, 0.5, grad_scale="unbiased")
    handler.set_drop_rates(rates)
    assert max(errors(mean_gradient(model, handler, of_independent_draws(rates)), full)) < 1e-12
    unscaled = DropBPHandler(model, 0.5)
    assert min(errors(mean_gradient(model, unscaled, of_independent_draws(rates)), full)) > 0.1


def test_a_fixed_share_loses_the_paths_through_several_branches(model):
    """Two of four, all pairs alike (balanced): a pair is kept together in 1/6 of the steps, not in 1/4.

    The last branch's own gradient flows through no other branch and stays exact; below it the paths through two gates
    count 2/3. In turn (cyclic), over all starts, some pairs never meet.
    """
    full = full_gradient(model)
    handler = DropBPHandler(model, 0.5, grad_scale="unbiased")
    pairs = [tuple(index in pair for index in range(4)) for pair in itertools.combinations(range(4), 2)]
    of_balanced = errors(mean_gradient(model, handler, dict.fromkeys(pairs, 1 / 6)), full)
    starts = [cyclic([0.5] * 4, [1.0] * 4, seed, 0) for seed in range(400)]
    of_cyclic = errors(mean_gradient(model, handler, {kept: starts.count(kept) / 400 for kept in set(starts)}), full)
    assert of_balanced[-1] < 1e-12
    assert of_cyclic[-1] < 0.1  # as far as 400 starts are all of them
    assert min(*of_balanced[:-1], *of_cyclic[:-1]) > 1e-3


def test_keep_one_adds_what_it_keeps(model):
    """Where all are dropped (1/16 of the plans) one of four is kept after all: 1/64 more on a share of 1/2."""
    probabilities = of_independent_draws([0.5] * 4)
    nothing = probabilities.pop((False,) * 4)
    for index in range(4):
        kept = tuple(other == index for other in range(4))
        probabilities[kept] += nothing / 4
    handler = DropBPHandler(model, 0.5, grad_scale="unbiased")
    *_, last = mean_gradient(model, handler, probabilities)
    torch.testing.assert_close(last, (1 + 2 / 64) * full_gradient(model)[-1])
