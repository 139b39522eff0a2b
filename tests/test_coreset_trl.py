"""Coresets in TRL's SFTTrainer: subsets by source, from a column that neither TRL nor the model knows."""

import pytest

pytest.importorskip("trl")

from models import tiny_causal_lm
from trainer_runs import QUIET, arguments, data, tokenizer
from trl import SFTConfig, SFTTrainer

from dropbp_kernels.coreset import apply_coreset

pytestmark = QUIET


def test_sft_trains_on_subsets(tmp_path):
    from datasets import Dataset
    from peft import LoraConfig

    names = ["code", "text", "code", "code", "rare", "text", "code", "text"]
    rows = [{"input_ids": row["input_ids"].tolist(), "source": names[place % 8]} for place, row in enumerate(data())]
    config = arguments(tmp_path, SFTConfig, max_steps=3, per_device_train_batch_size=8, logging_steps=1, max_length=16)
    trainer = SFTTrainer(
        tiny_causal_lm(),
        config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )
    selector = apply_coreset(trainer, 0.5)
    sources, select = [], selector.select
    selector.select = lambda batch, given: sources.append(given) or select(batch, given)
    trainer.train()
    assert len(sources) == selector.step == 3
    assert all(len(given) == 8 and len(set(given.tolist())) > 1 for given in sources)
    # Each step trained on 4 rows of 12 tokens.
    assert [entry["num_tokens"] for entry in trainer.state.log_history if "loss" in entry] == [48, 96, 144]


def test_batches_without_a_row_for_each_example_are_refused(tmp_path):
    """One row of eight examples was kept whole, as the rest of an epoch is: nothing was chosen, in silence."""
    from datasets import Dataset

    rows = [{"input_ids": row["input_ids"].tolist()} for row in data()]
    config = arguments(
        tmp_path, SFTConfig, max_steps=1, per_device_train_batch_size=8, padding_free=True, max_length=None
    )
    trainer = SFTTrainer(
        tiny_causal_lm(),
        config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
    )
    apply_coreset(trainer, 0.5)
    with pytest.raises(ValueError, match="expected a row for each of its 8 examples, of which some are chosen, got 1;"):
        trainer.train()
