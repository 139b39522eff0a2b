"""What a result was measured with: versions, hardware, commit. Used by `info` and by report.json."""

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from .. import __version__

PACKAGES = ("triton", "transformers", "peft", "numpy")
PACKAGE_FOLDER = Path(__file__).resolve().parent.parent


def versions() -> dict[str, str | None]:
    """Versions of this package, Python and what matters to it; None: not installed."""
    found: dict[str, str | None] = {"dropbp_kernels": __version__, "python": platform.python_version()}
    found["torch"] = torch.__version__  # a wheel's own metadata may leave out for which CUDA it was built
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    found["cuda of torch"] = torch.version.cuda
    found["cuda toolkit of the build"] = build_toolkit()
    return found


def build_toolkit() -> str | None:
    """The CUDA toolkit that compiled `_C_cuda`, as nvcc notes it in every library; None without that library."""
    for path in PACKAGE_FOLDER.glob("_C_cuda.*"):
        if match := re.search(rb"Cuda compilation tools, release [\d.]+, V([\d.]+)", path.read_bytes()):
            return match[1].decode()
    return None


def hardware() -> dict[str, Any]:
    """CPU, threads and GPUs of this machine."""
    return {
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cpu_cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": gpus(),
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file() and (match := re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)):
        return match[1]
    return platform.processor() or platform.machine()


def gpus() -> list[str]:
    """Name, compute capability and memory of each CUDA device."""
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        found.append(f"{device.name} (sm_{device.major}{device.minor}, {device.total_memory / 2**30:.0f} GiB)")
    return found


def git_commit() -> str | None:
    """The commit of this package's checkout, with "+" after it when files differ; None when it is not in one."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(PACKAGE_FOLDER), *arguments], capture_output=True, text=True)
        except OSError:  # no git on this machine
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", "__init__.py") is None:  # installed into somebody else's checkout
        return None
    commit = git("rev-parse", "HEAD")
    return commit and commit + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
