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
    targets = []
    if "boundary" in parts:
        targets.append(_boundary(counts))
    if "benchmarks" in parts:
        targets += _bandwidths(out)
    if "step" in parts:
        targets += _steps(out, is_dry)
    return targets


def _boundary(counts: list[dict[str, Any]]) -> Target:
    """The most that a dropped boundary costs; not judged where a forward shows no kernel: the profiler saw nothing."""
    parts = ("saved_bytes", "backward_kernels", "backward_allocated_bytes")
    costs = [sum(each[part] for part in parts) for each in counts if each["must_be_free"]]
    is_seen = all(each["forward_kernels"] for each in counts)
    name = "dropped boundary: kernels + bytes saved + bytes allocated in backward"
    return _at_most(name, max(costs, default=None) if is_seen else None, 0)


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
    newest = {row["drop_rate"]: row for row in _rows(out / "step.csv") if row["method"] == "ours"}
    over = float(newest["0.75"]["step_over_ideal"]) if "0.75" in newest else None
    targets = [_at_most("step at 0.75 over forward + 0.25 backward", over, 1.05, is_judged=not is_dry)]
    for rate in ("0.5", "0.75", "0.875"):
        row = newest.get(rate)
        peak = int(row["peak_live_bytes"]) / int(row["ideal_peak_bytes"]) if row else None
        targets.append(_at_most(f"peak live bytes at {rate} over the ideal", peak, 1.0, is_judged=not is_dry))
    return targets


def _at_most(name: str, value: float | None, bound: float, *, is_judged: bool = True) -> Target:
    return Target(name, value, bound, value <= bound if is_judged and value is not None else None)


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
