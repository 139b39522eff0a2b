"""dropbp-kernels plan as a user meets it: the tables, JSON, what fits, and every error."""

import json

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from dropbp_kernels.cli import main, model_config, plan_report, plan_tables
from dropbp_kernels.cli.plan_report import _largest, recommend
from dropbp_kernels.cli.planning import Setting, StepModel

SMALL = {  # of one block: most of what a simulated step takes is Python's cost of an operator
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MiB = 2**20


@pytest.fixture
def small(tmp_path):
    """The path of a config of a small model."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SMALL))
    return path


def plan(capsys, *argv):
    assert main(["plan", *map(str, argv)]) == 0
    return capsys.readouterr().out


def fails(capsys, *argv):
    """Run plan, expect one line on stderr and exit code 2; return the line."""
    assert main(["plan", *map(str, argv)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("dropbp-kernels: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.fixture
def uncheckpointed(monkeypatch):
    """A report compares settings without checkpointing alone: every setting is some simulated steps."""
    monkeypatch.setattr(plan_report, "CHECKPOINTS", ("none",))


def test_parts_add_up_in_json_and_table(capsys, small):
    report = json.loads(plan(capsys, "--model", small, "--seq-len", 64, "--drop-rate", 0.5, "--json"))
    assert len(report["settings"]) == 2 * 4  # drop rates 0 and 0.5
    assert report["settings"][0]["relative_step_time"] == 1.0
    assert all(sum(row["bytes"].values()) == row["peak_bytes"] for row in report["settings"])
    assert report["asked"]["setting"]["drop_rate"] == 0.5
    assert report["asked"]["relative_step_time"] < 0.9
    plan_tables.show(report)
    text = capsys.readouterr().out
    for part in ("weights", "optimizer", "activations", "logits", "peak", "drop rate 0.5, no checkpointing"):
        assert part in text
    assert "Assumed: " in text
    assert "longest" not in text


def test_what_fits(capsys, small, uncheckpointed):
    memory = ["--gpu-memory", 0.015, "--reserve", 0]
    report = json.loads(plan(capsys, "--model", small, "--seq-len", 256, "--drop-rate", 0.5, *memory, "--json"))
    budget = report["budget_bytes"]
    assert budget == round(0.015 * 2**30)
    for row in report["settings"]:
        assert row["fits"] == (row["peak_bytes"] <= budget) == (row["longest_seq_len"] >= 256)
        assert row["fits"] == (row["largest_batch_size"] >= 1)
        assert row["longest_seq_len"] % 64 == 0
    undropped, asked = report["settings"]
    assert report["asked"] == asked
    assert asked["longest_seq_len"] > undropped["longest_seq_len"]
    assert report["recommended"] == {"gentlest": undropped, "fastest": asked}
    plan_tables.show(report)
    peak = f"{undropped['peak_bytes'] / 2**20:.1f} MiB"
    assert f"Dropping least: drop rate 0, no checkpointing: {peak}, 1.00 of the time." in capsys.readouterr().out

    # the longest sequence fits, and the next one does not
    longest = asked["longest_seq_len"]
    model = StepModel(model_config.load_config(str(small)), adapter_dtype=torch.float32)
    for seq_len, fits in ((longest, True), (longest + 64, False)):
        assert (model.predict(Setting(1, seq_len, 0.5)).peak_bytes <= budget) is fits


@pytest.mark.parametrize("by", ["seq_len", "batch_size"])
def test_long_steps_in_slices_lie_on_the_line_that_they_are_read_off(small, monkeypatch, by):
    monkeypatch.setattr(plan_report, "MOST_IN_SLICES", 4096)
    model = StepModel(model_config.load_config(str(small)))
    unit = 64 if by == "seq_len" else 2048  # tokens of a row, or in a row of many

    def setting_at(n):
        return Setting(1, 64 * n, 0.5, "sliced") if by == "seq_len" else Setting(n, 2048, 0.5, "sliced")

    peak = plan_report._peak(model, setting_at, unit)
    for tokens in (2048, 4096, 6144, 10240):
        assert peak(tokens // unit) == model.predict(setting_at(tokens // unit)).peak_bytes, tokens
    assert len(model._predicted) == 4  # the last two were asked here alone


@pytest.mark.parametrize(
    ("name", "billions", "gib"),
    [("llama-2-7b", 6.74, 12.55), ("llama-3-8b", 8.03, 14.96), ("llama-2-70b", 68.98, 128.5)],
)
def test_shipped_configs_have_the_published_sizes(capsys, name, billions, gib, uncheckpointed):
    report = json.loads(plan(capsys, "--model", name, "--adapter", "full", "--drop-rate", 0, "--json"))
    assert report["num_parameters"] / 1e9 == pytest.approx(billions, abs=0.006)
    assert report["asked"]["bytes"]["weights"] / 2**30 == pytest.approx(gib, rel=0.002)
    assert set(model_config.shipped()) >= {name}


def test_builtin_model_and_a_folder_are_found(capsys, small, uncheckpointed):
    assert "builtin" in plan(capsys, "--model", "builtin", "--seq-len", 64, "--drop-rate", 0)
    assert "0.00 billion" in plan(capsys, "--model", small.parent, "--seq-len", 64, "--drop-rate", 0)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--seq-len", "0"], "--seq-len: expected at least 1, got 0"),
        (["--batch-size", "0"], "--batch-size: expected at least 1, got 0"),
        (["--lora-rank", "-1"], "--lora-rank: expected at least 1, got -1"),
        (["--drop-rate", "1"], "--drop-rate: expected 0 <= drop_rate < 1, got 1.0"),
        (["--drop-rate", "nan"], "--drop-rate: expected 0 <= drop_rate < 1, got nan"),
        (["--adapter", "dora"], "--adapter: expected one of lora, qlora, paca, qpaca, full, got 'dora'"),
        (["--checkpoint", "all"], "--checkpoint: expected one of none, block, kept, sliced, got 'all'"),
        (["--dtype", "int8"], "--dtype: expected one of bfloat16"),
        (["--optimizer", "lion"], "--optimizer: expected one of adamw"),
        (["--gpu-memory", "much"], "--gpu-memory: expected GiB, as in 24 or 80"),
        (["--gpu-memory", "0.5"], "and more than the reserve of 1, got '0.5'"),
        (["--reserve", "-1"], "--reserve: expected GiB >= 0, got -1.0"),
        (["--gpu-memory", "1.0002"], "weights and optimizer state alone take 0.0 GiB"),
        (["--model", "none.json"], "--model none.json: no such file or folder"),
        (["--model", "./none"], "--model ./none: no such file or folder"),
        (["--model", "Lama-2-7b"], "--model Lama-2-7b: no such model; did you mean llama-2-7b?"),
        (["--model", "."], "but the folder has no config.json"),
    ],
)
def test_bad_option_is_one_line(capsys, small, argv, message, monkeypatch, tmp_path):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    model = [] if "--model" in argv else ["--model", small]
    assert message in fails(capsys, *model, *argv)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a JSON file"),
        ("[]", "expected a JSON object with a model_type"),
        ('{"hidden_size": 4}', "expected a JSON object with a model_type"),
        ('{"model_type": "abacus"}', "not a config that transformers accepts"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "Field 'hidden_size' expected int, got str"),
        ('{"model_type": "llama", "hidden_size": -8}', "not a config that transformers accepts"),
        ('{"model_type": "t5"}', "transformers cannot build a causal LM"),
    ],
)
def test_bad_config_is_one_line(capsys, small, content, message):
    small.write_text(content)
    assert message in fails(capsys, "--model", small)


@pytest.mark.parametrize("command", [["plan"], ["finetune", "--output", "out"]])
def test_without_a_network_a_hub_id_is_given_up_at_once(capsys, monkeypatch, tmp_path, command):
    def no_network(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.model_info", no_network)
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", None)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", None)
    assert main([*command, "--model", "owner/none"]) == 2
    assert "not to be had from the Hugging Face hub: no network" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_model_is_required(capsys):
    assert "--model" in fails(capsys)


@pytest.mark.parametrize("budget", [0, 99, 100, 1234, 5000, 10**9])
@pytest.mark.parametrize("start", [1, 7, 400])
def test_largest_that_fits_by_search(budget, start):
    def peak(n):  # bent: another part is the largest from 20 on
        return max(100 + 3 * n, 40 + 6 * n)

    expected = max((n for n in range(1, 501) if peak(n) <= budget), default=0)
    assert _largest(peak, budget, (start, 2 * start), 500) == expected
    assert _largest(peak, budget, (start, start), 500) == expected


def test_search_needs_few_evaluations():
    asked = []
    assert _largest(lambda n: asked.append(n) or 1000 + 7 * n, 100_000, (32, 64), 1 << 20) == 99_000 // 7
    assert len(asked) <= 5


def test_recommendation_when_nothing_fits():
    row = {"fits": False, "relative_step_time": 1.0}
    rows = [{**row, "longest_seq_len": 64}, {**row, "longest_seq_len": 128}]
    assert recommend(rows) == {"longest": rows[1]}


def test_target_share_of_a_data_set_and_what_it_gains(capsys, tmp_path, small, uncheckpointed):
    small.write_text(json.dumps({**SMALL, "num_hidden_layers": 2}))
    lines = [json.dumps({"prompt": f"The square of {n:02}: ", "completion": f"{n * n:05}"}) for n in range(60)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    data = ["--data", tmp_path / "pairs.jsonl", "--tokenizer", "builtin", "--batch-size", 4]
    report = json.loads(plan(capsys, "--model", small, *data, "--drop-rate", 0, "--json"))
    found = report["data"]["by_batch_size"]
    assert list(found) == ["1", "2", "4", "8", "16"]
    # Of 25 tokens, padded to 32, the last prompt token and the completion's five but its last: 6; 18 are context.
    assert (found["4"]["seq_len"], found["4"]["targets"], found["4"]["forward"]) == (32, 6 / 32, 24 / 32)
    assert found["4"]["relative_step_time"]["lora"] == (24 + 6) / 64
    rows = {row["setting"]["target_share"]: row for row in report["target_plans"]}
    assert list(rows) == [None, 0.05, 0.1, 6 / 32, 0.25, 0.5, 1.0]
    assert rows[None]["relative_step_time"] == rows[1.0]["relative_step_time"] == 1.0
    times = [row["relative_step_time"] for row in report["target_plans"][1:]]
    peaks = [row["peak_bytes"] for row in report["target_plans"][1:]]
    assert times == sorted(times)
    assert peaks[1:] == sorted(peaks[1:])  # at the smallest shares the pass over the context is the peak
    plan_tables.show(report)
    text = capsys.readouterr().out
    for part in ("targets", "18.8%", "no plan", "0.47", "pairs.jsonl by batch size"):
        assert part in text


def test_bad_target_options(capsys, tmp_path, small):
    (tmp_path / "text.txt").write_text("x" * 300)
    data = ["--data", tmp_path / "text.txt"]
    assert "--target-share: expected 0 < target share <= 1, got 0.0" in fails(
        capsys, "--model", small, "--target-share", 0
    )
    assert "--target-share: expected none with --data" in fails(capsys, "--model", small, *data, "--target-share", 0.5)
    assert "--tokenizer: expected --data with it" in fails(capsys, "--model", small, "--tokenizer", "builtin")
    assert "llama-2-7b is a config alone" in fails(capsys, "--model", "llama-2-7b", *data)
    assert "no such file" in fails(capsys, "--model", small, "--data", tmp_path / "none.jsonl")
    assert "--fused-loss: expected one of auto, off, chunked" in fails(capsys, "--model", small, "--fused-loss", "x")
    short = ["--tokenizer", "builtin", "--seq-len", 64, "--batch-size", 8]
    assert "--batch-size: expected at most 3, the rows of --data" in fails(capsys, "--model", small, *data, *short)
