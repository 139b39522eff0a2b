"""What ptxas made of the CUDA kernels for an H200, as Triton's disassembler reads it."""

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from built import library
from ptx.fat_binary import entries, fat_binaries


def disassembler() -> str:
    triton = importlib.util.find_spec("triton")
    own = triton and Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    found = shutil.which(own or "nvdisasm") or shutil.which("nvdisasm")
    return found or pytest.skip("needs nvdisasm, of Triton or of a CUDA toolkit")


def stores(tmp_path: Path, architecture: int) -> dict[str, Counter]:
    """Of every kernel: how many stores to global memory of each width in bits it has."""
    found = {}
    for binary in fat_binaries(library("_C_cuda", "nvcc").read_bytes()):
        for kind, of, code in entries(binary):
            if (kind, of) != ("elf", architecture):
                continue
            (tmp_path / "code").write_bytes(code)
            command = [disassembler(), "-c", "-ndf", tmp_path / "code"]  # without its analysis of branches
            text = subprocess.run(command, capture_output=True, text=True, check=True)
            for section in re.split(r"\.section\s+\.text\.", text.stdout)[1:]:
                widths = re.findall(r"\bSTG\.E(?:\.EF|\.STRONG|\.GPU|\.SYS)*\.?(U16|64|128)?\b", section)
                found[section.partition(",")[0]] = Counter({"U16": 16, "": 32}.get(w) or int(w) for w in widths)
    return found


def first_number(name: str) -> int | None:
    match = re.search(r"Li(\d+)E", name)
    return match and int(match[1])


def test_packs_are_stored_whole(tmp_path):
    """nvcc 13 takes 16-byte stores of structs apart for sm_80 and sm_90, in rope into eight; for sm_120 it does not."""
    # The first number of a name is that of elements in a pack; two, beside doubles, may be too few for a wide store.
    kernels = {name: widths for name, widths in stores(tmp_path, 90).items() if first_number(name) in (4, 8)}
    assert len(kernels) > 100
    for name, widths in kernels.items():
        assert widths[64] + widths[128] > 0, name
        if "glu" not in name and "residual_add" not in name:  # whose last elements go one by one
            # A row of a norm has up to two statistics.
            assert widths[16] == 0, name
            assert widths[32] <= 2, name
