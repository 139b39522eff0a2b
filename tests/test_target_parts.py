"""Steps that train on a part of the labels: the others are context. The part is a window, or drawn at random."""

import pytest
import torch
from target_cases import CLOSE, assert_same, backward, chat, tiny

from dropbp_kernels import apply_dropbp
from dropbp_kernels.targets import IGNORED, plan_targets

NUM_WINDOWS = 4
WINDOWS, DRAWN = {"target_windows": NUM_WINDOWS}, {"target_keep": 0.3}
PARTS = [WINDOWS, DRAWN, {"target_windows": 2, "target_keep": 0.5}]


def labels_of(plan):
    """The labels that are left, (B, S)."""
    return torch.nn.functional.pad(plan.shift_labels[:, :-1], (1, 0), value=IGNORED)


def windows(labels, num_windows=NUM_WINDOWS, first_step=0, **options):
    """For each of num_windows steps, the labels that are left, (B, S)."""
    return [
        labels_of(plan_targets(labels, target_windows=num_windows, step=step, **options))
        for step in range(first_step, first_step + num_windows)
    ]


# ---- windows


@pytest.mark.parametrize("num_windows", [2, 3, 4])
def test_every_label_is_in_one_window(num_windows):
    labels = chat(seq_len=19)["labels"]
    labels[:, 0] = IGNORED  # predicted by nothing
    for first_step in (0, 5 * num_windows):
        left = windows(labels, num_windows, first_step)
        assert torch.equal(sum(window != IGNORED for window in left), (labels != IGNORED).long())
        for window in left:
            assert torch.equal(window[window != IGNORED], labels[window != IGNORED])
            counts = (window != IGNORED).sum(1)
            assert ((counts - (labels != IGNORED).sum(1) / num_windows).abs() < 1).all()
            for sample, kept in zip(labels, window != IGNORED, strict=True):  # a run of the sample's targets
                places = kept[sample != IGNORED].nonzero().flatten()
                assert places.numel() == 0 or places.numel() == places[-1] - places[0] + 1


def test_the_order_of_windows_is_drawn_from_the_seed():
    labels = torch.arange(1, 10).unsqueeze(0)
    firsts = {
        (seed, turn): windows(labels, first_step=4 * turn, seed=seed)[0] for seed in range(4) for turn in range(4)
    }
    assert len({tuple(window.flatten().tolist()) for window in firsts.values()}) == NUM_WINDOWS
    again = windows(labels, first_step=8, seed=2)[0]
    assert torch.equal(again, firsts[2, 2])


def test_rows_behind_the_window_do_not_run():
    tokens = torch.arange(1, 18).unsqueeze(0)
    counts = {}
    for step in range(NUM_WINDOWS):
        plan = plan_targets(tokens, target_windows=NUM_WINDOWS, step=step)
        counts[plan.num_context] = (plan.num_target, plan.num_skipped)
    assert counts == {0: (4, 13), 4: (4, 9), 8: (4, 5), 12: (4, 1)}


def test_a_window_beside_a_sample_of_padding_leaves_labels_out():
    labels = torch.tensor([[4, 5, 6], [IGNORED] * 3])
    mask = torch.tensor([[1, 1, 1], [0, 0, 0]])
    assert not any(plan_targets(labels, mask, target_windows=2, step=step).is_dense for step in range(2))
    assert plan_targets(labels, mask).is_dense


# ---- drawn at random


def test_drawn_targets_run_once_as_context_and_once_as_targets():
    labels = torch.tensor([[IGNORED, IGNORED, 2, 3, 4, 5, 6, 7, 8]])
    plan = plan_targets(labels, target_keep=0.5, seed=1)
    drawn = (plan.shift_labels[0] != IGNORED).nonzero().flatten()
    assert len(drawn) in (3, 4)
    assert not torch.equal(drawn, torch.arange(drawn[0], drawn[-1] + 1))  # scattered, or the test would say nothing
    context, targets = plan.stages
    last_context = max(set(range(int(drawn[-1]))) - set(drawn.tolist()))
    assert context.rows.tolist() == [list(range(last_context + 1))]  # behind it nobody reads a target's first run
    assert targets.rows.tolist() == [drawn.tolist()]
    assert (context.is_target, targets.is_target) == (False, True)
    assert (context.is_prefix, targets.runs_again, context.runs_again) == (True, True, False)
    assert plan.head_rows[0].tolist() == [drawn.tolist()]
    assert (plan.num_target, plan.num_context, plan.num_skipped) == (len(drawn), last_context + 1, 8 - int(drawn[-1]))
    assert plan.num_again == int((drawn < last_context).sum())


