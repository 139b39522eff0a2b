"""benchmarks.convergence: runs are trained once and recorded whole, controls follow from timings, tables add up."""

import re
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("the benchmarks are not part of an installed package", allow_module_level=True)
pytest.importorskip("peft")
sys.path.append(str(ROOT))

from benchmarks import (  # noqa: E402
    convergence,
    convergence_data,
    convergence_methods,
    convergence_report,
    convergence_timing,
    coreset_data,
)
from benchmarks.convergence_methods import GROUPS, TINY, Group, Point  # noqa: E402
from benchmarks.rows import RESULTS, read_rows  # noqa: E402
from dropbp_kernels.cli import builtin, corpus  # noqa: E402
from dropbp_kernels.cli.data import IGNORED, Data, Row  # noqa: E402


def tiny_data(name, seq_len, seed):
    """Rows of random bytes, of unequal lengths, the last half of each with a loss."""
    if name == "mixture":
        return convergence_data.MixtureData(seq_len, seed)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in (seq_len, seq_len - 8) * 10:
        ids = torch.randint(256, (length,), generator=generator, dtype=torch.int32)
        labels = ids.clone()
        labels[: length // 2] = IGNORED
        rows.append(Row(ids, labels))
    return Data(rows, 258, seed, name)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The tiny model lies in tmp_path, untrained; data are a few rows of noise."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(builtin.config(TINY)).save_pretrained(tmp_path / "model")
    monkeypatch.setattr(builtin, "ensure_pretrained", lambda recipe, device: tmp_path / "model")
    monkeypatch.setattr(convergence_data, "load", tiny_data)
    monkeypatch.setattr(coreset_data, "_text", lambda source: bytes(range(256)) * 300)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_is_timed_and_trained_and_a_second_call_has_nothing_to_do(group, tiny, capsys, monkeypatch):
    call = ["--group", group, "--scale", "tiny", "--out", str(tiny)]
    assert convergence.main([*call, "--time"]) == 0
    assert convergence.main([*call, "--seeds", "3"]) == 0
    rows = read_rows(tiny / convergence.FILE)
    assert {(row["method"], float(row["drop_rate"])) for row in rows} == {
        (point.method, point.drop_rate) for point in convergence_methods.group_of(group, "tiny").points
    }
    for row in rows:
        curve = [float(entry.partition(":")[2]) for entry in row["validation_curve"].split(";")]
        ends = float(row["validation_before"]), float(row["validation_loss"])
        assert (curve[0], curve[-1]) == pytest.approx(ends, rel=1e-4)
        assert curve[0] == pytest.approx(5.55, abs=0.1)  # an untrained model on 259 tokens
        assert len(row["train_curve"].split(";")) == int(row["steps"]) == 2
    undropped = next(row for row in rows if row["method"] == "undropped")
    assert float(undropped["validation_loss"]) != pytest.approx(curve[0], abs=1e-4)
    steps = read_rows(tiny / convergence_timing.FILE)
    assert {row["adapter"] for row in rows} == {row["adapter"] for row in steps}
    assert all(float(row["backward_gflop"]) >= 0 for row in steps)

    monkeypatch.setattr(convergence, "train", lambda *args: pytest.fail("trained again"))
    capsys.readouterr()
    assert convergence.main([*call, "--seeds", "3"]) == 0
    assert f"0 of {len(rows)} runs to do" in capsys.readouterr().out


def test_an_interrupted_call_goes_on_where_it_was(tiny):
    only = ["--group", "targets", "--scale", "tiny", "--out", str(tiny), "--seeds", "0", "1", "--only", "undropped"]
    convergence.main(only)
    path = tiny / convergence.FILE
    whole = read_rows(path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2]))
    convergence.main(only)
    again = read_rows(path)
    assert [row["seed"] for row in again] == ["0", "1"]
    assert [row["validation_loss"] for row in again] == [row["validation_loss"] for row in whole]
    assert again[0]["validation_loss"] != again[1]["validation_loss"]


