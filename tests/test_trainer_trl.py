"""DropBPCallback in TRL's trainers, whose losses do not pass through the model's own loss function."""

import pytest
import torch

pytest.importorskip("trl")

import trl
from models import tiny_causal_lm
from packaging.version import Version
from trainer_runs import QUIET, arguments, assert_same, data, tokenizer, weights
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

from dropbp_kernels import DropBPCallback
from dropbp_kernels.integrations import target_plans
from dropbp_kernels.integrations.trainer_batches import without_gradient_of
from dropbp_kernels.integrations.without_gradient import run_apart
from dropbp_kernels.targets import TargetPlan

pytestmark = QUIET


def train(folder, resume=None, rates="sensitivity", **overrides):
    from datasets import Dataset
    from peft import LoraConfig

    rows = Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in data()])
    settings = {"gradient_accumulation_steps": 2, "logging_steps": 1, "max_length": 16, **overrides}
    config = arguments(folder, SFTConfig, **settings)
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
    options = {"save_strategy": "steps", "save_steps": 1, "bf16": False}
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


SHORT = {"max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1}


def supervised(folder, model, callback):
    rows = [{"prompt": f"w{n} w5 w6 w7 w8", "completion": f"w{n} w9"} for n in range(3, 11)]
    return SFTTrainer(model, arguments(folder, SFTConfig, **SHORT), **with_data(rows, callback))


def preferences(folder, model, callback):
    rows = [{"prompt": f"w{n} w5 w6", "chosen": f"w{n} w7 w9", "rejected": f"w4 w{n}"} for n in range(3, 11)]
    return DPOTrainer(model, args=arguments(folder, DPOConfig, **SHORT), **with_data(rows, callback))


def groups(folder, model, callback):
    def length(completions, **kwargs):
        return [float(len(text.replace("w1", ""))) for text in completions]

    rows = [{"prompt": f"w{n} w5 w6" + " w7" * (n % 3)} for n in range(3, 11)]
    config = arguments(folder, GRPOConfig, num_generations=2, max_completion_length=4, **SHORT)
    return GRPOTrainer(model, length, args=config, **with_data(rows, callback))


def groups_half_of_which_agree(trainer_class, config_class, folder, callback):
    """Completions of every other prompt have the same reward."""

    def place(prompts, **kwargs):
        return [float(number) if int(prompt[1]) % 2 else 1.0 for number, prompt in enumerate(prompts)]

    rows = [{"prompt": f"w{n} w5 w6" + " w7" * (n % 3)} for n in range(3, 10)]
    config = arguments(folder, config_class, num_generations=2, max_completion_length=6, beta=0.0, **SHORT)
    return trainer_class(tiny_causal_lm(), place, args=config, **with_data(rows, callback))


def with_data(rows, callback):
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import pre_tokenizers

    words = tokenizer()
    words.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return {
        "train_dataset": Dataset.from_list(rows),
        "processing_class": words,
        "peft_config": LoraConfig(r=4, target_modules="all-linear"),
        "callbacks": [callback],
    }


@pytest.mark.parametrize("make", [supervised, preferences, groups])
def test_a_shared_context_is_exact_in_their_losses(make, tmp_path, monkeypatch):
    num_context = []
    share = TargetPlan.with_shared_context
    monkeypatch.setattr(
        TargetPlan,
        "with_shared_context",
        lambda plan, *args: num_context.append((plan.num_context, (new := share(plan, *args)).num_context)) or new,
    )
    logs = []
    options = {"context": "inference", "context_gradient": "full", "shared_context": True}
    for chosen in ({}, options):
        trainer = make(str(tmp_path), tiny_causal_lm(), DropBPCallback(0.0, **chosen))
        trainer.train()
        names = {"loss", "grad_norm", "entropy", "mean_token_accuracy"}
        logs += [
            [
                {name: value for name, value in entry.items() if name in names}
                for entry in trainer.state.log_history
                if "loss" in entry
            ]
        ]
    for dense, ours in zip(*logs, strict=True):
        assert ours == pytest.approx(dense, rel=1e-3, abs=1e-5)
        assert dense["grad_norm"] > 0.0
    assert len(num_context) >= 2
    if make is not supervised:
        assert all(2 * shared == unshared for unshared, shared in num_context)


@pytest.mark.parametrize(("trainer", "config"), [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)])
def test_completions_with_an_advantage_of_zero_run_as_inference(trainer, config, tmp_path, monkeypatch):
    apart = []
    monkeypatch.setattr(target_plans, "run_apart", lambda *args: (apart.append(len(args[-1])), run_apart(*args))[1])
    logs = []
    for options in ({}, {"context": "inference", "context_gradient": "full", "shared_context": True}):
        run = groups_half_of_which_agree(trainer, config, str(tmp_path), DropBPCallback(0.0, **options))
        run.train()
        logs.append([entry for entry in run.state.log_history if "loss" in entry])
        assert "compute_loss" not in vars(run)
    for dense, ours in zip(*logs, strict=True):
        names = [name for name in dense if "time" not in name and not name.startswith("dropbp")]
        assert [ours[name] for name in names] == pytest.approx([dense[name] for name in names], rel=1e-3, abs=1e-5)
    num_zero = [round(4 * entry["frac_reward_zero_std"]) for entry in logs[0]]
    assert apart == [count for count in num_zero if count]
    assert 2 in apart


