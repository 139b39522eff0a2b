"""Build, test and measure the package on a CUDA machine with one command, in under 8 minutes, without the internet.

    python benchmarks/gpu_check.py --out DIR                 build here, then test and measure
    python benchmarks/gpu_check.py --out DIR --no-build      use the _C and _C_cuda that lie in the tree, unrebuilt
    python benchmarks/gpu_check.py --out DIR --only tests    some of it; with as much time as they want
    python benchmarks/gpu_check.py --out DIR --dry-run       on a CPU: every stage, at tiny sizes

Where there is time for three such commands, build in place first (python setup.py build_ext --inplace); then, each with
--no-build and an --out of its own:  --only boundary tests sanitizer  |  --only benchmarks  |  --only step

Works in a copy of the tree, with the interpreter that runs this file and what is installed there. Every stage has its
own time limit; a stage that fails does not stop the next ones. DIR receives five small files, however many suites there
are: summary.json (stages, targets, machine), log.txt (what the stages printed), rows.zip (the CSV files) and two
pictures. Exit code 0: every stage passed and every target was met.

This file imports nothing but the standard library, so that it can report that the package does not import.
"""

import argparse
import csv
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
COPIED = (
    "dropbp_kernels",
    "csrc",
    "tests",
    "benchmarks",
    "examples",
    "setup.py",
    "pyproject.toml",
    "README.md",
    "LICENSE",
)
NOT_COPIED = shutil.ignore_patterns("__pycache__", "*.csv", "*.png", ".*")
BUDGET_S = 465.0  # of the 8 minutes; the rest is for starting and writing
# In the order of what a first run wants to know.
PARTS = ("build", "boundary", "tests", "benchmarks", "step", "sanitizer", "cpu")
PICTURES_S = 25.0  # kept for them, whatever the stages before took
OP_TESTS = tuple(
    f"tests/test_{path.stem}.py"
    for path in sorted((ROOT / "dropbp_kernels" / "ops").glob("*.py"))
    if (ROOT / "tests" / f"test_{path.stem}.py").exists()
)
# Every file with a test that is marked gpu, or gets its mark from the fixtures of tests/conftest.py.
GPU_TESTS = tuple(
    f"tests/{path.name}"
    for path in sorted((ROOT / "tests").glob("test_*.py"))
    if re.search(r"mark\.gpu|def test_\w+\([^)]*\b(backend|device)\b", path.read_text())
)
# A suite for each op and host overhead; the others run whole models.
BOUNDARY_SUITES = ("gated_residual_rms_norm", "gated_residual_layer_norm", "gated_residual_add")
MODEL_SUITES = ("sensitivity",)  # and those whose names end in step
OP_SUITES = tuple(
    path.stem.removeprefix("bench_")
    for path in sorted((ROOT / "benchmarks").glob("bench_*.py"))
    if not path.stem.endswith(("step", *MODEL_SUITES, *BOUNDARY_SUITES))
)
# Share of the copy bandwidth measured in the same run, bfloat16, width of at least 4096 and 8 M elements.
TARGET_FORWARD, TARGET_BACKWARD = 0.88, 0.70
MACHINE_CODE = """
import json, platform, sys, torch, dropbp_kernels
from dropbp_kernels import _backend
from dropbp_kernels.ops.schema import SCHEMAS
gpu = torch.cuda.is_available()
devices = ["cpu", "cuda"] if gpu else ["cpu"]
print(json.dumps({
    "python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda,
    "device": torch.cuda.get_device_name() if gpu else platform.processor() or platform.machine(),
    "capability": ".".join(map(str, torch.cuda.get_device_capability())) if gpu else "",
    "version": dropbp_kernels.__version__,
    "serving": {stem: {device: _backend.serving(stem, device) for device in devices} for stem in SCHEMAS},
    "missing": {name: _backend.why_not(name, "gated_residual_add") for name in _backend.BACKENDS},
}))
"""


@dataclass
class Stage:
    """One subprocess and how it went."""

    name: str
    ok: bool
    seconds: float
    note: str = ""


@dataclass
class Target:
    """A number and the bound it must keep; ok is None where it could not be judged."""

    name: str
    value: float | None
    bound: float
    ok: bool | None


