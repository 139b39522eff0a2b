"""How many examples each source keeps: by hand, and on drawn counts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dropbp_kernels.coreset.budgets import num_kept, plan_budgets, source_id


def members(*counts):
    return [source for source, count in enumerate(counts) for _ in range(count)]


@pytest.mark.parametrize(
    ("counts", "keep", "expected"),
    [
        # mean 16: the last is small and kept whole; 24 - 6 = 18 are left for 20 + 22
        ((20, 22, 6), 0.5, [9, 9, 6]),
        ((30, 10, 2), 0.5, [9, 10, 2]),
        # equal sizes: none is below the mean
        ((8, 8), 0.5, [4, 4]),
        # two are below the mean, by one; with the second whole too, the third would get nothing
        ((21, 21, 22), 0.5, [21, 5, 6]),
        ((5,), 0.5, [3]),
        ((5, 1), 1.0, [5, 1]),
        ((40, 3, 3), 0.1, [3, 1, 1]),  # no room for what is small
    ],
)
def test_by_hand(counts, keep, expected):
    assert plan_budgets(members(*counts), num_kept(sum(counts), keep)) == dict(enumerate(expected))


def test_what_sources_below_one_example_get_is_taken_where_most_is_above_the_exact_share():
    # 8 of 74: exactly 5.30 and 2.38, so 5 and 2; of the two too many one is taken off 5, then one off 2 (4 is less).
    assert plan_budgets(members(49, 22, 1, 1, 1), 8, dict.fromkeys(range(5), 1)) == dict(enumerate([4, 1, 1, 1, 1]))


def test_sizes_of_the_data_set_decide_what_is_small():
    assert plan_budgets(members(9, 9), 13, {0: 900, 1: 100}) == {0: 4, 1: 9}
    assert plan_budgets(members(9, 9), 13) == {0: 7, 1: 6}


@given(
    counts=st.lists(st.integers(1, 60), min_size=1, max_size=8),
    keep=st.floats(0.01, 1.0),
)
def test_budgets_fill_the_subset_and_fit_the_sources(counts, keep):
    sources = [source for source, count in enumerate(counts) for _ in range(count)]
    total = num_kept(len(sources), keep)
    if total < len(counts):
        with pytest.raises(ValueError, match="enlarge the batch or keep"):
            plan_budgets(sources, total)
        return
    budgets = plan_budgets(sources, total)
    assert sum(budgets.values()) == total
    assert all(1 <= budgets[source] <= counts[source] for source in budgets)
    assert budgets == plan_budgets(sources[::-1], total)
    split = [source for source in budgets if budgets[source] < counts[source]]
    left = sum(budgets[source] for source in split)
    for source in split:  # in proportion, up to a whole number and the one that each gets at least
        exact = left * counts[source] / sum(counts[other] for other in split)
        assert budgets[source] == 1 or abs(budgets[source] - exact) <= len(split)


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"sources: expected at most 2, as many as examples are kept of 4, got 3"):
        plan_budgets([1, 2, 3, 3], 2)
    with pytest.raises(ValueError, match=r"sources: expected those that the selector was told of \(a, b\), got c"):
        plan_budgets(["a", "c"], 1, {"a": 1, "b": 2})
    with pytest.raises(ValueError, match="batch: expected at least as many examples as there are sources, 3, got 2"):
        plan_budgets(["a", "b"], 1, {"a": 1, "b": 2, "c": 3})
    with pytest.raises(ValueError, match="but all 3 examples are from small ones: 1, 2"):
        plan_budgets([1, 2, 1], 2, {1: 1, 2: 2, 3: 30})
    assert plan_budgets([1, 2, 1], 3, {1: 3, 2: 3, 3: 30}) == {1: 2, 2: 1}  # which keeps all


def test_source_ids_are_the_same_in_every_process():
    assert source_id(7) == 7
    assert source_id("code") == -7723932992135749651
    assert len({source_id(name) for name in "abcdefgh"}) == 8
