"""finetune --coreset: half of each batch is trained on, a resumed run repeats the losses, and what is refused."""

import csv
import dataclasses
import json
import os
import signal

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from dropbp_kernels.cli import compare, main, training
from dropbp_kernels.cli.settings import Settings

TINY = ["--seq-len", "32", "--batch-size", "6", "--steps", "4", "--pretrain-steps", "1", "--device", "cpu"]
TINY_RECIPE = {"hidden_size": 24, "intermediate_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1}


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A folder of its own with text to train on, a model that is pretrained in no time, and one thread."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DROPBP_KERNELS_CACHE", str(tmp_path / "cache"))
    recipe = Settings.recipe
    monkeypatch.setattr(Settings, "recipe", lambda self: dataclasses.replace(recipe(self), **TINY_RECIPE))
    (tmp_path / "text.txt").write_text("".join(f"The square of {n} is {n * n}. " for n in range(200)))
    yield
    torch.set_num_threads(num_threads)


def finetune(output, *argv):
    return main(["finetune", "--output", str(output), "--data", "text.txt", *TINY, *argv])


def losses(folder, name=compare.OURS):
    with open(folder / "losses.csv", newline="") as file:
        return [(row["step"], row["train_loss"]) for row in csv.DictReader(file) if row["run"] == name]


def test_ours_trains_on_a_share_of_each_batch_and_the_others_on_all(tmp_path, capsys, monkeypatch):
    sizes = {}
    loss = training.Run.loss

    def noted(self, input_ids, labels):
        if torch.is_grad_enabled():
            sizes.setdefault(self.name, set()).add(len(input_ids))
        return loss(self, input_ids, labels)

    monkeypatch.setattr(training.Run, "loss", noted)
    assert finetune(tmp_path / "out", "--coreset", "0.5", "--drop-rate", "0.5") == 0
    assert sizes[compare.OURS] == {3}
    assert 6 in sizes[compare.FULL]
    results = json.loads((tmp_path / "out" / "report.json").read_text())["results"]
    assert results[compare.OURS]["backward_flops_kept"] == pytest.approx(0.25)
    assert results[compare.OURS]["saved_bytes"] < 0.4 * results[compare.FULL]["saved_bytes"]
    assert "coresets of 0.5 of each batch" in capsys.readouterr().out


def test_a_resumed_run_repeats_the_losses(tmp_path, monkeypatch):
    options = ["--no-compare", "--coreset", "0.5", "--drop-rate", "0"]
    assert finetune(tmp_path / "whole", *options) == 0
    step = training.Run.step

    def interrupted(self, number):
        if number == 1:
            os.kill(os.getpid(), signal.SIGINT)
        step(self, number)

    monkeypatch.setattr(training.Run, "step", interrupted)
    assert finetune(tmp_path / "parts", *options) == 130
    monkeypatch.setattr(training.Run, "step", step)
    assert main(["finetune", "--resume", str(tmp_path / "parts")]) == 0
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


@pytest.mark.parametrize("keep", ["0", "1.5"])
def test_a_share_out_of_range_is_refused(keep, tmp_path, capsys):
    assert finetune(tmp_path / "out", "--coreset", keep) == 2
    assert f"--coreset: expected 0 < coreset <= 1, got {float(keep)}" in capsys.readouterr().err
