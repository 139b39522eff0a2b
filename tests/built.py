"""The compiled libraries of this checkout."""

import os
import shutil
import sys
from pathlib import Path

import pytest

import dropbp_kernels

PACKAGE = Path(dropbp_kernels.__file__).parent


def library(stem: str, *tools: str) -> Path:
    """The built library; skips where it could not have been built, fails where it should have been."""
    found = sorted(PACKAGE.glob(f"{stem}.*so"))
    if found:
        return found[0]
    if os.environ.get("DROPBP_KERNELS_BACKEND") == "reference":
        pytest.skip("pure mode: DROPBP_KERNELS_BACKEND=reference")
    if sys.platform != "linux" or not any(
        shutil.which(tool) for tool in ("c++", "g++", "clang++", os.environ.get("CXX", ""))
    ):
        pytest.skip("no C++ compiler to build it with")
    missing = [tool for tool in tools if not shutil.which(tool)]
    if missing or (tools and os.environ.get("DROPBP_KERNELS_CUDA") == "0"):
        pytest.skip(f"{stem} was not built: no {', '.join(missing) or 'CUDA wanted'}")
    pytest.fail(f"{stem} was not built though a compiler is here: make build, or set DROPBP_KERNELS_BACKEND=reference")
