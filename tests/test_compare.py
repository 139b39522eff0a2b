"""make bench-compare: a slowdown between two commits is an error, and no slowdown is none."""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import compare
from benchmarks.compare import Change

ROOT = Path(__file__).resolve().parent.parent
SLOWDOWN = """
import functools, time
_without_sleep = gated_residual_add
@functools.wraps(_without_sleep)
def gated_residual_add(*arguments, **options):
    time.sleep(0.02)
    return _without_sleep(*arguments, **options)
"""
POINT = ("an_op", "fwd", "plain", "float32", "8", "16")


def sides(*pairs):
    """Rounds of one point of cpp: (base, new) milliseconds each."""
    return [{"base": {(*POINT, "cpp"): base}, "new": {(*POINT, "cpp"): new}} for base, new in pairs]


def test_the_median_of_the_rounds_ratios_counts():
    (change,) = compare.join(sides((1.0, 1.05), (2.0, 8.0), (3.0, 3.03)))  # the second round was disturbed
    assert (change.base_ms, change.new_ms, change.ratio) == (2.0, 3.03, pytest.approx(1.05))


def test_only_what_both_sides_have_is_compared():
    rounds = sides((1.0, 1.0))
    rounds[0]["new"]["another",] = 1.0
    assert len(compare.join(rounds)) == 1
    with pytest.raises(compare.CannotCompare, match="no benchmark in common"):
        compare.join([{"base": {}, "new": {("a",): 1.0}}])


@pytest.mark.parametrize(("ratio", "code"), [(0.5, 0), (1.0, 0), (1.099, 0), (1.101, 1)])
def test_a_tenth_is_the_limit(ratio, code, capsys):
    assert compare.report([Change((*POINT, "cpp"), 1.0, ratio, ratio)], compare.THRESHOLD) == code
    text = capsys.readouterr().out
    assert ("SLOWER" in text) == (code == 1)
    assert "1 points: " in text


def test_eager_is_a_control_and_no_loss(capsys):
    changes = [Change((*POINT, "eager"), 1.0, 2.0, 2.0), Change((*POINT, "cpp"), 1.0, 1.0, 1.0)]
    assert compare.report(changes, compare.THRESHOLD) == 0
    text = capsys.readouterr().out
    assert "+0.0%  +100.0%" in text
    assert "something else ran on this machine" in text


def test_what_is_no_commit_is_one_sentence(capsys):
    assert compare.main(["no-such-commit"]) == 2
    assert capsys.readouterr().err == (
        "bench-compare: BASE: expected a commit of this repository, got 'no-such-commit'\n"
    )


def test_help_and_bad_options(capsys):
    with pytest.raises(SystemExit) as stopped:
        compare.main(["--help"])
    assert stopped.value.code == 0
    assert "--quick" in capsys.readouterr().out
    for options in (["HEAD", "--rounds", "0"], ["HEAD", "--threshold", "0"]):
        with pytest.raises(SystemExit):
            compare.main(options)


@pytest.fixture
def repository(tmp_path):
    """A repository of Python alone, with one commit."""
    for name in ("benchmarks", "dropbp_kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "*.csv", "__pycache__"))
    identity = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "base"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    return tmp_path


# A call takes microseconds, and two are no measurement: a sleep exceeds a hundredfold, but so may a busy moment.
TINY = ["HEAD", "--scale", "tiny", "--rounds", "1", "--no-build", "--device", "cpu"]


def slower_lines(repository, text):
    listed = subprocess.run(["git", "worktree", "list"], cwd=repository, capture_output=True, text=True).stdout
    assert listed.count("\n") == 1  # BASE's is gone
    return [line for line in text.splitlines() if line.endswith("SLOWER")]


@pytest.mark.slow
def test_two_commits_alike(repository, monkeypatch, capsys):
    monkeypatch.setattr(compare, "ROOT", repository)  # the command itself is started below
    assert compare.main([*TINY, "--threshold", "1e5"]) == 0
    text = capsys.readouterr().out
    assert not slower_lines(repository, text)
    assert {line.split()[0] for line in text.splitlines() if " reference " in line} == {
        *("facility_location", "gated_residual_add", "gated_residual_rms_norm", "gated_residual_layer_norm", "swiglu"),
        *("geglu", "permuted_norm", "permuted_residual_add", "partial_gather", "column_update", "l1_distances", "rope"),
    }


@pytest.mark.slow
def test_two_commits_apart(repository):
    """The tree at hand sleeps 20 ms in every call of one op."""
    with (repository / "dropbp_kernels" / "ops" / "gated_residual_add.py").open("a") as op:
        op.write(SLOWDOWN)
    command = [sys.executable, "-m", "benchmarks.compare", *TINY, "--only", "host_overhead", "--threshold", "100"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    slower = slower_lines(repository, done.stdout)
    assert slower
    assert all("gated_residual_add" in line or "DropBP" in line for line in slower)


def test_the_worktree_is_removed_after_a_failure(tmp_path, monkeypatch):
    calls = []

    def git(*arguments):
        calls.append(arguments)
        return subprocess.CompletedProcess(arguments, 0, "abc\n", "")

    monkeypatch.setattr(compare, "_git", git)
    monkeypatch.setattr(compare, "_run", lambda *arguments: (_ for _ in ()).throw(compare.CannotCompare("broke")))
    options = argparse.Namespace(base="HEAD", no_build=False, device="cpu")
    with pytest.raises(compare.CannotCompare, match="broke"):
        compare.compare(options)
    assert calls[-1][:2] == ("worktree", "remove")
