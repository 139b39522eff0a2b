"""Coresets in the Trainer: what it trains on, its loss, resumes bit for bit; and two ranks that choose together."""

import pytest
import ranks
import torch
from coreset_ranks import RUNS, ranks_batch, selector_of
from models import tiny_causal_lm, with_lora

pytest.importorskip("accelerate")

from trainer_runs import arguments
from transformers import Trainer

from dropbp_kernels import DropBPCallback
from dropbp_kernels.coreset import apply_coreset
from dropbp_kernels.coreset.budgets import source_id
from dropbp_kernels.coreset.trainer import _SourceCollator

pytestmark = pytest.mark.usefixtures("one_thread")


def data(num_rows=44):
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(64, (12,), generator=generator) for _ in range(num_rows)]
    names = ["code", "text", "code", "code", "rare", "text", "code", "text"]
    return [{"input_ids": row, "labels": row, "source": names[i % 8]} for i, row in enumerate(rows)]


def trainer_of(folder, callbacks=(), coreset=True, options=None, **overrides):
    args = arguments(folder, **{"max_steps": 4, "per_device_train_batch_size": 8, "logging_steps": 1, **overrides})
    rows = data()
    trainer = Trainer(
        with_lora(tiny_causal_lm()), args, train_dataset=rows, eval_dataset=rows[:4], callbacks=list(callbacks)
    )
    if coreset:
        apply_coreset(trainer, num_coordinates=20, **(options or {}))
    return trainer


def test_the_trainer_sees_the_subsets_that_a_selector_chooses(tmp_path):
    trainer = trainer_of(tmp_path, gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=2)
    seen, chosen, original = [], [], trainer.coreset_selector.subset

    def subset(batch, sources):
        chosen.append((batch, sources, original(batch, sources)[0]))
        return chosen[-1][2], None

    trainer.coreset_selector.subset = subset
    hook = trainer.model.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs) if torch.is_grad_enabled() else None, with_kwargs=True
    )
    trainer.train()
    hook.remove()
    source_of = {tuple(row["input_ids"].tolist()): source_id(row["source"]) for row in data()}
    # Six micro-batches an epoch, the last one of four examples: it is kept whole.
    assert [len(inputs["input_ids"]) for inputs in seen] == [4] * 8
    assert len(chosen) == 7
    for batch, sources, taken in chosen:
        assert len(batch["input_ids"]) == len(sources) == 8
        assert sources.tolist() == [source_of[tuple(row)] for row in batch["input_ids"].tolist()]
        assert "source" not in taken
    assert torch.equal(seen[0]["input_ids"], chosen[0][2]["input_ids"])
    assert len([entry for entry in trainer.state.log_history if "eval_loss" in entry]) == 2
    # The Trainer divides by the tokens of the subsets, not of the batches: a token more or less would show.
    assert {int(inputs["num_items_in_batch"]) for inputs in seen} == {2 * 4 * 11}


def test_keeping_everything_trains_as_without_it(tmp_path):
    plain = trainer_of(tmp_path / "a", coreset=False)
    whole = trainer_of(tmp_path / "b", options={"keep": 1.0})
    for trainer in (plain, whole):
        trainer.train()
    for name, value in plain.model.state_dict().items():
        assert torch.equal(whole.model.state_dict()[name], value), name


def test_a_resumed_run_is_the_uninterrupted_run_bit_for_bit(tmp_path):
    def make():
        return trainer_of(tmp_path, callbacks=[DropBPCallback(0.5)], save_strategy="steps", save_steps=2)

    whole = make()
    whole.train()
    resumed = make()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    assert resumed.coreset_selector.step == whole.coreset_selector.step == 4
    (tmp_path / "checkpoint-2" / "coreset.pt").unlink()
    with pytest.warns(UserWarning, match=r"coreset\.pt: expected the state of the coreset, found none"):
        make().train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_what_is_refused(tmp_path):
    trainer = trainer_of(tmp_path)
    with pytest.raises(TypeError, match="trainer: expected a Trainer of transformers, got PeftModel"):
        apply_coreset(trainer.model)
    with pytest.raises(ValueError, match="trainer: expected one without a coreset"):
        apply_coreset(trainer)
    with pytest.raises(ValueError, match="weights: expected 'uniform'"):
        trainer_of(tmp_path, options={"weights": "cluster"})


def test_sources_are_numbers_or_names_and_belong_to_all_examples_or_to_none():
    def collator(examples):
        return {"x": torch.stack([example["x"] for example in examples])}

    collate, x = _SourceCollator(collator, "source"), torch.ones(2)
    batch = collate([{"x": x, "source": torch.tensor(7)}, {"x": x, "source": "code"}])
    assert batch["source"].tolist() == [7, source_id("code")]
    assert set(collate([{"x": x, "source": 7}, {"x": x}])) == {"x"}


def test_state_is_written_by_one_process_and_read_from_a_checkpoint_alone(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path)
    trainer._load_optimizer_and_scheduler(None)
    assert trainer.coreset_selector.step == 0
    trainer.create_optimizer_and_scheduler(4)
    for should_save in (False, True):
        monkeypatch.setattr(type(trainer.args), "should_save", should_save)
        trainer._save_optimizer_and_scheduler(str(tmp_path))
        assert (tmp_path / "coreset.pt").is_file() == should_save


# ---- ranks


def test_two_ranks_choose_what_one_would_of_all_candidates(tmp_path):
    with ranks.started("coreset_ranks.py", tmp_path):
        pass
    results = ranks.results_in(tmp_path)
    batch, sources = ranks_batch()
    for result in results:
        others = result["others"]
        assert len(others["labels"]) == 4  # of 12, 0.3 are kept
        assert torch.equal(others["pictures"], others["input_ids"][..., None].expand(-1, -1, 3))
        assert others["scale"] == 2.0
        assert result["refused"] == "batch: expected as many examples on every rank, got [12, 11]"
    for name, options in RUNS.items():
        selector = selector_of(options)
        for step in range(3):
            selected, weights = selector.select(batch, sources)
            ours = [result[name][step] for result in results]
            assert [len(one["selected"]) for one in ours] == [6, 6]
            assert torch.equal(torch.cat([one["selected"] for one in ours]).sort().values, selected)
            for one in ours:
                assert torch.equal(one["input_ids"], batch["input_ids"][one["selected"]])
                assert torch.equal(one["labels"], batch["labels"][one["selected"]])
                places = torch.searchsorted(selected, one["selected"])
                torch.testing.assert_close(one["weights"], weights[places])
        moments = [result[name + " state"]["moments"]["first"] for result in results]
        if "method" not in options:
            assert torch.equal(*moments)
            torch.testing.assert_close(moments[0], selector.moments.first)
