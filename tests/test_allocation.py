"""Drop rates from sensitivities and FLOPs: the published greedy in both twins, and the exact allocations."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dropbp_kernels import _backend, allocation
from dropbp_kernels.allocation import allocate, default_max_rate, depth_linear_rates

ATTENTION, MLP = 46137344.0, 176160768.0
MIXED = [0.5, 1e-8, 3e4, 0.7, 12.0, 0.1, 2.25, 1e-3]

# (sensitivities, flops, drop_rate, min_rate, steps of 0.1 above min_rate, rates as float32).
# The rates were recorded from the published C++ (commit 7170a63), compiled on x86-64 and called as its handler does.
# The steps can be followed by hand, the first one: 200 FLOPs are there, 150 may stay; equal keys, so the last branch
# goes first: 190, the first branch 180, again 170, 160, and the last one more: 150.
PUBLISHED = [
    ([1, 1], [100, 100], 0.25, 0.0, [2, 3], [0.20000000298023224, 0.30000001192092896]),
    (
        [1, 2, 4],
        [1000, 1000, 1000],
        0.5,
        0.0,
        [9, 4, 2],
        [0.9000000953674316, 0.4000000059604645, 0.20000000298023224],
    ),
    (
        [4, 1, 0, 2],
        [100, 400, 100, 400],
        0.5,
        0.0,
        [1, 7, 9, 3],
        [0.10000000149011612, 0.7000000476837158, 0.9000000953674316, 0.30000001192092896],
    ),
    ([1, 1, 1], [300, 100, 200], 0.6, 0.1, [5, 5, 5], [0.6000000238418579, 0.6000000238418579, 0.6000000238418579]),
    ([1, 3], [100, 300], 0.7, 0.25, [7, 4], [0.9500001072883606, 0.6500000357627869]),
    ([2, 3], [1000, 1000], 0.34, 0.25, [2, 0], [0.44999998807907104, 0.25]),
    (
        MIXED,
        [ATTENTION, MLP] * 4,
        0.75,
        0.0,
        [9, 9, 0, 8, 0, 9, 2, 9],
        [
            0.9000000953674316,
            0.9000000953674316,
            0.0,
            0.8000000715255737,
            0.0,
            0.9000000953674316,
            0.20000000298023224,
            0.9000000953674316,
        ],
    ),
    (
        MIXED,
        [ATTENTION, MLP] * 4,
        0.875,
        0.3,
        [6, 6, 2, 6, 6, 6, 6, 6],
        [0.9000000953674316] * 2 + [0.5] + [0.9000000953674316] * 5,
    ),
]


def python_twin(sensitivities, flops, target_flops, min_rate):
    return allocation._allocate_published(sensitivities, flops, target_flops, min_rate)


def host_twin(sensitivities, flops, target_flops, min_rate):
    host = _backend.host()
    if host is None:
        pytest.skip("the compiled host algorithms are not built, or not allowed")
    return host.allocate_published(sensitivities, flops, target_flops, min_rate)


@pytest.mark.parametrize("twin", [python_twin, host_twin])
@pytest.mark.parametrize("case", PUBLISHED)
def test_both_twins_equal_the_published_code_bit_for_bit(twin, case):
    sensitivities, flops, drop_rate, min_rate, num_steps, expected = case
    target_flops = float(int((1 - drop_rate) * sum(flops)))
    rates = list(twin([float(s) for s in sensitivities], [float(f) for f in flops], target_flops, min_rate))
    assert rates == expected
    assert [round((rate - min_rate) / 0.1) for rate in rates] == num_steps


@pytest.mark.parametrize("case", PUBLISHED)
def test_allocate_equals_the_published_code(case):
    sensitivities, flops, drop_rate, min_rate, _, expected = case
    assert allocate(sensitivities, flops, drop_rate, min_rate=min_rate) == expected


positive = st.floats(1e-12, 1e12)


@given(
    branches=st.lists(
        st.tuples(st.one_of(positive, st.sampled_from([0.0, 1.0, 2.0])), st.integers(10**3, 10**11)),
        min_size=1,
        max_size=40,
    ),
    min_rate=st.sampled_from([0.0, 0.1, 0.25, 0.3]),
    share=st.floats(0.0, 0.99),
)
@settings(max_examples=150, deadline=None)
def test_twins_agree_and_meet_the_target(branches, min_rate, share):
    sensitivities, flops = [float(s) for s, _ in branches], [float(f) for _, f in branches]
    drop_rate = min_rate + share * (0.9 - min_rate)
    target_flops = float(int((1 - drop_rate) * sum(flops)))
    rates = python_twin(sensitivities, flops, target_flops, min_rate)
    assert all(min_rate - 1e-7 <= rate < 1.0 for rate in rates)
    left = math.fsum((1 - rate) * cost for rate, cost in zip(rates, flops, strict=True))
    assert left <= target_flops + 1e-6 * sum(flops)
    assert left >= target_flops - 0.1 * max(flops) - 1e-6 * sum(flops)  # not one step too many
    if _backend.host() is not None:
        assert list(host_twin(sensitivities, flops, target_flops, min_rate)) == rates


def test_sensitive_branches_are_dropped_less():
    rates = allocate([5.0, 1.0, 3.0, 2.0, 4.0], [1000.0] * 5, 0.5)
    assert sorted(range(5), key=lambda index: -rates[index]) == [1, 3, 2, 4, 0]


def test_min_rate_equal_to_the_target_and_no_dropping_at_all():
    assert allocate([1.0, 2.0], [1.5, 2.5], 0.0) == [0.0, 0.0]
    assert allocate([1.0, 2.0], [1000.0, 1000.0], 0.5, min_rate=0.5) == [0.5, 0.5]


def test_numbers_of_any_kind_are_taken():
    torch = pytest.importorskip("torch")
    expected = allocate([1.0, 2.0, 4.0], [1000.0] * 3, 0.5)
    assert allocate(torch.tensor([1.0, 2.0, 4.0]), (1000, 1000, 1000), 0.5) == expected
    assert all(type(rate) is float for rate in expected)


@pytest.mark.parametrize(
    ("sensitivities", "flops", "options", "message"),
    [
        ([1.0], [1.0, 2.0], {}, "flops: expected one for each of the 1 sensitivities, got 2"),
        ([], [], {}, "sensitivities: expected at least one branch"),
        ([1.0, math.nan], [1.0, 1.0], {}, "sensitivities: expected finite numbers .* got nan for branch 1"),
        ([math.inf, 1.0], [1.0, 1.0], {}, "sensitivities: expected finite numbers .* got inf for branch 0"),
        ([1e39, 1.0], [1.0, 1.0], {}, r"sensitivities: expected finite numbers .* got 1e\+39 for branch 0"),
        ([-1.0, 1.0], [1.0, 1.0], {}, "sensitivities: expected finite numbers .* got -1.0 for branch 0"),
        ([0.0, 0.0], [1.0, 1.0], {}, "sensitivities: expected at least one positive number.*were the gates called"),
        ([1.0, 1.0], [1.0, -2.0], {}, "flops: expected finite numbers >= 0 .* got -2.0 for branch 1"),
        ([1.0, 1.0], [0.0, 0.0], {}, "flops: expected at least one positive number, got only zeros$"),
        ([1.0, 1.0], [1e3, 1e3], {"drop_rate": 1.0}, "drop_rate: expected 0 <= drop_rate < 1, got 1.0"),
        ([1.0, 1.0], [1e3, 1e3], {"drop_rate": -0.1}, "drop_rate: expected 0 <= drop_rate < 1, got -0.1"),
        ([1.0, 1.0], [1e3, 1e3], {"drop_rate": math.nan}, "drop_rate: expected 0 <= drop_rate < 1, got nan"),
        (
            [1.0, 1.0],
            [1e3, 1e3],
            {"drop_rate": 0.9},
            "drop_rate: expected less than 0.9, .* at the cap of 0.9, got 0.9",
        ),
        ([1.0, 1.0], [1e3, 1e3], {"drop_rate": 0.96, "min_rate": 0.25}, "drop_rate: expected less than 0.95, "),
        ([1.0, 1.0], [1e3, 1e3], {"drop_rate": 0.97, "min_rate": 0.95}, "drop_rate: expected less than 0.95, "),
        ([1.0, 1.0], [1, 1], {"drop_rate": 0.75}, r"drop_rate: expected .*FLOPs left to spend: 0 of 2\)"),
        ([1.0, 1.0], [1e3, 1e3], {"min_rate": 0.6}, r"min_rate: expected 0 <= min_rate <= drop_rate \(0.5\), got 0.6"),
        ([1.0, 1.0], [1e3, 1e3], {"min_rate": -0.1}, "min_rate: expected 0 <= min_rate"),
        ([1.0, 1.0], [1e3, 1e3], {"max_rate": 0.9}, "max_rate: expected None, .* published method, got 0.9"),
        *(
            ([1.0, 1.0], [1e3, 1e3], {"max_rate": wrong, "method": "optimal"}, r"max_rate: expected drop_rate \(0.5\)")
            for wrong in (0.4, 1.0, math.nan)
        ),
        (
            [1.0, 1.0],
            [1e3, 1e3],
            {"method": "greedy"},
            "method: expected one of published, optimal, variance, got 'greedy'",
        ),
    ],
)
def test_bad_input(sensitivities, flops, options, message):
    with pytest.raises(ValueError, match=message):
        allocate(sensitivities, flops, **{"drop_rate": 0.5, **options})


def test_just_below_the_reachable_rate():
    assert allocate([1.0, 2.0], [1e6, 1e6], 0.8999) == [0.9000000953674316] * 2


@pytest.mark.parametrize("twin", [python_twin, host_twin])
def test_rates_are_rounded_to_float32_and_what_is_left_is_not(twin):
    # 0.04 + 0.1 + 0.1, rounded after each sum; with a step of float32 it would be 0.24000000953674316.
    assert list(twin([1.0], [1000.0], 800.0, 0.04)) == [0.23999999463558197]
    # 1000 * (1 - 0.7) - 100 is a little more than 200, for which the branch is raised once more.
    assert list(twin([0.5], [1000.0], 200.0, 0.7)) == [0.9000000357627869]


@pytest.mark.parametrize("twin", [python_twin, host_twin])
def test_an_empty_heap_is_an_error_and_no_undefined_behaviour(twin):
    with pytest.raises(RuntimeError, match=r"target_flops: expected a value that rates up to 0.9 can reach, got 0"):
        twin([1.0, 1.0], [1.0, 1.0], 0.0, 0.0)


def flops_dropped(rates, flops):
    return math.fsum(rate * cost for rate, cost in zip(rates, flops, strict=True)) / math.fsum(flops)


def test_optimal_by_hand():
    """Sensitivity per FLOP 1, 4, 2, 2: the first goes to the bound, the last two share what is left of 500 FLOPs."""
    rates = allocate([100.0, 400.0, 400.0, 400.0], [100.0, 100.0, 200.0, 200.0], 0.5, method="optimal", max_rate=0.8)
    assert rates == pytest.approx([0.8, 0.0, 0.55, 0.55])
    assert allocate([2.0, 1.0], [1.0, 1.0], 0.75, method="optimal", min_rate=0.6, max_rate=0.8) == pytest.approx(
        [0.7, 0.8]
    )


def test_variance_by_hand():
    """1 - rate in proportion to sqrt(S / F) = 1, 2, 3; of 0.5 * 300 FLOPs that is 0.25, 0.5, 0.75."""
    assert allocate([1e2, 4e2, 9e2], [100.0] * 3, 0.5, method="variance") == pytest.approx([0.75, 0.5, 0.25])
    # Clipped: the last is always kept, and the others share the 80 FLOPs that are left, 1 to 2.
    assert allocate([1e2, 4e2, 1e6], [100.0] * 3, 0.4, method="variance") == pytest.approx(
        [1 - 0.8 / 3, 1 - 1.6 / 3, 0.0]
    )
    # Branches that nothing is lost by dropping get what the others cannot use.
    assert allocate([1.0, 0.0], [1.0, 1.0], 0.25, method="variance") == pytest.approx([0.0, 0.5])


branch = st.tuples(st.one_of(positive, st.sampled_from([0.0, 1.0, 2.0])), st.floats(1e3, 1e11))


@pytest.mark.parametrize("method", ["optimal", "variance"])
@given(
    branches=st.lists(branch, min_size=1, max_size=12).filter(lambda pairs: any(s for s, _ in pairs)),
    drop_rate=st.floats(0.0, 0.999),
    min_share=st.sampled_from([0.0, 0.5, 1.0]),
    data=st.data(),
)
@settings(max_examples=100, deadline=None)
def test_exact_budget_bounds_and_optimum(method, branches, drop_rate, min_share, data):
    """No move of FLOPs from one branch to another, within the bounds, lowers the objective."""
    sensitivities, flops = [s for s, _ in branches], [f for _, f in branches]
    low, high = min_share * drop_rate, default_max_rate(drop_rate)
    rates = allocate(sensitivities, flops, drop_rate, method=method, min_rate=low)
    assert all(low - 1e-12 <= rate <= high + 1e-12 for rate in rates)
    assert flops_dropped(rates, flops) == pytest.approx(drop_rate, abs=1e-9)

    def objective(rates):
        each = rates if method == "optimal" else [rate / (1 - rate) for rate in rates]
        return math.fsum(s * value for s, value in zip(sensitivities, each, strict=True))

    one, other = data.draw(st.tuples(*[st.integers(0, len(rates) - 1)] * 2))
    room = min((high - rates[one]) * flops[one], (rates[other] - low) * flops[other])
    moved = list(rates)
    rounding = 1e-12 + 1e-15 * math.fsum(sensitivities)  # of rates, as the objective sees it
    for share in (0.01, 0.5, 1.0):
        moved[one] = rates[one] + share * room / flops[one]
        moved[other] = rates[other] - share * room / flops[other]
        assert one == other or objective(moved) >= objective(rates) * (1 - 1e-6) - rounding


def test_any_target_is_reached():
    for method in ("optimal", "variance"):
        for drop_rate in (0.0, 0.5, 0.95, 0.999):
            assert flops_dropped(
                allocate(MIXED, [ATTENTION, MLP] * 4, drop_rate, method=method), [ATTENTION, MLP] * 4
            ) == (pytest.approx(drop_rate))


def test_depth_linear_rates():
    assert depth_linear_rates([1.0] * 5, 0.5) == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9])
    assert depth_linear_rates([1.0] * 5, 0.25) == pytest.approx([0.0, 0.125, 0.25, 0.375, 0.5])
    assert depth_linear_rates([3.0], 0.5) == [0.5]
    for drop_rate in (0.0, 0.3, 0.75, 0.95):
        rates = depth_linear_rates([ATTENTION, MLP] * 8, drop_rate)
        assert flops_dropped(rates, [ATTENTION, MLP] * 8) == pytest.approx(drop_rate)
        assert rates == sorted(rates)
        assert 0.0 <= rates[0] <= rates[-1] < 1.0
    with pytest.raises(ValueError, match=r"max_rate: expected drop_rate \(0.95\) <= max_rate < 1, got 0.9"):
        depth_linear_rates([1.0, 1.0], 0.95, max_rate=0.9)
    with pytest.raises(ValueError, match="flops: expected at least one positive number"):
        depth_linear_rates([], 0.5)


def test_the_compiled_greedy_wants_flops_for_each_branch():
    host = pytest.importorskip("dropbp_kernels._host")
    with pytest.raises(ValueError, match="flops: expected one for each of the 1 sensitivities, got 2"):
        host.allocate_published([1.0], [1.0, 2.0], 1.0, 0.0)
