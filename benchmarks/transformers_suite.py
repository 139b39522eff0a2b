"""Run transformers' own tests with every model patched at drop rate 0, and compare with the unpatched run.

python -m benchmarks.transformers_suite FOLDER [llama qwen2 gpt2 gemma2]

FOLDER is a source checkout of the installed version of transformers, with its tests/models; its distribution on the
package index lacks those. Exits with 1 when a test fails patched that passes unpatched. Nothing is copied from FOLDER.
"""

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

MODELS = ("llama", "qwen2", "gpt2", "gemma2")
ROOT = Path(__file__).parent.parent


def run_tests(folder: Path, models: list[str], is_patched: bool) -> dict[str, str]:
    """Outcome (passed, failed, skipped) of every test of these models, patched or not."""
    files = [f"tests/models/{model}/test_modeling_{model}.py" for model in models]
    plugin = ["-p", "benchmarks.transformers_patch"] if is_patched else []
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            *files,
            *plugin,
            "-q",
            "-p",
            "no:cacheprovider",
            f"--junitxml={report}",
        ]
        subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": f"{ROOT}:{folder}"}, check=False)
        if not report.exists():
            raise SystemExit(f"pytest wrote no report: {' '.join(command)} in {folder}")
        cases = ElementTree.parse(report).iter("testcase")
        return {f"{case.get('classname')}::{case.get('name')}": _outcome(case) for case in cases}


def _outcome(case: ElementTree.Element) -> str:
    if case.find("failure") is not None or case.find("error") is not None:
        return "failed"
    return "skipped" if case.find("skipped") is not None else "passed"


def main(arguments: list[str]) -> int:
    """Run both ways and print what differs."""
    if not arguments:
        raise SystemExit(__doc__)
    folder, models = Path(arguments[0]).resolve(), arguments[1:] or list(MODELS)
    missing = [model for model in models if not (folder / f"tests/models/{model}/test_modeling_{model}.py").exists()]
    if missing:
        raise SystemExit(f"{folder}: expected a checkout of transformers with tests/models, got none of {missing}")
    plain, patched = (run_tests(folder, models, is_patched) for is_patched in (False, True))
    broken = sorted(name for name, outcome in patched.items() if outcome == "failed" and plain.get(name) != "failed")
    for what, outcomes in (("unpatched", plain), ("patched", patched)):
        print(what, {kind: list(outcomes.values()).count(kind) for kind in ("passed", "failed", "skipped")})
    print("\n".join(["fail only when patched:", *broken]) if broken else "nothing fails only when patched")
    return int(bool(broken) or not any(outcome == "passed" for outcome in patched.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
