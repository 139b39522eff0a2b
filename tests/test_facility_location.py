"""The greedy facility location: exact, lazy as naive, and the picks of an independent package."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dropbp_kernels import _backend
from dropbp_kernels.coreset import facility_location


def exact_greedy(similarity, num_picks):
    """The definition, in fractions: nothing is rounded, nothing remembered from turn to turn."""
    rows = [[Fraction(value) for value in row] for row in similarity.double().tolist()]
    elements = range(len(rows))
    picks = []
    for _ in range(num_picks):
        rest = [j for j in elements if j not in picks]
        picks.append(max(rest, key=lambda j: (sum(max(rows[k][i] for k in [*picks, j]) for i in elements), -j)))
    weights = [0] * num_picks
    for i in elements:
        best = max(range(num_picks), key=lambda k: (picks[k] == i, rows[picks[k]][i], -k))
        weights[best] += 1
    return picks, weights


def from_points(points):
    """Similarities of points by L1 distances."""
    points = torch.as_tensor(points, dtype=torch.float32).reshape(len(points), -1)
    distances = torch.cdist(points, points, p=1)
    return distances.max() - distances


def random_points(num_elements, width, *, grid):
    """On a grid, L1 distances and their sums are exact in every float, and many of them are equal."""
    return torch.randint(0, 4, (num_elements, width)) if grid else torch.randn(num_elements, width)


ADVERSARIAL = {
    "one element": torch.tensor([[0.0]]),
    "all alike": torch.ones(7, 7),
    "all zero": torch.zeros(6, 6),
    "identity: every gain ties": torch.eye(9),
    "one cluster": from_points([3.0] * 8),
    "duplicates": from_points([0, 5, 0, 9, 5, 0, 9, 9]),
    "a line: ends tie": from_points(range(12)),
    "two clusters of one size": from_points([0, 1, 2, 100, 101, 102]),
    "a hub after its rivals": torch.tensor(
        [[2.0, 2.0, 0, 0], [2.0, 2.0, 0, 0], [0, 0, 2.0, 2.0], [1.5, 1.5, 1.5, 1.5]]
    ),
    "not symmetric": torch.triu(torch.arange(1.0, 37.0).reshape(6, 6)),
    "tiny": torch.eye(5, dtype=torch.float64) * 1e-310,
    "huge": from_points([0, 1, 3, 4]).double() * 1e307,
    "far apart in size": torch.tensor([[1e6, 1.0, 0.0], [1.0, 1e-3, 0.0], [0.0, 0.0, 2e-3]]),
}


@pytest.fixture(params=["host", "python"])
def twin(request, monkeypatch):
    """The C++ algorithm and its twin in PyTorch."""
    if request.param == "python":
        monkeypatch.setattr(_backend, "host", lambda: None)
    elif _backend.host() is None:
        pytest.skip("the compiled host algorithms are not built, or not allowed")


def picked(similarity, num_picks, **options):
    picks, weights = facility_location(similarity, num_picks, **options)
    assert picks.dtype == weights.dtype == torch.int64
    return picks.tolist(), weights.tolist()


def test_by_hand(twin):
    # Gains of the first turn: 11, 12, 10, 5. After 1, which covers 4, 5, 3, 0: of 0 it is 1, of 2 0 + 2 + 3, of 3 5.
    similarity = torch.tensor([[5, 4, 2, 0], [4, 5, 3, 0], [2, 3, 5, 0], [0, 0, 0, 5]])
    assert picked(similarity, 1) == ([1], [4])
    assert picked(similarity, 2) == ([1, 3], [3, 1])
    assert picked(similarity, 3) == ([1, 3, 2], [2, 1, 1])
    assert picked(similarity, 4) == ([1, 3, 2, 0], [1, 1, 1, 1])


@pytest.mark.parametrize("lazy", [True, False])
def test_adversarial_inputs_equal_the_exact_greedy(twin, lazy):
    for name, similarity in ADVERSARIAL.items():
        for num_picks in range(1, len(similarity) + 1):
            assert picked(similarity, num_picks, lazy=lazy) == exact_greedy(similarity, num_picks), (name, num_picks)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_inputs_equal_the_exact_greedy(data):
    num_elements = data.draw(st.integers(1, 12), label="num_elements")
    numbers = (
        st.sampled_from([0.0, 1.0, 2.0, 3.0]) if data.draw(st.booleans(), label="ties") else st.floats(0, 8, width=32)
    )
    values = data.draw(st.lists(numbers, min_size=num_elements**2, max_size=num_elements**2), label="values")
    # From 2^-20 on: 24 binary digits below the largest number, which float32 holds, are held exactly.
    similarity = torch.tensor(values).reshape(num_elements, num_elements)
    similarity[similarity < 2.0**-20] = 0
    num_picks = data.draw(st.integers(1, num_elements), label="num_picks")
    expected = exact_greedy(similarity, num_picks)
    assert picked(similarity, num_picks) == picked(similarity, num_picks, lazy=False) == expected


@pytest.mark.parametrize("grid", [True, False])
def test_twins_and_greedies_agree(monkeypatch, grid):
    similarity = from_points(random_points(90, 5, grid=grid))
    expected = picked(similarity, 40)
    assert picked(similarity, 40, lazy=False) == expected
    monkeypatch.setattr(_backend, "host", lambda: None)
    assert picked(similarity, 40) == expected
    assert picked(similarity, 40, lazy=False) == expected
    assert sum(expected[1]) == 90
    assert min(expected[1]) >= 1


def test_equals_apricot(monkeypatch):
    """The published package adds in float64: integers, so that it rounds nothing and ties are ties.

    Its naive greedy breaks them as ours does, its lazy one in its heap's order: there, numbers without ties, and no
    pick after the gains have become zero.
    """
    numba = pytest.importorskip("numba")
    monkeypatch.setattr(numba.config, "DISABLE_JIT", True)  # it would compile for half a minute
    apricot = pytest.importorskip("apricot")
    tied = ["all alike", "all zero", "one cluster", "duplicates", "a line: ends tie", "two clusters of one size"]
    cases = {
        "naive": [*(ADVERSARIAL[name] for name in tied), from_points(torch.randint(0, 4, (60, 4)))],
        "lazy": [torch.randint(0, 1 << 20, (60, 60)).double()],
    }
    for optimizer, similarities in cases.items():
        theirs = apricot.FacilityLocationSelection(1, metric="precomputed", optimizer=optimizer)
        for similarity in similarities:
            theirs.n_samples = len(similarity)
            similarity = (similarity + similarity.T).double()  # as it assumes
            ranking = theirs.fit(similarity.clone().numpy()).ranking.tolist()
            num_picks = len(similarity) if optimizer == "naive" else 20
            assert picked(similarity, num_picks)[0] == ranking[:num_picks], (optimizer, similarity)


def test_order_of_sums_does_not_matter(twin):
    """Two candidates with the same numbers in another order tie exactly, where float sums need not."""
    values = torch.rand(64, dtype=torch.float64)
    similarity = torch.zeros(64, 64, dtype=torch.float64)
    similarity[5], similarity[3] = values, values.flip(0)
    assert picked(similarity, 1)[0] == [3]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int32])
def test_any_real_dtype_and_layout(twin, dtype):
    similarity = from_points([0, 5, 0, 9, 5, 0, 9, 9])
    expected = picked(similarity, 3)
    assert picked(similarity.to(dtype).T, 3) == expected
    assert picked(similarity.requires_grad_(), 3) == expected


def test_4096_candidates(twin):
    similarity = from_points(torch.randn(4096, 1))
    picks, weights = facility_location(similarity, 64)
    assert len(set(picks.tolist())) == 64
    assert weights.sum() == 4096
    # A quality that 64 random elements do not reach.
    chance = similarity[torch.randperm(4096)[:64]].amax(0).sum()
    assert similarity[picks].amax(0).sum() > chance


@pytest.mark.parametrize(
    ("similarity", "num_picks", "error", "message"),
    [
        (torch.ones(3), 1, ValueError, r"similarity: expected shape \(B, B\), got \(3,\)"),
        (torch.ones(3, 4), 1, ValueError, r"similarity: expected shape \(B, B\), got \(3, 4\)"),
        (torch.ones(3, 3), 0, ValueError, "num_picks: expected 1 to 3, .* got 0"),
        (torch.ones(3, 3), 4, ValueError, "num_picks: expected 1 to 3, .* got 4"),
        (torch.ones(0, 0), 1, ValueError, "num_picks: expected 1 to 0, .* got 1"),
        (-torch.eye(3), 1, ValueError, "similarity: expected finite numbers >= 0, got numbers from -1.0 to"),
        (torch.full((2, 2), math.nan), 1, ValueError, "similarity: expected finite numbers >= 0, got .* nan"),
        (torch.full((2, 2), math.inf), 1, ValueError, "similarity: expected finite numbers >= 0, got .* inf"),
        (torch.eye(3) > 0, 1, TypeError, "similarity: expected real numbers, got torch.bool"),
        (torch.eye(3) * 1j, 1, TypeError, "similarity: expected real numbers, got torch.complex64"),
    ],
)
def test_bad_input(similarity, num_picks, error, message):
    with pytest.raises(error, match=message):
        facility_location(similarity, num_picks)


def test_host_refuses_a_buffer_of_another_size():
    import array

    host = _backend.host()
    if host is None:
        pytest.skip("the compiled host algorithms are not built, or not allowed")
    with pytest.raises(ValueError, match="num_elements"):
        host.facility_location(array.array("q", [1, 2, 3]), 2, 1, True)
    with pytest.raises(ValueError, match="values of int64"):
        host.facility_location(array.array("i", [1, 2, 3, 4]), 2, 1, True)
    with pytest.raises(ValueError, match="num_picks: expected 0 to 1, got 2"):
        host.facility_location(array.array("q", [1]), 1, 2, True)
