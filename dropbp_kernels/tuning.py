"""Launch parameters of the Triton kernels: a table by width and architecture, and what was measured on this GPU.

A launcher declares a `LaunchTable` and asks it for a `Config` by width. Two lines take part in all of it:

    _TABLE = LaunchTable("my_op", row_table(32768, 4096), lambda to: launch_my_op(to.x, to.weight))
    config = _TABLE.at(width, x.device)    # config.block, config.num_warps, config.programs_per_multiprocessor

`dropbp-kernels tune` finds every declared table, measures its candidates on the GPU and keeps the fastest in
`_backend.cache_dir()/tuning`, one file for each GPU and version of Triton. The first launch of each width reads that
file; where it says nothing the rows of the table count. Nothing is tuned, read or queried at import.

A wrong choice costs time and never a right result: a launcher has to compute the same with every `Config`.
"""

import contextlib
import functools
import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import _backend

UNMEASURED = "from a count of registers and bytes in flight; not measured"
ANY_ARCHITECTURE = "any"
NARROWEST, WIDEST = 64, 65536  # widths beyond are served like these
CACHE_FORMAT = 1
THREADS_OF_A_WARP = 32


@dataclass(frozen=True)
class Config:
    """Launch parameters of one kernel. block: elements of a program at a time, a power of two."""

    block: int
    num_warps: int
    programs_per_multiprocessor: int = 0  # of a persistent kernel; 0: the grid follows from the data

    def __post_init__(self) -> None:
        for name in ("block", "num_warps"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1 or value & (value - 1):
                raise ValueError(f"{name}: expected a power of two, got {value!r}")
        if self.num_warps > 32:
            raise ValueError(f"num_warps: expected at most 32, got {self.num_warps}")
        if not isinstance(self.programs_per_multiprocessor, int) or not 0 <= self.programs_per_multiprocessor <= 64:
            raise ValueError(f"programs_per_multiprocessor: expected 0 to 64, got {self.programs_per_multiprocessor!r}")

    @functools.cached_property
    def options(self) -> dict[str, Any]:
        """What Triton is told beside a kernel's arguments.

        Products and sums are rounded each, as the interpreter and the C++ kernels do it: a frozen weight then changes
        no bit of another gradient. Said, because what Triton does unasked changes between its versions.
        """
        return {"num_warps": self.num_warps, "enable_fp_fusion": False}

    def __str__(self) -> str:
        programs = f", {self.programs_per_multiprocessor} programs" if self.programs_per_multiprocessor else ""
        return f"block {self.block}, {self.num_warps} warps{programs}"


@dataclass(frozen=True)
class Row:
    """One line of a table: config for widths up to max_width on an architecture ("sm_90", or any)."""

    max_width: int
    config: Config
    architecture: str = ANY_ARCHITECTURE
    origin: str = UNMEASURED


@dataclass(frozen=True)
class Inputs:
    """What a table's `run` is called with while it is tuned."""

    x: Tensor  # (rows, width)
    y: Tensor  # (rows, width)
    z: Tensor  # (rows, width)
    weight: Tensor  # (width,)
    per_row: Tensor  # (rows,) float32, positive
    permutation: Tensor  # (rows,) int64


def row_table(widest_block: int, chunk: int, warps_per_multiprocessor: int = 0) -> list[Row]:
    """For kernels of one row at a time: whole rows up to widest_block, wider ones in chunks; 16 elements a thread.

    warps_per_multiprocessor: of a persistent kernel, all of its programs' warps together, so that narrow rows keep as
    many bytes in flight as wide ones.
    """
    blocks = {1 << bits: 1 << bits for bits in range(NARROWEST.bit_length() - 1, widest_block.bit_length())}
    if widest_block < WIDEST:
        blocks[WIDEST] = chunk
    rows = []
    for max_width, block in blocks.items():
        num_warps = warps_for(block)
        programs = max(warps_per_multiprocessor // num_warps, 1) if warps_per_multiprocessor else 0
        rows.append(Row(max_width, Config(block, num_warps, programs)))
    return rows


def warps_for(block: int) -> int:
    """Warps for 16 elements a thread."""
    return min(max(block // (16 * THREADS_OF_A_WARP), 1), 32)


class LaunchTable:
    """The launch parameters of one launcher; `run` calls it on `Inputs`, for `dropbp-kernels tune`."""

    def __init__(self, name: str, rows: Sequence[Row], run: Callable[[Inputs], Any]) -> None:
        if not any(row.architecture == ANY_ARCHITECTURE and row.max_width >= WIDEST for row in rows):
            raise ValueError(f"rows of {name}: expected one for any architecture and width {WIDEST}")
        self.name = name
        self.rows = sorted(rows, key=lambda row: (row.architecture == ANY_ARCHITECTURE, row.max_width))
        self.run = run
        self._override: Config | None = None
        self._chosen: dict[tuple[torch.device, int], Config] = {}
        TABLES[name] = self

    def at(self, width: int, device: torch.device) -> Config:
        """The parameters for `width` on `device`: measured on this GPU, else of its architecture, else of any."""
        if self._override is not None:
            return self._override
        key = device, (width - 1).bit_length()
        config = self._chosen.get(key)
        if config is None:
            config = self._chosen[key] = self.row(width, device).config
        return config

    def row(self, width: int, device: torch.device) -> Row:
        """The line that serves `width` on `device`, with its origin."""
        width = bucket(width)
        architecture = ANY_ARCHITECTURE
        if device.type == "cuda":
            gpu = _gpu(device)
            architecture = gpu.architecture
            measured = read_cache(cache_path(gpu.name)).get(self.name, {}).get(width)
            if measured is not None:
                return Row(width, measured, architecture, f"measured by dropbp-kernels tune on {gpu.name}")
        return next(
            row for row in self.rows if row.max_width >= width and row.architecture in (architecture, ANY_ARCHITECTURE)
        )

    @contextlib.contextmanager
    def override(self, config: Config) -> Iterator[None]:
        """Launch with `config` inside the block; not thread-safe."""
        before, self._override = self._override, config
        try:
            yield
        finally:
            self._override = before

    def forget(self) -> None:
        """Look everything up again: after the file on disk has changed."""
        self._chosen.clear()


TABLES: dict[str, LaunchTable] = {}


def bucket(width: int) -> int:
    """The power of two that a table is read at: the next one, within NARROWEST and WIDEST."""
    return min(max(1 << (width - 1).bit_length(), NARROWEST), WIDEST)


@dataclass(frozen=True)
class Gpu:
    name: str
    architecture: str


@functools.cache
def _gpu(device: torch.device) -> Gpu:
    properties = torch.cuda.get_device_properties(device)
    return Gpu(properties.name, f"sm_{properties.major}{properties.minor}")


# ---- what was measured, on disk


def cache_path(gpu_name: str) -> Path:
    """The file of what was measured on a GPU of this name, with this version of Triton."""
    slug = re.sub(r"[^a-z0-9]+", "-", gpu_name.lower()).strip("-")
    return _backend.cache_dir() / "tuning" / f"{slug}-triton-{_triton_version()}.json"


def read_cache(path: Path) -> dict[str, dict[int, Config]]:
    """Table name -> width -> config. No file: nothing. A file that cannot be read: a warning once, and nothing."""
    return _read_cache(path, path.stat().st_mtime_ns if path.is_file() else None)


@functools.cache
def _read_cache(path: Path, changed: int | None) -> dict[str, dict[int, Config]]:
    if changed is None:
        return {}
    try:
        content = json.loads(path.read_text())
        if content["format"] != CACHE_FORMAT:
            raise ValueError(f"format: expected {CACHE_FORMAT}, got {content['format']!r}")
        return {
            name: {int(width): Config(**{f.name: entry[f.name] for f in fields(Config)}) for width, entry in of.items()}
            for name, of in content["tables"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(
            f"dropbp_kernels: {path} is no result of dropbp-kernels tune ({type(error).__name__}: {error}); "
            "the built-in launch parameters are used; remove the file or run the command again",
            RuntimeWarning,
            stacklevel=2,
        )
        return {}


def write_cache(path: Path, gpu_name: str, found: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> None:
    """Add to the file: table name -> width -> the fields of a Config and whatever else is worth keeping.

    What the file knew of other tables and widths stays. The file is replaced as a whole, so that no reader sees half.
    """
    entries: dict[str, dict[str, Any]] = json.loads(path.read_text())["tables"] if read_cache(path) else {}
    for name, of in found.items():
        entries.setdefault(name, {}).update({str(width): dict(entry) for width, entry in of.items()})
    content = {"format": CACHE_FORMAT, "gpu": gpu_name, "triton": _triton_version(), "tables": entries}
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".json")
    with open(handle, "w") as file:
        json.dump(content, file, indent=2)
        file.write("\n")
    os.replace(temporary, path)
    for table in TABLES.values():
        table.forget()


def _triton_version() -> str:
    import triton  # the metadata of a distribution would not be found: some containers call theirs pytorch-triton

    return str(triton.__version__)
