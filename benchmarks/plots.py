"""Pictures of benchmark rows.

    python -m benchmarks.plots --rows benchmarks/results --out benchmarks/results

bandwidth.png  share of copy bandwidth of every variant, by dtype and direction      (gated_residual_rms_norm.csv)
step.png       time and memory of a training step, by method and drop rate           (step.csv)

Of each point the newest row counts.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from .rows import RESULTS, read_rows

# One hue per variant in every picture: Okabe and Ito's palette, told apart by most colour-blind readers.
COLOURS = {
    "eager": "#999999",
    "aten": "#56B4E9",
    "compile": "#E69F00",
    "liger": "#CC79A7",
    "quack": "#F0E442",
    "undropped": "#999999",
    "published": "#E69F00",
    "ours": "#0072B2",
}
OUR_COLOURS = ("#0072B2", "#009E73", "#D55E00")  # of the package's own backends


def plot_bandwidth(rows: list[dict[str, str]], path: Path) -> None:
    """Share of copy bandwidth against size, one panel for each dtype and direction."""
    import matplotlib.pyplot as plt

    rows = [row for row in _newest(rows) if row["copy_fraction"]]
    dtypes = sorted({row["dtype"] for row in rows})
    directions = [d for d in ("fwd", "bwd", "fwd+bwd") if any(row["direction"] == d for row in rows)]
    sizes = sorted({_size(row) for row in rows}, key=lambda size: (size[0] * size[1], size))
    backends = _order(rows)
    figure, axes = plt.subplots(
        len(dtypes), len(directions), figsize=(4.2 * len(directions), 3.2 * len(dtypes)), squeeze=False, sharey=True
    )
    for line, dtype in zip(axes, dtypes, strict=True):
        for axis, direction in zip(line, directions, strict=True):
            for backend in backends:
                chosen = {
                    _size(row): float(row["copy_fraction"])
                    for row in rows
                    if (row["dtype"], row["direction"], row["backend"]) == (dtype, direction, backend)
                    and row["case"] == "weight frozen"
                }
                places = [place for place, size in enumerate(sizes) if size in chosen]
                heights = [100 * chosen[sizes[place]] for place in places]
                axis.plot(places, heights, "o-", color=_colour(backend, backends), label=backend, markersize=4)
            axis.axhline(100, color="black", linewidth=0.6, linestyle=":")
            axis.set_title(f"{direction}, {dtype}", fontsize=10)
            axis.set_xticks(range(len(sizes)), [f"{r}\nx {w}" for r, w in sizes], fontsize=7)
            axis.set_ylim(bottom=0)
            axis.grid(axis="y", alpha=0.3)
        line[0].set_ylabel("% of copy bandwidth")
    axes[0][0].legend(fontsize=8)
    figure.suptitle(f"gated_residual_rms_norm on {rows[0]['device']}, frozen weight (rows x width)", fontsize=11)
    _save(figure, path)


def plot_step(rows: list[dict[str, str]], path: Path) -> None:
    """Forward and backward time, and peak live bytes, of every method; dotted: the ideal."""
    import matplotlib.pyplot as plt

    methods = [(row["method"], float(row["drop_rate"]), row) for row in _newest(rows)]
    methods.sort(key=lambda entry: (entry[1], entry[0] == "ours"))
    labels = [name if not rate else f"{name}\n{rate:g}" for name, rate, _ in methods]
    colours = [COLOURS[name] for name, _, _ in methods]
    figure, (time_axis, memory_axis) = plt.subplots(1, 2, figsize=(12, 4.2))
    for place, (_, _, row) in enumerate(methods):
        forward, backward = float(row["forward_ms"]), float(row["backward_ms"])
        time_axis.bar(place, forward, color=colours[place])
        time_axis.bar(place, backward, bottom=forward, color=colours[place], alpha=0.45)
        _mark(time_axis, place, float(row["ideal_step_ms"]))
        memory_axis.bar(place, int(row["peak_live_bytes"]) / 2**20, color=colours[place])
        _mark(memory_axis, place, int(row["ideal_peak_bytes"]) / 2**20)
    time_axis.set_ylabel("ms a step: forward (dark), backward (light)")
    memory_axis.set_ylabel("peak live MiB")
    for axis in (time_axis, memory_axis):
        axis.set_xticks(range(len(labels)), labels, fontsize=8)
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
    newest = methods[0][2]
    figure.suptitle(
        f"{newest['model']}, LoRA, {newest['dtype']}, {newest['batch_size']} x {newest['seq_len']} tokens on "
        f"{newest['device']}; dotted: the ideal for the drop rate",
        fontsize=11,
    )
    _save(figure, path)


def main(arguments: list[str] | None = None) -> int:
    """Draw what there are rows for; 0 when anything was drawn."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, default=RESULTS, help="folder of the CSV files")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the pictures")
    options = parser.parse_args(arguments)
    import matplotlib

    matplotlib.use("Agg")
    options.out.mkdir(parents=True, exist_ok=True)
    num_drawn = 0
    pictures = (("gated_residual_rms_norm", "bandwidth", plot_bandwidth), ("step", "step", plot_step))
    for stem, name, draw in pictures:
        if rows := read_rows(options.rows / f"{stem}.csv"):
            draw(rows, options.out / f"{name}.png")
            print(options.out / f"{name}.png")
            num_drawn += 1
    return 0 if num_drawn else 1


def _newest(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """The newest row of each point on the device, and of the model, of the newest row."""
    keys = ("case", "direction", "backend", "dtype", "rows", "width", "method", "drop_rate")
    rows = [row for row in rows if all(row.get(name) == rows[-1].get(name) for name in ("device", "model"))]
    return list({tuple(row.get(key) for key in keys): row for row in rows}.values())


def _size(row: dict[str, str]) -> tuple[int, int]:
    return int(row["rows"]), int(row["width"])


def _order(rows: list[dict[str, str]]) -> list[str]:
    """Backends, ours last and so drawn on top."""
    names = dict.fromkeys(row["backend"] for row in rows)
    return sorted(names, key=lambda name: name not in COLOURS)


def _colour(backend: str, backends: list[str]) -> str:
    ours = [name for name in backends if name not in COLOURS]
    return COLOURS.get(backend) or OUR_COLOURS[ours.index(backend)]


def _mark(axis: Any, place: int, height: float) -> None:
    axis.hlines(height, place - 0.45, place + 0.45, color="black", linestyle=":", linewidth=1.5)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    sys.exit(main())
