"""Short trainings with `DropBPCallback` in transformers' Trainer, which several test files look at."""

import pytest
import torch
from models import tiny_causal_lm
from transformers import Trainer, TrainerCallback, TrainingArguments

from dropbp_kernels import DropBPCallback

NUM_BRANCHES = 6
# For runs with TRL: one thread, and its own warnings on the way ignored.
QUIET = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"),
]


def data(num_rows=48):
    tokens = torch.randint(64, (num_rows, 12), generator=torch.Generator().manual_seed(3))
    return [{"input_ids": row, "labels": row} for row in tokens]


def arguments(folder, kind=TrainingArguments, **overrides):
    """Those of a Trainer, or of TRL's `kind`, for a short run on a CPU."""
    defaults = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
    }
    return kind(**{**defaults, **overrides})


def tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(64)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w1", eos_token="w2", unk_token="w0")


class Watcher(TrainerCallback):
    """Notes, for every micro-batch, the plan that ran and which branches' parameters have gradients after it."""

    def __init__(self, callback):
        self.callback = callback
        self.plans = []
        self.grads = []
        self.is_training = False

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        model.register_forward_pre_hook(lambda *_: self.plans.append(self.plan()) if self.is_training else None)

    def plan(self):
        assert [gate.kept for gate in self.callback.handler.gates.values()] == list(self.callback.handler.plan.kept)
        return self.callback.handler.plan

    def on_step_begin(self, args, state, control, **kwargs):
        self.is_training = True

    def note(self, model):
        blocks = [m for m in model.modules() if type(m).__name__.endswith("DecoderLayer")]
        branches = [branch for block in blocks for branch in (block.self_attn, block.mlp)]
        self.grads.append(tuple(any(p.grad is not None for p in branch.parameters()) for branch in branches))

    def on_substep_end(self, args, state, control, model=None, **kwargs):
        self.note(model)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.note(model)
        self.is_training = False  # what comes until the next step is a probe


def train(folder, callback=None, model=None, resume=None, callbacks=(), eval_data=None, **overrides):
    callback = DropBPCallback(0.5) if callback is None else callback
    trainer = Trainer(
        tiny_causal_lm() if model is None else model,
        arguments(folder, **overrides),
        train_dataset=data(),
        eval_dataset=eval_data,
        callbacks=[callback, *callbacks],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def assert_same(ours, expected):
    assert set(ours) == set(expected)
    for name, value in expected.items():
        assert torch.equal(ours[name], value), name


def two_rows():
    rows = data(2)
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
