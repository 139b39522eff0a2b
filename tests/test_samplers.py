"""Samplers: which branches a plan keeps, how often, together with which, and at which cost."""

import itertools
import math
import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dropbp_kernels.samplers import SAMPLERS, balanced, bernoulli, cyclic, get_sampler, published

NUM_DRAWS = 10_000
# A binomial count is more than this many standard errors off once in 15,000 tries; the draws are seeded, so a test
# that passes once passes always.
NUM_STANDARD_ERRORS = 4.0

ATTENTION, MLP = 46.1e6, 176.2e6
LLAMA_FLOPS = [ATTENTION, MLP] * 8


def draw(sampler, rates, flops=None, seed=0, num_draws=NUM_DRAWS):
    flops = LLAMA_FLOPS if flops is None else flops
    return [sampler(rates, flops, seed, step) for step in range(num_draws)]


def num_standard_errors(plans, index, rate):
    """How far the kept count of a branch is from its expectation."""
    kept = sum(plan[index] for plan in plans)
    return abs(kept - len(plans) * (1 - rate)) / math.sqrt(len(plans) * rate * (1 - rate))


@pytest.mark.parametrize("sampler", [balanced, bernoulli])
@pytest.mark.parametrize(
    "rates",
    [
        [0.75] * 16,
        [0.875] * 16,
        [0.1 * (index % 9 + 1) for index in range(16)],
        [0.99] * 8 + [0.01] * 8,
    ],
    ids=["0.75", "0.875", "all different", "extremes"],
)
def test_every_branch_is_kept_with_its_own_probability(sampler, rates):
    plans = draw(sampler, rates)
    worst = max(num_standard_errors(plans, index, rate) for index, rate in enumerate(rates))
    assert worst < NUM_STANDARD_ERRORS


def test_balanced_has_no_bias_by_index_when_all_flops_differ():
    rates = [0.875] * 16
    plans = draw(balanced, rates, flops=[1.0 + index for index in range(16)])
    assert max(num_standard_errors(plans, index, 0.875) for index in range(16)) < NUM_STANDARD_ERRORS
    # Random group order: every pair of branches is kept together at times. In a fixed order only 8 plans could occur.
    pairs = Counter(pair for plan in plans for pair in itertools.combinations([i for i in range(16) if plan[i]], 2))
    assert len(pairs) == 16 * 15 / 2


@pytest.mark.parametrize("rate", [0.5, 0.75, 0.875])
def test_balanced_spends_the_same_flops_in_every_step(rate):
    spent = {sum(f for f, kept in zip(LLAMA_FLOPS, plan, strict=True) if kept) for plan in draw(balanced, [rate] * 16)}
    assert len(spent) == 1
    assert spent.pop() == pytest.approx((1 - rate) * sum(LLAMA_FLOPS), rel=1e-12)


def test_balanced_expectations_that_are_whole_only_up_to_rounding():
    flops, rates = [1.0] * 10, [0.9] * 10
    assert list(itertools.accumulate(1.0 - rate for rate in rates))[-1] != 1.0
    assert {sum(plan) for plan in draw(balanced, rates, flops)} == {1}


@given(
    rates=st.lists(st.integers(0, 99).map(lambda n: n / 100), min_size=1, max_size=40),
    group_sizes=st.lists(st.sampled_from([1.0, 2.5, 7.0]), min_size=40, max_size=40),
    seed=st.integers(-(2**63), 2**63),
    step=st.integers(0, 10**9),
)
@settings(max_examples=200, deadline=None)
def test_balanced_keeps_floor_or_ceiling_of_the_expectation_in_each_group_and_in_total(rates, group_sizes, seed, step):
    flops = group_sizes[: len(rates)]
    kept = balanced(rates, flops, seed, step)
    for members in [range(len(rates)), *([i for i, f in enumerate(flops) if f == g] for g in set(flops))]:
        expected = round(math.fsum(1 - rates[i] for i in members), 6)
        assert math.floor(expected) <= sum(kept[i] for i in members) <= math.ceil(expected)


