"""Drawing the rows that a branch keeps: uniform, reproducible, the same on every device, nothing global touched."""

import itertools
import random
from collections import Counter

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dropbp_kernels import permutation
from dropbp_kernels.permutation import draw_num_kept, draw_permutation

# Recorded from the first version.
GOLDEN = [[2, 7, 4, 1, 5, 6, 3, 0], [1, 3, 6, 0, 2, 5, 4, 7], [2, 3, 3, 3, 3, 2, 2, 3]]
WORDS = st.integers(-(1 << 63), (1 << 63) - 1)


def chi_square(counts, expected):
    return sum((count - expected) ** 2 / expected for count in counts)


def test_by_hand():
    """One round of the hash on small numbers, by hand."""
    # 1: shifts leave 1; 1 * 0x21F0AAAD; xor its upper 17 bits (0x43E1); times 0x735A2D97 mod 2^32; xor its upper 17.
    x = 0x21F0AAAD ^ 0x43E1
    x = x * 0x735A2D97 % (1 << 32)
    assert permutation._mix(1) == x ^ (x >> 15)
    assert permutation._mix(0) == 0


def test_is_the_same_for_ever():
    """Plans of older runs must be drawn again after an upgrade."""
    assert draw_permutation(8, seed=0, step=0, branch=0).tolist() == GOLDEN[0]
    assert draw_permutation(8, seed=1234567890123, step=-7, branch=63).tolist() == GOLDEN[1]
    assert [draw_num_kept(10, 0.75, seed=3, step=step, branch=1) for step in range(8)] == GOLDEN[2]


@settings(max_examples=60, deadline=None)
@given(num_rows=st.integers(0, 300), seed=WORDS, step=WORDS, branch=WORDS)
def test_is_a_permutation_and_pure(num_rows, seed, step, branch):
    drawn = draw_permutation(num_rows, seed=seed, step=step, branch=branch)
    assert drawn.dtype == torch.int64
    assert sorted(drawn.tolist()) == list(range(num_rows))
    assert torch.equal(drawn, draw_permutation(num_rows, seed=seed, step=step, branch=branch))
    # Tensors stand for their numbers.
    tensors = {"seed": torch.tensor(seed), "step": torch.tensor(step), "branch": torch.tensor(branch)}
    assert torch.equal(drawn, draw_permutation(num_rows, **tensors))
    several = draw_permutation(num_rows, seed=seed, step=step, branch=torch.tensor([branch, 5]))
    assert several.shape == (2, num_rows)
    assert torch.equal(several[0], drawn)


def test_all_orders_are_equally_likely():
    # 24 orders of 4 rows, 24000 draws: chi-square of 23 degrees of freedom is above 58 once in 10^4.
    orders = draw_permutation(4, seed=0, step=0, branch=torch.arange(24000))
    counts = Counter(map(tuple, orders.tolist()))
    assert set(counts) == set(itertools.permutations(range(4)))
    assert chi_square(counts.values(), 1000) < 58


@pytest.mark.parametrize("name", ["seed", "step", "branch"])
def test_every_row_is_kept_equally_often(name):
    """... and pairs of rows too, over consecutive seeds, steps and branches."""
    num_rows, num_kept, draws = 64, 16, 2000
    kept = torch.zeros(draws, num_rows, dtype=torch.float64)
    for draw in range(draws):
        numbers = {"seed": 1, "step": 2, "branch": 3, name: draw}
        kept[draw, draw_permutation(num_rows, **numbers)[:num_kept]] = 1.0
    assert kept.sum(0).sub(draws / 4).abs().max() < 4.5 * (draws * 3 / 16) ** 0.5
    pairs = (kept.T @ kept)[torch.triu(torch.ones(num_rows, num_rows), 1).bool()]
    share = num_kept * (num_kept - 1) / (num_rows * (num_rows - 1))
    assert pairs.sub(draws * share).abs().max() < 5 * (draws * share * (1 - share)) ** 0.5
    # Consecutive draws are independent: the overlap of the kept rows has the mean 16 * 16 / 64 of chance.
    overlap = (kept[1:] * kept[:-1]).sum(1)
    assert abs(overlap.mean().item() - 4.0) < 4.5 * (overlap.var().item() / draws) ** 0.5


