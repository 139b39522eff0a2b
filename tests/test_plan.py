"""The drop plan and how gates are told."""

import pytest

from dropbp_kernels import DropBP, DropPlan
from dropbp_kernels.plan import set_plan


def test_a_plan_is_a_value():
    plan = DropPlan((True, False, False, False), step=3, seed=1)
    assert plan == DropPlan((True, False, False, False), step=3, seed=1)
    assert len(plan) == 4
    assert list(plan) == [True, False, False, False]
    assert plan.drop_rate == 0.75
    with pytest.raises(AttributeError):
        plan.step = 4


def test_set_plan_tells_every_gate():
    gates = {"a": DropBP(), "b": DropBP(), "c": DropBP()}
    set_plan(gates, (False, True, False))
    assert [gate.kept for gate in gates.values()] == [False, True, False]


@pytest.mark.parametrize(
    ("kept", "error", "message"),
    [
        ((True,), ValueError, "plan: expected one entry for each of the 2 branches, got 1"),
        ((False, 0.5), TypeError, "plan: expected bool entries .* got 0.5 of type float"),
        ((False, 1), TypeError, "plan: expected bool entries .* got 1 of type int"),
    ],
)
def test_a_wrong_plan_changes_no_gate(kept, error, message):
    gates = {"a": DropBP(), "b": DropBP()}
    with pytest.raises(error, match=message):
        set_plan(gates, kept)
    assert all(gate.kept for gate in gates.values())


def test_a_gate_that_finds_its_modules_no_more_changes_no_other():
    class Lost(DropBP):
        def refresh(self):
            raise ValueError("lost")

    gates = {"a": DropBP(), "b": Lost()}
    with pytest.raises(ValueError, match="lost"):
        set_plan(gates, (False, False))
    assert gates["a"].kept
