"""The compiled libraries import nothing of torch but its stable interface, and nothing of Python.

That is what lets one build serve every torch from 2.11 on, and every Python.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from built import library
from ptx.fat_binary import entries, fat_binaries

import dropbp_kernels

PACKAGE = Path(dropbp_kernels.__file__).parent


def imported(path: Path) -> list[str]:
    """Undefined dynamic symbols, without those of a system library, which carry its version: malloc@GLIBC_2.2.5."""
    if shutil.which("nm") is None:
        pytest.skip("needs nm of binutils")
    lines = subprocess.run(["nm", "-D", "--undefined-only", path], capture_output=True, text=True, check=True).stdout
    symbols = [line.split() for line in lines.splitlines()]
    assert symbols, "nm printed nothing"
    return [name for kind, name in symbols if kind != "w" and not re.search(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_", name)]


def needed(path: Path) -> list[str]:
    output = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True).stdout
    assert "RPATH" not in output
    assert "RUNPATH" not in output
    return re.findall(r"NEEDED.*\[(.+)\]", output)


LIBRARIES = [("_C", ()), ("_C_cuda", ("nvcc",))]
SOURCES = PACKAGE.parent / "csrc"
# TORCH_TARGET_VERSION hides no macro that came later; those of torch 2.11 are here, with which the build was tried.
MACROS_OF_2_11 = {"STABLE_TORCH_LIBRARY_IMPL", "TORCH_BOX", "TORCH_ERROR_CODE_CHECK"}


@pytest.mark.parametrize(("stem", "tools"), LIBRARIES)
def test_imports_only_the_stable_interface(stem, tools):
    symbols = imported(library(stem, *tools))
    unstable = [name for name in symbols if not re.fullmatch(r"(aoti_torch|torch)_[a-z0-9_]+", name)]
    assert unstable == []
    assert "torch_library_impl" in symbols, "the audit does not see what the library surely imports"


@pytest.mark.skipif(not SOURCES.is_dir(), reason="the sources are not part of an installed package")
def test_uses_no_macro_that_the_oldest_torch_lacks():
    text = "".join(path.read_text() for path in SOURCES.rglob("*.*") if path.suffix in (".h", ".cpp", ".cu", ".cuh"))
    assert set(re.findall(r"\b(?:STABLE|STD|TORCH|AOTI|C10)_[A-Z0-9_]+", text)) == MACROS_OF_2_11


@pytest.mark.parametrize(("stem", "tools"), LIBRARIES)
def test_needs_no_python_and_no_cuda_toolkit(stem, tools):
    if shutil.which("readelf") is None:
        pytest.skip("needs readelf of binutils")
    torch_libraries = {"_C": {"libtorch_cpu.so"}, "_C_cuda": {"libtorch_cpu.so", "libtorch_cuda.so"}}[stem]
    names = needed(library(stem, *tools))
    assert {name for name in names if "torch" in name or "c10" in name} == torch_libraries
    assert not [name for name in names if "python" in name or "cudart" in name]


@pytest.mark.parametrize(("stem", "tools"), LIBRARIES)
def test_holds_no_path_of_the_building_machine(stem, tools):
    content = library(stem, *tools).read_bytes()
    assert str(Path(torch.__file__).parent).encode() not in content
    assert str(PACKAGE.parent).encode() not in content


def test_host_knows_no_torch():
    names = imported(library("_host"))
    assert names
    assert all(name.startswith(("Py", "_Py")) for name in names)


def test_device_code_for_four_generations():
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        pytest.skip("TORCH_CUDA_ARCH_LIST asks for others")
    binaries = fat_binaries(library("_C_cuda", "nvcc").read_bytes())
    found = {(kind, architecture) for binary in binaries for kind, architecture, _ in entries(binary)}
    assert {("elf", 80), ("elf", 90), ("elf", 100), ("elf", 120), ("ptx", 120)} <= found
