"""The CPU kernels are compiled for several generations of processors; this machine would run only the best of them.

So small programs run each one. instruction_sets.cpp: all halfs and bfloat16s are widened, a million floats are rounded
and judged by the definition of the formats, and runs of every length are summed. instruction_sets_norms.cpp: norms and
their gradients on rows of every width. With GCC also under the sanitizers, since `make sanitize` runs the best only.
"""

import shutil
import subprocess
from pathlib import Path

import pytest
import sanitize

HERE = Path(__file__).parent


def builds():
    """(program, compiler, flags) of what can be built here."""
    compilers = [name for name in ("g++", "clang++") if shutil.which(name)]
    plain = [("instruction_sets", name, ["-O2"]) for name in compilers]
    try:
        compiler, _ = sanitize.gcc()
    except sanitize.CannotRun:
        return plain + [("instruction_sets_norms", name, ["-O2"]) for name in compilers[:1]]
    watched = ["-O1", *sanitize.PROGRAM_FLAGS]
    return plain + [(program, compiler, watched) for program in ("instruction_sets", "instruction_sets_norms")]


@pytest.mark.parametrize(
    ("name", "compiler", "flags"),
    builds() or [pytest.param("", "", [], marks=pytest.mark.skip(reason="no C++ compiler"))],
)
def test_every_instruction_set_computes_the_same(name, compiler, flags, tmp_path):
    program = tmp_path / name
    common = ["-std=c++17", "-ffp-contract=off", "-Wno-psabi", "-o", program]
    subprocess.run([compiler, *common, *flags, HERE / f"{name}.cpp"], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "baseline checked" in done.stdout
