"""Tables and pictures of the rows of `benchmarks.convergence`.

    python -m benchmarks.convergence --report

Methods are compared within a seed, since a seed gives all of them the same adapter and the same batches. A difference
is printed bold where a two-sided paired t-test over the seeds finds it at 5 %: with three seeds that asks for 2.5 times
their standard deviation, so what is not bold may still be there.
"""

import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import convergence_gradients
from .convergence_lines import (
    Line,
    Rows,
    control_in_backward,
    control_in_time,
    difference,
    lines_of,
    published_beside,
)
from .convergence_methods import GROUPS
from .convergence_timing import FILE as STEP_FILE
from .rows import ROOT, read_rows

FILE = "convergence.csv"
ADAPTERS = ("lora", "full", "paca")
DOCS = ROOT / "docs"
# The table of a group stands there between <!-- convergence: GROUP, ADAPTER --> and <!-- end -->.
PAGE = DOCS / "convergence.md"


def table(group: str, adapter: str, rows: Rows, steps: Rows) -> str:
    """The group's table, as Markdown; empty where there are no rows."""
    lines = lines_of(group, adapter, rows, steps)
    if not lines:
        return ""
    task, full = GROUPS[group].task, lines[0]
    before = float(full.rows[0]["validation_before"])
    rates = {f"{float(row['learning_rate']):g} ({row['adapter']})": None for line in lines for row in line.rows}
    machines = dict.fromkeys(line.timed_on for line in lines if line.timed_on)
    timed_on = f"; step times on {' and '.join(machines)}" if machines else ""
    sources = list(_by_source(full))
    columns = ["method", "batch", "step time", "backward FLOPs", "validation loss", "vs undropped"]
    columns += ["vs undropped, same time (batch)", "vs undropped, same backward (batch)"]
    columns += [*(sources or ["vs published (gap closed)"]), "seeds"]
    out = [
        f"{task.model}, {task.data}, {task.steps} steps of {task.batch_size} x {task.seq_len} bytes, learning rate "
        f"{', '.join(rates)}; validation loss {before:.3f} before{timed_on}.\n",
        f"| {' | '.join(columns)} |",
        f"|---|{'--:|' * (len(columns) - 1)}",
    ]
    for line in lines:
        cells = [
            line.point.name,
            str(line.batch_size),
            _share(line.step_over_undropped),
            _share(line.backward_over_undropped),
            _mean_and_deviation(list(line.losses.values())),
            "" if line is full else str(difference(line.losses, full.losses) or ""),
            _beside(line, control_in_time(line, lines)),
            _beside(line, control_in_backward(line, lines)),
            *([f"{loss:.3f}" for loss in _by_source(line).values()] or [_beside_published(line, full, lines)]),
            str(len(line.losses)),
        ]
        out.append(f"| {' | '.join(cells)} |")
    return "\n".join(out) + "\n"


def _beside(line: Line, control: Line | None) -> str:
    found = None if control is None else difference(line.losses, control.losses)
    return "" if found is None or control is None else f"{found} ({control.batch_size})"


def _beside_published(line: Line, full: Line, lines: Sequence[Line]) -> str:
    """The difference to published DropBP, and which share of published's own distance to undropped it is."""
    published = published_beside(line, lines)
    found = None if published is None else difference(line.losses, published.losses)
    gap = None if published is None else difference(published.losses, full.losses)
    if found is None or gap is None:
        return ""
    return f"{found} ({-found.mean / gap.mean:.0%})" if gap.mean > 0 else str(found)


