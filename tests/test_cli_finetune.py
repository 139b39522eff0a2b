"""Fine-tuning through the command line: what is compared, what is written."""

import json
import re

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from finetune_runs import finetune, losses, pairs, place, report  # noqa: F401

from dropbp_kernels.cli import builtin, compare, finetuning, models, training
from dropbp_kernels.cli.data import load_data
from dropbp_kernels.cli.settings import Settings, resolve

pytestmark = pytest.mark.usefixtures("one_thread", "place")


def test_comparison_writes_everything_with_sane_content(tmp_path, capsys, monkeypatch):
    output, saved, save_model = tmp_path / "out", [], finetuning._save_model

    def noted(run, *rest):
        saved.append(run.name)
        save_model(run, *rest)

    monkeypatch.setattr(finetuning, "_save_model", noted)
    assert finetune(output, "--drop-rate", "0.75") == 0
    assert saved == [compare.OURS]
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


def test_fused_runs_are_all_fused(tmp_path, monkeypatch):
    apply, fused = compare.apply_dropbp, []

    def noted(model, drop_rate, **options):
        fused.append(options["fused"])
        return apply(model, drop_rate, **options)

    monkeypatch.setattr(compare, "apply_dropbp", noted)
    assert finetune(tmp_path / "out", "--drop-rate", "0.5", "--steps", "1", "--fused") == 0
    results = report(tmp_path / "out")["results"]
    assert fused == [True] * len(results)
    assert results[compare.FULL]["backward_flops_kept"] == 1.0


def test_tokens_without_a_loss_run_as_inference_by_default(tmp_path, capsys):
    assert finetune(tmp_path / "out", *pairs(tmp_path), "--steps", "2") == 0
    facts = report(tmp_path / "out")
    assert (facts["settings"]["context"], facts["settings"]["drop_rate"]) == ("inference", 0.0)
    results = facts["results"]
    assert list(results) == [compare.FULL, compare.SMALLER, compare.PUBLISHED, compare.BRANCHES, compare.OURS]
    assert results[compare.OURS]["backward_flops_kept"] == 6 / 32
    text = capsys.readouterr().out
    assert "19% of the tokens carry a loss: the others run as inference, and no branch is dropped" in text
    assert "drop rate 0, tokens without a loss as inference" in text
    assert finetune(tmp_path / "text", "--steps", "1", "--no-compare") == 0  # every token of a text carries a loss
    settings = report(tmp_path / "text")["settings"]
    assert (settings["context"], settings["drop_rate"]) == ("off", 0.75)


@pytest.mark.parametrize(
    "options", [{"drop_rate": 0.75}, {"granularity": "token"}, {"coreset": 0.5}, {"context": "off"}]
)
def test_who_drops_otherwise_gets_no_target_plan_unasked(options):
    settings = resolve(Settings(**options))
    assert (settings.context, settings.drop_rate) == ("off", 0.75)


@pytest.mark.parametrize(
    ("option", "value", "words", "bad", "expected"),
    [
        ("--target-windows", 4, "4 windows of targets in turn", "0", "at least 1, got 0"),
        ("--target-keep", 0.25, "0.25 of the targets drawn", "0", "0 < target_keep <= 1, got 0.0"),
    ],
)
def test_parts_of_the_targets_ask_for_a_target_plan(option, value, words, bad, expected, tmp_path, capsys):
    settings = resolve(Settings(**{option.removeprefix("--").replace("-", "_"): value}))
    assert (settings.context, settings.drop_rate) == ("inference", 0.0)
    assert words in compare.in_words(settings)
    assert finetune(tmp_path, option, str(value), "--context", "off") == 2
    assert f"{option} {value}: expected --context inference with it" in capsys.readouterr().err
    assert finetune(tmp_path, option, bad) == 2
    assert f"{option}: expected {expected}" in capsys.readouterr().err


def made_runs(tmp_path, **options):
    """The runs that a comparison on pairs makes, by name, and their settings."""
    data = pairs(tmp_path)[1]
    settings = resolve(Settings(data=data, seq_len=32, batch_size=4, pretrain_steps=1, **options))
    data = load_data(settings.data, models.load_tokenizer(settings), settings.seq_len, settings.seed)
    runs = compare.make_runs(models.load_model(settings, data), data, settings, control_batch=1)
    return {run.name: run for run in runs}, settings


def test_granularity_is_kept_by_ours_alone_also_with_context(tmp_path, capsys):
    runs, _ = made_runs(tmp_path, granularity="token", drop_rate=0.5)
    assert {name: run.handler and run.handler.granularity for name, run in runs.items()} == {
        compare.FULL: None,
        compare.SMALLER: None,
        compare.PUBLISHED: "branch",
        compare.TARGETS: "branch",
        compare.OURS: "token",
    }
    options = ["--drop-rate", "0.5", "--steps", "2", "--no-compare"]
    assert finetune(tmp_path / "out", *options, "--granularity", "token") == 0
    facts = report(tmp_path / "out")
    assert facts["settings"]["granularity"] == "token"
    assert facts["results"][compare.OURS]["backward_flops_kept"] == pytest.approx(0.5, abs=0.01)
    assert "drop rate 0.5 by token" in capsys.readouterr().out
    options += ["--granularity", "sample", "--context", "inference"]
    assert finetune(tmp_path / "other", *pairs(tmp_path), *options) == 0
    assert "drop rate 0.5 by sample, tokens without a loss as inference" in capsys.readouterr().out


