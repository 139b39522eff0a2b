"""What gpu_check.py demands of a GPU, judged from the rows and the counts of its run.

Imports nothing but the standard library, as gpu_check.py does.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Share of the copy bandwidth measured in the same run, bfloat16, width of at least 4096 and 8 M elements.
FORWARD, BACKWARD = 0.88, 0.70


@dataclass
class Target:
    """A number and the bound it must keep; ok is None where it could not be judged."""

    name: str
    value: float | None
    bound: float
    ok: bool | None


def judged(out: Path, parts: Sequence[str], counts: list[dict[str, Any]], is_dry: bool) -> list[Target]:
    """The targets of what `parts` ran, from the rows in `out` and the counts of the boundary."""
    costs = [
        c["saved_bytes"] + c["backward_kernels"] + c["backward_allocated_bytes"] for c in counts if c["must_be_free"]
    ]
    worst = max(costs, default=None)
    if not all(
        c["forward_kernels"] for c in counts
    ):  # no add without one: the profiler is blind, and zeros say nothing
        worst = None
    name = "dropped boundary: kernels + bytes saved + bytes allocated in backward"
    targets = []
    if "boundary" in parts:
        targets.append(Target(name, worst, 0, None if worst is None else worst == 0))
    if "benchmarks" in parts:
        targets += _bandwidths(out)
    if "step" in parts:
        targets += _steps(out, is_dry)
    return targets


def _bandwidths(out: Path) -> list[Target]:
    norms = _rows(out / "gated_residual_rms_norm.csv")
    layer_norms = _rows(out / "gated_residual_layer_norm.csv")
    adds = _rows(out / "gated_residual_add.csv")
    return [
        _bandwidth("fused forward", norms, "fwd", "weight frozen", FORWARD),
        _bandwidth("fused backward, weight frozen", norms, "bwd", "weight frozen", BACKWARD),
        _bandwidth("fused backward, weight trained", norms, "bwd", "weight trained", BACKWARD),
        _bandwidth("fused LayerNorm forward", layer_norms, "fwd", "weight frozen", FORWARD),
        _bandwidth("fused LayerNorm backward, weight frozen", layer_norms, "bwd", "weight frozen", BACKWARD),
        _bandwidth("add", adds, "fwd", "sum", FORWARD),
    ]


def _steps(out: Path, is_dry: bool) -> list[Target]:
    targets = []
    steps = [row for row in _rows(out / "step.csv") if row["method"] == "ours"]
    for rate in ("0.5", "0.75", "0.875"):
        row = next((row for row in reversed(steps) if row["drop_rate"] == rate), None)
        over = None if row is None else float(row["step_over_ideal"])
        ok = None if over is None or is_dry or rate != "0.75" else over <= 1.05
        if rate == "0.75":
            targets.append(Target("step at 0.75 over forward + 0.25 backward", over, 1.05, ok))
        peak = None if row is None else int(row["peak_live_bytes"]) / int(row["ideal_peak_bytes"])
        ok = None if peak is None or is_dry else peak <= 1
        targets.append(Target(f"peak live bytes at {rate} over the ideal", peak, 1.0, ok))
    return targets


def _bandwidth(what: str, rows: list[dict[str, str]], direction: str, case: str, bound: float) -> Target:
    """The smallest share of copy bandwidth among this package's rows that the target speaks of."""
    shares = [
        float(row["copy_fraction"])
        for row in rows
        if row["backend"] in ("cuda", "triton")
        and (row["direction"], row["case"], row["dtype"]) == (direction, case, "bfloat16")
        and int(row["width"]) >= 4096
        and int(row["rows"]) * int(row["width"]) >= 1 << 23
    ]
    worst = min(shares, default=None)
    return Target(f"{what}: share of copy bandwidth", worst, bound, None if worst is None else worst >= bound)


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
