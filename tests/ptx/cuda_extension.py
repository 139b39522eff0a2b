"""Runs the CUDA extension on tensors of the CPU: its host code as it was built, its PTX on machine.py.

The objects of the build are linked with a stand-in for CUDA's runtime (cudart.cpp) in place of the real one.
"""

import ctypes
import functools
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .fat_binary import HEADER_SIZE, fat_binaries, ptx_of, size_of
from .machine import launch
from .memory import Fault, Traffic, extent
from .program import Program, parse

ROOT = Path(__file__).parents[2]
_CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
_Triple = ctypes.POINTER(ctypes.c_uint)
_Pointers = ctypes.POINTER(ctypes.c_void_p)
_OnLaunch = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_char_p, _Triple, _Triple, ctypes.c_size_t, _Pointers, ctypes.c_void_p
)
_OnAllocation = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)


def objects() -> list[Path]:
    """What the CUDA extension was linked from; empty where it was not built here, or of other sources than these."""
    folder = Path("build", f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}")  # setup.py's
    found = sorted(path.relative_to(ROOT) for path in (ROOT / folder / "_C_cuda").glob("*.o"))
    if not found:
        return []
    ninja = [sys.executable, "-m", "ninja", "-n", "-f", folder / "build.ninja", *found]
    done = subprocess.run(ninja, cwd=ROOT, capture_output=True, text=True)
    return [ROOT / path for path in found] if "no work to do" in done.stdout else []


def headers() -> Path:
    """The folder of CUDA's headers, of the toolkit that setup.py builds with."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), Path(nvcc).resolve().parent.parent if nvcc else None, "/usr/local/cuda"]
    folders = [Path(home, "include") for home in homes if home]
    return next(folder for folder in folders if (folder / "cuda_runtime.h").exists())


def build(folder: Path) -> Path:
    """The library for Extension, in `folder`. Errors: ValueError where nvcc left no PTX that can be read."""
    for path in objects()[:1]:
        ptx_of(next(fat_binaries(path.read_bytes())))
    library = folder / "libdropbp_on_cpu.so"
    torch_libraries = Path(torch.__file__).parent / "lib"
    command = ["g++", "-shared", "-fPIC", "-fvisibility=hidden", "-std=c++17", "-Wl,-Bsymbolic,-z,defs", "-w"]
    command += ["-isystem", str(headers()), str(Path(__file__).parent / "cudart.cpp")]
    command += [*map(str, objects()), f"-L{torch_libraries}", "-ltorch_cpu", "-o", str(library)]
    subprocess.run(command, check=True)
    return library


@functools.cache
def _module(address: int) -> str:
    """The PTX of the fat binary at `address`."""
    return ptx_of(ctypes.string_at(address, size_of(ctypes.string_at(address, HEADER_SIZE))))


@functools.cache
def _kernel(address: int, name: str) -> Program:
    return parse(_module(address), name)


class Extension:
    """The ops of the CUDA extension, for tensors on the CPU."""

    def __init__(self, library: Path) -> None:
        torch.ops.load_library(str(library))
        self.traffic: dict[str, Traffic] = {}  # by kernel, of the last call
        self._extents: list[tuple[int, int]] = []
        self._errors: list[Exception] = []
        self._callbacks = _OnLaunch(self._launch), _OnAllocation(self._note)  # kept alive
        self._library = ctypes.CDLL(str(library))
        self._library.dropbp_watch(*self._callbacks)
        self._stream = 0

    def call(
        self,
        name: str,
        *arguments,
        num_last_blocks: int | None = None,
        num_multiprocessors: int = 2,
        shared_bytes: int = 227 << 10,
    ):
        """The raw op `name`, all blocks of its launches or the last, on a GPU of so much and a stream of its own.

        Errors: Fault where a kernel does what it must not, or runs on another stream.
        """
        self._num_last_blocks = num_last_blocks
        self._stream += 1
        self._library.dropbp_set(ctypes.c_void_p(self._stream), num_multiprocessors, shared_bytes)
        self.traffic, self._errors = {}, []
        self._extents = [extent(argument) for argument in arguments if isinstance(argument, torch.Tensor)]
        with _Copies(self._extents):
            result = getattr(torch.ops.dropbp_kernels, name).default.redispatch(_CUDA, *arguments)
        self._extents = []
        if self._errors:
            raise self._errors[0]
        return result

    def _note(self, start, num_bytes) -> None:
        self._extents.append((start or 0, (start or 0) + num_bytes))

    def _launch(self, module, name, grid, block, shared_bytes, arguments, stream) -> None:
        try:
            if stream != self._stream:
                raise Fault(f"{name.decode()}: launched on stream {stream}, where {self._stream} is the current one")
            kernel = _kernel(module, name.decode())
            sizes = [variable.size for variable in kernel.parameters.variables.values()]
            values = [ctypes.string_at(arguments[index], size) for index, size in enumerate(sizes)]
            self.traffic[kernel.name] = launch(
                kernel, grid[:3], block[:3], values, self._extents, shared_bytes, self._num_last_blocks
            )
        except Exception as error:
            self._errors.append(error)


class _Copies(TorchDispatchMode):
    """Adds tensors that an op makes by calling others, such as contiguous, to `extents`."""

    def __init__(self, extents: list[tuple[int, int]]) -> None:
        super().__init__()
        self._extents = extents
        self._kept: list[torch.Tensor] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self._kept.append(result)
            self._extents.append(extent(result))
        return result
