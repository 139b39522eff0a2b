"""Target plans in a Trainer of transformers."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from target_cases import chat, tiny
from trainer_runs import arguments
from transformers import Trainer, TrainerCallback

from dropbp_kernels import DropBPCallback
from dropbp_kernels.integrations import meters
from dropbp_kernels.targets import IGNORED

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def test_in_the_trainer(tmp_path):
    batch = chat(4)
    data = [{name: batch[name][index] for name in ("input_ids", "labels")} for index in range(4)]
    losses = []
    for options in ({}, {"context": "inference", "context_gradient": "full"}):
        settings = arguments(tmp_path, max_steps=2, logging_steps=1, learning_rate=5e-5)
        callback = DropBPCallback(0.0, **options)
        trainer = Trainer(tiny(dtype=torch.float32), settings, train_dataset=data, callbacks=[callback])
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][0] != losses[0][1]


@pytest.mark.parametrize("num_micro_batches", [1, 3])
def test_a_trainer_goes_on_after_a_batch_without_a_target(tmp_path, num_micro_batches):
    class Watch(TrainerCallback):
        weights = ()

        def on_step_begin(self, args, state, control, model=None, **kwargs):
            self.weights += ([p.detach().clone() for p in model.parameters()],)

    batch = chat(3)
    batch["labels"][1] = IGNORED
    data = [{name: batch[name][index] for name in ("input_ids", "labels")} for index in range(3)]
    settings = arguments(
        tmp_path, max_steps=4, per_device_train_batch_size=1, gradient_accumulation_steps=num_micro_batches,
        optim="sgd", learning_rate=0.1, lr_scheduler_type="constant",
    )  # fmt: skip
    model, watch = tiny(dtype=torch.float32), Watch()
    callback = DropBPCallback(0.0, context="inference", rates="sensitivity", calibrate_at=0.0)
    trainer = Trainer(model, settings, train_dataset=data, callbacks=[callback, watch])
    with pytest.warns(UserWarning, match="no target in a batch; its gradient is zero"):
        trainer.train()
    weights = (*watch.weights, [p.detach() for p in model.parameters()])
    moved = [any(map(torch.ne, map(torch.sum, old), map(torch.sum, new))) for old, new in itertools.pairwise(weights)]
    assert sum(moved) in ((4,) if num_micro_batches == 3 else (2, 3))  # of four steps, by the order of the samples
    assert all(torch.isfinite(p).all() for p in model.parameters())
    batch["labels"][:] = IGNORED
    assert not model(**batch).loss.requires_grad  # a loop of one's own asks


def test_tokens_a_second_are_those_of_whole_batches(tmp_path, monkeypatch):
    """The gates see the targets alone with gradients: 8 of 2 x 16 tokens, in a step that takes a second."""
    ticks = itertools.count()
    monkeypatch.setattr(meters, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    tokens = torch.randint(3, 96, (2, 16), generator=torch.Generator().manual_seed(1))
    labels = tokens.masked_fill(torch.arange(16) < 12, IGNORED)
    settings = arguments(tmp_path, max_steps=1, logging_steps=1)
    data = [{"input_ids": row, "labels": label} for row, label in zip(tokens, labels, strict=True)]
    callback = DropBPCallback(0.0, context="inference")
    trainer = Trainer(tiny(dtype=torch.float32), settings, train_dataset=data, callbacks=[callback])
    trainer.train()
    assert trainer.state.log_history[0]["dropbp_tokens_per_second"] == 32.0