@dataclass
class Check:
    """The state of one run."""

    out: Path
    tree: Path
    is_dry: bool
    deadline: float
    commit: str
    parts: tuple[str, ...] = PARTS
    stages: list[Stage] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> str:
        return "cpu" if self.is_dry else "cuda"

    def stage(self, name: str, command: list[str], limit_s: float, *, codes: tuple[int, ...] = (0,)) -> str:
        """Run one stage in the copied tree, within its limit and the time left; return what it printed."""
        limit_s = min(limit_s, self.left_s() - (0 if name == "pictures" else PICTURES_S))
        if limit_s < 2:
            self.stages.append(Stage(name, False, 0.0, "no time left"))
            return ""
        environment = {**os.environ, "PYTHONPATH": str(self.tree), "PYTHONUNBUFFERED": "1"}
        environment["DROPBP_KERNELS_CUDA"] = "0" if self.is_dry else "1"
        if capability := self.machine.get("capability"):
            environment["TORCH_CUDA_ARCH_LIST"] = capability  # code for this GPU alone: a shorter build
        started = time.monotonic()
        process = subprocess.Popen(
            command,
            cwd=self.tree,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=limit_s)
            ok, note = process.returncode in codes, "" if process.returncode in codes else f"exit {process.returncode}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)  # its children too, compilers and workers
            output, _ = process.communicate()
            ok, note = False, f"stopped after {limit_s:.0f} s"
        stage = Stage(name, ok, round(time.monotonic() - started, 1), note or _pytest_result(output))
        self.stages.append(stage)
        with (self.out / "log.txt").open("a") as log:
            log.write(f"\n===== {name}: {' '.join(command)}\n{output}\n")
        print(f"{'ok    ' if ok else 'FAILED'} {stage.seconds:6.1f} s  {name}  {stage.note}", flush=True)
        if not ok:
            print("\n".join(f"       | {line}" for line in output.strip().splitlines()[-12:]), flush=True)
        return output

    def left_s(self) -> float:
        return self.deadline - time.monotonic()

    def note(self, text: str) -> None:
        self.stages[-1].note = "; ".join(filter(None, (self.stages[-1].note, text)))


