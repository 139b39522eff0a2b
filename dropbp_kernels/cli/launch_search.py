"""The search for launch parameters: which candidates there are, how they are timed, what is kept. See `tune`."""

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from datetime import datetime, timezone
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .. import tuning
from ..ops.schema import SCHEMAS
from ..tuning import Config, Inputs, LaunchTable
from . import progress
from .errors import UserError, require_packages

NUM_WARPS = (1, 2, 4, 8, 16, 32)
ELEMENTS_OF_A_THREAD = range(4, 65)
PROGRAMS = (1, 2, 4, 8, 16)

Timer = Callable[[Callable[[], Any]], float]  # milliseconds of a call


def measure_all(tables: Sequence[LaunchTable], widths: Sequence[int], rows_at: Callable[[int], int]) -> None:
    """Measure every table at every width on the current GPU; each result is on disk before the next is measured.

    Errors: UserError without a GPU, or without what it needs to measure.
    """
    if not torch.cuda.is_available():
        raise UserError("tune measures on a CUDA GPU, and torch sees none here; --dry-run shows what it would measure")
    require_packages("tune", ("tqdm",))
    from triton.testing import do_bench  # writes the L2 before each call

    def time(call: Callable[[], Any]) -> float:
        return do_bench(call, warmup=10, rep=50, return_mode="median")

    device = torch.device("cuda", torch.cuda.current_device())
    gpu_name = torch.cuda.get_device_name(device)
    path = tuning.cache_path(gpu_name)
    total = sum(num_candidates(table.row(width, device).config, width) for table in tables for width in widths)
    print(f"{gpu_name}: {len(tables)} launchers, {len(widths)} widths, up to {total} measurements")
    with progress.bar("tune", total) as bar:
        for table in tables:
            for width in widths:
                entry = search(table, inputs_of(rows_at(width), width, device), time, bar.update)
                tuning.write_cache(path, gpu_name, {table.name: {tuning.bucket(width): entry}})
                bar.write(_result_line(table.name, width, entry))
    print(f"written: {path}")


def inputs_of(rows: int, width: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Inputs:
    """Random inputs for a table's `run`."""
    x, y, z = (torch.randn(rows, width, device=device, dtype=dtype) for _ in range(3))
    weight = torch.randn(width, device=device, dtype=dtype)
    return Inputs(x, y, z, weight, torch.rand(rows, device=device) + 0.5, torch.randperm(rows, device=device))


def search(table: LaunchTable, inputs: Inputs, timer: Timer, advance: Callable[[int], Any]) -> dict[str, Any]:
    """Fields of the fastest Config, its time, and that of the one used now.

    Blocks and warps first, then programs of a persistent kernel with the best of them. A candidate that does not fit
    the GPU is left out; one that computes something else ends the search with an error.
    """
    width = inputs.x.shape[1]
    present = table.row(width, inputs.x.device).config
    with table.override(present):
        expected = _tensors(table.run(inputs))
    times_ms: dict[Config, float] = {}

    def measure(config: Config) -> None:
        if config not in times_ms:
            times_ms[config] = _time(table, config, inputs, expected, timer)
        advance(1)

    for config in blocks_and_warps(present, width):
        measure(config)
    for config in programs(min(times_ms, key=times_ms.__getitem__)):
        measure(config)
    best = min(times_ms, key=times_ms.__getitem__)
    if times_ms[best] == float("inf"):
        raise UserError(f"{table.name}, width {width}: no launch parameters fit this GPU, not even {present}")
    return {
        **asdict(best),
        "median_ms": times_ms[best],
        "replaced": asdict(present),
        "replaced_ms": times_ms[present],
        "rows": inputs.x.shape[0],
        "date_utc": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def blocks_and_warps(present: Config, width: int) -> Iterator[Config]:
    """`present` first, then every other block and number of warps worth a try at `width`."""
    yield present
    whole_row = 1 << (width - 1).bit_length()
    for block in sorted({min(block, whole_row) for block in (1024, 2048, 4096, 8192, present.block, whole_row)}):
        for num_warps in NUM_WARPS:
            config = replace(present, block=block, num_warps=num_warps)
            if block // (num_warps * tuning.THREADS_OF_A_WARP) in ELEMENTS_OF_A_THREAD and config != present:
                yield config


def programs(best: Config) -> Iterator[Config]:
    """`best` with every other number of programs; none where the grid follows from the data."""
    if best.programs_per_multiprocessor:
        for count in PROGRAMS:
            if count != best.programs_per_multiprocessor:
                yield replace(best, programs_per_multiprocessor=count)


def num_candidates(present: Config, width: int) -> int:
    return len(list(blocks_and_warps(present, width))) + len(list(programs(present)))


def _time(table: LaunchTable, config: Config, inputs: Inputs, expected: list[Tensor], timer: Timer) -> float:
    """Milliseconds of a call with `config`; infinite where it does not fit the GPU."""
    from triton.runtime.errors import OutOfResources, PTXASError

    with table.override(config):
        try:
            actual = _tensors(table.run(inputs))
        except (OutOfResources, PTXASError):
            return float("inf")
        for ours, theirs in zip(actual, expected, strict=True):
            # Another order of summing is no other result.
            bound = 0.01 * theirs.abs().max().item() if theirs.numel() else 0.0
            if not torch.allclose(ours.double(), theirs.double(), rtol=0.01, atol=bound):
                raise UserError(
                    f"{table.name}, width {inputs.x.shape[1]}: another result with {config}. This is a bug of the "
                    "kernel; please report it. The parameters measured before are kept."
                )
        return timer(lambda: table.run(inputs))


def _tensors(result: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


def tables(names: Sequence[str] | None) -> list[LaunchTable]:
    """Those called so, or all. Errors: UserError without Triton, or for a name that is none."""
    if importlib.util.find_spec("triton") is None:
        raise UserError("tune needs triton, not installed here; run: pip install 'dropbp_kernels[triton]'")
    for stem in SCHEMAS:
        importlib.import_module(f"dropbp_kernels._triton.{stem}")
    for name in names or ():
        if name not in tuning.TABLES:
            raise UserError(f"--op: expected one of {', '.join(tuning.TABLES)}, got {name!r}")
    return [tuning.TABLES[name] for name in names or tuning.TABLES]


def check_widths(widths: Sequence[int]) -> None:
    for width in widths:
        if not 1 <= width <= tuning.WIDEST:
            raise UserError(f"--width: expected 1 to {tuning.WIDEST}, got {width}")


def print_plan(tables: Sequence[LaunchTable], widths: Sequence[int]) -> None:
    """What is used now, and how many candidates there are."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
    where = "no GPU here, so the lines for any architecture" if device is None else torch.cuda.get_device_name(device)
    print(f"used now ({where}):")
    for table in tables:
        for width in widths:
            row = table.row(width, device or torch.device("cpu"))
            count = num_candidates(row.config, width)
            print(f"  {table.name:<34} {width:>6}  {row.config!s:<34} {count:>3} candidates  [{row.origin}]")
    path = tuning.cache_path(torch.cuda.get_device_name(device) if device else "name of the gpu")
    print(f"results go to {path}")


def _result_line(name: str, width: int, entry: dict[str, Any]) -> str:
    best = Config(entry["block"], entry["num_warps"], entry["programs_per_multiprocessor"])
    times = f"{entry['median_ms']:.4f} ms, was {entry['replaced_ms']:.4f} ms with {Config(**entry['replaced'])}"
    return f"{name:<34} {width:>6}  {best!s:<34} {times}"
