"""Labels that a Trainer tells by a completion_mask, and not to the model, as TRL's did before 1.15."""

import pytest
import torch
from target_cases import tiny
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments

from dropbp_kernels import DropBPCallback
from dropbp_kernels.integrations import trainer_batches
from dropbp_kernels.integrations.trainer_batches import labels_of
from dropbp_kernels.targets import IGNORED

TOKENS = torch.randint(3, 96, (4, 16), generator=torch.Generator().manual_seed(1))
IS_COMPLETION = (torch.arange(16) >= 10) & (torch.arange(16) < torch.tensor([[16], [13], [14], [16]]))


class OwnLoss(Trainer):
    """Takes the loss of completions from the logits of a model that is called without labels."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        is_completion = inputs["completion_mask"].bool()
        if "completion_ids" in inputs:
            tokens = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
            is_completion = torch.cat([torch.zeros_like(inputs["prompt_ids"]).bool(), is_completion], dim=1)
        else:
            tokens = inputs["input_ids"]
        logits = model(input_ids=tokens).logits
        return cross_entropy(logits[:, :-1][is_completion[:, 1:]], tokens[:, 1:][is_completion[:, 1:]])


class Policy(OwnLoss):
    """The same for each sample, times its advantage."""

    beta = 0.0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return self._compute_loss(model, inputs)

    def _compute_loss(self, model, inputs):
        logits, tokens = model(input_ids=inputs["input_ids"]).logits, inputs["input_ids"]
        losses = cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
        return ((losses * inputs["completion_mask"][:, 1:]).sum(1) * inputs["advantages"]).mean()


def whole():
    return {"input_ids": TOKENS, "completion_mask": IS_COMPLETION.long()}


def parts():
    return {
        "prompt_ids": TOKENS[:, :10],
        "completion_ids": TOKENS[:, 10:],
        "completion_mask": IS_COMPLETION[:, 10:].long(),
    }


@pytest.mark.parametrize("batch_of", [whole, parts])
def test_labels_of(batch_of):
    expected = TOKENS.masked_fill(~IS_COMPLETION, IGNORED)
    assert torch.equal(labels_of(batch_of()), expected)
    assert labels_of({**batch_of(), "labels": TOKENS}) is None  # which the model is called with
    assert labels_of({"input_ids": TOKENS}) is None


def with_labels():
    return {"input_ids": TOKENS, "labels": TOKENS.masked_fill(~IS_COMPLETION, IGNORED)}


@pytest.mark.parametrize(
    ("trainer_class", "batch_of", "smoothing"),
    [(OwnLoss, whole, 0.0), (OwnLoss, parts, 0.0), (Trainer, with_labels, 0.1)],
)
def test_the_loss_is_that_of_dense_training(trainer_class, batch_of, smoothing, tmp_path):
    batch, losses = batch_of(), []
    data = [{name: values[row] for name, values in batch.items()} for row in range(4)]
    for options in ({}, {"context": "inference", "context_gradient": "full"}):
        arguments = TrainingArguments(
            str(tmp_path), max_steps=4, per_device_train_batch_size=1, gradient_accumulation_steps=2, logging_steps=1,
            report_to="none", use_cpu=True, remove_unused_columns=False, dataloader_pin_memory=False,
            label_smoothing_factor=smoothing,
        )  # fmt: skip
        callback = DropBPCallback(0.0, **options)
        trainer = trainer_class(tiny(dtype=torch.float32), arguments, train_dataset=data, callbacks=[callback])
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert callback.handler.targets.num_target < 8  # of the 16 tokens of the last micro-batch
    assert "compute_loss" not in vars(trainer)


@pytest.mark.parametrize("context_gradient", ["full", "none"])
def test_samples_without_an_advantage_run_apart_also_in_the_probe(context_gradient, tmp_path, monkeypatch):
    """Which sees what the model was called with last, a part of the batch."""
    monkeypatch.setattr(trainer_batches, "_LOSSES", (__name__,))
    batch = {**whole(), "advantages": torch.tensor([0.0, 1.0, 0.0, -1.0])}
    data = [{name: values[row] for name, values in batch.items()} for row in range(4)]
    logs, options = [], {"context": "inference", "context_gradient": context_gradient}
    for beta in (1.0, 0.0):  # with another term in the loss none runs apart
        monkeypatch.setattr(Policy, "beta", beta)
        arguments = TrainingArguments(
            str(tmp_path), max_steps=2, per_device_train_batch_size=4, logging_steps=1, report_to="none", use_cpu=True,
            remove_unused_columns=False, dataloader_pin_memory=False, lr_scheduler_type="constant",
        )  # fmt: skip
        callback = DropBPCallback(0.5, **options)
        trainer = Policy(tiny(dtype=torch.float32), arguments, train_dataset=data, callbacks=[callback])
        trainer.train()
        logs.append([(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry])
        entry = trainer.state.log_history[0]
        assert entry["dropbp_bytes_not_saved"] > 0.0
    assert logs[1] == [pytest.approx(entry, rel=1e-4, abs=1e-6) for entry in logs[0]]


def test_labels_of_a_loss_function_are_those_that_the_user_names(tmp_path):
    batch = {**with_labels(), "targets": with_labels()["labels"]}
    del batch["labels"]
    data = [{name: values[row] for name, values in batch.items()} for row in range(4)]

    class Named(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            targets = inputs.pop("targets")
            logits = model(**inputs).logits
            return cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())

    losses = []
    for options in (
        {},
        {"labels": lambda inputs: inputs["targets"], "context": "inference", "context_gradient": "full"},
    ):
        arguments = TrainingArguments(
            str(tmp_path), max_steps=3, per_device_train_batch_size=2, logging_steps=1, report_to="none", use_cpu=True,
            remove_unused_columns=False, dataloader_pin_memory=False,
        )  # fmt: skip
        callback = DropBPCallback(0.0, **options)
        trainer = Named(tiny(dtype=torch.float32), arguments, train_dataset=data, callbacks=[callback])
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert 0 < callback.handler.targets.num_target < 32


def test_a_function_that_finds_labels_is_checked():
    with pytest.raises(TypeError, match="labels: expected a function of a batch's inputs, got str"):
        DropBPCallback(0.0, context="inference", labels="targets")
    with pytest.raises(ValueError, match='labels: expected None without context="inference"'):
        DropBPCallback(0.5, labels=len)


class AllLogits(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return sum_of_all(model(input_ids=inputs["input_ids"]), inputs["labels"])


def sum_of_all(outputs, labels, num_items_in_batch=None):
    return outputs.logits.square().mean()


@pytest.mark.parametrize(("trainer_class", "function"), [(Trainer, sum_of_all), (AllLogits, None)])
def test_a_loss_of_the_users_may_read_the_logits_of_context(trainer_class, function, tmp_path):
    """So its labels are not told; a warning says that nothing is left out."""
    data = [{name: values[row] for name, values in with_labels().items()} for row in range(4)]
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=2,
        label_smoothing_factor=0.1,
        report_to="none",
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    callback = DropBPCallback(0.0, context="inference")
    model = tiny(dtype=torch.float32)
    trainer = trainer_class(model, arguments, train_dataset=data, callbacks=[callback], compute_loss_func=function)
    with pytest.warns(UserWarning, match="no labels were seen in a training step"):
        trainer.train()