def _by_source(line: Line) -> dict[str, float]:
    """Mean loss by source, where the data are a mixture."""
    parts = [part.split(":") for row in line.rows for part in row.get("validation_parts", "").split(";") if part]
    names = dict.fromkeys(name for name, _ in parts)
    return {name: statistics.mean(float(loss) for other, loss in parts if other == name) for name in names}


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _mean_and_deviation(values: Sequence[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"


# ---- pictures


def draw(group: str, adapter: str, rows: Rows, steps: Rows, path: Path) -> None:
    """Training loss against steps, and final validation loss against the time of a step; every seed is a dot."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = lines_of(group, adapter, rows, steps)
    task = GROUPS[group].task
    methods = [line for line in lines if not line.is_control]
    colours = dict(zip((line.point.name for line in methods), plt.get_cmap("tab20").colors * 3, strict=False))
    figure, (curves, finals) = plt.subplots(1, 2, figsize=(15, 5), layout="constrained")
    full = lines[0]
    for line in [full, *methods]:
        means = [statistics.mean(values) for values in zip(*map(_train_curve, line.rows), strict=False)]
        places = [task.steps * (place + 0.5) / len(means) for place in range(len(means))]
        curves.plot(places, means, color=colours.get(line.point.name, "black"), linewidth=1.2, label=line.point.name)
        if line.step_over_undropped is not None and line is not full:
            times = [line.step_over_undropped] * len(line.losses)
            finals.plot(times, list(line.losses.values()), "o", color=colours[line.point.name], markersize=4, alpha=0.6)
            mean = statistics.mean(line.losses.values())
            finals.plot([times[0]], [mean], "D", color=colours[line.point.name], markersize=8)
    controls = sorted(
        (line for line in lines if line.is_control and line.step_over_undropped), key=lambda c: c.batch_size
    )
    finals.plot(
        [line.step_over_undropped for line in controls],
        [statistics.mean(line.losses.values()) for line in controls],
        "k.-",
        label="undropped, by batch size (right)",
    )
    for line in controls:
        where: Any = (line.step_over_undropped, statistics.mean(line.losses.values()))
        finals.annotate(f" {line.batch_size}", where, fontsize=8, va="bottom")
    curves.set(xlabel="steps", ylabel="training loss, mean over seeds and windows")
    finals.set(xlabel="time of a step, of the undropped one", ylabel="validation loss at the end (dots: seeds)")
    for axes in (curves, finals):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize=8)
    figure.suptitle(
        f"{group}: {task.model}, {adapter}, {task.data}, {task.steps} steps", fontsize=11, x=0.01, ha="left"
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _train_curve(row: dict[str, str]) -> list[float]:
    return [float(value) for value in row["train_curve"].split(";")]


# ---- the page


def with_tables(page: str, rows: Rows, steps: Rows, gradients: Rows) -> str:
    """The page with every marked place filled from the rows: the table of a group, or "gradients" of a group."""
    parts = page.split("<!-- convergence: ")
    out = [parts[0]]
    for part in parts[1:]:
        name, _, rest = part.partition(" -->")
        _, end, after = rest.partition("<!-- end -->")
        group, _, adapter = name.partition(", ")
        if not end:
            raise ValueError(f"page: expected <!-- end --> after <!-- convergence: {name} -->, found none")
        if group == "gradients":
            text = convergence_gradients.table(gradients, adapter)
        else:
            text = table(group, adapter, rows, steps)
        out.append(f"{name} -->\n{text}{end}{after}")
    return "<!-- convergence: ".join(out)


def read_all(folder: Path) -> tuple[Rows, Rows, Rows]:
    """Losses, step times, gradients."""
    rows, steps, gradients = (read_rows(folder / file) for file in (FILE, STEP_FILE, convergence_gradients.FILE))
    return rows, steps, gradients


def write(folder: Path) -> int:
    """Write the tables into the page, draw the pictures that it shows, and print all tables that have rows."""
    rows, steps, gradients = read_all(folder)
    page = with_tables(PAGE.read_text(), rows, steps, gradients)
    for group, adapter in itertools.product(GROUPS, ADAPTERS):
        own = GROUPS[group].points[0].adapter
        if own in (None, adapter) and (text := table(group, adapter, rows, steps)):
            print(f"{group}, {adapter}: {text}")
            if (name := f"convergence-{group}-{adapter}.png") in page:
                draw(group, adapter, rows, steps, DOCS / name)
    PAGE.write_text(page)
    return 0
