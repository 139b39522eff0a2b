"""Windows of targets: each step trains on a part of the labels and takes the other labelled tokens as context."""

import pytest
import torch
from target_cases import CLOSE, assert_same, backward, chat, tiny

from dropbp_kernels import apply_dropbp
from dropbp_kernels.targets import IGNORED, plan_targets

NUM_WINDOWS = 4


def windows(labels, num_windows=NUM_WINDOWS, first_step=0, **options):
    """For each of num_windows steps, the labels that are left, (B, S)."""
    left = []
    for step in range(first_step, first_step + num_windows):
        plan = plan_targets(labels, target_windows=num_windows, step=step, **options)
        left.append(torch.nn.functional.pad(plan.shift_labels[:, :-1], (1, 0), value=IGNORED))
    return left


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


@pytest.mark.parametrize("context_gradient", ["none", "one_hop"])
def test_equals_a_target_plan_of_the_labels_of_the_window(context_gradient):
    batch = chat()
    options = {"context": "inference", "context_gradient": context_gradient}
    model, by_hand = tiny(), tiny()
    handler = apply_dropbp(model, 0.0, target_windows=NUM_WINDOWS, seed=3, **options)
    apply_dropbp(by_hand, 0.0, **options)
    for labels in windows(batch["labels"], seed=3):
        handler.step()
        assert_same(backward(model, batch), backward(by_hand, {**batch, "labels": labels}), **CLOSE)


def test_a_state_keeps_the_window_of_a_step_whose_plan_was_set_by_hand():
    def fresh():
        model = tiny()
        options = {"context": "inference", "target_windows": NUM_WINDOWS, "strict": False}
        return model, apply_dropbp(model, 0.0, **options)

    model, handler = fresh()
    for _ in range(3):
        handler.step()
    handler.set_plan([True] * len(handler.gates))
    resumed_model, resumed = fresh()
    resumed.load_state_dict(handler.state_dict())
    assert_same(backward(resumed_model, chat()), backward(model, chat()), rtol=0.0, atol=0.0)


def test_windows_make_up_the_whole_gradient():
    """Where nothing is left out, the mean over the windows is the dense gradient: equal windows, equal weights."""
    tokens = torch.randint(3, 96, (2, 17), generator=torch.Generator().manual_seed(1))  # 16 targets a sample
    batch = {"input_ids": tokens, "labels": tokens, "use_cache": False}
    loss, dense = backward(tiny(), batch)
    model = tiny()
    options = {"context": "inference", "context_gradient": "full"}
    handler = apply_dropbp(model, 0.0, target_windows=NUM_WINDOWS, **options)
    found = []
    for items in (None, 32):  # a loss that is a mean, and one that is a sum over what the Trainer counted
        more = {} if items is None else {"num_items_in_batch": torch.tensor(items)}
        losses, gradients = [], []
        for _ in range(NUM_WINDOWS):
            handler.step()
            part, gradient = backward(model, {**batch, **more})
            losses.append(part)
            gradients.append({name: value.clone() for name, value in gradient.items()})
        mean = {name: sum(gradient[name] for gradient in gradients) / NUM_WINDOWS for name in dense}
        found.append((sum(losses) / NUM_WINDOWS, mean))
    for ours in found:
        assert_same(ours, (loss, dense), rtol=1e-5, atol=1e-7)


def test_rows_behind_the_window_do_not_run():
    tokens = torch.arange(1, 18).unsqueeze(0)
    counts = {}
    for step in range(NUM_WINDOWS):
        plan = plan_targets(tokens, target_windows=NUM_WINDOWS, step=step)
        counts[plan.num_context] = (plan.num_target, plan.num_skipped)
    assert counts == {0: (4, 13), 4: (4, 9), 8: (4, 5), 12: (4, 1)}


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "4"])
def test_other_numbers_of_windows_are_refused(value):
    with pytest.raises(ValueError, match="target_windows: expected a whole number from 1 on"):
        apply_dropbp(tiny(), 0.0, context="inference", target_windows=value)


def test_losses_that_need_every_label_are_refused():
    with pytest.raises(ValueError, match='context: expected "inference" with target_windows=2'):
        apply_dropbp(tiny(), 0.0, target_windows=2)
    batch = chat()
    model = tiny()
    handler = apply_dropbp(model, 0.0, context="inference", target_windows=2, strict=False)
    handler.step(labels=batch["labels"])
    with pytest.raises(ValueError, match="target_windows: expected 1 with labels given to step"):
        model(input_ids=batch["input_ids"], use_cache=False)
    handler.step()
    model.loss_function = lambda logits, labels, **_: logits.sum(-1)
    with pytest.raises(ValueError, match="target_windows: expected 1 for a loss that is no mean"):
        model(**batch)
