"""benchmarks/gpu_check.py: what it judges by hand, and the whole of it on a CPU."""

import functools
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import conftest
import cuda_errors
import pytest

from benchmarks import gpu_check, gpu_stages, gpu_targets, run

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_gpu_check_dry_run(tmp_path):
    command = [sys.executable, "benchmarks/gpu_check.py", "--out", str(tmp_path), "--dry-run", "--no-build"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["bandwidth.png", "log.txt", "rows.zip", "step.png", "summary.json"]
    packed = set(zipfile.ZipFile(tmp_path / "rows.zip").namelist())
    assert {"step.csv", "host_overhead.csv", *(f"gated_residual_{op}_norm.csv" for op in ("rms", "layer"))} <= packed
    assert all(path.stat().st_size < 1 << 20 for path in tmp_path.iterdir())
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["ok"]
    assert all(stage["ok"] for stage in summary["stages"])
    wanted = {
        "boundary",
        "microbenchmarks of the boundary",
        "microbenchmarks of other ops",
        "GPU tests",
        "training step",
    }
    assert wanted <= {stage["name"] for stage in summary["stages"]}
    assert summary["targets"][0]["value"] == 0  # the dropped boundary
    assert summary["machine"]["serving"]["gated_residual_add"].keys() == {"cpu"}


def test_gpu_check_measures_and_tests_every_op():
    from dropbp_kernels.ops.schema import SCHEMAS

    measured = {*gpu_check.OP_SUITES, *gpu_check.BOUNDARY_SUITES, *gpu_check.MODEL_SUITES}
    assert measured == {name for name in run.SUITES if not name.endswith("step")}
    assert {*gpu_check.TRITON_SUITES, *gpu_check.STEP_SUITES, "step"} <= set(run.SUITES)
    tests = {f"tests/test_{stem}.py" for stem in SCHEMAS}
    assert tests <= set(gpu_check.OP_TESTS)
    assert {*tests, "tests/test_on_gpu.py", "tests/test_op_properties.py"} <= set(gpu_check.GPU_TESTS)


def test_gpu_check_runs_without_any_package():
    command = [sys.executable, "-I", "-S", "benchmarks/gpu_check.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def check(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    return gpu_stages.Check(out, tmp_path, is_dry=False, deadline=time.monotonic() + 60, commit="")


def test_a_failing_stage_is_noted_and_the_next_one_runs(check, capsys):
    check.stage("fails", [sys.executable, "-c", "print('why'); raise SystemExit(3)"], 30)
    check.stage("hangs", [sys.executable, "-c", "import time; print('waiting', flush=True); time.sleep(60)"], 3)
    check.stage("works", [sys.executable, "-c", "print('12 passed in 1.0s')"], 30)
    assert [stage.ok for stage in check.stages] == [False, False, True]
    assert [stage.note for stage in check.stages] == ["exit 3", "stopped after 3 s", "12 passed in 1.0s"]
    log = (check.out / "log.txt").read_text()
    assert "why" in log
    assert "waiting" in log
    assert "FAILED" in capsys.readouterr().out
    check.deadline = time.monotonic() + gpu_stages.PICTURES_S  # kept for the pictures
    check.stage("pictures", ["true"], 30)
    assert check.stages[-1].ok
    check.stage("late", ["true"], 30)
    assert check.stages[-1].note == "no time left"
    stages = json.loads((check.out / "summary.json").read_text())["stages"]  # also where the check itself is stopped
    assert [stage["name"] for stage in stages] == ["fails", "hangs", "works", "pictures"]


def test_a_stage_that_is_stopped_says_what_it_knows(check, monkeypatch):
    code = "try:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('2 failed so far')"
    check.stage("tests", [sys.executable, "-c", f"import time\n{code}"], 3)
    assert "2 failed so far" in (check.out / "log.txt").read_text()
    monkeypatch.setattr(gpu_stages, "FAREWELLS", tuple((number, 2.0) for number, _ in gpu_stages.FAREWELLS))
    code = "signal.signal(signal.SIGINT, signal.SIG_IGN)\ndef kernel():\n    time.sleep(60)\nkernel()"
    output = check.stage("kernel", [sys.executable, "-c", f"import signal, time\n{code}"], 3)
    assert "in kernel" in output


def test_what_outlives_a_stage_holds_nothing_up(check):
    code = "import subprocess; subprocess.Popen(['sleep', '15'], start_new_session=True); print('done')"
    assert check.stage("leaves a child", [sys.executable, "-c", code], 30) == "done\n"
    assert check.stages[-1].seconds < 10


def test_the_log_of_a_stage_is_bounded(check):
    output = check.stage("talks", [sys.executable, "-c", "print('first'); print('x' * 4_000_000); print('last')"], 30)
    assert len(output) > 4_000_000
    check.stage("next", [sys.executable, "-c", "print('next')"], 30)
    log = (check.out / "log.txt").read_text()
    assert len(log) < 2 * gpu_stages.MAX_LOGGED_BYTES
    assert "\nfirst\n" in log
    assert log.index("\nlast\n") < log.index("\nnext\n")


def test_packages_of_the_caller_are_found(check, monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "carried"))
    (tmp_path / "carried").mkdir()
    (tmp_path / "carried" / "a_peer.py").write_text("print('found')")
    assert check.stage("import", [sys.executable, "-c", "import a_peer"], 30) == "found\n"


SUITES = """
import os, sys
for suite in sys.argv[sys.argv.index("--only") + 1 : sys.argv.index("--budget-s")]:
    print(f"\\n{suite} on cuda, full [0 s]", flush=True)
    if suite == "second":
        os._exit(3)  # an error of CUDA, which no suite behind it in this process would survive
    print(f"rows of {suite}")
"""


def test_a_suite_that_ends_its_process_costs_no_other(check):
    command = [sys.executable, "-c", SUITES]
    gpu_check._bench(check, "ops", command, ("first", "second", "third", "fourth"), 30)
    assert [(stage.name, stage.ok) for stage in check.stages] == [("ops", False), ("ops, those behind second", True)]
    log = (check.out / "log.txt").read_text()
    assert all(f"\nrows of {suite}\n" in log for suite in ("first", "third", "fourth"))
    gpu_check._bench(check, "broken", [sys.executable, "-c", "raise SystemExit(1)"], ("first", "second"), 30)
    assert [stage.name for stage in check.stages[2:]] == ["broken"]


def test_a_dry_run_of_some_parts_is_tiny_too(check, monkeypatch):
    def stage(self, name, command, *args, **options):
        self.stages.append(gpu_stages.Stage(name, True, 0.0))
        commands.append(command)
        return ""

    commands = []
    monkeypatch.setattr(gpu_stages.Check, "stage", stage)
    check.is_dry, check.deadline = True, time.monotonic() + 400
    for check.parts in (("benchmarks",), ("step",)):
        gpu_check._run_stages(check, no_build=True)
    suites = [command for command in commands if "benchmarks.run" in command]
    assert len(suites) == 5
    assert all("tiny" in command and "--sizes" not in command for command in suites)
    (finetune,) = (command for command in commands if "finetune" in command)
    assert finetune[finetune.index("--steps") + 1] == "2"


def test_rows_and_what_a_finetuning_leaves_are_one_file(tmp_path):
    finetune = tmp_path / "tree" / "finetune"
    for folder in (tmp_path / "triton", tmp_path / "others", finetune / "adapter"):
        folder.mkdir(parents=True)
    for path in ("a.csv", "triton/a.csv", "others/a.csv", "tree/finetune/report.json"):
        (tmp_path / path).write_text(path)
    gpu_check._pack_rows(tmp_path, finetune)
    with zipfile.ZipFile(tmp_path / "rows.zip") as archive:
        assert archive.namelist() == ["a.csv", "triton/a.csv", "finetune/report.json"]
        assert archive.read("triton/a.csv") == b"triton/a.csv"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["others", "rows.zip", "tree"]
    assert (tmp_path / "others" / "a.csv").exists()  # is none of ours


TORCH = """
class cuda:
    is_spoilt = False

    def is_initialized():
        return True

    def synchronize():
        if cuda.is_spoilt:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
"""
SPOILT = """
from torch import cuda

def test_first(): pass
def test_second():
    cuda.is_spoilt = True
    raise RuntimeError("the first to see it")
def test_third(): assert not cuda.is_spoilt
def test_fourth(): assert not cuda.is_spoilt
"""


def test_a_worker_with_a_cuda_error_is_replaced(tmp_path):
    """With a stand-in for torch, which takes seconds to import in each of the three processes."""
    pytest.importorskip("xdist")
    assert conftest.pytest_runtest_logfinish is cuda_errors.pytest_runtest_logfinish
    (tmp_path / "torch.py").write_text(TORCH)
    (tmp_path / "test_spoilt.py").write_text(SPOILT)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"PYTHONPATH": str(ROOT / "tests"), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    plugins = ["-p", "xdist", "-p", "cuda_errors", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-n", "1", *plugins, "test_spoilt.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "the first to see it" in done.stdout
    assert "test_third" not in done.stdout.partition("short test summary")[2]
    assert "3 passed" in done.stdout, done.stdout


def test_targets_are_judged_by_the_worst_row(tmp_path):
    columns = "backend,direction,case,dtype,rows,width,copy_fraction"
    lines = [
        "triton,fwd,weight frozen,bfloat16,16384,4096,0.9",
        "triton,fwd,weight frozen,bfloat16,8192,8192,0.8",
        "triton,fwd,weight frozen,bfloat16,65536,1024,0.1",  # too narrow to count
        "eager,fwd,weight frozen,bfloat16,8192,8192,0.2",
        "triton,bwd,weight frozen,bfloat16,8192,8192,0.7",
    ]
    (tmp_path / "gated_residual_rms_norm.csv").write_text("\n".join([columns, *lines]) + "\n")
    judged = functools.partial(gpu_targets.judged, tmp_path, gpu_stages.PARTS, is_dry=False)
    free = {
        "forward_kernels": 1,
        "saved_bytes": 0,
        "backward_kernels": 0,
        "backward_allocated_bytes": 0,
        "must_be_free": True,
    }
    verdicts = {target.name: target for target in judged([free])}
    forward = verdicts["fused forward: share of copy bandwidth"]
    assert (forward.value, forward.ok) == (0.8, False)
    assert verdicts["fused backward, weight frozen: share of copy bandwidth"].ok is True
    assert verdicts["add: share of copy bandwidth"].ok is None  # not measured: counts as missed on a GPU
    (boundary_target,) = (target for name, target in verdicts.items() if name.startswith("dropped boundary"))
    assert boundary_target.ok is True
    busy = {**free, "backward_kernels": 1}
    assert judged([free, busy])[0].ok is False
    assert judged([free, {**free, "forward_kernels": 0}])[0].ok is None  # a profiler that sees nothing proves nothing
    asked = gpu_targets.judged(tmp_path, ("benchmarks",), [], is_dry=False)
    assert not any(target.name.startswith("dropped") for target in asked)  # what was not asked for is not missed