def test_the_size_of_a_control_follows_from_the_newest_timing():
    undropped = {4: 10.0, 8: 14.0, 16: 30.0}
    batch = convergence_timing.batch_as_fast_as
    assert [batch(ms, undropped) for ms in (14.0, 22.0, 12.0, 40.0)] == [8, 12, 6, 16]
    assert batch(8.0, undropped) == 2.0  # on the line through the two smallest
    assert batch(1.0, undropped) == 1.0

    task, point = GROUPS["targets"].task, Point("undropped", as_fast_as=("published", 0.5))
    row = {"group": "targets", "adapter": "lora", "method": "published", "drop_rate": "0.5", "undropped_batch": "6.1"}
    rows = [row, {**row, "undropped_batch": "4.6"}, {**row, "group": "plans", "undropped_batch": "1"}]
    assert convergence.batch_size_of(point, task, "targets", "lora", rows) == 5
    assert convergence.batch_size_of(point, task, "targets", "full", rows) is None


def test_controls_of_one_size_are_one_run(capsys):
    points = (Point("undropped"), Point("undropped", batch_size=3), Point("undropped", as_fast_as=("branch", 0.75)))
    group = Group(GROUPS["plans"].task, points)
    timed = {"group": "plans", "adapter": "lora", "method": "branch", "drop_rate": "0.75", "undropped_batch": "3.2"}
    runs = list(convergence.wanted_runs("plans", group, "lora", [0, 1], [], [timed]))
    assert [(run.seed, run.batch_size) for run in runs] == [(0, 12), (0, 3), (1, 12), (1, 3)]
    assert len(list(convergence.wanted_runs("plans", group, "lora", [0, 1], [], []))) == 4
    assert "plans, lora: undropped, as fast as branch 0.75 waits for a timing" in capsys.readouterr().out


def test_windows_cover_all_values_once():
    assert convergence.window_means([1.0, 2.0, 3.0, 4.0, 5.0], 2) == [1.5, 4.0]
    assert convergence.window_means([1.0, 2.0], 20) == [1.0, 2.0]


def test_a_difference_is_paired_by_seed_and_real_only_beyond_its_noise():
    losses = {0: 2.0, 1: 3.0, 2: 4.0, 7: 9.0}
    close = convergence_report.difference(losses, {0: 1.9, 1: 2.9, 2: 3.9, 8: 0.0})
    assert (close.mean, close.num) == (pytest.approx(0.1), 3)
    assert close.is_real
    assert str(close) == "**+0.100**"
    # mean 0.1, deviation 0.05: t = 0.1 / (0.05 / sqrt(3)) = 3.46, below 4.303
    noisy = convergence_report.difference(losses, {0: 1.95, 1: 2.9, 2: 3.85})
    assert str(noisy) == "+0.100"
    assert not convergence_report.difference({0: 2.0}, {0: 1.0}).is_real
    assert convergence_report.difference({0: 2.0}, {1: 1.0}) is None


def run_row(method, drop_rate, batch_size, seed, loss, **different):
    task = GROUPS["plans"].task
    values = {
        "group": "plans",
        "adapter": "lora",
        "method": method,
        "drop_rate": str(drop_rate),
        "batch_size": str(batch_size),
        "steps": str(task.steps),
        "learning_rate": str(task.learning_rates["lora"]),
        "seed": str(seed),
        "validation_before": "3",
        "validation_loss": str(loss),
        "train_curve": "3;2.5",
    }
    return {**values, **different}


def step_row(method, drop_rate, batch_size, step, backward):
    return {
        "date_utc": "2026",
        "group": "plans",
        "adapter": "lora",
        "method": method,
        "drop_rate": str(drop_rate),
        "batch_size": str(batch_size),
        "step_over_undropped": str(step),
        "backward_gflop": str(backward),
    }