def test_a_share_of_each_sample_is_drawn_and_of_the_batch():
    labels = torch.full((4, 41), 5)
    labels[1, :30] = labels[2, :38] = labels[3] = IGNORED  # 40, 11, 3 and no targets
    num_targets = torch.tensor([40, 11, 3, 0])
    counts = torch.stack(
        [(labels_of(plan_targets(labels, target_keep=0.25, step=step)) != IGNORED).sum(1) for step in range(400)]
    )
    assert ((counts - 0.25 * num_targets).abs() < 1).all()
    assert set(counts.sum(1).tolist()) == {13, 14}  # of 54
    torch.testing.assert_close(counts.double().mean(0), 0.25 * num_targets.double(), rtol=0.0, atol=0.08)


def test_every_target_is_drawn_as_often_as_any_other():
    labels = torch.full((2, 9), 5)
    drawn = torch.stack(
        [plan_targets(labels, target_keep=0.5, step=step).shift_labels != IGNORED for step in range(600)]
    )
    assert (drawn[..., :-1].double().mean(0) - 0.5).abs().max() < 0.1
    assert len({tuple(row.flatten().tolist()) for row in drawn}) > 500


def test_what_is_drawn_is_a_function_of_seed_and_step():
    labels = chat()["labels"]

    def drawn(**options):
        return labels_of(plan_targets(labels, target_keep=0.3, **options)).tolist()

    torch.manual_seed(9)
    expected = torch.rand(1)
    torch.manual_seed(9)
    first = drawn(seed=1, step=2)
    assert torch.equal(torch.rand(1), expected)
    assert first == drawn(seed=1, step=2)
    assert first != drawn(seed=1, step=3) != drawn(seed=2, step=3)


def test_one_target_is_drawn_at_least():
    labels = torch.tensor([[IGNORED, IGNORED, 7, IGNORED, 8], [IGNORED] * 5])
    places = set()
    for step in range(20):
        plan = plan_targets(labels, target_keep=0.01, step=step)
        assert plan.num_target == 1
        places.add(int(plan.head_rows[0][0, 0]))
    assert places == {1, 3}
    assert plan_targets(torch.full((2, 5), IGNORED), target_keep=0.5).num_target == 0


# ---- both


@pytest.mark.parametrize("context_gradient", ["none", "one_hop", "full"])
@pytest.mark.parametrize("part", PARTS)
def test_equals_a_target_plan_of_the_labels_of_the_part(part, context_gradient, turns_apart):
    batch = chat()
    options = {"context": "inference", "context_gradient": context_gradient}
    model, by_hand = tiny(), tiny()
    handler = apply_dropbp(model, 0.0, **part, seed=3, **options)
    apply_dropbp(by_hand, 0.0, **options)
    for step in range(4):
        handler.step()
        labels = labels_of(plan_targets(batch["labels"], **part, seed=3, step=step))
        assert_same(backward(model, batch), backward(by_hand, {**batch, "labels": labels}), **CLOSE)


@pytest.mark.parametrize("part", PARTS)
def test_a_state_keeps_the_part_of_a_step_whose_plan_was_set_by_hand(part):
    def fresh():
        model = tiny()
        return model, apply_dropbp(model, 0.0, context="inference", strict=False, **part)

    model, handler = fresh()
    for _ in range(3):
        handler.step()
    handler.set_plan([True] * len(handler.gates))
    resumed_model, resumed = fresh()
    resumed.load_state_dict(handler.state_dict())
    assert_same(backward(resumed_model, chat()), backward(model, chat()), rtol=0.0, atol=0.0)


