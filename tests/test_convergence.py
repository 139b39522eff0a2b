"""benchmarks.convergence: runs are trained once and recorded whole, controls follow from timings."""

import pytest
from convergence_cases import tiny_task

from benchmarks import (
    convergence,
    convergence_methods,
    convergence_timing,
)
from benchmarks.convergence_methods import GROUPS, Group, Point
from benchmarks.rows import read_rows


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    with tiny_task(tmp_path, monkeypatch) as folder:
        yield folder


@pytest.mark.parametrize("group", ["targets", "variations", "chosen", "parts", "plans", "paca", "coreset"])
def test_a_group_is_timed_and_trained_and_a_second_call_has_nothing_to_do(group, tiny, capsys, monkeypatch):
    call = ["--group", group, "--scale", "tiny", "--out", str(tiny)]
    assert convergence.main([*call, "--time", "--rounds", "1"]) == 0
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
    assert not any(convergence_methods.is_simulated(row["method"], float(row["drop_rate"])) for row in steps)
    assert {row["adapter"] for row in rows} == {row["adapter"] for row in steps}
    assert {row["group"] for row in rows} == {row["group"] for row in steps} == {GROUPS[group].rows_of or group}
    assert all(float(row["backward_gflop"]) >= 0 for row in steps)

    monkeypatch.setattr(convergence, "train", lambda *args: pytest.fail("trained again"))
    capsys.readouterr()
    assert convergence.main([*call, "--seeds", "3"]) == 0
    assert f"0 of {len(rows)} runs to do" in capsys.readouterr().out


def test_no_method_is_left_out():
    """The groups that are not run above hold no method that those do not."""
    names = ("targets", "variations", "chosen", "parts", "plans", "paca", "coreset")
    points = [point for name in names for point in GROUPS[name].points]
    assert {point.method for group in GROUPS.values() for point in group.points} == {point.method for point in points}
    assert convergence_methods.METHODS.keys() == {point.method for point in points}


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


def test_a_step_is_as_fast_as_an_undropped_one_of_some_batch():
    undropped = {4: 10.0, 8: 14.0, 16: 30.0}
    batch = convergence_timing.batch_as_fast_as
    assert [batch(ms, undropped) for ms in (14.0, 22.0, 12.0, 40.0)] == [8, 12, 6, 16]
    assert batch(8.0, undropped) == 2.0  # on the line through the two smallest
    assert batch(1.0, undropped) == 1.0


def test_tables_of_one_task_share_their_runs():
    for name, group in GROUPS.items():
        assert group.rows_of is None or group.task == GROUPS[group.rows_of].task, name
        assert len({str(point) for point in group.points}) == len(group.points), name
    group = Group(GROUPS["plans"].task, (Point("undropped"), Point("published", 0.75, learning_rate=4e-3)))
    runs = list(convergence.wanted_runs(group, "lora", [0, 1], [], "plans"))
    assert [(run.seed, run.group, run.learning_rate) for run in runs] == [
        (seed, "plans", rate) for seed in (0, 1) for rate in (8e-3, 4e-3)
    ]
    swept = list(convergence.wanted_runs(group, "lora", [100], [1e-3, 2e-3], "plans"))
    assert [run.learning_rate for run in swept] == [1e-3, 1e-3, 2e-3, 2e-3]


def test_points_are_named_on_the_command_line(capsys):
    with pytest.raises(SystemExit):
        convergence.main(["--group", "plans", "--only", "poems 0.5"])
    assert "published 0.75" in capsys.readouterr().err
    assert str(Point("published", 0.75)) == convergence_methods.label("published", 0.75)


def test_a_step_in_windows_takes_the_mean_of_what_each_window_takes():
    """A window with more context before it takes longer: no median over all of them says what a turn of them costs."""
    run = object.__new__(convergence_timing.WindowRun)
    run.numbers = [9, 0, 1, 0, 1, 0, 1]  # the first is a warm-up
    assert convergence_timing._typical([1.0, 2.0, 1.0, 40.0, 3.0, 4.0], run, 1) == (1.0 + 4.0) / 2
