"""dropbp-kernels tune: measure launch parameters of the Triton kernels on this GPU and keep the fastest on disk."""

import argparse
from typing import Any

from .errors import UserError

WIDTHS = (1024, 2048, 4096, 8192, 16384)
ELEMENTS = 1 << 26  # of x: far more than a cache holds, half a millisecond or less for each pass


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "tune",
        help="measure launch parameters of the Triton kernels on this GPU",
        description=(
            "Measure launch parameters (block, warps, programs) of the Triton kernels on this GPU, in bfloat16, and "
            "keep the fastest on disk: in $DROPBP_KERNELS_CACHE/tuning or the user's cache, one file for each GPU. "
            "Every later run on such a GPU uses them. They change times, never results."
        ),
        epilog="examples: dropbp-kernels tune --dry-run | dropbp-kernels tune --op gated_residual_add --width 4096",
    )
    add = parser.add_option
    add("--op", "kernels to measure (default: all; --dry-run lists them)", nargs="+")
    add("--width", "row widths", list(WIDTHS), nargs="+", type=int)
    add("--rows", f"rows of the inputs (default: {ELEMENTS >> 20} Mi elements / width)", type=int)
    parser.add_argument("--dry-run", action="store_true", help="show what would be measured, and what is used now")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.rows is not None and args.rows < 1:
        raise UserError(f"--rows: expected at least 1, got {args.rows}")
    from . import launch_search

    tables = launch_search.tables(args.op)
    launch_search.check_widths(args.width)
    if args.dry_run:
        launch_search.print_plan(tables, args.width)
    else:
        launch_search.measure_all(tables, args.width, lambda width: args.rows or max(ELEMENTS // width, 1))
    return 0
