"""The CPU kernels are compiled for several generations of processors; this machine would run only the best of them.

So a small program (instruction_sets.cpp) runs each one: all halfs and bfloat16s are widened, a million floats are
rounded and judged by the definition of the formats, and runs of every length are summed.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
COMPILERS = [name for name in ("g++", "clang++") if shutil.which(name)]


@pytest.mark.parametrize("compiler", COMPILERS or [pytest.param("", marks=pytest.mark.skip(reason="no C++ compiler"))])
def test_every_instruction_set_computes_the_same(compiler, tmp_path):
    program = tmp_path / "instruction_sets"
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-Wno-psabi", "-o", program]
    subprocess.run([compiler, *flags, HERE / "instruction_sets.cpp"], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "baseline checked" in done.stdout