def test_hash_has_no_collisions_and_mixes_every_bit():
    numbers = torch.randint(1 << 32, (1 << 16,)).unique()
    hashed = permutation._mix(numbers)
    assert hashed.unique().numel() == numbers.numel()
    assert hashed.min() >= 0
    assert hashed.max() < 1 << 32
    for bit in range(32):
        flipped = hashed ^ permutation._mix(numbers ^ (1 << bit))
        shares = torch.stack([(flipped >> place & 1).double().mean() for place in range(32)])
        assert shares.min() > 0.4, bit
        assert shares.max() < 0.6, bit


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.5, 0.75, 0.875, 0.99])
@pytest.mark.parametrize("num_rows", [0, 1, 3, 16, 1000])
def test_num_kept_is_right_in_the_mean(num_rows, rate):
    draws = 3000
    counts = [draw_num_kept(num_rows, rate, seed=5, step=step, branch=2) for step in range(draws)]
    mean = (1 - rate) * num_rows
    assert all(abs(count - mean) < 1 for count in counts)
    assert abs(sum(counts) / draws - mean) < 4.5 * 0.5 / draws**0.5
    if rate == 0.0:
        assert set(counts) == {num_rows}


def test_num_kept_tells_nothing_of_the_permutation():
    first = torch.tensor([draw_permutation(8, seed=0, step=step, branch=0)[0].item() for step in range(3000)])
    counts = torch.tensor([draw_num_kept(1, 0.5, seed=0, step=step, branch=0) for step in range(3000)])
    for row in range(8):
        share = counts[first == row].double().mean().item()
        assert abs(share - 0.5) < 4.5 * 0.5 / (3000 / 8) ** 0.5


def test_touches_no_generator():
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    draw_permutation(100, seed=0, step=1, branch=2)
    draw_num_kept(100, 0.5, seed=0, step=1, branch=2)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), numpy.random.get_state()[1].tolist())


def test_compiles_once_for_all_steps():
    import torch._dynamo.testing

    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    drawn = torch.compile(draw_permutation, fullgraph=True, backend=counter)
    for step in range(5):
        numbers = {"seed": 7, "step": torch.tensor(step), "branch": torch.arange(3)}
        assert torch.equal(drawn(50, **numbers), draw_permutation(50, **numbers))
    assert counter.frame_count == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_same_bits_on_a_gpu():
    for num_rows in (0, 1, 1000, 1 << 20):
        on_gpu = draw_permutation(num_rows, seed=-5, step=3, branch=1, device="cuda")
        assert torch.equal(on_gpu.cpu(), draw_permutation(num_rows, seed=-5, step=3, branch=1))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_rows": -1}, ValueError, "num_rows: expected 0 to 2147483648, got -1"),
        ({"seed": 0.5}, TypeError, "seed: expected an int or an int64 tensor, got float"),
        ({"step": True}, TypeError, "step: expected an int or an int64 tensor, got bool"),
        ({"step": torch.zeros(2, dtype=torch.int64)}, TypeError, r"step: expected .* of shape \(2,\)"),
        ({"branch": torch.zeros(2)}, TypeError, "branch: expected an int or an int64 tensor .* got torch.float32"),
        ({"seed": 1 << 63}, ValueError, "seed: expected at most 64 bits"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        draw_permutation(**{"num_rows": 4, "seed": 0, "step": 0, "branch": 0, **arguments})


def test_wrong_rates():
    for rate in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="drop_rate: expected 0 <= drop_rate < 1"):
            draw_num_kept(4, rate, seed=0, step=0, branch=0)
    with pytest.raises(ValueError, match="num_rows: expected 0 or more, got -1"):
        draw_num_kept(-1, 0.5, seed=0, step=0, branch=0)
