"""Run transformers' own tests with every model patched at drop rate 0, and compare with the unpatched run.

python -m benchmarks.transformers_suite FOLDER [llama qwen2 gpt2 gemma2] [--fused]

FOLDER is a source checkout of transformers with its tests/models, which its distribution on the package index lacks;
its tests run on its own sources. A row a model is appended to results/transformers_suite.csv. Exits with 1 when a test
fails patched that passes unpatched. Nothing is copied from FOLDER.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from .rows import RESULTS, ROOT, Machine, append_rows, machine

MODELS = ("llama", "qwen2", "gpt2", "gemma2")


@dataclass(frozen=True)
class SuiteRow(Machine):
    """The tests of one model. results/README.md says what each column means."""

    transformers: str
    model: str
    way: str
    unpatched_passed: int
    unpatched_failed: int
    unpatched_skipped: int
    patched_passed: int
    patched_failed: int
    patched_skipped: int
    fail_only_patched: str


def run_tests(folder: Path, model: str, way: str | None) -> dict[str, str]:
    """Outcome (passed, failed, skipped) of every test of this model, patched in this way or (None) not."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        plugin = ["-p", "benchmarks.transformers_patch"] if way else []
        test_file = f"tests/models/{model}/test_modeling_{model}.py"
        options = ["-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
        command = [sys.executable, "-m", "pytest", test_file, *plugin, *options]
        paths = os.pathsep.join(map(str, (ROOT, folder / "src", folder, *filter(None, [os.getenv("PYTHONPATH")]))))
        environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "DROPBP_SUITE_WAY": way or ""}
        subprocess.run(command, cwd=folder, env=environment, check=False)
        if not report.exists():
            raise SystemExit(f"pytest wrote no report: {' '.join(command)} in {folder}")
        outcomes: dict[str, str] = {}
        for case in ElementTree.parse(report).iter("testcase"):
            name = f"{case.get('classname')}::{case.get('name')}"
            outcomes[name] = "failed" if outcomes.get(name) == "failed" else _outcome(case)  # a subtest has a case too
        return outcomes


def compare(plain: dict[str, str], patched: dict[str, str]) -> list[str]:
    """The tests that fail, or are no longer there, patched only."""
    return sorted(
        name for name, outcome in plain.items() if outcome != "failed" and patched.get(name) in ("failed", None)
    )


def _outcome(case: ElementTree.Element) -> str:
    if case.find("failure") is not None or case.find("error") is not None:
        return "failed"
    return "skipped" if case.find("skipped") is not None else "passed"


def _version(folder: Path) -> str:
    lines = (folder / "src/transformers/__init__.py").read_text().splitlines()
    return next(line.split('"')[1] for line in lines if line.startswith("__version__"))


def main(arguments: list[str] | None = None, results: Path = RESULTS) -> int:
    """Run both ways for each model, append its row and print what differs."""
    parser = argparse.ArgumentParser("python -m benchmarks.transformers_suite", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="source checkout of transformers, with tests/models")
    parser.add_argument("models", nargs="*", default=list(MODELS), help=f"default: {' '.join(MODELS)}")
    parser.add_argument("--fused", action="store_true", help="patch with fused norms too")
    options = parser.parse_args(arguments)
    folder, way = options.folder.resolve(), "fused" if options.fused else "generic"
    for model in options.models:
        if not (folder / f"tests/models/{model}/test_modeling_{model}.py").exists():
            parser.error(f"folder: expected a checkout of transformers with tests/models/{model}, got {folder}")
    has_broken = False
    for model in options.models:
        plain, patched = run_tests(folder, model, None), run_tests(folder, model, way)
        if "passed" not in plain.values():
            raise SystemExit(f"{model}: expected tests that pass unpatched, got none; see pytest's output above")
        broken = compare(plain, patched)
        counts = {
            f"{state}_{kind}": list(outcomes.values()).count(kind)
            for state, outcomes in (("unpatched", plain), ("patched", patched))
            for kind in ("passed", "failed", "skipped")
        }
        print(
            model,
            way,
            counts,
            *(["fail only when patched:", *broken] if broken else ["nothing fails only when patched"]),
        )
        row = SuiteRow(
            **asdict(machine(torch.device("cpu"))),
            transformers=_version(folder),
            model=model,
            way=way,
            **counts,
            fail_only_patched=" ".join(broken),
        )
        append_rows(results / "transformers_suite.csv", [row])
        has_broken |= bool(broken)
    return int(has_broken)


if __name__ == "__main__":
    sys.exit(main())
