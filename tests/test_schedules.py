"""Schedules of the drop rate over a run: their values, what a handler makes of them, and what they refuse."""

import math

import pytest
import torch
from models import toy_model

from dropbp_kernels import DropBPHandler
from dropbp_kernels.schedules import SCHEDULES, cosine, factor_at, get_schedule, recovery, warmup


def test_values():
    assert [warmup(step, 100) for step in (0, 5, 10, 99)] == [0.0, 0.5, 1.0, 1.0]
    assert [cosine(step, 100) for step in (0, 25, 50, 75)] == pytest.approx([1.0, 0.5 + 0.25 * 2**0.5, 0.5, 0.1464466])
    assert [cosine(step, 100, share=0.5) for step in (0, 50, 75, 99)] == pytest.approx([1, 1, 0.5, 0.000986635])
    assert [recovery(step, 100) for step in (0, 89, 90, 99)] == [1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("share", ["", ":0.05", ":1"])
@pytest.mark.parametrize("total_steps", [1, 7, 1000])
def test_factors_are_factors(name, share, total_steps):
    schedule = get_schedule(name + share)
    assert all(0.0 <= factor_at(schedule, step, total_steps) <= 1.0 for step in range(total_steps))
    assert factor_at(schedule, 10 * total_steps, total_steps) == factor_at(schedule, total_steps - 1, total_steps)


def test_a_handler_drops_by_the_rates_of_the_step():
    model = toy_model(8)
    handler = DropBPHandler(model, 0.75, schedule="recovery:0.5", total_steps=8, grad_scale="unbiased")
    kept, scales = [], []
    for _ in range(8):
        kept.append(sum(handler.step()))
        scales.append({gate.grad_scale for gate in handler.gates.values()})
        model(torch.ones(1, 1, 8))
    assert kept == [2] * 4 + [8] * 4
    assert scales == [{4.0}] * 4 + [{1.0}] * 4  # unbiased for the rates in force
    assert handler.drop_rates == [0.75] * 8
    assert handler.draw(2) == DropBPHandler(toy_model(8), 0.75, schedule="recovery:0.5", total_steps=8).draw(2)


def test_a_callable():
    handler = DropBPHandler(toy_model(8), 0.5, schedule=lambda step, total: step / total, total_steps=4)
    assert [sum(handler.draw(step)) for step in range(4)] == [8, 7, 6, 5]


@pytest.mark.parametrize(
    ("schedule", "error", "message"),
    [
        ("linear", ValueError, "schedule: expected a callable or one of warmup, cosine, recovery, got 'linear'"),
        ("warmup:0", ValueError, r"schedule: expected a share of the run in \(0, 1\] after 'warmup', got '0'"),
        ("warmup:many", ValueError, "schedule: expected a share .* got 'many'"),
        (0.5, TypeError, "schedule: expected None, a name or a callable, got float"),
    ],
)
def test_what_is_no_schedule(schedule, error, message):
    with pytest.raises(error, match=message):
        DropBPHandler(toy_model(), 0.5, schedule=schedule, total_steps=10)


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (1.5, ValueError, r"schedule: expected a factor in \[0, 1\], got 1.5 at step 0"),
        (-0.1, ValueError, r"schedule: expected a factor in \[0, 1\], got -0.1"),
        (math.nan, ValueError, r"schedule: expected a factor in \[0, 1\], got nan"),
        (None, TypeError, "schedule: expected a function that returns a number, got None at step 0"),
        ([0.5] * 4, TypeError, "schedule: expected a function that returns a number"),
    ],
)
def test_what_a_callable_may_not_return(returned, error, message):
    handler = DropBPHandler(toy_model(), 0.5, schedule=lambda step, total: returned, total_steps=10)
    with pytest.raises(error, match=message):
        handler.step()
    assert handler.num_steps == 0


def test_total_steps():
    with pytest.raises(ValueError, match=r"total_steps: expected the number of steps of the run, .* got None"):
        DropBPHandler(toy_model(), 0.5, schedule="warmup").step()
    for wrong in (0, -3, 2.5, True):
        with pytest.raises(ValueError, match="total_steps: expected a number of steps, at least 1, got"):
            DropBPHandler(toy_model(), 0.5, schedule="warmup", total_steps=wrong)
