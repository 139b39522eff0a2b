"""What happens to a parameter whose branch was dropped in a step: weight decay, momentum, Adam's moments and count."""

import pytest
import torch
from models import toy_model

from dropbp_kernels import DropBPHandler
from dropbp_kernels.missing_grad import fill_missing_gradients, register_missing_grad

X = torch.linspace(-1.0, 1.0, 48).view(2, 3, 8)
LEARNING_RATE, WEIGHT_DECAY = 0.1, 0.5


def run(make_optimizer, missing_grad, plans, micro_batches=1):
    """Two blocks; the second's weight before and after the last step, and its optimizer state."""
    model = toy_model(2)
    handler = DropBPHandler(model, 0.5, strict=False)
    optimizer = make_optimizer(model.parameters())
    register_missing_grad(optimizer, missing_grad)
    weight = model[1].up.weight
    steps = [plans[start : start + micro_batches] for start in range(0, len(plans), micro_batches)]
    for of_step in steps:
        for kept in of_step:
            handler.set_plan([True, kept])
            model(X).square().mean().backward()
        before = weight.detach().clone()
        optimizer.step()
        optimizer.zero_grad()
    return before, weight.detach(), optimizer.state[weight]


def sgd(parameters):
    return torch.optim.SGD(parameters, LEARNING_RATE, momentum=0.9, weight_decay=WEIGHT_DECAY)


def adamw(parameters):
    return torch.optim.AdamW(parameters, LEARNING_RATE, weight_decay=WEIGHT_DECAY)


@pytest.mark.parametrize("make_optimizer", [sgd, adamw])
def test_skip_leaves_weight_and_state_alone(make_optimizer):
    before, after, state = run(make_optimizer, "skip", [True, False])
    assert torch.equal(after, before)
    _, _, state_of_one_step = run(make_optimizer, "skip", [True])
    assert state.keys() == state_of_one_step.keys()
    assert all(torch.equal(torch.as_tensor(state[key]), torch.as_tensor(state_of_one_step[key])) for key in state)
    assert not run(make_optimizer, "skip", [False])[2]  # never kept: no state at all


def test_zero_is_a_step_of_sgd_with_momentum():
    before, after, state = run(sgd, "zero", [True, False])
    momentum = run(sgd, "zero", [True])[2]["momentum_buffer"]
    expected = 0.9 * momentum + WEIGHT_DECAY * before
    torch.testing.assert_close(state["momentum_buffer"], expected)
    torch.testing.assert_close(after, before - LEARNING_RATE * expected)


def test_zero_is_a_step_of_adamw():
    before, after, state = run(adamw, "zero", [True, False])
    first = run(adamw, "zero", [True])[2]
    assert (int(first["step"]), int(state["step"])) == (1, 2)
    m, v = 0.9 * first["exp_avg"], 0.999 * first["exp_avg_sq"]
    torch.testing.assert_close(state["exp_avg"], m)
    torch.testing.assert_close(state["exp_avg_sq"], v)
    moved = LEARNING_RATE * (m / (1 - 0.9**2)) / ((v / (1 - 0.999**2)).sqrt() + 1e-8)
    torch.testing.assert_close(after, before * (1 - LEARNING_RATE * WEIGHT_DECAY) - moved)


def test_under_accumulation_one_kept_micro_batch_is_enough():
    results = {mode: run(adamw, mode, [True, True, False, True], micro_batches=2) for mode in ("skip", "zero")}
    assert torch.equal(results["skip"][1], results["zero"][1])
    assert all(int(state["step"]) == 2 for _, _, state in results.values())
    assert not torch.equal(results["skip"][0], results["skip"][1])


def test_frozen_parameters_stay_without():
    model = toy_model(2)
    model[0].requires_grad_(False)
    fill_missing_gradients(model.parameters())
    assert all(parameter.grad is None for parameter in model[0].parameters())
    assert all(not parameter.grad.any() for parameter in model[1].parameters())


def test_an_unknown_mode():
    with pytest.raises(ValueError, match="missing_grad: expected one of skip, zero, got 'keep'"):
        register_missing_grad(sgd(toy_model(1).parameters()), "keep")
