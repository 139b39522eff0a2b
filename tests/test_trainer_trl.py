"""DropBPCallback in TRL's SFTTrainer, whose loss does not pass through the model's head."""

import pytest
import torch

pytest.importorskip("trl")

from models import tiny_causal_lm
from test_trainer import arguments, assert_same, data, one_thread, weights  # noqa: F401
from trl import SFTConfig, SFTTrainer

from dropbp_kernels import DropBPCallback

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"),
]


def tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(64)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w1", eos_token="w2", unk_token="w0")


def train(folder, resume=None, rates="sensitivity", **overrides):
    from datasets import Dataset
    from peft import LoraConfig

    rows = Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in data()])
    settings = {**arguments(folder).to_dict(), "gradient_accumulation_steps": 2, "logging_steps": 1, **overrides}
    names = {field for field in SFTConfig.__dataclass_fields__ if field in settings}
    names -= {"push_to_hub_token", "logging_dir"}
    config = SFTConfig(**{name: settings[name] for name in names}, max_length=16)
    callback = DropBPCallback(0.5, rates=rates, calibrate_at=0.3)
    torch.manual_seed(0)
    trainer = SFTTrainer(
        tiny_causal_lm(),
        config,
        train_dataset=rows,
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
        callbacks=[callback],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, callback


def test_plans_calibration_logs_and_an_exact_resume(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "bf16": False, "activation_checkpointing": False}
    whole, callback = train(tmp_path, **options)
    handler = callback.handler
    assert handler.num_steps == 6
    assert len(set(handler.drop_rates)) > 1
    entries = [entry for entry in whole.state.log_history if "loss" in entry]
    assert all({"dropbp_drop_rate", "dropbp_tokens_per_second", "num_tokens"} <= set(entry) for entry in entries)
    # Probes are not counted as training: each step saw 2 micro-batches of 2 rows of 12 tokens and no more.
    assert [entry["num_tokens"] for entry in entries] == [48 * step for step in range(1, 7)]
    for step in (1, 3):
        resumed, other = train(tmp_path, str(tmp_path / f"checkpoint-{step}"), **options)
        assert other.handler.state_dict() == handler.state_dict()
        assert_same(weights(resumed), weights(whole))
