"""A training loop that draws no plans is told so, once; loops that draw them are not."""

import copy
import io

import pytest
import torch
from models import tiny_causal_lm, toy_model, with_lora

from dropbp_kernels import DropBPHandler, apply_dropbp
from dropbp_kernels.coreset import CoresetSelector
from dropbp_kernels.gates import find_gates

TOKENS = torch.arange(16).view(2, 8)


def train(model, num_steps, draw_plan=lambda: None, micro_batches=1):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(num_steps):
        draw_plan()
        for _ in range(micro_batches):
            model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_no_step():
    model = tiny_causal_lm()
    apply_dropbp(model, 0.5)
    train(model, 1, micro_batches=2)
    with pytest.warns(UserWarning, match=r"expected handler\.step\(\) before the forward") as record:
        train(model, 3)
    assert len(record) == 1


def test_step_outside_of_the_loop():
    model = tiny_causal_lm()
    handler = apply_dropbp(model, 0.5)
    handler.step()
    with pytest.warns(UserWarning, match="weights changed between two forwards without it"):
        train(model, 2)


def test_blocks_of_ones_own():
    model = toy_model()
    DropBPHandler(model, 0.5)
    model(torch.ones(1, 1, 8)).sum().backward()
    torch.optim.AdamW(model.parameters()).step()
    with pytest.warns(UserWarning, match=r"handler\.step"):
        model(torch.ones(1, 1, 8))


def test_blocks_that_left_for_another_pipeline_stage():
    model = torch.nn.ModuleDict({f"block{number}": block for number, block in enumerate(toy_model())})
    handler = DropBPHandler(model, 0.5, strict=False)
    del model["block0"], model["block1"]
    handler.step()  # looked for the first block by its name
    assert [block.gate.unstepped is not None for block in model.values()] == [True, False]


@pytest.mark.parametrize("part", [{"target_windows": 2}, {"target_keep": 0.5}])
def test_parts_of_the_labels_need_steps_too(part):
    model = tiny_causal_lm()
    apply_dropbp(model, 0.0, context="inference", **part)
    with pytest.warns(UserWarning, match="the plan stays what it was"):
        train(model, 2)


@pytest.mark.parametrize("copied", ["deepcopy", "pickle"])
def test_copy_whose_handler_stayed_behind(copied):
    model = tiny_causal_lm()
    handler = apply_dropbp(model, 0.5)
    if copied == "deepcopy":
        other = copy.deepcopy(model)
    else:
        torch.save(model, file := io.BytesIO())
        file.seek(0)
        other = torch.load(file, weights_only=False)
    handler.step()  # says nothing to the copy
    with pytest.warns(UserWarning, match="step: expected"):
        train(other, 2)
    train(other, 2, DropBPHandler(other, 0.5).step)


def test_a_copy_of_a_model_that_was_trained_hears_nothing_at_its_first_call():
    model = tiny_causal_lm()
    apply_dropbp(model, 0.5)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.0)  # counted, as training before the patch would be
    for _ in range(2):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        model = copy.deepcopy(model)


def test_adapters_that_are_disabled_for_a_reference_hear_nothing():
    model = with_lora(tiny_causal_lm())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.mul_(1.0)
    apply_dropbp(model, 0.5)
    for _ in range(2):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        with model.disable_adapter():
            model(input_ids=TOKENS)


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_loops_that_are_right_hear_nothing(rate):
    model = tiny_causal_lm()
    handler = apply_dropbp(model, rate, checkpoint="kept")
    selector = CoresetSelector(model, keep=0.5)
    batch = {"input_ids": TOKENS, "labels": TOKENS}

    def loss():
        return model(**batch).loss

    def draw_plan():
        handler.calibrate(loss, allocation="variance")  # between two steps, after weights changed
        selector.select(batch)
        with torch.no_grad():
            loss()
        handler.step()

    train(model, 3, draw_plan, micro_batches=2)
    assert all(gate.unstepped is None for gate in find_gates(model).values())


def test_plans_by_hand_and_undropped_models_hear_nothing():
    model = tiny_causal_lm()
    handler = apply_dropbp(model, 0.5)
    handler.set_plan([True, False] * 3)
    train(model, 3)
    model = tiny_causal_lm()
    apply_dropbp(model, 0.0)
    train(model, 3)


def test_zero_3_is_known_by_its_parameters_and_given_no_plan_that_drops():
    """tests/test_deepspeed.py does so in DeepSpeed, where that is installed."""
    model = toy_model()
    for parameter in model.parameters():
        parameter.ds_id = 0
    handler = DropBPHandler(model, 0.5)
    plan = handler.plan
    with pytest.raises(RuntimeError, match=r"plan: expected a gradient for every parameter under .* ZeRO-3"):
        handler.step()
    assert (handler.plan, handler.num_steps) == (plan, 0)
    with pytest.raises(RuntimeError, match="ZeRO-3"):
        handler.set_plan([False] + [True] * (len(plan) - 1))
    state = {**handler.state_dict(), "plan": [False] * len(plan)}
    with pytest.raises(RuntimeError, match="ZeRO-3"):
        handler.load_state_dict(state)
    assert (handler.plan, handler.num_steps) == (plan, 0)
    with pytest.raises(RuntimeError, match="drops branches or rows"):
        DropBPHandler(model, 0.5, granularity="sample").step()
    DropBPHandler(model, 0.0).step()
    model.requires_grad_(False)  # DeepSpeed leaves what is frozen alone
    DropBPHandler(model, 0.5).step()
