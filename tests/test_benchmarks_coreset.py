"""The benchmarks of coresets: what they measure and write is what they say."""

import csv
from dataclasses import fields

import pytest
import torch
from models import tiny_causal_lm, with_lora

from benchmarks import bench_coreset_step, coreset_agreement, coreset_data
from benchmarks.rows import RESULTS, append_rows, read_rows
from benchmarks.settings import Settings

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


def test_committed_rows_have_the_columns_of_today():
    with (RESULTS / "coreset_agreement.csv").open(newline="") as file:
        lines = list(csv.reader(file))
    assert lines[0] == [column.name for column in fields(coreset_agreement.AgreementRow)]
    assert {len(line) for line in lines} == {len(lines[0])}


def test_coreset_step_rows():
    (rows,) = bench_coreset_step.run(Settings(CPU, "tiny"))
    assert [row.method for row in rows] == ["full", "half", "exact", "spsa"]
    full, half, exact, spsa = rows
    assert full.peak_over_full == full.step_over_full == half.step_over_half == 1
    assert half.scoring_ms == half.selection_ms == 0
    for row in (exact, spsa):
        assert row.scoring_ms > row.selection_ms > 0
        assert row.training_ms < full.training_ms + row.scoring_ms
        assert row.peak_over_full <= 0.7  # nothing is micro-batched finer than an example
    assert len(bench_coreset_step.verdicts(rows)) == 4


def test_agreement_of_spsa_with_exact_gradients(tmp_path, monkeypatch):
    monkeypatch.setattr(coreset_agreement, "DIRECTIONS", (1, 16))
    model = with_lora(tiny_causal_lm(vocab_size=256, max_position_embeddings=64))
    rows = coreset_agreement.run(model, "tiny", 16, 32, 1, [(torch.float32, 1e-3)])
    assert [(row.kind, row.directions, row.steps) for row in rows] == [
        *(("exact", 0, 1), ("fresh", 1, 1), ("fresh", 16, 1)),
        *(("fresh", 1, 16), ("fixed", 1, 16)),
    ]
    assert rows[0].rank_correlation == pytest.approx(1)
    assert rows[0].picks_quality == pytest.approx(1)
    assert rows[2].rank_correlation > rows[1].rank_correlation
    append_rows(tmp_path / "rows.csv", rows)
    coreset_agreement.draw(read_rows(tmp_path / "rows.csv"), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_the_mixture_is_the_same_everywhere_and_unequal():
    mixture = coreset_data.Mixture(32, seed=0, num_rows=400)
    assert {name: len(rows) for name, rows in mixture.train.items()} == {
        "code": 200,
        "documentation": 160,
        "headers": 40,
    }
    epoch = [mixture.batch(step, 40) for step in range(10)]
    assert torch.cat([sources for *_, sources in epoch]).bincount().tolist() == [200, 160, 40]
    other = coreset_data.Mixture(32, seed=1, num_rows=400)
    assert torch.equal(other.train["code"], mixture.train["code"])
    assert not torch.equal(other.batch(0, 40)[0], epoch[0][0])
