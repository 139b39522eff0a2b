"""Two pictures of the newest rows in a folder.

    python -m benchmarks.plots --rows benchmarks/results --out benchmarks/results

bandwidth.png  share of copy bandwidth of every variant of gated_residual_rms_norm, as in docs/kernels.md
step.png       time and memory of a training step, by method and drop rate           (step.csv)
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from . import page
from .rows import RESULTS, read_rows

COLOURS = {"undropped": "#999999", "published": "#E69F00", "ours": "#0072B2"}


def draw_bandwidth(rows: Path, path: Path) -> bool:
    """The picture of the norm on the device of its newest row; whether there is one."""
    op = "gated_residual_rms_norm"
    if not (found := read_rows(rows / f"{op}.csv")):
        return False
    where = op, found[-1]["device"]
    points = {point: each for point, each in page.read_points(rows).items() if (point.op, point.device) == where}
    page.draw({point: each for point, each in points.items() if page.has_bandwidth(each)}, path)
    return True


def draw_step(rows: Path, path: Path) -> bool:
    """Forward and backward time, and peak live bytes, of every method; dotted: the ideal. Whether there are rows."""
    import matplotlib.pyplot as plt

    if not (found := read_rows(rows / "step.csv")):
        return False
    newest = found[-1]
    found = [row for row in found if (row["device"], row["model"]) == (newest["device"], newest["model"])]
    methods = list({(float(row["drop_rate"]), row["method"] == "ours", row["method"]): row for row in found}.items())
    methods.sort(key=lambda entry: entry[0])
    labels = [name if not rate else f"{name}\n{rate:g}" for (rate, _, name), _ in methods]
    figure, (time_axis, memory_axis) = plt.subplots(1, 2, figsize=(12, 4.2))
    for place, ((_, _, name), row) in enumerate(methods):
        forward, backward, colour = float(row["forward_ms"]), float(row["backward_ms"]), COLOURS[name]
        time_axis.bar(place, forward, color=colour)
        time_axis.bar(place, backward, bottom=forward, color=colour, alpha=0.45)
        _mark(time_axis, place, float(row["ideal_step_ms"]))
        memory_axis.bar(place, int(row["peak_live_bytes"]) / 2**20, color=colour)
        _mark(memory_axis, place, int(row["ideal_peak_bytes"]) / 2**20)
    time_axis.set_ylabel("ms a step: forward (dark), backward (light)")
    memory_axis.set_ylabel("peak live MiB")
    for axis in (time_axis, memory_axis):
        axis.set_xticks(range(len(labels)), labels, fontsize=8)
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
    figure.suptitle(
        f"{newest['model']}, LoRA, {newest['dtype']}, {newest['batch_size']} x {newest['seq_len']} tokens on "
        f"{newest['device']}; dotted: the ideal for the drop rate",
        fontsize=11,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    return True


def main(arguments: list[str] | None = None) -> int:
    """Draw what there are rows for; 0 when anything was drawn."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, default=RESULTS, help="folder of the CSV files")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the pictures")
    options = parser.parse_args(arguments)
    import matplotlib

    matplotlib.use("Agg")
    options.out.mkdir(parents=True, exist_ok=True)
    is_drawn = False
    for name, draw in (("bandwidth", draw_bandwidth), ("step", draw_step)):
        if draw(options.rows, options.out / f"{name}.png"):
            print(options.out / f"{name}.png")
            is_drawn = True
    return 0 if is_drawn else 1


def _mark(axis: Any, place: int, height: float) -> None:
    axis.hlines(height, place - 0.45, place + 0.45, color="black", linestyle=":", linewidth=1.5)


if __name__ == "__main__":
    sys.exit(main())
