"""The address and undefined-behaviour sanitizers over the C++ CPU kernels, and that they would see a fault."""

import shutil
import subprocess
import sys

import pytest
import sanitize

try:
    COMPILER, PRELOAD = sanitize.gcc()
except sanitize.CannotRun as reason:
    pytest.skip(str(reason), allow_module_level=True)

FAULTY = """
#include <cstdint>
extern "C" {
float read(const float* values, int64_t at) { return values[at]; }
int32_t twice(int32_t value) { return value + value; }
}
"""
LOAD = """
import ctypes
faulty = ctypes.CDLL("./faulty.so")
faulty.read.argtypes, faulty.read.restype = [ctypes.c_void_p, ctypes.c_int64], ctypes.c_float
assert faulty.twice(21) == 42
"""
TENSOR = """
import torch
x = torch.ones(8)
assert faulty.read(x.data_ptr(), 7) == 1
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faulty")
    (folder / "faulty.cpp").write_text(FAULTY)
    flags = [*sanitize.PROGRAM_FLAGS, "-O1", "-g1"]
    subprocess.run([COMPILER, *flags, "-shared", "-fPIC", "-o", "faulty.so", "faulty.cpp"], cwd=folder, check=True)
    return folder


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (TENSOR + "faulty.read(x.data_ptr(), 64)", "AddressSanitizer: heap-buffer-overflow"),
        (TENSOR + "p = x.data_ptr(); del x; faulty.read(p, 0)", "AddressSanitizer: heap-use-after-free"),
        ("faulty.twice(2**31 - 1)", "signed integer overflow"),
        ("print('done')", None),
    ],
)
def test_a_fault_beside_a_tensor_is_found(folder, capsys, call, message):
    is_found = sanitize.run_watched([sys.executable, "-c", LOAD + call], folder, PRELOAD, {})
    assert is_found == (message is not None)
    assert (message or "done") in capsys.readouterr().out


def test_failing_tests_count_as_findings(tmp_path, capsys):
    assert sanitize.run_watched([sys.executable, "-c", "print('why'); raise SystemExit(3)"], tmp_path, PRELOAD, {})
    assert "why" in capsys.readouterr().out


@pytest.mark.slow
def test_cpu_kernels(tmp_path, capsys):
    """The tests of every op on libraries built with the sanitizers, one instruction set; make sanitize takes all."""
    assert sanitize.main(["--only", "cpu", "--quick", "--folder", str(tmp_path)]) == 0, capsys.readouterr().out
    assert "sanitize cpu: nothing found" in capsys.readouterr().out


def test_a_machine_without_a_gpu_says_so(monkeypatch, capsys):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sanitize, "sanitize_cpu", lambda folder, is_quick: False)
    assert sanitize.main([]) == 0
    text = "sanitize gpu: no GPU here, so compute-sanitizer did not run over the CUDA and Triton kernels"
    assert text in capsys.readouterr().out
    assert sanitize.main(["--only", "gpu"]) == 1


def test_every_op_is_run():
    from dropbp_kernels.ops.schema import SCHEMAS

    assert {f"tests/test_{stem}.py" for stem in SCHEMAS} <= set(sanitize.op_tests())


def test_without_gcc_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name, **options: None)
    assert sanitize.main(["--only", "cpu"]) == 1
    assert "the sanitizers need Linux and GCC" in capsys.readouterr().out
