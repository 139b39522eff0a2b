"""benchmarks.convergence: tables add up, the page says what the rows say."""

import re
from dataclasses import fields

import convergence_cases  # noqa: F401  # skips where there are no benchmarks
import pytest

from benchmarks import (
    convergence,
    convergence_data,
    convergence_gradients,
    convergence_lines,
    convergence_report,
    convergence_timing,
)
from benchmarks.convergence_methods import GROUPS
from benchmarks.rows import RESULTS, read_rows
from dropbp_kernels.cli import builtin, corpus
from dropbp_kernels.cli.data import IGNORED


def test_a_difference_is_paired_by_seed_and_real_only_beyond_its_noise():
    losses = {0: 2.0, 1: 3.0, 2: 4.0, 7: 9.0}
    close = convergence_lines.difference(losses, {0: 1.9, 1: 2.9, 2: 3.9, 8: 0.0})
    assert (close.mean, close.num) == (pytest.approx(0.1), 3)
    assert close.is_real
    assert str(close) == "**+0.100**"
    # mean 0.1, deviation 0.05: t = 0.1 / (0.05 / sqrt(3)) = 3.46, below 4.303
    noisy = convergence_lines.difference(losses, {0: 1.95, 1: 2.9, 2: 3.85})
    assert str(noisy) == "+0.100"
    assert not convergence_lines.difference({0: 2.0}, {0: 1.0}).is_real
    assert convergence_lines.difference({0: 2.0}, {1: 1.0}) is None


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


def step_row(method, drop_rate, batch_size, step, backward, device="one CPU"):
    values = {"date_utc": "2026", "group": "plans", "adapter": "lora", "method": method, "drop_rate": str(drop_rate)}
    values |= {"device": device, "threads": "2" if device == "one CPU" else "1"}
    costs = {"step_over_undropped": str(step), "backward_gflop": str(backward)}
    return {**values, **costs, "batch_size": str(batch_size)}


def test_a_table_by_hand(tmp_path):
    rows = []
    for seed, noise in enumerate((0.0, 0.1, 0.05)):
        rows += [
            run_row("undropped", 0, 12, seed, 2.0 + noise),
            run_row("published", 0.75, 12, seed, 2.5 + noise),
            run_row("branch", 0.75, 12, seed, 2.3 + noise + 0.01 * seed),
            run_row("undropped", 0, 5, seed, 2.2 + noise),
        ]
    rows.append(run_row("branch", 0.75, 12, convergence_lines.FIRST_SWEEP_SEED, 1.0))
    rows.append(run_row("branch", 0.75, 12, 0, 1.0, learning_rate="1e-5"))
    steps = [
        step_row("undropped", 0, 12, 1.0, 8.0),
        step_row("undropped", 0, 3, 0.4, 2.0),
        step_row("published", 0.75, 12, 0.6, 1.5),
        step_row("branch", 0.75, 12, 0.61, 3.35, device="another"),
    ]
    table = convergence_report.table("plans", "lora", rows, steps).splitlines()
    assert table[0].endswith("; validation loss 3.000 before; step times on one CPU, 2 threads and another, 1 thread.")
    assert convergence_report.table("plans", "lora", rows, []).splitlines()[0].endswith("loss 3.000 before.")
    assert table[-4:] == [
        "| undropped | 12 | 1.00 | 1.00 | 2.050 ± 0.050 |  |  |  |  | 3 |",
        "| published 0.75 | 12 | 0.60 | 0.19 | 2.550 ± 0.050 | **+0.500** | **+0.300** (5) |  |  | 3 |",
        "| branch 0.75 | 12 | 0.61 | 0.42 | 2.360 ± 0.056 | **+0.310** | **+0.110** (5) | **+0.110** (5) "
        "| **-0.190** (38%) | 3 |",
        "| undropped | 5 | 0.53 | 0.42 | 2.250 ± 0.050 | **+0.200** |  |  |  | 3 |",
    ]
    page = "a\n<!-- convergence: plans, lora -->\nold\n<!-- end -->\nb"
    filled = convergence_report.with_tables(page, rows, steps, [])
    assert convergence_report.with_tables(filled, rows, steps, []) == filled
    assert filled.startswith("a\n<!-- convergence: plans, lora -->\nbyte Llama, 8 blocks")
    assert filled.endswith("| 3 |\n<!-- end -->\nb")
    with pytest.raises(ValueError, match="expected <!-- end --> after <!-- convergence: plans, lora -->"):
        convergence_report.with_tables(page[:-14], rows, steps, [])
    convergence_report.draw("plans", "lora", rows, steps, tmp_path / "plans.png")
    assert (tmp_path / "plans.png").stat().st_size > 10_000


def test_a_seed_that_was_run_again_counts_once_by_its_newest_row():
    first = [run_row("undropped", 0, 12, seed, 2.0, validation_before="3.1") for seed in (0, 1)]
    again = [run_row("undropped", 0, 12, seed, 2.2) for seed in (0, 1, 2)]
    table = convergence_report.table("plans", "lora", first + again, [])
    assert table.splitlines()[0].endswith("; validation loss 3.000 before.")
    assert "| 2.200 ± 0.000 |  |  |  |  | 3 |" in table
    (line,) = convergence_lines.lines_of("plans", "lora", first + again, [])
    assert line.rows == again  # whose curves are drawn


def test_the_page_says_what_the_committed_rows_say():
    text = convergence_report.PAGE.read_text()
    filled = convergence_report.with_tables(text, *convergence_report.read_all(RESULTS))
    assert filled == text, "run: python -m benchmarks.convergence --report"
    pictures = set(re.findall(r"\]\((convergence-.*?\.png)\)", text))
    assert pictures == {path.name for path in convergence_report.DOCS.glob("convergence-*.png")}


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
        (convergence_gradients.FILE, convergence_gradients.GradientRow),
    ):
        rows = read_rows(RESULTS / file)
        assert rows, file
        assert list(rows[0]) == [column.name for column in fields(row_type)]
        assert all(None not in row and None not in row.values() for row in rows)  # too long or too short a line