def test_balanced_joint_probabilities_are_those_of_drawing_without_replacement():
    """Equal rates, equal FLOPs, 3 of 12 kept: all 220 plans are equally likely (Pearson's chi-square)."""
    counts = Counter(draw(balanced, [0.75] * 12, [1.0] * 12, num_draws=11_000))
    assert len(counts) == math.comb(12, 3)
    chi_square = sum((count - 50) ** 2 / 50 for count in counts.values())
    degrees = 219  # mean 219, standard deviation sqrt(2 * 219)
    assert abs(chi_square - degrees) < NUM_STANDARD_ERRORS * math.sqrt(2 * degrees)


def test_bernoulli_branches_are_independent():
    plans = draw(bernoulli, [0.75, 0.4], [1.0, 1.0])
    both = sum(a and b for a, b in plans)
    expected = 0.25 * 0.6
    assert abs(both - NUM_DRAWS * expected) < NUM_STANDARD_ERRORS * math.sqrt(NUM_DRAWS * expected * (1 - expected))
    assert {len(set(plan)) for plan in plans} == {1, 2}


@pytest.mark.parametrize("rates", [[0.5] * 16, [0.3] * 10, [0.2, 0.4, 0.6, 0.8]])
def test_published_drops_at_least_the_mean_rate_and_never_fewer_than_bernoulli(rates):
    num_topped_up = 0
    for step in range(500):
        kept = published(rates, [1.0] * len(rates), 0, step)
        drawn = bernoulli(rates, [1.0] * len(rates), 0, step)
        assert len(rates) - sum(kept) >= math.fsum(rates) - 1e-9
        assert all(a >= b for a, b in zip(drawn, kept, strict=True))
        if (missing := round(math.fsum(rates)) - (len(rates) - sum(drawn))) > 0:
            assert sum(drawn) - sum(kept) == missing
            num_topped_up += 1
    assert num_topped_up > 50


def test_published_tops_up_by_decreasing_rate_then_in_model_order():
    rates = [0.1, 0.5, 0.1, 0.5, 0.5]
    for step in range(300):
        drawn = bernoulli(rates, [1.0] * 5, 3, step)
        candidates = [index for index in (1, 3, 4, 0, 2) if drawn[index]]
        num_missing = max(0, 2 - (5 - sum(drawn)))  # the mean rate is 0.34: 2 of 5
        expected = tuple(drawn[i] and i not in candidates[:num_missing] for i in range(5))
        assert published(rates, [1.0] * 5, 3, step) == expected


def test_published_starves_early_branches():
    """What FACTS about the published code say: at 0.5 early branches are dropped far more often than late ones."""
    plans = draw(published, [0.5] * 16, num_draws=2000)
    dropped = [1 - sum(plan[index] for plan in plans) / 2000 for index in range(16)]
    assert dropped[0] > 0.6
    assert abs(dropped[-1] - 0.5) < NUM_STANDARD_ERRORS * math.sqrt(0.25 / 2000)


def test_cyclic_moves_a_window_over_the_depth():
    """Eight blocks of two branches at rate 0.75: two whole blocks, side by side, and every block once in four steps."""
    plans = draw(cyclic, [0.75] * 16, num_draws=8)
    blocks = [[index for index in range(8) if plan[2 * index]] for plan in plans]
    assert all(plan[::2] == plan[1::2] for plan in plans)  # attention and MLP of a block together
    assert all(len(kept) == 2 for kept in blocks)
    assert sorted(block for kept in blocks[:4] for block in kept) == list(range(8))
    assert blocks[4:] == blocks[:4]
    assert all((b - a) % 8 in (1, 7) for a, b in blocks)
    assert [sum(kept) for kept in draw(cyclic, [0.75] * 16, num_draws=4, seed=1)] == [4] * 4


