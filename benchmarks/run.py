"""Run the benchmarks, print a table, append rows to CSV files.

python -m benchmarks.run                     all, under 6 minutes on 2 CPU cores; rows to benchmarks/results
python -m benchmarks.run --quick --out DIR   about a minute
python -m benchmarks.run --only glu --sizes 256x256 --dtypes float32    some rows again
python -m benchmarks.run --only row_step target_step --wide             whole steps of a wider model
"""

import argparse
import faulthandler
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from . import (
    baselines,
    bench_checkpointed_step,
    bench_coreset_step,
    bench_gated_residual_add,
    bench_gated_residual_layer_norm,
    bench_gated_residual_rms_norm,
    bench_glu,
    bench_group_step,
    bench_host_overhead,
    bench_l1_distances,
    bench_loss_step,
    bench_paca_step,
    bench_partial_gather,
    bench_patched_step,
    bench_permuted_norm,
    bench_rope,
    bench_row_step,
    bench_sensitivity,
    bench_step,
    bench_target_step,
    bench_turn_step,
)
from .baselines import WrongResult
from .rows import RESULTS, append_rows
from .settings import SCALES, Settings

SUITES: dict[str, Callable[[Settings], Iterator[list[Any]]]] = {
    "host_overhead": bench_host_overhead.run,
    "step": bench_step.run,
    "checkpointed_step": bench_checkpointed_step.run,
    "loss_step": bench_loss_step.run,
    "patched_step": bench_patched_step.run,
    "row_step": bench_row_step.run,
    "target_step": bench_target_step.run,
    "turn_step": bench_turn_step.run,
    "group_step": bench_group_step.run,
    "coreset_step": bench_coreset_step.run,
    "paca_step": bench_paca_step.run,
    "sensitivity": bench_sensitivity.run,
    "gated_residual_rms_norm": bench_gated_residual_rms_norm.run,
    "gated_residual_layer_norm": bench_gated_residual_layer_norm.run,
    "gated_residual_add": bench_gated_residual_add.run,
    "glu": bench_glu.run,
    "permuted_norm": bench_permuted_norm.run,
    "partial_gather": bench_partial_gather.run,
    "l1_distances": bench_l1_distances.run,
    "rope": bench_rope.run,
}
# Two threads that share a core with another program wait for each other for milliseconds at every kernel.
BUSY_LOAD = 0.7
BUDGET_S = 350.0  # what `make bench` may take on a busy machine


def main(arguments: list[str] | None = None) -> int:
    """Run the chosen suites; 0 when every variant was right and everything fitted the memory, else 1."""
    options = _parse(arguments)
    device = torch.device(options.device)
    if options.scale == "tiny":
        torch.set_num_threads(1)  # waking a second thread would be most of the work
        baselines.compiler = "eager"  # so would the compiler, and what it is given is PyTorch's own
    elif device.type == "cpu" and (load := os.getloadavg()[0]) > BUSY_LOAD:
        print(f"Something else is running (load average {load:.1f}): these times will be worth little.", flush=True)
    settings = Settings(
        device, options.scale, options.commit, tuple(options.sizes), tuple(options.dtypes), options.wide
    )
    started = time.monotonic()
    failed = []
    for number, name in enumerate(options.only):
        seconds = time.monotonic() - started
        if options.budget_s:  # an equal share of what is left for every suite still to run
            share_s = max((options.budget_s - seconds) / (len(options.only) - number), 0.0)
            settings.deadline = time.monotonic() + share_s
            if options.hang_s:  # a kernel that never ends cannot be interrupted
                faulthandler.dump_traceback_later(share_s + options.hang_s, exit=True)
        print(f"\n{name} on {device}, {options.scale} [{seconds:.0f} s]", flush=True)
        try:
            for place, rows in enumerate(SUITES[name](settings)):
                append_rows(options.out / f"{name}.csv", rows)
                print("\n".join([rows[0].HEADER][place:] + [str(row) for row in rows]), flush=True)
        except WrongResult as error:
            failed.append(name)
            print(f"REFUSED: {error}; fix it before {name} is timed", file=sys.stderr)
        except torch.OutOfMemoryError as error:
            failed.append(name)
            print(f"OUT OF MEMORY: {name}: {error}", file=sys.stderr)
    faulthandler.cancel_dump_traceback_later()
    if settings.num_left_out:
        print(f"\n{settings.num_left_out} cases were left out: the {options.budget_s:.0f} s were over")
    print(f"\n{time.monotonic() - started:.0f} s; rows are in {options.out}")
    return 1 if failed else 0


def _size(text: str) -> tuple[int, int]:
    rows, width = map(int, text.split("x"))
    return rows, width


def _dtype(text: str) -> torch.dtype:
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[text]


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    scales = parser.add_mutually_exclusive_group()
    scales.add_argument(
        "--quick", dest="scale", action="store_const", const="quick", help="fewer sizes: about a minute"
    )
    scales.add_argument("--scale", choices=SCALES, help="how much to measure; tiny: only see that all of it runs")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default, help=f"default: {default}")
    parser.add_argument("--only", nargs="+", choices=SUITES, default=list(SUITES), help="suites to run; default: all")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="folder of the CSV files; default: benchmarks/results"
    )
    parser.add_argument(
        "--sizes", nargs="+", type=_size, default=(), metavar="ROWSxWIDTH", help="of ops, such as 256x256; default: all"
    )
    parser.add_argument("--dtypes", nargs="+", type=_dtype, default=(), help="of ops: float32, bfloat16; default: both")
    parser.add_argument("--wide", action="store_true", help="whole steps on a CPU: a model of width 576, not 192")
    parser.add_argument("--commit", default="", help="the commit that rows name, for a copy without git")
    parser.add_argument(
        "--budget-s",
        type=float,
        default=BUDGET_S,
        help=f"start no case after so many seconds, which the suites share; 0: no limit; default: {BUDGET_S:g}",
    )
    parser.add_argument(
        "--hang-s",
        type=float,
        default=0.0,
        help="end the process, and say where it stands, so many seconds after a suite's share of the budget; 0: never",
    )
    parser.set_defaults(scale="full")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA GPU")
    return options


if __name__ == "__main__":
    sys.exit(main())
