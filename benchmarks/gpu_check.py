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

This file, gpu_stages.py (how a stage runs) and gpu_targets.py (what is demanded) import nothing but the standard
library, so that they can report that the package does not import.
"""

import argparse
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
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if not __package__:  # run by its path
    sys.path.insert(0, str(ROOT))

from benchmarks.gpu_stages import PARTS, PICTURES_S, Check, Stage  # noqa: E402
from benchmarks.gpu_targets import judged  # noqa: E402

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
DRY_TESTS = ("tests/test_gated_residual_rms_norm.py",)  # those of all ops take as long to collect as a suite to run
# A suite for each op and host overhead; the others run whole models.
BOUNDARY_SUITES = ("gated_residual_rms_norm", "gated_residual_layer_norm", "gated_residual_add")
MODEL_SUITES = ("sensitivity",)  # and those whose names end in step
OP_SUITES = tuple(
    path.stem.removeprefix("bench_")
    for path in sorted((ROOT / "benchmarks").glob("bench_*.py"))
    if not path.stem.endswith(("step", *MODEL_SUITES, *BOUNDARY_SUITES))
)
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
        targets = judged(check.out, check.parts, counts, check.is_dry)
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
        tests, codes = (DRY_TESTS, (0, 5)) if check.is_dry else (GPU_TESTS, (0,))
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
        some = [*DRY_TESTS, "-k", "cpp and empty"] if check.is_dry else [*OP_TESTS, "-k", "cpp"]
        check.stage("CPU tests of the ops", [*at_once, "-m", "not gpu", *some], 60)
    if {"benchmarks", "step"} & set(check.parts):
        check.stage("pictures", [python, "-m", "benchmarks.plots", "--rows", str(check.out), *out], PICTURES_S)
    counts = check.tree / "boundary.json"
    return json.loads(counts.read_text()) if counts.exists() else []


def _machine(check: Check, name: str) -> dict[str, Any]:
    """Versions, GPU and which backend serves which op; what was known before when the import fails."""
    output = check.stage(name, [sys.executable, "-c", MACHINE_CODE], 60)
    lines = [line for line in output.splitlines() if line.startswith("{")]
    if not check.stages[-1].ok or not lines:
        return check.machine
    machine = json.loads(lines[-1])
    check.note(f"{machine['device']}, torch {machine['torch']}, Python {machine['python']}")
    return machine


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