@pytest.mark.parametrize("rates", [[0.9] * 16, [0.1 * (index % 9 + 1) for index in range(16)]], ids=["0.9", "mixed"])
def test_cyclic_keeps_each_branch_evenly_in_time(rates):
    plans = draw(cyclic, rates, num_draws=1000)
    for index, rate in enumerate(rates):
        steps = [step for step, plan in enumerate(plans) if plan[index]]
        gaps = {b - a for a, b in itertools.pairwise(steps)}
        assert gaps <= {math.floor(1 / (1 - rate) + 1e-9), math.ceil(1 / (1 - rate) - 1e-9)}
        assert abs(len(steps) - 1000 * (1 - rate)) <= 1


def test_cyclic_starts_anywhere():
    """Over seeds each branch is kept with its probability in any one step, which unbiased gradients rest on."""
    rates = [0.75, 0.4, 0.9, 0.5]
    plans = [cyclic(rates, [1.0] * 4, seed, 3) for seed in range(4000)]
    kept = [sum(plan[index] for plan in plans) for index in range(4)]
    for count, rate in zip(kept, rates, strict=True):
        assert abs(count - 4000 * (1 - rate)) < NUM_STANDARD_ERRORS * math.sqrt(4000 * rate * (1 - rate))


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_edge_rates(sampler):
    assert all(all(plan) for plan in draw(sampler, [0.0] * 16, num_draws=200))
    mixed = [0.0, 0.99] * 8
    plans = draw(sampler, mixed, num_draws=2000)
    kept = [sum(plan[index] for plan in plans) for index in range(16)]
    assert kept[::2] == [2000] * 8
    assert max(kept[1::2]) < 60  # 20 expected; 60 is 9 standard errors off
    assert sampler([], [], 0, 0) == ()
    assert sampler([0.0], [1.0], 0, 0) == (True,)


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_a_plan_is_a_pure_function_of_seed_and_step(sampler):
    random.seed(0), torch.manual_seed(0)
    python, cpu = random.getstate(), torch.get_rng_state()
    rates = [0.75] * 16
    first = draw(sampler, rates, num_draws=50)
    random.random()  # the global generator has no say in it
    assert draw(sampler, rates, num_draws=50) == first
    random.setstate(python)
    again = [sampler(rates, LLAMA_FLOPS, 0, step) for step in reversed(range(50))][::-1]
    assert again == first
    assert random.getstate() == python
    assert torch.equal(torch.get_rng_state(), cpu)
    assert len(set(first)) > (3 if sampler is cyclic else 40)  # and steps differ
    assert draw(sampler, rates, seed=2, num_draws=50) != first
    assert all(isinstance(kept, bool) for plan in first for kept in plan)


@pytest.mark.parametrize(
    ("sampler", "kept"),
    [(balanced, [1, 6]), (bernoulli, [0, 2, 4, 6]), (published, [4, 6])],
)
def test_plans_are_the_same_in_every_version_of_python(sampler, kept):
    """Recorded from this package on Python 3.11: a later Python or a later version must draw the same plan."""
    plan = sampler([0.75] * 8, [1.0, 4.0] * 4, 7, 1019)
    assert [index for index, is_kept in enumerate(plan) if is_kept] == kept


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
@pytest.mark.parametrize("rate", [1.0, -0.1, math.nan, 2.0])
def test_rates_outside_the_range_are_refused(sampler, rate):
    with pytest.raises(ValueError, match="rates: expected 0 <= drop_rate < 1"):
        sampler([0.5, rate], [1.0, 1.0], 0, 0)


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_flops_of_another_length_are_refused(sampler):
    with pytest.raises(ValueError, match="flops: expected one for each of the 2 rates, got 3"):
        sampler([0.5, 0.5], [1.0] * 3, 0, 0)


def test_get_sampler():
    assert get_sampler("balanced") is balanced
    assert get_sampler(bernoulli) is bernoulli
    with pytest.raises(ValueError, match="one of balanced, bernoulli, published, cyclic, got 'bernouli'"):
        get_sampler("bernouli")
    with pytest.raises(TypeError, match="name or a callable, got int"):
        get_sampler(3)
