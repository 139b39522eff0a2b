"""Fine-tuning that was interrupted: what a resumed run repeats, bit for bit, and what it refuses."""

import dataclasses
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

from finetune_runs import (  # noqa: F401
    TEXT,
    TINY,
    TINY_RECIPE,
    finetune,
    losses,
    pairs,
    place,
    report,
    write_checkpoint,
)
from transformers import AutoModelForCausalLM

from dropbp_kernels.cli import builtin, compare, compare_report, main, training
from dropbp_kernels.cli.settings import Settings

pytestmark = pytest.mark.usefixtures("one_thread", "place")


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


def test_resumed_comparison_repeats_the_losses_bit_for_bit(tmp_path, capsys, monkeypatch, interrupt_at):
    options = ["--drop-rate", "0.5", "--rates", "sensitivity"]
    assert finetune(tmp_path / "whole", *options) == 0
    interrupt_at(compare.PUBLISHED, 3)
    assert finetune(tmp_path / "parts", *options) == 130
    assert report(tmp_path / "parts")["steps_done"] == 4  # the step under way is finished, by all four
    command = re.search(r"dropbp-kernels (finetune --resume .*)", capsys.readouterr().out)[1].split()
    assert (tmp_path / "parts" / "checkpoint.pt").exists()
    monkeypatch.delattr(compare, "equal_time_batch")  # the control keeps its batch size, which is not measured again
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
    files = [(tmp_path / folder / "calibration.json").read_text() for folder in ("whole", "parts")]
    assert files[0] == files[1]


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


def test_ctrl_c_in_a_process_of_its_own(tmp_path):
    model = str(write_checkpoint(tmp_path / "tiny-llama"))
    command = [sys.executable, "-u", "-m", "dropbp_kernels.cli", "finetune", "--data", "text.txt", *TINY]
    process = subprocess.Popen(
        [*command, "--model", model, "--steps", "100000", "--output", "out"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    for line in process.stdout:
        if "validation loss after 0 steps" in line:
            break
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "to go on: dropbp-kernels finetune --resume out" in out
    assert "the step under way is finished and a checkpoint written; Ctrl-C again to stop at once" in err
    assert "Traceback" not in err
    done = report(tmp_path / "out")["steps_done"]
    assert 1 <= done < 100000
    assert torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)["step"] == done
    assert len(losses(tmp_path / "out")) == done


def test_interrupted_behind_the_last_step_leaves_what_is_known(tmp_path, monkeypatch, capsys):
    def interrupt(run):
        raise KeyboardInterrupt

    monkeypatch.setattr(compare_report, "measure_memory", interrupt)
    assert finetune("out", "--no-compare") == 130
    assert "Traceback" not in capsys.readouterr().err
    found = report(tmp_path / "out")
    (result,) = found["results"].values()
    assert found["finished"]
    assert result["saved_bytes"] is None
    assert result["steps"] == found["steps_done"] == len(losses(tmp_path / "out"))
    assert result["validation_loss_after"] is not None
    assert (tmp_path / "out" / "adapter").is_dir()


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
