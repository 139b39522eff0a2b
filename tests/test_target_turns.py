"""Turns of a conversation: in stages of their own, or together in two, in which some targets run twice."""

import pytest
import torch
from hypothesis import given, settings
from target_cases import CLOSE, assert_same, backward, batches, chat, tiny

from dropbp_kernels import apply_dropbp, targets
from dropbp_kernels.integrations import target_plans
from dropbp_kernels.stage_masks import StageMasks
from dropbp_kernels.targets import IGNORED, plan_targets


def talk(num_turns, num_context=3):
    """Labels of one conversation, (1, S)."""
    return torch.tensor([[*[IGNORED] * num_context, 5] * num_turns])


def places(plan):
    return [(stage.is_target, stage.rows[0].tolist()) for stage in plan.stages]


def test_together_all_context_runs_before_all_targets():
    labels = torch.tensor([[IGNORED, IGNORED, 5, 6, IGNORED, IGNORED, 7, IGNORED]])
    plan = plan_targets(labels, turns="together")
    assert places(plan) == [(False, [0, 1, 2, 3, 4]), (True, [1, 2, 5])]  # nobody sees the last one's keys
    assert (plan.num_context, plan.num_target, plan.num_again, plan.num_skipped) == (5, 3, 2, 2)
    apart = plan_targets(labels, turns="apart")
    assert places(apart) == [(False, [0]), (True, [1, 2]), (False, [3, 4]), (True, [5])]
    assert (apart.num_context, apart.num_target, apart.num_again, apart.num_skipped) == (3, 3, 0, 2)


@pytest.mark.parametrize("turns", ["apart", "together"])
def test_one_turn_runs_once(turns):
    plan = plan_targets(talk(1), turns=turns)
    assert places(plan) == [(False, [0, 1]), (True, [2])]
    assert plan.num_again == 0


def test_turns_run_together_where_that_makes_fewer_rows(monkeypatch):
    assert len(plan_targets(talk(8)).stages) == 2  # a pass over few rows counts as one over many
    monkeypatch.setattr(targets, "PASS_ROWS", 1)
    assert len(plan_targets(talk(8)).stages) == 16  # 31 rows in place of 31 + 7
    monkeypatch.setattr(targets, "PASS_ROWS", 4)  # 16 passes of 4 in place of 30 + 8
    assert len(plan_targets(talk(8)).stages) == 2
    monkeypatch.setattr(targets, "PASS_ROWS", 1)
    ragged = torch.cat([torch.cat([talk(1, 9), talk(1, 2)], 1), torch.cat([talk(1, 2), talk(1, 9)], 1)])
    assert len(plan_targets(ragged).stages) == 2  # no stage is padded to a turn of the other sample


def test_turns_run_the_way_that_runs_fewer_rows(monkeypatch):
    draws = torch.Generator().manual_seed(0)

    def num_rows(turns):
        return sum(max(stage.rows.numel(), targets.PASS_ROWS) for stage in plan_targets(labels, turns=turns).stages)

    for case in range(80):
        monkeypatch.setattr(targets, "PASS_ROWS", 1 + case % 8)
        labels = torch.where(torch.rand(1 + case % 3, 12, generator=draws) < 0.5, 5, IGNORED)
        assert num_rows("auto") == min(num_rows("apart"), num_rows("together"))


