"""Build, test and measure the package on a CUDA machine with one command, in under 8 minutes, without the internet.

    python benchmarks/gpu_check.py --out DIR                 build here, then test and measure
    python benchmarks/gpu_check.py --out DIR --no-build      use the _C and _C_cuda that lie in the tree, unrebuilt
    python benchmarks/gpu_check.py --out DIR --only tests    some of it; with as much time as they want
    python benchmarks/gpu_check.py --out DIR --dry-run       on a CPU: every stage, at tiny sizes

Where there is time for three such commands, build in place first (python setup.py build_ext --inplace); then, each with
--no-build and an --out of its own:  --only boundary tests sanitizer  |  --only benchmarks  |  --only step
Add --commit ID where the tree came without its git folder, or the rows name none.

Works in a copy of the tree, with the interpreter that runs this file and what is installed there. Every stage has its
own time limit; a stage that fails, hangs or spoils its CUDA context does not stop the next ones, nor a suite of
benchmarks or a test the others of its stage. DIR receives five small files, however many suites there are: summary.json
(stages, targets, machine), log.txt (what the stages printed), rows.zip (the CSV files, and what a fine-tuning leaves)
and two pictures. Exit code 0: every stage passed and every target was met.

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
from collections.abc import Mapping, Sequence
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
# What parts behind the tests are left at least, where all run in one command.
LATER_S = {"benchmarks": 120.0, "step": 100.0}
# No test takes as many seconds. One of forty random shapes in Triton compiles some 150 kernels, half a second each.
TEST_S, TRITON_TEST_S = 60, 200
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
# Ops that CUDA C++ serves where it is built and that run through autograd, measured in Triton once more; two sizes.
TRITON_SUITES = ("gated_residual_rms_norm", "gated_residual_layer_norm", "glu", "rope")
TRITON_SIZES = ("--sizes", "16384x4096", "8192x8192", "--dtypes", "bfloat16")
# Whole steps beside the one that has targets; first what says most.
STEP_SUITES = (
    *("patched_step", "target_step", "turn_step", "row_step", "checkpointed_step", "loss_step", "paca_step"),
    "group_step",
)
FINETUNE = "finetune"  # the folder of a fine-tuning by the command line
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
        try:
            targets = judged(check.out, check.parts, counts, check.is_dry)
        finally:  # a row that was cut off may not cost the others
            _pack_rows(check.out, tree / FINETUNE)
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
    bench += ["--out", str(check.out)]

    is_short = len(check.parts) > 3  # all in one command: what tells most in what time there is
    parallel = 0 if check.is_dry else min(os.cpu_count() or 1, 16)
    # On a CPU no test of the ops is marked gpu: pytest's exit code 5.
    tests, codes = (DRY_TESTS, (0, 5)) if check.is_dry else (GPU_TESTS, (0,))
    if "tests" in check.parts:
        spare_s = check.left_s() - PICTURES_S - sum(LATER_S[part] for part in LATER_S if part in check.parts)
        limit_s = min(max(spare_s, 30), 130) if is_short else 300
        command = [*_pytest(parallel), "-m", "gpu", *tests, "-k", "not triton and not 2_31"]
        check.stage("GPU tests", command, limit_s, codes=codes)
        if not check.is_dry:  # one after the other: each wants a third of the memory
            check.stage("GPU tests beyond 2^31", [*_pytest(1), "-m", "gpu", *tests, "-k", "2_31"], 60)
    if "benchmarks" in check.parts:
        all_s = check.left_s() - PICTURES_S - (LATER_S["step"] if "step" in check.parts else 0)
        shares = (0.6, 0.4) if is_short else (0.5, 0.3)
        _bench(check, "microbenchmarks of the boundary", bench, BOUNDARY_SUITES, max(all_s * shares[0], 20))
        _bench(check, "microbenchmarks of other ops", bench, OP_SUITES, max(all_s * shares[1], 20))
        if not is_short:
            # Apart from the rows of what serves, which a newer run of the same points would replace.
            triton, forced = ["--out", str(check.out / "triton")], {"DROPBP_KERNELS_BACKEND": "triton"}
            sizes = () if check.is_dry else TRITON_SIZES
            command, left_s = [*bench, *sizes, *triton], check.left_s() - PICTURES_S
            _bench(check, "microbenchmarks in Triton", command, TRITON_SUITES, left_s, environment=forced)
    if "step" in check.parts:
        scale = [] if check.is_dry else ["--quick"]
        check.stage("training step", [*bench, *scale, "--only", "step"], 200)
        if not is_short:
            few = ["--steps", "2", "--pretrain-steps", "2", "--seq-len", "32"] if check.is_dry else []
            command = [python, "-m", "dropbp_kernels.cli", "finetune", *device, "--output", FINETUNE, *few]
            check.stage("finetune", command, 120, environment={"DROPBP_KERNELS_CACHE": str(check.tree / "cache")})
            left_s = check.left_s() - PICTURES_S
            _bench(check, "other training steps", [*bench, *scale], STEP_SUITES, left_s, hang_s=120)
    if "sanitizer" in check.parts:
        # Exit code 1 on a CPU, with a sentence: there is no GPU.
        quick = [python, "tests/sanitize.py", "--only", "gpu", "--quick"]
        check.stage("compute-sanitizer memcheck", quick, 90, codes=(1,) if check.is_dry else (0,))
    if "cpu" in check.parts:
        some = [*DRY_TESTS, "-k", "cpp and empty"] if check.is_dry else [*OP_TESTS, "-k", "cpp"]
        check.stage("CPU tests of the ops", [*_pytest(parallel), "-m", "not gpu", *some], 60)
    if "tests" in check.parts and not check.is_dry:  # the last: Triton compiles for minutes
        command = [*_pytest(parallel, TRITON_TEST_S), "-m", "gpu", *tests, "-k", "triton and not 2_31"]
        check.stage("GPU tests of Triton's kernels", command, 300)
    if {"benchmarks", "step"} & set(check.parts):
        pictures = [python, "-m", "benchmarks.plots", "--rows", str(check.out), "--out", str(check.out)]
        check.stage("pictures", pictures, PICTURES_S)
    counts = check.tree / "boundary.json"
    return json.loads(counts.read_text()) if counts.exists() else []


def _pytest(num_workers: int, test_s: int = TEST_S) -> list[str]:
    """pytest, as far as its plugins are here with workers that are replaced when they end."""
    options = ["-q", "-rs", "--tb=short", "-p", "no:cacheprovider", "-o", "addopts=", "-W", "default"]
    options += ["--continue-on-collection-errors"]  # a package that is missing costs one file
    if importlib.util.find_spec("xdist"):
        options += ["-n", str(num_workers)]
    if importlib.util.find_spec("pytest_timeout"):  # a kernel that never ends costs its worker and not the stage
        options += [f"--timeout={test_s}", "--timeout-method=thread"]
    return [sys.executable, "-m", "pytest", *options]


def _bench(
    check: Check,
    name: str,
    command: list[str],
    suites: Sequence[str],
    seconds: float,
    *,
    hang_s: int = 60,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Suites in one process, which starts once; behind one that ended it, the others go on in another."""
    until, what = time.monotonic() + seconds, name
    while suites and (left_s := until - time.monotonic()) > 5:
        options = ["--only", *suites, "--budget-s", f"{0.85 * left_s:.0f}", "--hang-s", str(hang_s)]
        output = check.stage(what, [*command, *options], left_s, environment=environment)
        begun = [suite for suite in suites if re.search(rf"^{suite} on ", output, re.MULTILINE)]
        if check.stages[-1].ok or not begun:
            return
        suites = suites[len(begun) :]
        what = f"{name}, those behind {begun[-1]}"


def _machine(check: Check, name: str) -> dict[str, Any]:
    """Versions, GPU and which backend serves which op; what was known before when the import fails."""
    output = check.stage(name, [sys.executable, "-c", MACHINE_CODE], 60)
    lines = [line for line in output.splitlines() if line.startswith("{")]
    if not check.stages[-1].ok or not lines:
        return check.machine
    machine = json.loads(lines[-1])
    check.note(f"{machine['device']}, torch {machine['torch']}, Python {machine['python']}")
    return machine


def _pack_rows(out: Path, finetune: Path) -> None:
    """All CSV files, and those of a fine-tuning, into rows.zip: machines that hand back only a few files exist."""
    with zipfile.ZipFile(out / "rows.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in (*sorted(out.glob("*.csv")), *sorted(out.glob("triton/*.csv"))):
            archive.write(path, path.relative_to(out))
            path.unlink()
        for path in sorted(finetune.glob("*.*")):
            archive.write(path, f"{FINETUNE}/{path.name}")
    shutil.rmtree(out / "triton", ignore_errors=True)


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
