"""dropbp-kernels profile: what it writes, and that it notices gates that do not do what the plan says."""

import copy
import csv
import json
import re

import pytest
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import Interval

pytest.importorskip("transformers")
pytest.importorskip("peft")

from dropbp_kernels import DropBP
from dropbp_kernels.cli import main, tracing

SMALL = {
    "model_type": "llama",
    "vocab_size": 80,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 80,
    "n_embd": 32,
    "n_layer": 4,
    "n_head": 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def profile(tmp_path, *argv, config=SMALL):
    """(exit code, rows of branches.csv)"""
    (tmp_path / "config.json").write_text(json.dumps(config))
    output = tmp_path / "out"
    code = main(
        ["profile", "--model", str(tmp_path / "config.json"), "--seq-len", "24", "--output", str(output), *argv]
    )
    with open(output / "branches.csv", newline="") as file:
        return code, list(csv.DictReader(file))


@pytest.mark.parametrize("config", [SMALL, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("lora_rank", ["8", "0"])
def test_dropped_branches_are_seen_to_do_nothing(tmp_path, capsys, config, lora_rank):
    code, rows = profile(tmp_path, "--drop-rate", "0.5", "--lora-rank", lora_rank, config=config)
    assert code == 0
    assert len(rows) == 8
    assert sum(row["kept"] == "True" for row in rows) == 4
    for row in rows:
        is_kept = row["kept"] == "True"
        assert (int(row["num_backward"]) > 5) is is_kept
        assert (float(row["backward_ms"]) > 0) is is_kept
        assert (int(row["saved_bytes"]) > 0) is is_kept
        assert float(row["forward_ms"]) > 0
        assert float(row["flops"]) > 0
    text = capsys.readouterr().out
    assert "as planned: 4 dropped branches ran no backward" in text
    assert "dropped" in text
    assert (tmp_path / "out" / "branches.png").stat().st_size > 10_000


def test_ranges_on_the_timeline_of_a_gpu_are_no_calls(tmp_path, monkeypatch):
    """There the kernels of a branch run when the host is in other branches already."""
    recorded = torch.profiler.profile.events

    def events(trace):
        calls = list(recorded(trace))
        ranges = [copy.copy(event) for event in calls if event.name.startswith(tracing.RANGE)]
        end = max(event.time_range.end for event in calls)
        for event in ranges:
            event.device_type, event.time_range = DeviceType.CUDA, Interval(event.time_range.start, end)
        return calls + ranges

    monkeypatch.setattr(torch.profiler.profile, "events", events)
    code, _ = profile(tmp_path, "--drop-rate", "0.5")
    assert code == 0


def test_target_plan_is_traced(tmp_path, capsys):
    argv = ["--drop-rate", "0", "--target-share", "0.25"]
    code, rows = profile(tmp_path, *argv)
    assert code == 0
    assert all(int(row["num_backward"]) > 5 for row in rows)
    match = re.search(r"25.0% of the tokens are targets; the step saves (\d+\.\d)% of", capsys.readouterr().out)
    assert 20 < float(match[1]) < 45


def test_detach_afterwards_is_caught_by_what_it_saves(tmp_path, capsys):
    code, rows = profile(tmp_path, "--drop-rate", "0.5", "--dropped-runs", "detach")
    assert code == 1
    assert all(int(row["num_backward"]) == 0 for row in rows if row["kept"] == "False")  # its graph died at the detach
    assert capsys.readouterr().out.count("NOT AS PLANNED") == 4


def test_gate_that_ignores_the_plan_is_caught_by_the_trace(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(DropBP, "run", lambda self, residual, branch: branch(residual))
    code, _ = profile(tmp_path, "--drop-rate", "0.5")
    assert code == 1
    assert "dropped, but autograd ran" in capsys.readouterr().out


def test_gate_that_drops_what_is_kept_is_caught(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(DropBP, "run", lambda self, residual, branch: torch.no_grad()(branch)(residual))
    monkeypatch.setattr(torch.Tensor, "backward", lambda self: None)  # nothing to train is left
    code, _ = profile(tmp_path, "--drop-rate", "0.5")
    assert code == 1
    assert "kept, but autograd ran no backward" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--drop-rate", "1"], "--drop-rate: expected 0 <= drop_rate < 1"),
        (["--seq-len", "1"], "--seq-len: expected at least 2, got 1"),
        (["--target-share", "0"], "--target-share: expected 0 < target share <= 1, got 0.0"),
        (["--lora-rank", "-1"], "--lora-rank: expected at least 0, got -1"),
        (["--dropped-runs", "away"], "--dropped-runs: expected inference or detach"),
        (["--output", "/dev/null"], "--output /dev/null: expected a new or empty folder"),
    ],
)
def test_bad_option_is_one_line(capsys, argv, message):
    assert main(["profile", "--model", "builtin", *argv]) == 2
    assert message in capsys.readouterr().err