@settings(max_examples=200, deadline=None)
@given(batches())
@pytest.mark.parametrize(
    "options",
    [{"turns": "apart"}, {"turns": "together"}, {"target_keep": 0.5}, {"turns": "together", "context_keep": 0.5}],
)
def test_every_row_sees_each_row_before_it_once(options, batch):
    """And those that ran with autograd as they ran there, if it did too."""
    labels, mask, position_ids = batch
    plan = plan_targets(labels, mask, position_ids, **options)
    masks, ran = StageMasks(plan.documents), []
    with_autograd = torch.zeros_like(labels, dtype=torch.bool)
    for stage in plan.stages:
        masks.add(stage)
        ran.append(stage)
        if stage.is_target:
            for sample, rows in enumerate(stage.rows):
                with_autograd[sample, rows[stage.is_row[sample]]] = True
        sees = masks.mask()[:, 0]
        keys = [(number, column) for number, other in enumerate(ran) for column in range(other.rows.shape[1])]
        for sample, column in stage.is_row.nonzero().tolist():
            place = int(stage.rows[sample, column])
            seen = [keys[key] for key in sees[sample, column].nonzero().flatten().tolist()]
            real = [k for k in range(place + 1) if mask is None or bool(mask[sample, k])]
            before = [k for k in real if plan.documents[sample, k] == plan.documents[sample, place]]
            assert sorted(int(ran[number].rows[sample, other]) for number, other in seen) == before
            if stage.is_target:
                for number, other in seen:
                    key = int(ran[number].rows[sample, other])
                    assert ran[number].is_target == bool(with_autograd[sample, key])


def left_padded():
    batch = chat()
    mask = torch.ones_like(batch["labels"])
    mask[0, :5] = mask[2, :2] = 0
    batch["labels"][mask == 0] = IGNORED
    return {**batch, "attention_mask": mask}


def packed():
    batch = chat()
    return {**batch, "position_ids": torch.cat((torch.arange(7), torch.arange(9))).expand(3, -1)}


@pytest.mark.parametrize("part", [{}, {"target_keep": 0.4}], ids=["all", "drawn"])
@pytest.mark.parametrize(
    ("model_type", "make_batch", "more"),
    [
        ("llama", left_padded, {}),
        ("llama", packed, {}),
        ("llama", packed, {"context_keep": 0.4}),
        ("mistral", chat, {}),  # a sliding window
        ("gemma3_text", chat, {"context_keep": 0.4}),  # with and without a window
        ("gpt2", left_padded, {}),  # absolute positions
    ],
)
def test_together_and_apart_have_the_same_gradient(model_type, make_batch, more, part, monkeypatch):
    """Drawn targets are compared with themselves as labels, each a turn."""
    batch = make_batch()
    overrides = {"sliding_window": 4} if model_type in ("mistral", "gemma3_text") else {}
    model, by_turns = (tiny(model_type, **overrides) for _ in range(2))
    options = {"context": "inference", "context_gradient": "one_hop", "seed": 2, **more}
    handlers = apply_dropbp(model, 0.0, **part, **options), apply_dropbp(by_turns, 0.0, **options)
    for handler in handlers:
        handler.step()
    where = {name: batch[name] for name in ("attention_mask", "position_ids") if name in batch}
    left = plan_targets(batch["labels"], **where, **part, seed=2).shift_labels
    labels = torch.nn.functional.pad(left[:, :-1], (1, 0), value=IGNORED)
    monkeypatch.setattr(target_plans, "_turns", lambda decoder, rule: "together")
    ours = backward(model, batch)
    monkeypatch.setattr(target_plans, "_turns", lambda decoder, rule: "apart")
    assert_same(ours, backward(by_turns, {**batch, "labels": labels}), **CLOSE)


@pytest.mark.parametrize(
    ("options", "num_passes"), [({}, 2), ({"context_gradient": "full"}, 4), ({"shared_context": True}, 4)]
)
def test_passes_of_a_conversation(options, num_passes):
    """Nothing is gained together where all is kept, and a context with targets in it is not shared."""
    model, passes = tiny(), []
    apply_dropbp(model, 0.0, context="inference", **options).step()
    model.model.layers[0].register_forward_pre_hook(lambda *_: passes.append(1))
    backward(model, chat())
    assert len(passes) == num_passes


def test_unknown_turns_are_refused():
    with pytest.raises(ValueError, match="turns: expected one of auto, apart, together, got 'both'"):
        plan_targets(talk(2), turns="both")
