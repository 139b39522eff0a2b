"""What people get wrong with `DropBPCallback`: two of them, options for a model that is patched otherwise, Ctrl-C."""

import pytest
import torch
from models import tiny_causal_lm, toy_model

pytest.importorskip("accelerate")

from trainer_runs import arguments, data, train
from transformers import Trainer, TrainerCallback

from dropbp_kernels import DropBPCallback, apply_dropbp, remove_dropbp
from dropbp_kernels.targets import IGNORED

pytestmark = pytest.mark.usefixtures("one_thread")


def trainer(folder, model, *callbacks):
    return Trainer(model, arguments(folder), train_dataset=data(), callbacks=list(callbacks))


def test_two_callbacks(tmp_path):
    with pytest.raises(ValueError, match="callbacks: expected one DropBPCallback, got 2"):
        trainer(tmp_path, tiny_causal_lm(), DropBPCallback(0.5), DropBPCallback(0.75))


def test_a_cell_that_is_run_again_with_other_options(tmp_path):
    model = tiny_causal_lm()
    for rate in (0.5, 0.75):  # other rates of the same patch are no matter
        callback = DropBPCallback(rate, fused=True, sampler="cyclic")
        train(tmp_path, callback, model)
        assert callback.handler.report()["drop_rate"] == pytest.approx(rate, abs=0.1)
    callback = DropBPCallback(0.5, fused=True, context="inference")
    with pytest.raises(ValueError, match=r"context: expected None, with which the model is patched, got 'inference'"):
        trainer(tmp_path, model, callback)
    remove_dropbp(model)
    trainer(tmp_path, model, callback)
    assert callback.handler.targets is not None


def test_options_of_the_patch_for_gates_of_ones_own(tmp_path):
    with pytest.raises(ValueError, match="fused: expected no option of apply_dropbp for a model with gates of its own"):
        trainer(tmp_path, toy_model(), DropBPCallback(0.5, fused=True))


def test_rows_of_a_model_that_was_patched_for_branches(tmp_path):
    model = tiny_causal_lm()
    apply_dropbp(model, 0.5)
    callback = DropBPCallback(0.5, granularity="token")
    trainer(tmp_path, model, callback)
    callback.handler.step()
    batch = data(2)
    tokens = torch.stack([row["input_ids"] for row in batch])
    mask = torch.ones_like(tokens)
    mask[0, 6:] = 0
    model(input_ids=tokens, attention_mask=mask, labels=tokens.masked_fill(mask == 0, IGNORED)).loss.backward()
    assert callback.handler.gates["model.layers.0.gate_mlp"].is_real.sum() == mask.sum()
    trainer(tmp_path, model, DropBPCallback(0.5, granularity="token"))
    assert len(model._forward_pre_hooks) == 1
    remove_dropbp(model)
    assert not model._forward_pre_hooks


def test_a_run_that_was_interrupted_leaves_no_gradient_of_zero(tmp_path):
    class Interrupt(TrainerCallback):
        def on_pre_optimizer_step(self, *args, **kwargs):
            raise KeyboardInterrupt

    model, callback = tiny_causal_lm(), DropBPCallback(0.0, context="inference")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, callback, model, callbacks=[Interrupt()])
    tokens = torch.ones(1, 4, dtype=torch.long)
    with pytest.warns(UserWarning, match="every token of the first step has a label"):
        callback.handler.step()  # a loop of one's own goes on
    with pytest.warns(UserWarning, match="no target in a batch; its loss has no gradient"):
        assert not model(input_ids=tokens, labels=torch.full_like(tokens, IGNORED)).loss.requires_grad


def test_a_run_that_was_interrupted_leaves_nothing_once_the_next_one_has_ended(tmp_path):
    class Interrupt(TrainerCallback):
        def on_pre_optimizer_step(self, *args, **kwargs):
            raise KeyboardInterrupt

    model, callback = tiny_causal_lm(), DropBPCallback(0.5, measure=True)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, callback, model, callbacks=[Interrupt()])
    assert model._forward_hooks
    train(tmp_path, callback, model)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