def main(arguments: list[str] | None = None) -> int:
    """Run every stage; 0 when all passed and all targets that could be judged were met."""
    options = _parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "log.txt").write_text("")
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="dropbp-gpu-check-") as folder:
        tree = Path(folder)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, tree / name, ignore=NOT_COPIED)
            elif source.exists():
                shutil.copy(source, tree)
        commit = options.commit or _commit()
        deadline, parts = started + options.budget_s, tuple(options.only)
        check = Check(options.out.resolve(), tree, options.dry_run, deadline, commit, parts)
        counts = _run_stages(check, options.no_build)
        targets = _targets(check, counts)
        _pack_rows(check.out)
        libraries = _libraries(tree)

    print()
    for target in targets:
        verdict = {True: "met", False: "MISSED", None: "not judged"}[target.ok]
        value = "-" if target.value is None else f"{target.value:.3g}"
        print(f"{verdict:<11} {target.name}: {value} (target {target.bound:g})")
    # On a GPU a target that could not be judged counts as missed.
    ok = all(stage.ok for stage in check.stages) and all(
        target.ok or (options.dry_run and target.ok is None) for target in targets
    )
    summary = {
        "ok": ok,
        "dry_run": options.dry_run,
        "seconds": round(time.monotonic() - started, 1),
        "commit": check.commit,
        "machine": check.machine,
        "libraries": libraries,
        "stages": [asdict(stage) for stage in check.stages],
        "targets": [asdict(target) for target in targets],
        "boundary": counts,
    }
    (options.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(f"\n{'PASSED' if ok else 'FAILED'} in {summary['seconds']} s; {options.out / 'summary.json'}")
    return 0 if ok else 1


def _run_stages(check: Check, no_build: bool) -> list[dict[str, Any]]:
    """Run all stages; return the counts of the boundary."""
    python, device = sys.executable, ["--device", check.device]
    bench = [python, "-m", "benchmarks.run", *device, "--commit", check.commit]
    carried = _libraries(check.tree)
    check.machine = _machine(check, "import, with the libraries in the tree" if carried else "import, pure Python")
    if carried:
        check.note(", ".join(carried))
        # Every result is compared with the reference before it is timed.
        op = ["--scale", "tiny", "--only", "gated_residual_add", "--out", "carried_rows"]
        check.stage("libraries in the tree compute right", [*bench, *op], 60)
    if not no_build and "build" in check.parts:
        check.stage("build", [python, "setup.py", "build_ext", "--inplace"], 120)
        check.machine = _machine(check, "import, with the libraries built here")
    if not check.is_dry:
        missing = {name: check.machine.get("missing", {}).get(name, "unknown") for name in ("cpp", "cuda", "triton")}
        reasons = "; ".join(f"{name}: {reason}" for name, reason in missing.items() if reason)
        check.stages.append(Stage("cpp, cuda and triton serve", not reasons, 0.0, reasons))

    if "boundary" in check.parts:
        check.stage("boundary", [python, "-m", "benchmarks.boundary", *device, "--json", "boundary.json"], 60)
    if check.is_dry:
        bench += ["--scale", "tiny"]
    out = ["--out", str(check.out)]

    pytest = [python, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-o", "addopts=", "-W", "default"]
    at_once = pytest
    if importlib.util.find_spec("xdist") and not check.is_dry:
        at_once = [*pytest, "-n", str(min(os.cpu_count() or 1, 16))]  # Triton compiles a kernel for each width
    if "tests" in check.parts:
        # On a CPU no test of the ops is marked gpu: pytest's exit code 5.
        tests, codes = (OP_TESTS, (0, 5)) if check.is_dry else (GPU_TESTS, (0,))
        limit_s = 130 if len(check.parts) > 3 else 300
        check.stage("GPU tests", [*at_once, "-m", "gpu", *tests, "-k", "not 2_31"], limit_s, codes=codes)
        if not check.is_dry:  # one after the other: each wants a third of the memory
            check.stage("GPU tests beyond 2^31", [*pytest, "-m", "gpu", *tests, "-k", "2_31"], 60)
    if "benchmarks" in check.parts:
        # What is left, but for what the parts after it may take.
        later = {"step": 100, "sanitizer": 40, "cpu": 25}
        all_s = check.left_s() - PICTURES_S - sum(later[part] for part in later if part in check.parts)
        for name, suites, share in (("the boundary", BOUNDARY_SUITES, 0.6), ("other ops", OP_SUITES, 0.4)):
            seconds = max(all_s * share, 20)
            command = [*bench, *out, "--only", *suites, "--budget-s", f"{0.85 * seconds:.0f}"]
            check.stage(f"microbenchmarks of {name}", command, seconds)
    if "step" in check.parts:
        scale = [] if check.is_dry else ["--quick"]
        check.stage("training step", [*bench, *scale, *out, "--only", "step"], 200)
    if "sanitizer" in check.parts:
        # Exit code 1 on a CPU, with a sentence: there is no GPU.
        quick = [python, "tests/sanitize.py", "--only", "gpu", "--quick"]
        check.stage("compute-sanitizer memcheck", quick, 90, codes=(1,) if check.is_dry else (0,))
    if "cpu" in check.parts:
        few = ["-k", "cpp and empty"] if check.is_dry else ["-k", "cpp"]
        check.stage("CPU tests of the ops", [*at_once, "-m", "not gpu", *OP_TESTS, *few], 60)
    if {"benchmarks", "step"} & set(check.parts):
        check.stage("pictures", [python, "-m", "benchmarks.plots", "--rows", str(check.out), *out], PICTURES_S)
    counts = check.tree / "boundary.json"
    return json.loads(counts.read_text()) if counts.exists() else []


def _pytest_result(output: str) -> str:
    """Pytest's last line, such as "12 passed, 3 skipped in 4.56s"; "" for any other output."""
    lines = output.strip().splitlines()
    return lines[-1].strip("= ") if lines and re.search(r"\d (passed|failed|deselected|skipped)", lines[-1]) else ""


def _machine(check: Check, name: str) -> dict[str, Any]:
    """Versions, GPU and which backend serves which op; what was known before when the import fails."""
    output = check.stage(name, [sys.executable, "-c", MACHINE_CODE], 60)
    lines = [line for line in output.splitlines() if line.startswith("{")]
    if not check.stages[-1].ok or not lines:
        return check.machine
    machine = json.loads(lines[-1])
    check.note(f"{machine['device']}, torch {machine['torch']}, Python {machine['python']}")
    return machine


def _targets(check: Check, counts: list[dict[str, Any]]) -> list[Target]:
    """The targets, judged from the rows and the counts of this run."""
    costs = [
        c["saved_bytes"] + c["backward_kernels"] + c["backward_allocated_bytes"] for c in counts if c["must_be_free"]
    ]
    worst = max(costs, default=None)
    name = "dropped boundary: kernels + bytes saved + bytes allocated in backward"
    targets = []
    if "boundary" in check.parts:
        targets.append(Target(name, worst, 0, None if worst is None else worst == 0))
    if "benchmarks" in check.parts:
        targets += _bandwidths(check)
    if "step" in check.parts:
        targets += _steps(check)
    return targets


def _bandwidths(check: Check) -> list[Target]:
    norms = _rows(check.out / "gated_residual_rms_norm.csv")
    layer_norms = _rows(check.out / "gated_residual_layer_norm.csv")
    adds = _rows(check.out / "gated_residual_add.csv")
    return [
        _bandwidth("fused forward", norms, "fwd", "weight frozen", TARGET_FORWARD),
        _bandwidth("fused backward, weight frozen", norms, "bwd", "weight frozen", TARGET_BACKWARD),
        _bandwidth("fused backward, weight trained", norms, "bwd", "weight trained", TARGET_BACKWARD),
        _bandwidth("fused LayerNorm forward", layer_norms, "fwd", "weight frozen", TARGET_FORWARD),
        _bandwidth("fused LayerNorm backward, weight frozen", layer_norms, "bwd", "weight frozen", TARGET_BACKWARD),
        _bandwidth("add", adds, "fwd", "sum", TARGET_FORWARD),
    ]


def _steps(check: Check) -> list[Target]:
    targets = []
    steps = [row for row in _rows(check.out / "step.csv") if row["method"] == "ours"]
    for rate in ("0.5", "0.75", "0.875"):
        row = next((row for row in reversed(steps) if row["drop_rate"] == rate), None)
        over = None if row is None else float(row["step_over_ideal"])
        ok = None if over is None or check.is_dry or rate != "0.75" else over <= 1.05
        if rate == "0.75":
            targets.append(Target("step at 0.75 over forward + 0.25 backward", over, 1.05, ok))
        peak = None if row is None else int(row["peak_live_bytes"]) / int(row["ideal_peak_bytes"])
        ok = None if peak is None or check.is_dry else peak <= 1
        targets.append(Target(f"peak live bytes at {rate} over the ideal", peak, 1.0, ok))
    return targets


def _bandwidth(what: str, rows: list[dict[str, str]], direction: str, case: str, bound: float) -> Target:
    """The smallest share of copy bandwidth among this package's rows that the target speaks of."""
    shares = [
        float(row["copy_fraction"])
        for row in rows
        if row["backend"] in ("cuda", "triton")
        and (row["direction"], row["case"], row["dtype"]) == (direction, case, "bfloat16")
        and int(row["width"]) >= 4096
        and int(row["rows"]) * int(row["width"]) >= 1 << 23
    ]
    worst = min(shares, default=None)
    return Target(f"{what}: share of copy bandwidth", worst, bound, None if worst is None else worst >= bound)


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _pack_rows(out: Path) -> None:
    """All CSV files into rows.zip: machines that hand back only a few files exist."""
    with zipfile.ZipFile(out / "rows.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(out.glob("*.csv")):
            archive.write(path, path.name)
            path.unlink()


def _libraries(tree: Path) -> dict[str, str]:
    """SHA-256 of each compiled library in the tree: the proof of which files ran."""
    found = sorted((tree / "dropbp_kernels").glob("_*.so"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def _commit() -> str:
    try:
        command = ["git", "rev-parse", "--short=9", "HEAD"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results, five files")
    parser.add_argument("--no-build", action="store_true", help="use the libraries that lie in the tree")
    parser.add_argument(
        "--dry-run", action="store_true", help="on a CPU, at tiny sizes; targets of a GPU are not judged"
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts of it; default: all")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help=f"time for all stages; default {BUDGET_S:g}")
    parser.add_argument("--commit", default="", help="the commit that rows name, for a copy without git")
    options = parser.parse_args(arguments)
    if options.out.exists() and not options.out.is_dir():
        parser.error(f"--out: expected a folder, got the file {options.out}")
    return options


if __name__ == "__main__":
    sys.exit(main())
