"""Fine-tuning through the command line, on models and steps so few that a test takes seconds."""

import csv
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

import tokenizers
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dropbp_kernels.cli import builtin, compare, main, models, training
from dropbp_kernels.cli.data import load_data
from dropbp_kernels.cli.settings import Settings, resolve

TINY = ["--seq-len", "32", "--batch-size", "4", "--steps", "6", "--pretrain-steps", "1", "--device", "cpu"]
TINY_RECIPE = {"hidden_size": 24, "intermediate_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1}
TEXT = "".join(f"The square of {n} is {n * n}. " for n in range(200))
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch, cache):
    """A folder of its own with text to train on, and a built-in model that is pretrained in no time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DROPBP_KERNELS_CACHE", str(cache))
    recipe = Settings.recipe
    monkeypatch.setattr(Settings, "recipe", lambda self: dataclasses.replace(recipe(self), **TINY_RECIPE))
    (tmp_path / "text.txt").write_text(TEXT)


def finetune(output, *argv):
    return main(["finetune", "--output", str(output), "--data", "text.txt", *TINY, *argv])


def losses(folder):
    """Everything in losses.csv but the times, which differ."""
    with open(folder / "losses.csv", newline="") as file:
        return [(r["run"], r["step"], r["train_loss"], r["validation_loss"]) for r in csv.DictReader(file)]


def report(folder):
    return json.loads((folder / "report.json").read_text())


@pytest.fixture
def interrupt_at(monkeypatch):
    """interrupt_at(run, step): Ctrl-C arrives in the middle of this step."""
    original = training.Run.step

    def arm(name, at_step):
        def step(self, step):
            if (self.name, step) == (name, at_step):
                os.kill(os.getpid(), signal.SIGINT)
            return original(self, step)

        monkeypatch.setattr(training.Run, "step", step)

    yield arm
    monkeypatch.setattr(training.Run, "step", original)


def test_comparison_writes_everything_with_sane_content(tmp_path, capsys):
    output = tmp_path / "out"
    assert finetune(output, "--drop-rate", "0.75") == 0
    assert {path.name for path in output.iterdir()} == {"adapter", "comparison.png", "losses.csv", "report.json"}

    facts = report(output)
    assert facts["finished"] is True
    assert facts["settings"]["drop_rate"] == 0.75
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["hardware"]["cpu"]
    results = facts["results"]
    assert list(results) == [compare.FULL, compare.SMALLER, compare.PUBLISHED, compare.OURS]
    full, smaller, published, ours = results.values()
    assert len({result["validation_loss_before"] for result in results.values()}) == 1
    assert full["validation_loss_after"] < full["validation_loss_before"]
    assert full["batch_size"] == published["batch_size"] == ours["batch_size"] == 4
    assert 1 <= smaller["batch_size"] <= 4
    assert ours["backward_flops_kept"] == pytest.approx(0.25)
    assert published["backward_flops_kept"] < 0.5
    assert smaller["backward_flops_kept"] == smaller["batch_size"] / 4
    assert ours["dropbp"]["num_steps"] == 6  # measuring draws no plan of the training
    # Saved bytes and peak: what is dropped saves nothing, detaching afterwards saves all of it first.
    assert ours["saved_bytes"] < 0.5 * full["saved_bytes"]
    assert published["saved_bytes"] > 0.8 * full["saved_bytes"]
    assert ours["peak_live_bytes"] < published["peak_live_bytes"] < full["peak_live_bytes"]

    rows = losses(output)
    assert len(rows) == 4 * 6
    assert [row[3] != "" for row in rows[:6]] == [False, True, False, True, False, True]
    assert (output / "comparison.png").read_bytes()[:4] == b"\x89PNG"
    assert (output / "comparison.png").stat().st_size > 20_000

    text = capsys.readouterr().out
    for label in ("forward time", "backward time", "peak live", "saved for backward", "FLOPs kept", "validation loss"):
        assert label in text
    assert "25.0%" in text
    assert f"control: without dropping, a batch of {smaller['batch_size']}" in text


def pairs(tmp_path):
    """Prompts without a loss of three times the length of their completions."""
    lines = [json.dumps({"prompt": f"The square of {n:02}: ", "completion": f"{n * n:05}"}) for n in range(100)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    return ["--data", "pairs.jsonl"]


def test_comparison_shows_a_target_plan_where_data_have_context(tmp_path, capsys):
    assert finetune(tmp_path / "off", *pairs(tmp_path), "--drop-rate", "0.5", "--steps", "2") == 0
    results = report(tmp_path / "off")["results"]
    assert list(results) == [compare.FULL, compare.SMALLER, compare.PUBLISHED, compare.TARGETS, compare.OURS]
    full, targets, ours = (results[name] for name in (compare.FULL, compare.TARGETS, compare.OURS))
    # Of 25 tokens, padded to 32, the last prompt token and the completion's five but its last.
    assert targets["rows_with_backward"] == targets["backward_flops_kept"] == 6 / 32
    assert (ours["rows_with_backward"], ours["backward_flops_kept"]) == (1.0, 0.5)
    assert targets["saved_bytes"] < 0.5 * full["saved_bytes"]
    assert targets["peak_live_bytes"] < 0.5 * full["peak_live_bytes"]
    assert targets["validation_loss_before"] == full["validation_loss_before"]
    assert targets["validation_loss_after"] < targets["validation_loss_before"]
    assert "rows with a backward" in capsys.readouterr().out


def test_context_is_asked_for_and_repeated_after_a_resume(tmp_path, capsys, interrupt_at):
    options = [*pairs(tmp_path), "--context", "inference", "--context-gradient", "one_hop", "--no-compare"]
    options += ["--drop-rate", "0.5", "--steps", "4"]
    assert finetune(tmp_path / "whole", *options) == 0
    assert "drop rate 0.5, tokens without a loss as inference (context gradient one_hop)" in capsys.readouterr().out
    ours = report(tmp_path / "whole")["results"][compare.OURS]
    assert (ours["rows_with_backward"], ours["backward_flops_kept"]) == (6 / 32, None)
    assert finetune(tmp_path / "dense", *options[:2], *options[-5:]) == 0
    assert losses(tmp_path / "dense") != losses(tmp_path / "whole")

    interrupt_at(compare.OURS, 2)
    assert finetune(tmp_path / "parts", *options) == 130
    command = re.search(r"dropbp-kernels (finetune --resume .*)", capsys.readouterr().out)[1].split()
    assert main([*command, "--context", "off"]) == 2
    assert "--resume: the checkpoint was made with --context inference, got off" in capsys.readouterr().err
    assert main(command) == 0
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_context_on_a_model_that_cannot_is_refused(tmp_path, checkpoint_folder, capsys):
    from transformers import BloomConfig, BloomForCausalLM

    BloomForCausalLM(BloomConfig(vocab_size=320, hidden_size=16, n_layer=1, n_head=2)).save_pretrained(
        checkpoint_folder
    )
    argv = ["--model", str(checkpoint_folder), *pairs(tmp_path), "--adapter", "full"]
    assert finetune("out", *argv, "--context-gradient", "full") == 2
    assert "--context-gradient full: expected --context inference with it" in capsys.readouterr().err
    assert finetune("out", *argv, "--context", "inference") == 2
    assert "expected a decoder that can run in stages for context, but BloomModel" in capsys.readouterr().err
    assert finetune("out", *argv, "--steps", "1", "--compare") == 0
    assert compare.TARGETS not in report(tmp_path / "out")["results"]
    assert "no target plan is compared: model: expected a decoder" in capsys.readouterr().out


def test_granularity_is_kept_by_ours_alone_also_with_context(tmp_path, capsys):
    assert finetune(tmp_path / "out", "--granularity", "token", "--drop-rate", "0.5", "--steps", "2", "--compare") == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["settings"]["granularity"] == "token"
    assert report["results"][compare.OURS]["backward_flops_kept"] == pytest.approx(0.5, abs=0.01)
    assert "drop rate 0.5 by token" in capsys.readouterr().out
    options = [
        "--granularity",
        "sample",
        "--context",
        "inference",
        "--drop-rate",
        "0.5",
        "--steps",
        "2",
        "--no-compare",
    ]
    assert finetune(tmp_path / "other", *pairs(tmp_path), *options) == 0
    assert "drop rate 0.5 by sample, tokens without a loss as inference" in capsys.readouterr().out


def test_published_dropbp_is_given_the_backward_of_ours(tmp_path):
    settings = resolve(
        Settings(data=pairs(tmp_path)[1], seq_len=32, batch_size=4, pretrain_steps=1, context="inference")
    )
    assert settings.drop_rate == 0.0  # tokens are dropped in place of branches
    data = load_data(settings.data, models.load_tokenizer(settings), settings.seq_len, settings.seed)
    runs = {run.name: run for run in compare.make_runs(models.load_model(settings, data), data, settings, 1)}
    assert list(runs) == [compare.FULL, compare.SMALLER, compare.PUBLISHED, compare.OURS]
    assert [run.by_targets for run in runs.values()] == [False, False, False, True]
    assert runs[compare.PUBLISHED].handler.drop_rate == pytest.approx(1 - 6 / 32)


def test_resumed_comparison_repeats_the_losses_bit_for_bit(tmp_path, capsys, interrupt_at):
    options = ["--drop-rate", "0.5", "--rates", "sensitivity"]
    assert finetune(tmp_path / "whole", *options) == 0
    interrupt_at(compare.PUBLISHED, 3)
    assert finetune(tmp_path / "parts", *options) == 130
    assert report(tmp_path / "parts")["steps_done"] == 4  # the step under way is finished, by all four
    command = re.search(r"dropbp-kernels (finetune --resume .*)", capsys.readouterr().out)[1].split()
    assert (tmp_path / "parts" / "checkpoint.pt").exists()
    assert main(command) == 0

    # The control's batch size is measured, so it may differ between the two; the others must not.
    whole, parts = (
        [row for row in losses(tmp_path / name) if row[0] != compare.SMALLER] for name in ("whole", "parts")
    )
    assert len(whole) == 3 * 6
    assert whole == parts
    for name in (compare.PUBLISHED, compare.OURS):
        whole, parts = (report(tmp_path / folder)["results"][name]["dropbp"] for folder in ("whole", "parts"))
        assert whole == parts
        assert len({branch["drop_rate"] for branch in whole["branches"]}) > 1
    assert not (tmp_path / "parts" / "checkpoint.pt").exists()


def test_resume_from_a_periodic_checkpoint_and_bad_resumes(tmp_path, capsys, monkeypatch):
    options = ["--no-compare", "--adapter", "full", "--save-every", "2", "--seed", "3"]
    assert finetune(tmp_path / "whole", *options) == 0
    capsys.readouterr()

    def crash(self, step, original=training.Run.step):
        if step == 5:
            raise RuntimeError("power cut")
        return original(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(training.Run, "step", crash)
        with pytest.raises(RuntimeError, match="power cut"):
            finetune(tmp_path / "parts", *options)
    assert torch.load(tmp_path / "parts" / "checkpoint.pt", weights_only=True)["step"] == 4
    capsys.readouterr()

    def refused(*argv):
        before = sorted(tmp_path.rglob("*"))
        assert main(["finetune", *argv]) == 2
        assert sorted(tmp_path.rglob("*")) == before
        return capsys.readouterr().err

    resume = ["--resume", str(tmp_path / "parts")]
    assert "the checkpoint was made with --steps 6, got 8" in refused(*resume, "--steps", "8")
    assert "the checkpoint was made with --adapter full, got lora" in refused(*resume, "--adapter", "lora")
    assert "a resumed run writes to the folder of its checkpoint" in refused(*resume, "--output", "elsewhere")
    (tmp_path / "text.txt").write_text(TEXT.replace("square", "sphere"))
    assert "expected the data that the checkpoint was made with" in refused(*resume)
    (tmp_path / "text.txt").write_text(TEXT)
    with monkeypatch.context() as patch:  # the model behind the name has changed
        patch.setattr(Settings, "recipe", lambda self: builtin.Recipe(**{**TINY_RECIPE, "hidden_size": 48, "steps": 1}))
        assert "expected the model that the checkpoint was made with" in refused(*resume)

    assert main(["finetune", *resume]) == 0
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert {path.name for path in (tmp_path / "parts").iterdir()} == {"model", "losses.csv", "report.json"}
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name / "model") for name in ("whole", "parts")]
    states = [model.state_dict() for model in models]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_ctrl_c_in_a_process_of_its_own(tmp_path, cache):
    command = [sys.executable, "-u", "-m", "dropbp_kernels.cli", "finetune", "--data", "text.txt", *TINY]
    process = subprocess.Popen(
        [*command, "--steps", "100000", "--output", "out", "--no-compare"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DROPBP_KERNELS_CACHE": str(cache)},
    )
    for line in process.stdout:
        if "validation loss after 0 steps" in line:
            break
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "to go on: dropbp-kernels finetune --resume out" in out
    assert "Traceback" not in err
    done = report(tmp_path / "out")["steps_done"]
    assert 1 <= done < 100000
    assert torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)["step"] == done
    assert len(losses(tmp_path / "out")) == done


@pytest.fixture
def checkpoint_folder(tmp_path):
    """A tiny Llama and a tokenizer with a chat template, as they lie on a disk."""
    folder = tmp_path / "tiny-llama"
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", "<|user|>", "<|assistant|>"]
    tokenizer.train_from_iterator(
        [TEXT],
        tokenizers.trainers.BpeTrainer(
            vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    fast.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_own_checkpoint_learns_chats(tmp_path, checkpoint_folder, capsys):
    chats = [
        [{"role": "user", "content": f"square {n}"}, {"role": "assistant", "content": f"it is {n * n}"}]
        for n in range(40)
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    argv = ["--model", str(checkpoint_folder), "--data", "chats.jsonl", "--learning-rate", "0.01", "--steps", "8"]
    argv = [*argv, "--rates", "depth_linear", "--schedule", "warmup:0.5", "--missing-grad", "zero"]
    assert finetune("out", *argv, "--grad-scale", "unbiased", "--sampler", "cyclic", "--drop-rate", "0.5") == 0
    facts = report(tmp_path / "out")
    assert list(facts["results"]) == [compare.OURS]  # a comparison only when asked for
    ours = facts["results"][compare.OURS]
    assert ours["validation_loss_after"] < ours["validation_loss_before"]
    assert facts["data"]["train_tokens_with_loss"] < 0.8 * facts["data"]["train_tokens"]
    adapted = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out" / "adapter")
    assert any(parameter.abs().max() > 0 for name, parameter in adapted.named_parameters() if "lora_B" in name)
    assert (tmp_path / "out" / "adapter" / "tokenizer.json").exists()

    capsys.readouterr()
    assert finetune("long", "--model", str(checkpoint_folder), "--seq-len", "128") == 2
    assert "--seq-len: expected at most 64" in capsys.readouterr().err


def test_checkpoint_with_too_few_embeddings_or_of_another_family(tmp_path, checkpoint_folder, capsys):
    config = json.loads((checkpoint_folder / "config.json").read_text())
    LlamaForCausalLM(LlamaConfig(**{**config, "vocab_size": 200})).save_pretrained(checkpoint_folder)
    assert finetune("out", "--model", str(checkpoint_folder)) == 2
    assert "but the model has only 200 embeddings" in capsys.readouterr().err

    from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel  # its norms come after the adds

    config = OpenAIGPTConfig(vocab_size=320, n_embd=16, n_layer=1, n_head=2)
    OpenAIGPTLMHeadModel(config).save_pretrained(checkpoint_folder)
    assert finetune("out", "--model", str(checkpoint_folder), "--adapter", "full") == 2
    assert "found no residual branches in transformer.h.0 (Block)" in capsys.readouterr().err


def test_checkpoint_without_tokenizer(checkpoint_folder, capsys):
    (checkpoint_folder / "tokenizer.json").unlink()
    (checkpoint_folder / "tokenizer_config.json").unlink()
    assert finetune("out", "--model", str(checkpoint_folder)) == 2
    assert "no tokenizer could be loaded" in capsys.readouterr().err


def test_loss_that_is_not_finite_ends_the_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(training.Run, "loss", lambda self, *batch: torch.tensor(float("nan"), requires_grad=True))
    assert finetune("out", "--no-compare") == 2
    assert "ours: the loss is nan at step 0; lower --learning-rate" in capsys.readouterr().err


def test_bfloat16_runs_under_autocast(tmp_path):
    for adapter in ("lora", "paca", "full"):
        assert finetune(adapter, "--no-compare", "--dtype", "bfloat16", "--adapter", adapter, "--steps", "4") == 0
        ours = report(tmp_path / adapter)["results"][compare.OURS]
        assert ours["validation_loss_after"] < ours["validation_loss_before"]
    config = json.loads((tmp_path / "paca" / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["alpha"]) == ("DROPBP_PACA", 8, 32)


def test_interrupted_pretraining_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("DROPBP_KERNELS_CACHE", str(tmp_path / "new"))

    def interrupt(step, steps):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(builtin, "scheduled", interrupt)
        assert finetune("out") == 130
    assert list((tmp_path / "new").iterdir()) == []
    recipe = builtin.Recipe(**TINY_RECIPE, steps=1)
    folder = builtin.ensure_pretrained(recipe, torch.device("cpu"))
    assert [path.name for path in (tmp_path / "new").iterdir()] == [folder.name]
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert builtin.ensure_pretrained(recipe, torch.device("cpu")) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    assert builtin.cached_folder(dataclasses.replace(recipe, seed=1)) != folder


def test_batch_of_equal_time_lies_on_the_line_through_two_times(monkeypatch):
    class Fake:
        batch_size = 16
        handler = None
        settings = Settings()

    full, ours = Fake(), Fake()
    ours.handler = type("Handler", (), {"draw": lambda self, n: self, "set_plan": lambda self, p: None, "kept": ()})()

    def choose(ours_s, full_s=17.0, half_s=9.0):
        times = {(full, 16): full_s, (full, 8): half_s, (ours, 16): ours_s}
        monkeypatch.setattr(compare, "_time_backprop", lambda run, size: times[run, size])
        return compare.equal_time_batch(full, ours)

    assert [choose(t) for t in (17.0, 11.0, 10.6, 5.0, 0.5, 30.0)] == [16, 10, 10, 4, 1, 16]
    assert choose(11.0, half_s=18.0) == 16  # noise: the line falls
    full.batch_size = 1
    assert compare.equal_time_batch(full, ours) == 1


def test_schedule_rises_and_falls():
    factors = [builtin.scheduled(step, 100) for step in range(100)]
    assert factors[0] == pytest.approx(0.2)
    assert factors[4] == factors[5] == 1.0
    assert factors[-1] == pytest.approx(0.1, abs=1e-3)
    assert factors[5:] == sorted(factors[5:], reverse=True)