def test_published_dropbp_is_given_the_backward_of_ours(tmp_path):
    runs, settings = made_runs(tmp_path, context="inference")
    assert settings.drop_rate == 0.0  # tokens are dropped in place of branches
    assert list(runs) == [compare.FULL, compare.SMALLER, compare.PUBLISHED, compare.BRANCHES, compare.OURS]
    assert [bool(run.handler and run.handler.targets) for run in runs.values()] == [False, False, False, False, True]
    assert len({run.validate(0) for run in runs.values()}) == 1  # so that the command asks one of them
    for name in (compare.PUBLISHED, compare.BRANCHES):
        assert runs[name].handler.drop_rate == pytest.approx(1 - 6 / 32)


def test_rates_from_the_calibration_of_another_run(tmp_path, capsys):
    def rates(folder):
        branches = report(tmp_path / folder)["results"][compare.OURS]["dropbp"]["branches"]
        return [branch["drop_rate"] for branch in branches]

    options = ["--no-compare", "--drop-rate", "0.5", "--steps", "1"]
    assert finetune(tmp_path / "first", *options, "--rates", "sensitivity") == 0
    assert (tmp_path / "first" / "calibration.png").read_bytes()[:4] == b"\x89PNG"
    file = str(tmp_path / "first" / "calibration.json")
    assert finetune(tmp_path / "again", *options, "--rates", file, "--seed", "1") == 0
    assert rates("again") == rates("first")
    assert len(set(rates("first"))) > 1
    assert finetune(tmp_path / "other", *options, "--rates", file, "--allocation", "optimal") == 0
    assert rates("other") != rates("first")
    assert json.loads((tmp_path / "other" / "calibration.json").read_text())["allocation"] == "optimal"

    capsys.readouterr()
    assert finetune("no", *options, "--rates", file, "--adapter", "full") == 2
    assert re.search(r"--rates .*calibration.json: calibration: expected the 8 branches", capsys.readouterr().err)
    assert finetune("no", *options[:1], "--drop-rate", "0.95", "--rates", file) == 2
    assert re.search(r"--drop-rate with --rates .*: drop_rate: expected less than 0.9", capsys.readouterr().err)
    assert finetune("no", *options, "--rates", str(tmp_path / "first" / "report.json")) == 2
    assert "report.json: expected a calibration with the keys" in capsys.readouterr().err


def test_published_dropbp_at_a_rate_that_cannot_be_shared_out_is_refused_before_the_first_step(tmp_path, capsys):
    options = ["--context", "inference", "--drop-rate", "0.6", "--rates", "sensitivity", "--steps", "2"]
    assert finetune(tmp_path / "out", *pairs(tmp_path), *options) == 2
    assert "--drop-rate with --rates sensitivity: drop_rate: expected less than 0.9" in capsys.readouterr().err


def test_loss_that_is_not_finite_ends_the_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(training.Run, "loss", lambda self, *batch: torch.tensor(float("nan"), requires_grad=True))
    assert finetune("out", "--no-compare") == 2
    assert "ours: the loss is nan at step 0; lower --learning-rate" in capsys.readouterr().err


def test_bfloat16_runs_under_autocast(tmp_path):
    for adapter in ("lora", "paca", "full"):
        assert finetune(adapter, "--no-compare", "--dtype", "bfloat16", "--adapter", adapter, "--steps", "4") == 0
        ours = report(tmp_path / adapter)["results"][compare.OURS]
        assert ours["validation_loss_after"] < ours["validation_loss_before"]
    assert (tmp_path / "full" / "model" / "config.json").is_file()
    config = json.loads((tmp_path / "paca" / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["alpha"]) == ("DROPBP_PACA", 8, 32)


def test_batch_of_equal_time_lies_on_the_line_through_two_times(monkeypatch):
    class Fake:
        batch_size = 16
        handler = None
        settings = Settings()

    full, ours, numbers = Fake(), Fake(), []
    ours.handler = type("Handler", (), {"draw": lambda self, n: self, "set_plan": lambda self, p: None, "kept": ()})()

    def choose(ours_s, full_s=17.0, half_s=9.0):
        times = {(full, 16): full_s, (full, 8): half_s, (ours, 16): ours_s}
        monkeypatch.setattr(
            compare, "_time_backprop", lambda run, size, number: (numbers.append(number), times[run, size])[1]
        )
        return compare.equal_time_batch(full, ours)

    assert [choose(t) for t in (17.0, 11.0, 10.6, 5.0, 0.5, 30.0)] == [16, 10, 10, 4, 1, 16]
    assert choose(11.0, half_s=18.0) == 16  # noise: the line falls
    assert choose(11.0, half_s=16.9) == 16  # ... or hardly rises: launches take the time, and not rows
    assert choose(11.0, half_s=15.0) == 1
    turns = range(compare.WARM_UP_ROUNDS + compare.TIMED_ROUNDS)
    assert numbers[: 3 * len(turns)] == [turn for turn in turns for _ in range(3)]  # each on rows of its own
    full.batch_size = 1
    assert compare.equal_time_batch(full, ours) == 1


def test_schedule_rises_and_falls():
    factors = [builtin.scheduled(step, 100) for step in range(100)]
    assert factors[0] == pytest.approx(0.2)
    assert factors[4] == factors[5] == 1.0
    assert factors[-1] == pytest.approx(0.1, abs=1e-3)
    assert factors[5:] == sorted(factors[5:], reverse=True)
