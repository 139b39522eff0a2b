"""The benchmarks of whole steps: what is measured and written is what they say."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks import (
    bench_checkpointed_step,
    bench_group_step,
    bench_loss_step,
    bench_patched_step,
    bench_row_step,
    bench_step,
    bench_target_step,
    bench_turn_step,
    plots,
    steps,
)
from benchmarks.rows import append_rows
from benchmarks.settings import Settings
from dropbp_kernels import apply_dropbp
from dropbp_kernels.cli.models import twin

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


def test_columns_of_step_times_by_hand():
    times = [(1.0, 2.0), (2.0, 6.0), (4.0, 1.0)]
    assert steps.time_columns(times) == {
        "num_samples": 3,
        "forward_ms": 2.0,
        "backward_ms": 2.0,
        "step_ms": 5.0,
        "step_p20_ms": pytest.approx(3.8),
        "step_p80_ms": pytest.approx(6.8),
    }
    assert steps.over(times, [(3.0, 3.0), (2.0, 2.0), (1.0, 1.0)]) == 2.0  # of 0.5, 2 and 2.5


def test_step_rows(tmp_path):
    (rows,) = bench_step.run(Settings(CPU, "tiny"))
    assert [(row.method, row.drop_rate) for row in rows[:3]] == [("undropped", 0), ("published", 0.5), ("ours", 0.5)]
    undropped, published, ours = rows[0], rows[3], rows[4]
    assert undropped.flops_kept == 1.0
    assert ours.flops_kept == pytest.approx(0.25, abs=0.15)
    assert published.saved_bytes > 0.8 * undropped.saved_bytes  # its dropped branches still build their graphs
    assert ours.saved_bytes < 0.5 * undropped.saved_bytes
    assert ours.ideal_step_ms == pytest.approx(undropped.forward_ms + 0.25 * undropped.backward_ms)
    transient = undropped.ideal_peak_bytes - undropped.peak_live_bytes
    assert transient > 0
    assert ours.ideal_peak_bytes == pytest.approx(0.25 * undropped.peak_live_bytes + transient, abs=1)
    assert all(held for name, held in bench_step.verdicts(rows).items() if name.startswith("peak"))
    append_rows(tmp_path / "step.csv", rows)
    assert plots.main(["--rows", str(tmp_path), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "step.png").stat().st_size > 10_000


def test_loss_step_rows():
    suites = list(bench_loss_step.run(Settings(CPU, "tiny")))
    assert [row.trained_weight for rows in suites for row in rows[:1]] == [False, True]
    for rows in suites:
        assert [row.way for row in rows] == list(bench_loss_step.ways())
        by_way = {row.way: row for row in rows}
        assert by_way["chunked"].loss_error <= 2 * by_way["unfused"].loss_error + 1e-6
        assert by_way["chunked"].gradient_error < 1e-2
        assert by_way["unfused"].speedup_vs_unfused == 1


def test_checkpointed_step_rows():
    (rows,) = bench_checkpointed_step.run(Settings(CPU, "tiny"))
    by_name = {(row.method, row.drop_rate): row for row in rows}
    undropped, published = by_name["undropped", 0.0], by_name["published", 0.875]
    assert published.saved_bytes == undropped.saved_bytes  # every block keeps its input
    for way in ("transformers", "kept", "sliced"):
        assert by_name[way, 0.875].saved_bytes < undropped.saved_bytes
        assert by_name[way, 0.75].flops_kept == pytest.approx(0.25, abs=0.15)
    assert len(bench_checkpointed_step.verdicts(rows)) == 3


def test_row_step_rows():
    first, *_ = bench_row_step.run(Settings(CPU, "tiny"))
    assert [row.granularity for row in first] == ["branch", "sample", "token"]
    assert [row.flops_kept for row in first] == pytest.approx([0.5] * 3, abs=0.02)
    assert first[0].step_over_branch == 1.0
    assert bench_row_step.verdicts(first) == {}  # the target is for batches of 8 and more
    large = [replace(row, batch_size=8) for row in first]
    assert len(bench_row_step.verdicts(large)) == 2


def test_patched_step_rows():
    (rows,) = bench_patched_step.run(Settings(CPU, "tiny"))
    assert [row.method for row in rows] == ["unpatched", "patched", "fused"]
    assert rows[0].step_over_unpatched == 1.0
    assert len(bench_patched_step.verdicts(rows)) == 2


def test_group_step_rows():
    half, _ = bench_group_step.run(Settings(CPU, "tiny"))
    by_method = {row.method: row for row in half}
    assert list(by_method) == list(bench_group_step.METHODS)
    assert by_method["undropped"].step_over_undropped == 1.0
    for way in ("none", "shared"):
        assert by_method[f"{way} apart"].saved_bytes < 0.6 * by_method[way].saved_bytes


def test_methods_of_a_group_step_have_the_same_loss():
    model, batch = steps.build(bench_group_step.as_groups(steps.SIZES["tiny"]), CPU)
    groups = bench_group_step.with_groups(batch, 0.5)
    assert groups["advantages"].tolist() == [0.0] * 4 + [-1.0, 1.0, -1.0, 1.0]
    losses = [bench_group_step.GroupStepper(model, groups, CPU, None, False).forward()]
    for shared in (False, True):
        patched = twin(model)
        handler = apply_dropbp(patched, 0.0, strict=False, context="inference", shared_context=shared)
        losses += [
            bench_group_step.GroupStepper(patched, groups, CPU, handler, apart).forward() for apart in (False, True)
        ]
    assert losses[0].item() != 0.0
    torch.testing.assert_close(torch.stack(losses), losses[0].expand(5), rtol=1e-5, atol=1e-6)


def test_turn_step_rows():
    two, four = bench_turn_step.run(Settings(CPU, "tiny"))
    assert [(row.method, row.num_passes, row.is_chosen) for row in two] == [
        ("undropped", 1, False),
        ("apart", 4, False),
        ("together", 2, True),
    ]
    assert [row.num_passes for row in four] == [1, 8, 2]
    tokens = torch.arange(1, 65).expand(3, 64)
    labels = bench_turn_step.with_turns({"input_ids": tokens}, 4)["labels"]
    shares = (labels != -100).view(3, 4, 16).sum(2) / 16
    assert shares.min() >= 0.125
    assert shares.max() <= 0.375
    assert torch.equal(labels[:, 15::16], tokens[:, 15::16])


class Asked(Exception):
    """All that a benchmark would time is there."""


@pytest.mark.parametrize("bench", [bench_patched_step, bench_row_step, bench_target_step])
def test_models_of_a_step_share_their_frozen_weights(bench, monkeypatch):
    """A GPU has no room for eleven of seven billion."""
    models = []

    def ask(*args):
        raise Asked

    where = getattr(bench, "steps", bench)
    stepper = SimpleNamespace(bytes=dict, times=None)
    monkeypatch.setattr(where, "Stepper", lambda model, *args: models.append(model) or stepper)
    monkeypatch.setattr(bench, "times_in_turn" if where is bench else "in_turn", ask)
    with pytest.raises(Asked):
        next(bench.run(Settings(CPU, "tiny")))
    assert len(models) >= 3
    for is_trained in (True, False):
        places = [tuple(p.data_ptr() for p in model.parameters() if p.requires_grad == is_trained) for model in models]
        assert len(set(places)) == (len(models) if is_trained else 1)