class OwnLoss(GRPOTrainer):
    def _compute_loss(self, model, inputs):
        return super()._compute_loss(model, inputs) + 1.0


class OwnTerm(GRPOTrainer):
    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs) + 1.0


@pytest.mark.parametrize("cls", [GRPOTrainer, RLOOTrainer, OwnLoss, OwnTerm])
@pytest.mark.parametrize("term", [None, "beta", "_entropy_bonus_enabled", "aux_loss_enabled"])
def test_where_an_advantage_of_zero_is_no_gradient(cls, term):
    trainer = object.__new__(cls)
    vars(trainer).update({"beta": 0.0, "_entropy_bonus_enabled": False, "aux_loss_enabled": False})
    if term is not None:
        vars(trainer)[term] = 0.1
    of_tokens = torch.tensor([[0.0, 0.0], [0.0, 1e-6], [-1.0, 0.0]])
    if term is None and cls not in (OwnLoss, OwnTerm):
        assert without_gradient_of(trainer, {"advantages": of_tokens.sum(1)}).tolist() == [True, False, False]
        assert without_gradient_of(trainer, {"advantages": of_tokens}).tolist() == [True, False, False]
    else:
        assert without_gradient_of(trainer, {"advantages": of_tokens}) is None
    assert without_gradient_of(trainer, {}) is None


@pytest.mark.skipif(
    Version(trl.__version__) < Version("1.15"), reason="SFTTrainer of this TRL leaves the loss to the model"
)
@pytest.mark.parametrize(("part", "value"), [("target_windows", 2), ("target_keep", 0.5)])
def test_parts_of_the_labels_are_refused_where_the_trainer_divides_by_all_labels(part, value, tmp_path):
    callback = DropBPCallback(0.0, context="inference", **{part: value})
    with pytest.raises(ValueError, match=f"{part}: expected 1 where the caller makes the loss of log-probabilit"):
        supervised(str(tmp_path), tiny_causal_lm(), callback).train()


def test_packed_samples_are_documents_of_a_target_plan(tmp_path, monkeypatch):
    """TRL tells documents by position_ids, and again by seq_idx."""
    plans = []
    whole = TargetPlan.head_rows.fget
    monkeypatch.setattr(TargetPlan, "head_rows", property(lambda plan: (plans.append(plan), whole(plan))[1]))
    monkeypatch.setitem(SHORT, "packing", True)
    monkeypatch.setitem(SHORT, "max_length", 16)
    trainer = supervised(str(tmp_path), tiny_causal_lm(), DropBPCallback(0.0, context="inference"))
    trainer.train()
    assert plans
    assert all(plan.is_packed and plan.num_context > 0 for plan in plans)


def distilled(folder, callback):
    rows = [{"prompt": f"w{n} w5 w6" + " w7" * (n % 3)} for n in range(3, 11)]
    config = arguments(folder, trl.DistillationConfig, max_completion_length=4, **SHORT)
    teacher = tiny_causal_lm()
    with torch.no_grad():
        teacher.lm_head.weight.add_(0.1 * torch.randn_like(teacher.lm_head.weight))
    callbacks = [] if callback is None else [callback]
    trainer = trl.DistillationTrainer(
        tiny_causal_lm(), teacher, args=config, **{**with_data(rows, None), "callbacks": callbacks}
    )
    torch.manual_seed(0)
    trainer.train()
    return [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.skipif(not hasattr(trl, "DistillationTrainer"), reason="no DistillationTrainer in this TRL")
def test_a_loss_that_is_called_in_place_of_the_models_forward(tmp_path):
    dense = distilled(tmp_path, None)
    assert all(norm > 0.0 for _, norm in dense)
    for options in ({}, {"granularity": "token"}, {"context": "inference", "context_gradient": "full"}):
        callback = DropBPCallback(0.0, **options)
        assert distilled(tmp_path, callback) == [pytest.approx(entry, rel=1e-3, abs=1e-5) for entry in dense]
    assert 0 < callback.handler.targets.num_target < callback.handler.targets.num_tokens
    with pytest.raises(ValueError, match="the trainer does not call the model's own forward"):
        distilled(tmp_path, DropBPCallback(0.5, rates="sensitivity"))
