"""Run the kernels under sanitizers: python tests/sanitize.py (make sanitize).

CPU  The C++ libraries are built with the address and the undefined-behaviour sanitizer (GCC), and the tests of every op
     run on them. Python is not built so: the run-time of the sanitizers is loaded before it, and watches PyTorch's
     memory too, so that an element before or behind a tensor is found. Leaks are not looked for: Python keeps things.
GPU  compute-sanitizer's memcheck, racecheck and initcheck over the CUDA and Triton kernels, a few tests of every op.

Exit code 0: nothing found in what could run; a sentence says what could not, and with --only it is an error.
"""

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("dropbp_kernels", "csrc", "tests", "setup.py", "pyproject.toml", "README.md", "LICENSE")
CPU_SANITIZERS = "address,undefined"
# A call for every access in place of code for it: the norms compile in two thirds of the time, and see the same.
ACCESSES_BY_CALL = ("--param", "asan-instrumentation-with-call-threshold=0")
# Loads and stores are compiled once for their types, not into every kernel: in a third of the time, seen the same.
SHARED_CODE = "-DDROPBP_INLINE=inline"
PROGRAM_FLAGS = (f"-fsanitize={CPU_SANITIZERS}", "-fno-sanitize-recover=all", *ACCESSES_BY_CALL)
GPU_TOOLS = ("memcheck", "racecheck", "initcheck")
# What a sanitizer learns nothing from: these run no kernel of ours, or run it a hundred times.
LEFT_OUT = "not opcheck and not compile and not gradcheck and not any_shape and not 2_31"


class CannotRun(Exception):
    """Why a sanitizer cannot run on this machine, in a sentence."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run the kernels under sanitizers.")
    parser.add_argument("--only", choices=("cpu", "gpu"), help="one of the two; not being able to run is an error then")
    parser.add_argument("--quick", action="store_true", help="CPU: one instruction set. GPU: memcheck alone")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "sanitize", help="where to build")
    options = parser.parse_args(arguments)
    runs = {"cpu": sanitize_cpu, "gpu": sanitize_gpu}
    is_good = True
    for name in [options.only] if options.only else runs:
        try:
            found = runs[name](options.folder.resolve(), options.quick)
        except CannotRun as reason:
            print(f"sanitize {name}: {reason}", flush=True)
            is_good = is_good and options.only is None
            continue
        print(f"sanitize {name}: {'FINDINGS' if found else 'nothing found'}", flush=True)
        is_good = is_good and not found
    return 0 if is_good else 1


def op_tests() -> list[str]:
    """The test files of all ops: those of each, and those of what several have in common."""
    stems = sorted(path.stem for path in (ROOT / "dropbp_kernels" / "ops").glob("*.py"))
    stems += ["op_properties", "boundary_norms", "permuted_norm_stream"]
    return [f"tests/test_{stem}.py" for stem in stems if (ROOT / "tests" / f"test_{stem}.py").exists()]


# ---- CPU


def sanitize_cpu(folder: Path, is_quick: bool) -> bool:
    """Build, test; whether anything was found. Reports are printed."""
    compiler, preload = gcc()
    build_cpu(folder, compiler, is_quick)
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts="]
    chosen = [*op_tests(), "tests/test_allocation.py"]
    command = [*pytest, *chosen, "-k", f"(cpp or allocation) and {LEFT_OUT}"]
    return run_watched(command, folder, preload, {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "2"})


def gcc() -> tuple[str, list[str]]:
    """The compiler, and the libraries to load before Python."""
    compiler = next((name for name in ("g++", "c++") if shutil.which(name)), None)
    if sys.platform != "linux" or compiler is None:
        raise CannotRun("the sanitizers need Linux and GCC, and there is no g++ here")
    # libstdc++ too: the sanitizer looks for its __cxa_throw when it starts, before Python has loaded it.
    names = ("libasan.so", "libstdc++.so")
    found = [subprocess.run([compiler, f"-print-file-name={n}"], capture_output=True, text=True).stdout for n in names]
    paths = [text.strip() for text in found]
    if not all(Path(path).is_absolute() and Path(path).exists() for path in paths):
        raise CannotRun(f"{compiler} has no address sanitizer here (libasan.so)")
    return compiler, paths


def build_cpu(folder: Path, compiler: str, is_quick: bool) -> None:
    """The package with sanitized libraries, in `folder`; a second build compiles what has changed."""
    for name in COPIED:
        source, target = ROOT / name, folder / name
        if source.is_dir():
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        else:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
    flags = f"-fsanitize={CPU_SANITIZERS} -fno-sanitize-recover=undefined"
    # Unoptimised code compiles in half the time, and tests of small tensors hardly notice.
    quick = " ".join(("-O0", "-DDROPBP_X86=0", SHARED_CODE, *ACCESSES_BY_CALL))
    environment = {
        **os.environ,
        "CXX": f"{compiler} {flags}",
        "CXXFLAGS": "-g1 -fno-omit-frame-pointer " + (quick if is_quick else "-O1"),
        "DROPBP_KERNELS_CUDA": "0",
    }
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the sanitized build failed:\n{done.stdout}{done.stderr}")


def run_watched(command: Sequence[str], folder: Path, preload: Sequence[str], environment: dict[str, str]) -> bool:
    """Run `command` with the sanitizers' run-time loaded; whether it failed or anything was reported."""
    reports = folder / "reports"
    shutil.rmtree(reports, ignore_errors=True)
    reports.mkdir(parents=True)
    log = f"log_path={reports / 'report'}"  # pytest would swallow what goes to stderr
    done = subprocess.run(
        command,
        cwd=folder,
        env={
            **os.environ,
            "LD_PRELOAD": ":".join(preload),
            "ASAN_OPTIONS": f"detect_leaks=0:{log}",
            "UBSAN_OPTIONS": f"print_stacktrace=1:{log}",
            **environment,
        },
        capture_output=True,
        text=True,
    )
    found = sorted(reports.iterdir())
    for report in found:
        print(report.read_text(errors="replace")[:8000])
    last = (done.stdout.strip().splitlines() or ["no output"])[-1]
    print(done.stdout[-8000:] + done.stderr[-4000:] if done.returncode and not found else last, flush=True)
    return bool(found) or done.returncode != 0


# ---- GPU


def sanitize_gpu(folder: Path, is_quick: bool) -> bool:
    """Every tool over a few tests of every op; whether anything was found."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=str(Path(home, "bin")))
    if importlib.util.find_spec("torch") is None:
        raise CannotRun("torch is not installed")
    import torch

    if not torch.cuda.is_available():
        raise CannotRun("no GPU here, so compute-sanitizer did not run over the CUDA and Triton kernels")
    if tool is None:
        raise CannotRun(f"compute-sanitizer is not on PATH, nor in {home}/bin; it comes with the CUDA toolkit")
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=", "-m", "gpu"]
    # Without PyTorch's cache every tensor is an allocation of its own, whose ends are watched.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    found = False
    for name in GPU_TOOLS[:1] if is_quick else GPU_TOOLS:
        command = [tool, f"--tool={name}", "--error-exitcode=1", *pytest, *op_tests()]
        few = "cuda and (empty or many_rows)" if is_quick else f"(cuda or triton) and {LEFT_OUT}"
        done = subprocess.run([*command, "-k", few], cwd=ROOT, env=environment)  # prints as it goes: it may be stopped
        print(f"----- {name}: {'ok' if done.returncode == 0 else 'FINDINGS'}", flush=True)
        found = found or done.returncode != 0
    return found


if __name__ == "__main__":
    sys.exit(main())