def mean_gradient(part, num_steps, batch):
    model = tiny()
    handler = apply_dropbp(model, 0.0, context="inference", context_gradient="full", **part)
    losses, gradients = [], []
    for _ in range(num_steps):
        handler.step()
        loss, gradient = backward(model, batch)
        losses.append(loss)
        gradients.append({name: value.clone() for name, value in gradient.items()})
    mean = {name: sum(gradient[name] for gradient in gradients) / num_steps for name in gradients[0]}
    return sum(losses) / num_steps, mean


@pytest.mark.parametrize("items", [None, 32])  # a loss that is a mean; one that is a sum over what the Trainer counted
def test_windows_make_up_the_whole_gradient(items):
    """Where nothing is left out, the mean over the windows is the dense gradient: equal windows, equal weights."""
    tokens = torch.randint(3, 96, (2, 17), generator=torch.Generator().manual_seed(1))  # 16 targets a sample
    batch = {"input_ids": tokens, "labels": tokens, "use_cache": False}
    dense = backward(tiny(), batch)
    more = {} if items is None else {"num_items_in_batch": torch.tensor(items)}
    assert_same(mean_gradient(WINDOWS, NUM_WINDOWS, {**batch, **more}), dense, rtol=1e-5, atol=1e-7)


def test_a_loss_over_counted_labels_is_right_on_average():
    """Of n labels the Trainer counts n, of which a step has n * target_keep."""
    tokens = torch.randint(3, 96, (2, 17), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": tokens, "labels": tokens, "use_cache": False}
    model = tiny()
    handler = apply_dropbp(model, 0.0, context="inference", target_keep=0.25)
    losses = []
    for items in (None, 32):
        handler.set_plan([True] * len(handler.gates))
        losses.append(model(**batch, **({} if items is None else {"num_items_in_batch": torch.tensor(items)})).loss)
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("seq_len", [2, 9])  # one target, which is always drawn: nothing to save; four of eight
def test_counted_labels_are_taken_as_a_part_once(seq_len):
    """Also where PEFT's model calls the patched one inside, and for who calls again with what a hook saw."""
    peft = pytest.importorskip("peft")
    tokens = torch.randint(3, 96, (1, seq_len), generator=torch.Generator().manual_seed(1))
    model, seen = peft.get_peft_model(tiny(), peft.LoraConfig(target_modules=["q_proj"])), []
    apply_dropbp(model, 0.0, context="inference", target_keep=0.5)
    mean = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    num_drawn = max(1, (seq_len - 1) // 2)
    counted = model(input_ids=tokens, labels=tokens, use_cache=False, num_items_in_batch=num_drawn).loss
    torch.testing.assert_close(counted, 2.0 * mean)
    torch.testing.assert_close(model(**seen[0]).loss, counted)


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "4"])
def test_other_numbers_of_windows_are_refused(value):
    with pytest.raises(ValueError, match="target_windows: expected a whole number from 1 on"):
        apply_dropbp(tiny(), 0.0, context="inference", target_windows=value)


@pytest.mark.parametrize("value", [0, -0.1, 1.5, True, "0.5", float("nan")])
def test_other_shares_of_targets_are_refused(value):
    with pytest.raises(ValueError, match="target_keep: expected 0 < target_keep <= 1, got"):
        apply_dropbp(tiny(), 0.0, context="inference", target_keep=value)


@pytest.mark.parametrize("part", [{"target_windows": 2}, {"target_keep": 0.5}])
def test_losses_that_need_every_label_are_refused(part):
    (name,) = part
    with pytest.raises(ValueError, match=f'context: expected "inference" with {name}={part[name]}'):
        apply_dropbp(tiny(), 0.0, **part)
    batch = chat()
    model = tiny()
    handler = apply_dropbp(model, 0.0, context="inference", strict=False, **part)
    handler.step(labels=batch["labels"])
    with pytest.raises(ValueError, match=f"{name}: expected 1 with labels given to step.*got {part[name]}"):
        model(input_ids=batch["input_ids"], use_cache=False)
    handler.step()
    model.loss_function = lambda logits, labels, **_: logits.sum(-1)
    with pytest.raises(ValueError, match=f"{name}: expected 1 for a loss that is no mean"):
        model(**batch)
