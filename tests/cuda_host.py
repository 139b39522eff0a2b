"""Device code of CUDA kernels built for the host, with CUDA's headers and an ordinary compiler."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent


def headers() -> Path | None:
    """The folder of CUDA's headers, if there is one."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), Path(nvcc).resolve().parent.parent if nvcc else None, "/usr/local/cuda"]
    folders = [Path(home, "include") for home in homes if home]
    return next((folder for folder in folders if (folder / "cuda_fp16.h").exists()), None)


def can_build() -> bool:
    return shutil.which("g++") is not None and headers() is not None


def build(source: str, folder: Path, flags: Sequence[str] = ()) -> Path:
    """The program of tests/`source`, in `folder`."""
    program = folder / Path(source).stem
    # Not optimised: the compiler takes longer than the programs.
    common = ["-std=c++17", "-O0", "-w", "-isystem", str(headers()), "-o", str(program)]
    subprocess.run(["g++", *common, *flags, str(HERE / source)], check=True)
    return program
