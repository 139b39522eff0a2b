"""Addresses beyond 2^31 elements, in every backend, mostly on memory that nobody touches.

C++ CPU   the compiler finds every narrowing of a 64-bit index, and test_gated_residual_add.py runs 2^31 + 2^11 elements
CUDA      test_ptx_cuda.py runs the last blocks of launches over 2^32 + 2^11 elements
Triton    test_ptx_triton.py does the same; test_triton.py reads the compiled kernels: no product of 32 bits is left but
          those of columns
GPU       test_on_gpu.py runs over more than 2^31 elements
"""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
STABLE_ABI = f"-DTORCH_TARGET_VERSION={2 << 56 | 11 << 48}ULL"


@pytest.mark.skipif(shutil.which("clang++") is None, reason="needs clang++, whose warning this is")
@pytest.mark.parametrize("source", sorted(path.name for path in (ROOT / "csrc" / "cpu").glob("*.cpp")))
def test_no_index_of_the_cpu_kernels_is_narrowed(source):
    torch_headers = Path(torch.__file__).parent / "include"
    flags = ["-fsyntax-only", "-std=c++17", "-Werror=shorten-64-to-32", STABLE_ABI, "-isystem", str(torch_headers)]
    done = subprocess.run(["clang++", *flags, str(ROOT / "csrc" / "cpu" / source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_compiler_would_see_a_narrowed_index(tmp_path):
    if shutil.which("clang++") is None:
        pytest.skip("needs clang++")
    (tmp_path / "narrow.cpp").write_text("long f(long i, long w) { int at = i * w; return at; }\n")
    command = ["clang++", "-fsyntax-only", "-Werror=shorten-64-to-32", str(tmp_path / "narrow.cpp")]
    assert subprocess.run(command, capture_output=True).returncode != 0
