"""The device code of the norms, run on a CPU: what a machine without a GPU can know of CUDA kernels.

cuda_rows.cpp gives every thread of a block a fibre that waits at barriers and shuffles, and compares with plain loops.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def test_device_code_computes_right(tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc, for the headers of its toolkit")
    program = tmp_path / "cuda_rows"
    subprocess.run(["nvcc", "-std=c++17", "-O1", "-w", "-o", program, HERE / "cuda_rows.cpp"], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert done.stdout == "checked\n"
