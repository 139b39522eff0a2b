"""Which backend serves an op. The only place that loads compiled code, and the only reader of environment variables.

Every op exists in plain PyTorch (``reference``), registered for all devices. A compiled library or a Triton launcher
registers itself for one device and then takes precedence in PyTorch's own dispatcher, so a call site has no ``if`` and
nothing is decided, or retried, during a call.

==========  ========================================  =================
device      ladder, best first                        registered under
==========  ========================================  =================
cpu         cpp, reference                            CPU
cuda        cuda, triton, reference                   CUDA
any other   reference                                 (all devices)
==========  ========================================  =================

Environment: ``DROPBP_KERNELS_BACKEND=reference|cpp|triton|cuda`` allows only that backend (above ``reference``);
``TRITON_INTERPRET=1`` (Triton's own) lets the Triton kernels run on CPU tensors, for tests;
``DROPBP_KERNELS_CACHE``, else ``XDG_CACHE_HOME``, says where `cache_dir` is.
"""

import contextlib
import importlib
import importlib.util
import os
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from . import reference
from .choices import check_choice

BACKENDS = ("reference", "cpp", "triton", "cuda")
LADDER = {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")}
# Stems that csrc/cuda implements; the others are served by Triton on a GPU (docs/architecture.md says why).
CUDA_STEMS = frozenset(
    {
        "column_update",
        "gated_residual_add",
        "gated_residual_layer_norm",
        "gated_residual_rms_norm",
        "glu",
        "partial_gather",
        "permuted_norm",
        "permuted_residual_add",
        "rope",
    }
)

_HOST = "dropbp_kernels._host"

_library = torch.library.Library("dropbp_kernels", "DEF")
_schemas: dict[str, dict[str, str]] = {}
_missing: dict[str, str] = {}  # backend -> why it cannot serve


def _forced() -> str | None:
    name = os.environ.get("DROPBP_KERNELS_BACKEND")
    if name is not None:
        check_choice("DROPBP_KERNELS_BACKEND", name, BACKENDS)
    return name


def is_interpreting() -> bool:
    """Whether Triton kernels run on the CPU, in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _load(backend: str, stem: str) -> None:
    """Load the compiled library `stem`; on a miss keep the reason for `info`."""
    if _forced() not in (None, backend):
        _missing[backend] = f"DROPBP_KERNELS_BACKEND={_forced()}"
        return
    found = sorted(Path(__file__).parent.glob(f"{stem}.*so")) + sorted(Path(__file__).parent.glob(f"{stem}.pyd"))
    if not found:
        _missing[backend] = f"{stem} was not built"
        return
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:  # a library built for another torch or platform: the package still works, and says so
        _missing[backend] = f"{found[0].name} does not load: {error}"
        warnings.warn(f"dropbp_kernels: {_missing[backend]}; using plain PyTorch instead", RuntimeWarning, stacklevel=2)


def _why_triton_cannot_build() -> str | None:
    """Triton compiles a C file before its first launch: what that takes and is not here. Windows' brings all of it."""
    if sys.platform != "linux":
        return None
    command = os.environ.get("CC")
    if not any(map(shutil.which, ("gcc", "clang") if command is None else (command,))):
        return "no C compiler was found ($CC, gcc, clang), which Triton needs to launch a kernel"
    # As Triton looks for them: Debian's scheme for what pip installs names a folder of which it has none.
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    if not Path(sysconfig.get_path("include", scheme), "Python.h").is_file():
        return "Python's C headers are not installed, which Triton needs to launch a kernel"
    return None


def _launcher(stem: str, name: str) -> Callable[..., Any]:
    """A raw op that imports its Triton kernels on the first call."""

    def launch(*args: Any) -> Any:
        return getattr(importlib.import_module(f"dropbp_kernels._triton.{stem}"), f"launch_{name}")(*args)

    return launch


def install(schemas: dict[str, dict[str, str]]) -> None:
    """Define the raw ops of `schemas` and register the best backend of each device. Called once, by `ops`."""
    _schemas.update(schemas)
    for names in schemas.values():
        for name, signature in names.items():
            _library.define(name + signature)
            _library.impl(name, getattr(reference, f"{name}_reference"), "CompositeExplicitAutograd")
            if signature.endswith("-> ()"):  # no result of which a fake would have to say shape and dtype
                torch.library.register_fake(f"dropbp_kernels::{name}", lambda *args: None, lib=_library)

    _load("cpp", "_C")
    if torch.version.cuda is None:
        _missing["cuda"] = "this torch was built without CUDA"
    else:
        _load("cuda", "_C_cuda")
    if importlib.util.find_spec("triton") is None:
        _missing["triton"] = "triton is not installed"
    elif _forced() not in (None, "triton"):
        _missing["triton"] = f"DROPBP_KERNELS_BACKEND={_forced()}"
    elif torch.version.cuda is None and not is_interpreting():
        _missing["triton"] = "this torch was built without CUDA (TRITON_INTERPRET=1 runs the kernels on the CPU)"
    elif not is_interpreting() and (reason := _why_triton_cannot_build()) is not None:
        _missing["triton"] = reason

    if "triton" not in _missing and torch.version.cuda is not None:
        _register(_library, "triton", "CUDA", [stem for stem in schemas if why_not("cuda", stem) is not None])
    if "triton" not in _missing and _forced() == "triton" and is_interpreting():
        _register(_library, "triton", "CPU", schemas)


def _register(library: torch.library.Library, backend: str, key: str, stems: Any) -> None:
    for stem in stems:
        for name in _schemas[stem]:
            kernel = getattr(reference, f"{name}_reference") if backend == "reference" else _launcher(stem, name)
            # Triton's own registration may stand there: torch 2.11 refuses another one unless it is asked for.
            library.impl(name, kernel, key, allow_override=True)


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Serve every op from `backend` inside the block: for tests, benchmarks and bug hunts; not thread-safe.

    `cpp` and `cuda` serve their device already where they are built, so for them this only checks that they do.
    Errors: ValueError for an unknown backend, RuntimeError when it cannot serve on this machine, with the reason.
    """
    check_choice("backend", backend, BACKENDS)
    if backend in _missing:
        raise RuntimeError(f"backend {backend!r} cannot serve here: {_missing[backend]}")
    library = torch.library.Library("dropbp_kernels", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="[\\s\\S]*verriding a previously registered kernel")
            if backend == "reference" or (backend == "triton" and is_interpreting()):
                _register(library, backend, "CPU", _schemas)
            if backend in ("reference", "triton") and torch.version.cuda is not None:
                _register(library, backend, "CUDA", _schemas)
        yield
    finally:
        library._destroy()


def why_not(backend: str, stem: str) -> str | None:
    """Why `backend` cannot serve the ops of `stem` on this machine; None when it can."""
    if backend == "cuda" and stem not in CUDA_STEMS and "cuda" not in _missing:
        return "no CUDA C++ kernel; Triton serves it"
    return _missing.get(backend)


def serving(stem: str, device_type: str) -> str:
    """Name of the backend that serves the ops of `stem` on `device_type` ("cpu", "cuda", ...)."""
    if device_type == "cpu" and _forced() == "triton" and is_interpreting() and "triton" not in _missing:
        return "triton"
    return next(b for b in LADDER.get(device_type, ("reference",)) if why_not(b, stem) is None)


def why_no_host() -> str | None:
    """Why there are no compiled host algorithms; None where there are."""
    if _forced() == "reference":
        return "DROPBP_KERNELS_BACKEND=reference"
    return None if importlib.util.find_spec(_HOST) else "_host was not built"


def host() -> ModuleType | None:
    """The compiled host algorithms (`csrc/host`), or None: see `why_no_host`."""
    return importlib.import_module(_HOST) if why_no_host() is None else None


def cache_dir() -> Path:
    """Folder for what the package keeps between runs: $DROPBP_KERNELS_CACHE, or dropbp_kernels in the user's cache."""
    if folder := os.environ.get("DROPBP_KERNELS_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dropbp_kernels"