def test_a_table_by_hand(tmp_path):
    rows = []
    for seed, noise in enumerate((0.0, 0.1, 0.05)):
        rows += [
            run_row("undropped", 0, 12, seed, 2.0 + noise),
            run_row("published", 0.75, 12, seed, 2.5 + noise),
            run_row("branch", 0.75, 12, seed, 2.3 + noise + 0.01 * seed),
            run_row("undropped", 0, 6, seed, 2.2 + noise),
        ]
    rows.append(run_row("branch", 0.75, 12, convergence_report.FIRST_SWEEP_SEED, 1.0))
    rows.append(run_row("branch", 0.75, 12, 0, 1.0, learning_rate="1e-5"))
    steps = [
        step_row("undropped", 0, 12, 1.0, 8.0),
        step_row("undropped", 0, 3, 0.4, 2.0),
        step_row("published", 0.75, 12, 0.6, 1.5),
        step_row("branch", 0.75, 12, 0.61, 2.0),
    ]
    assert convergence_report.table("plans", "lora", rows, steps).splitlines()[-4:] == [
        "| undropped | 12 | 1.00 | 1.00 | 2.050 ± 0.050 |  |  |  | 3 |",
        "| published 0.75 | 12 | 0.60 | 0.19 | 2.550 ± 0.050 | **+0.500** | **+0.300** (6) |  | 3 |",
        "| branch 0.75 | 12 | 0.61 | 0.25 | 2.360 ± 0.056 | **+0.310** | **+0.110** (6) | 38% | 3 |",
        "| undropped | 6 | 0.60 | 0.50 | 2.250 ± 0.050 | **+0.200** |  |  | 3 |",
    ]
    page = "a\n<!-- convergence: plans, lora -->\nold\n<!-- end -->\nb"
    filled = convergence_report.with_tables(page, rows, steps)
    assert convergence_report.with_tables(filled, rows, steps) == filled
    assert filled.startswith("a\n<!-- convergence: plans, lora -->\nbyte Llama, 8 blocks")
    assert filled.endswith("| 3 |\n<!-- end -->\nb")
    with pytest.raises(ValueError, match="expected <!-- end --> after <!-- convergence: plans, lora -->"):
        convergence_report.with_tables(page[:-14], rows, steps)
    convergence_report.draw("plans", "lora", rows, steps, tmp_path / "plans.png")
    assert (tmp_path / "plans.png").stat().st_size > 10_000


def test_the_page_says_what_the_committed_rows_say():
    rows, steps = read_rows(RESULTS / convergence.FILE), read_rows(RESULTS / convergence_timing.FILE)
    text = convergence_report.PAGE.read_text()
    assert convergence_report.with_tables(text, rows, steps) == text, "run: python -m benchmarks.convergence --report"
    for group, adapter in re.findall("<!-- convergence: (\\w+), (\\w+) -->", text):
        assert (convergence_report.DOCS / f"convergence-{group}-{adapter}.png").exists()


def test_summaries_are_long_and_end_where_the_docstring_does(monkeypatch):
    source, text = "x = 1\n" * 20, "What it does.\n\nMore of it."
    pairs = ((source, text + '"""'), (source, 'Short."""'), ("x = 1", 'Too short a pair."""'))
    monkeypatch.setattr(corpus, "docstring_pairs", lambda max_bytes: pairs)
    convergence_data._summaries.cache_clear()
    rows = convergence_data._summaries(160)
    convergence_data._summaries.cache_clear()
    decode = builtin.ByteTokenizer().decode
    targets = [decode([int(label) for label in row.labels if label != IGNORED]) for row in rows]
    assert targets == ['What it does."""', 'Short."""']
    with pytest.raises(ValueError, match="expected a built-in name, mixture or summaries, got 'poems'"):
        convergence_data.load("poems", 32, 0)


def test_committed_rows_have_the_columns_of_today():
    for file, row_type in (
        (convergence.FILE, convergence.ConvergenceRow),
        (convergence_timing.FILE, convergence_timing.ConvergenceStepRow),
    ):
        rows = read_rows(RESULTS / file)
        assert rows
        assert list(rows[0]) == [column.name for column in fields(row_type)]
        assert all(None not in row and None not in row.values() for row in rows)  # too long or too short a line


def test_points_are_named_on_the_command_line(capsys):
    with pytest.raises(SystemExit):
        convergence.main(["--group", "plans", "--only", "poems 0.5"])
    assert "published 0.75" in capsys.readouterr().err
    assert str(Point("published", 0.75)) == convergence_methods.label("published", 0.75)
