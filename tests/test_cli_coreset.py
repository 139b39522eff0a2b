"""finetune --coreset: half of each batch is trained on, a resumed run repeats the losses, and what is refused."""

import os
import signal

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from finetune_runs import finetune, losses, place, report  # noqa: F401

from dropbp_kernels.cli import compare, main, training

pytestmark = pytest.mark.usefixtures("one_thread", "place")


def test_ours_trains_on_a_share_of_each_batch_and_the_others_on_all(tmp_path, capsys, monkeypatch):
    sizes = {}
    loss = training.Run.loss

    def noted(self, input_ids, labels):
        if torch.is_grad_enabled():
            sizes.setdefault(self.name, set()).add(len(input_ids))
        return loss(self, input_ids, labels)

    monkeypatch.setattr(training.Run, "loss", noted)
    assert finetune(tmp_path / "out", "--coreset", "0.5", "--drop-rate", "0.5", "--steps", "4") == 0
    assert sizes[compare.OURS] == {2}
    assert 4 in sizes[compare.FULL]
    results = report(tmp_path / "out")["results"]
    assert results[compare.OURS]["backward_flops_kept"] == pytest.approx(0.25)
    assert results[compare.OURS]["saved_bytes"] < 0.4 * results[compare.FULL]["saved_bytes"]
    assert "coresets of 0.5 of each batch" in capsys.readouterr().out


def test_a_resumed_run_repeats_the_losses(tmp_path, monkeypatch):
    options = ["--no-compare", "--coreset", "0.5", "--drop-rate", "0", "--steps", "4"]
    assert finetune(tmp_path / "whole", *options) == 0
    step = training.Run.step

    def interrupted(self, number):
        if number == 1:
            os.kill(os.getpid(), signal.SIGINT)
        step(self, number)

    monkeypatch.setattr(training.Run, "step", interrupted)
    assert finetune(tmp_path / "parts", *options) == 130
    assert not (tmp_path / "parts" / "adapter").exists()
    monkeypatch.setattr(training.Run, "step", step)
    assert main(["finetune", "--resume", str(tmp_path / "parts")]) == 0
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


@pytest.mark.parametrize("keep", ["0", "1.5"])
def test_a_share_out_of_range_is_refused(keep, tmp_path, capsys):
    assert finetune(tmp_path / "out", "--coreset", keep) == 2
    assert f"--coreset: expected 0 < coreset <= 1, got {float(keep)}" in capsys.readouterr().err
