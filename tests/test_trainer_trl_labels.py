"""Target plans in TRL's experimental trainers, which call the model without labels."""

import importlib

import pytest
import torch

pytest.importorskip("trl.experimental.orpo")

from models import tiny_causal_lm
from trainer_runs import QUIET, arguments, tokenizer, weights

from dropbp_kernels import DropBPCallback

pytestmark = QUIET
WORDS = [(f"w{n} w5 w6" + " w7" * (n % 3), f" w{n} w7 w9" + " w8" * (n % 2), f" w4 w{n}") for n in range(3, 11)]
PROMPTS = [{"prompt": prompt, "privileged_context": "w9 w10"} for prompt, _, _ in WORDS]
PAIRS = [{"prompt": prompt, "chosen": good, "rejected": bad} for prompt, good, bad in WORDS]
GOLDEN = [{**pair, "reference": " w9 w10 w11"} for pair in PAIRS]
CHATS = [
    {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": good}]}
    for prompt, good, _ in WORDS
]
BYTES = {"use_extended_uld": False, "max_completion_length": 4}


def every_other(completions, **kwargs):
    return [float(number % 2) for number, _ in enumerate(completions)]


def student(folder):
    model = tiny_causal_lm().double()
    model.config._name_or_path = str(folder)  # where some trainers look for its configuration
    return model


def teacher(folder):
    model = student(folder)
    with torch.no_grad():
        model.lm_head.weight.add_(0.2 * torch.randn_like(model.lm_head.weight))
    return model


def trained(folder, kind, callback, rows, others, settings, own=lambda trainer_class: trainer_class):
    from datasets import Dataset
    from tokenizers import pre_tokenizers

    module = importlib.import_module("trl.experimental." + kind.lower().replace("iwopd", "iw_opd"))
    words = tokenizer()
    words.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.chat_template = "{% for message in messages %}{{ 'w3 ' + message['content'] + ' ' }}{% endfor %}"
    model = student(folder)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    config = arguments(
        folder, getattr(module, kind + "Config"), max_steps=2, per_device_train_batch_size=4, logging_steps=1,
        optim="sgd", learning_rate=0.1, remove_unused_columns=False, **settings,
    )  # fmt: skip
    trainer = own(getattr(module, kind + "Trainer"))(
        model, *others(folder), args=config, train_dataset=Dataset.from_list(rows), processing_class=words,
        callbacks=[callback],
    )  # fmt: skip
    torch.manual_seed(0)
    trainer.train()
    return trainer


def none(folder):
    return ()


def a_teacher(folder):
    return (teacher(folder),)


def a_reward(folder):
    return (every_other,)


@pytest.mark.parametrize(
    ("kind", "rows", "others", "settings"),
    [
        ("CPO", PAIRS, none, {"max_length": 32}),
        ("ORPO", PAIRS, none, {"max_length": 32}),
        ("TPO", GOLDEN, none, {}),
        ("GKD", CHATS, a_teacher, {"max_new_tokens": 4}),
        ("GOLD", CHATS, a_teacher, BYTES),
        ("IWOPD", CHATS, a_teacher, {"max_completion_length": 4}),
        ("SDFT", PROMPTS, none, {"max_completion_length": 4, "num_generations": 2, "distillation_topk": 5}),
        ("SDPO", PROMPTS, a_reward, {"max_completion_length": 4, "num_generations": 2}),
    ],
)
def test_gradients_are_those_of_dense_training(kind, rows, others, settings, tmp_path):
    runs, losses = [], []
    for options in ({}, *({"context": "inference", "context_gradient": name} for name in ("full", "none"))):
        callback = DropBPCallback(0.0, **options)
        runs.append(trained(tmp_path, kind, callback, rows, others, settings))
        losses.append([entry["loss"] for entry in runs[-1].state.log_history if "loss" in entry])
        targets = callback.handler.targets
        assert targets is None or 0 < targets.num_target < targets.num_tokens / 1.5
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert losses[2][0] == pytest.approx(losses[0][0], rel=1e-6)
    dense, full, none = map(weights, runs)
    torch.testing.assert_close(full, dense, rtol=1e-9, atol=1e-12)
    assert any(not torch.allclose(none[name], dense[name], rtol=1e-9, atol=1e-12) for name in dense)


def with_a_term_of_all_logits(trainer_class):
    class Own(trainer_class):
        def compute_loss(self, model, inputs, *args, **kwargs):
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
            return loss + outputs.logits.square().mean()

    return Own


@pytest.mark.parametrize(
    ("settings", "own"),
    [
        ({"use_uld_loss": True, "label_smoothing_factor": 0.1}, lambda trainer_class: trainer_class),
        ({}, with_a_term_of_all_logits),
    ],
)
def test_losses_that_read_more_are_told_no_labels(settings, own, tmp_path):
    if settings:
        settings = {**settings, "teacher_tokenizer_name_or_path": str(tmp_path)}
    callback = DropBPCallback(0.0, context="inference")
    with pytest.warns(UserWarning, match="no labels were seen in a training step"):
        trained(tmp_path, "GOLD", callback, CHATS, a_teacher, {**BYTES, **settings}, own)
    assert callback.handler.targets.num_target is None
