"""Tables and pictures of the rows of `benchmarks.convergence`.

    python -m benchmarks.convergence --report

Methods are compared within a seed, since a seed gives all of them the same adapter and the same batches. A difference
is printed bold where a two-sided paired t-test over the seeds finds it at 5 %: with three seeds that asks for 2.5 times
their standard deviation, so what is not bold may still be there.
"""

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .convergence_methods import GROUPS, Point, label
from .convergence_timing import FILE as STEP_FILE
from .rows import ROOT, read_rows

FILE = "convergence.csv"
DOCS = ROOT / "docs"
# The table of a group stands there between <!-- convergence: GROUP, ADAPTER --> and <!-- end -->.
PAGE = DOCS / "convergence.md"
# Two-sided 5 % quantiles of Student's t, by degrees of freedom.
T_QUANTILES = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}

Rows = list[dict[str, str]]


@dataclass(frozen=True)
class Line:
    """One line of a table. losses: final validation loss by seed; None: not timed."""

    name: str
    drop_rate: float
    batch_size: int
    losses: dict[int, float]
    step_over_undropped: float | None
    backward_over_undropped: float | None
    rows: Rows
    is_control: bool


@dataclass(frozen=True)
class Difference:
    """Mean and standard deviation of a loss minus another's within each seed."""

    mean: float
    deviation: float
    num: int

    @property
    def is_real(self) -> bool:
        """Whether a two-sided paired t-test finds it at 5 %."""
        quantile = T_QUANTILES.get(self.num - 1, 1.96 if self.num > 1 else math.inf)
        return abs(self.mean) > quantile * self.deviation / math.sqrt(self.num)

    def __str__(self) -> str:
        text = f"{self.mean:+.3f}"
        return f"**{text}**" if self.is_real else text


def difference(losses: dict[int, float], of: dict[int, float]) -> Difference | None:
    """losses - of over the seeds that both have; None where there is none."""
    values = [losses[seed] - of[seed] for seed in sorted(losses.keys() & of.keys())]
    if not values:
        return None
    deviation = statistics.stdev(values) if len(values) > 1 else math.inf
    return Difference(statistics.mean(values), deviation, len(values))


def lines_of(group: str, adapter: str, rows: Rows, steps: Rows) -> list[Line]:
    """The group's lines, in its order: undropped first, smaller batches last. None where undropped has no row.

    Only rows with the task's steps and learning rate count.
    """
    task = GROUPS[group].task
    rows = [row for row in rows if row["group"] == group and int(row["seed"]) < FIRST_SWEEP_SEED]
    rows = [row for row in rows if int(row["steps"]) == task.steps]
    rows = [row for row in rows if float(row["learning_rate"]) == task.learning_rates.get(row["adapter"])]
    timed = [row for row in steps if row["group"] == group]
    dates = [row["date_utc"] for row in timed if row["adapter"] == adapter]
    timed = [row for row in timed if dates and row["date_utc"] == dates[-1]]
    undropped = [row for row in rows if (row["method"], row["adapter"]) == ("undropped", adapter)]
    sizes = {int(row["batch_size"]) for row in undropped}
    if task.batch_size not in sizes:
        return []
    points = [point for point in GROUPS[group].points if point.as_fast_as is None and point.batch_size is None]
    smaller = sorted((size for size in sizes if size < task.batch_size), reverse=True)
    points += [Point("undropped", batch_size=size) for size in smaller]
    lines = [_line(point, adapter, rows, timed, task.batch_size) for point in points]
    return [line for line in lines if line.losses]


FIRST_SWEEP_SEED = 100  # seeds from here on are for choosing settings, and stand in no table


def _line(point: Point, adapter: str, rows: Rows, timed: Rows, full_batch: int) -> Line:
    key = (point.adapter or adapter, point.method, point.drop_rate, point.batch_size or full_batch)
    chosen = [row for row in rows if _key(row) == key]
    is_control = point.method == "undropped" and key[0] == adapter
    step, backward = _undropped_cost(key, timed) if is_control else _cost(key, timed, adapter)
    return Line(
        name=label(point.method, point.drop_rate) + (f", {point.adapter}" if point.adapter else ""),
        drop_rate=point.drop_rate,
        batch_size=key[3],
        losses={int(row["seed"]): float(row["validation_loss"]) for row in chosen},
        step_over_undropped=step,
        backward_over_undropped=backward,
        rows=chosen,
        is_control=is_control,
    )


Key = tuple[str, str, float, int]


def _key(row: dict[str, str]) -> Key:
    return row["adapter"], row["method"], float(row["drop_rate"]), int(row["batch_size"])


def _cost(key: Key, timed: Rows, adapter: str) -> tuple[float | None, float | None]:
    """(step time, backward FLOPs) over undropped's at the full batch."""
    undropped = [row for row in timed if (row["method"], row["adapter"]) == ("undropped", adapter)]
    full = max(undropped, key=lambda row: int(row["batch_size"]), default=None)
    for row in timed:
        if full and _key(row) == key:
            backward = float(row["backward_gflop"]) / float(full["backward_gflop"])
            return float(row["step_over_undropped"]), backward
    return None, None


def _undropped_cost(key: Key, timed: Rows) -> tuple[float | None, float | None]:
    """The same of undropped at any batch size, on the lines between those that were measured."""
    adapter, method, _, batch_size = key
    sizes = {int(row["batch_size"]) for row in timed if (row["method"], row["adapter"]) == (method, adapter)}
    costs = [(size, *_cost((adapter, method, 0.0, size), timed, adapter)) for size in sorted(sizes)]
    for (low, *low_costs), (high, *high_costs) in itertools.pairwise(costs):
        if low <= batch_size <= high:
            share = (batch_size - low) / (high - low)
            step, flops = (a + share * (b - a) for a, b in zip(low_costs, high_costs, strict=True))
            return step, flops
    return None, None


def control_of(line: Line, lines: Sequence[Line]) -> Line | None:
    """The undropped line with the largest batch whose step takes no longer than this one's; None without one."""
    if line.is_control or line.step_over_undropped is None:
        return None
    limit = line.step_over_undropped + 1e-9
    fits = [c for c in lines if c.is_control and c.step_over_undropped and c.step_over_undropped <= limit]
    return max(fits, key=lambda control: control.batch_size, default=None)


def table(group: str, adapter: str, rows: Rows, steps: Rows) -> str:
    """The group's table, as Markdown; empty where there are no rows."""
    lines = lines_of(group, adapter, rows, steps)
    if not lines:
        return ""
    task, full = GROUPS[group].task, lines[0]
    published = {line.drop_rate: line for line in lines if line.name.startswith("published")}
    before = float(full.rows[0]["validation_before"])
    rates = {f"{float(row['learning_rate']):g} ({row['adapter']})": None for line in lines for row in line.rows}
    out = [
        f"{task.model}, {task.data}, {task.steps} steps of {task.batch_size} x {task.seq_len} bytes, learning rate "
        f"{', '.join(rates)}; validation loss {before:.3f} before.\n",
        "| method | batch | step time | backward FLOPs | validation loss | - undropped "
        "| - undropped in no more time (batch) | of published's gap closed | seeds |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for line in lines:
        control = control_of(line, lines)
        beside = None if control is None else difference(line.losses, control.losses)
        gap = None if line.name.startswith("undropped") else _gap_closed(line, full, published)
        beside_text = "" if beside is None or control is None else f"{beside} ({control.batch_size})"
        cells = [
            line.name,
            str(line.batch_size),
            _share(line.step_over_undropped),
            _share(line.backward_over_undropped),
            _mean_and_deviation(list(line.losses.values())),
            "" if line is full else str(difference(line.losses, full.losses) or ""),
            beside_text,
            "" if gap is None else f"{gap:.0%}",
            str(len(line.losses)),
        ]
        out.append(f"| {' | '.join(cells)} |")
    return "\n".join(out) + "\n"


def _gap_closed(line: Line, full: Line, published: dict[float, Line]) -> float | None:
    """Share of the gap between published DropBP at the same rate (or the group's only one) and undropped."""
    only = next(iter(published.values())) if len(published) == 1 else None
    peer = published.get(line.drop_rate, only)
    if peer is None or peer is line:
        return None
    gap, ours = difference(peer.losses, full.losses), difference(line.losses, full.losses)
    return None if gap is None or ours is None or gap.mean <= 0 else 1 - ours.mean / gap.mean


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
    colours = dict(zip((line.name for line in methods), plt.get_cmap("tab20").colors * 3, strict=False))
    figure, (curves, finals) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    full = lines[0]
    for line in [full, *methods]:
        means = [statistics.mean(values) for values in zip(*map(_train_curve, line.rows), strict=False)]
        places = [task.steps * (place + 0.5) / len(means) for place in range(len(means))]
        curves.plot(places, means, color=colours.get(line.name, "black"), linewidth=1.2, label=line.name)
        if line.step_over_undropped is not None and line is not full:
            times = [line.step_over_undropped] * len(line.losses)
            finals.plot(times, list(line.losses.values()), "o", color=colours[line.name], markersize=4, alpha=0.6)
            mean = statistics.mean(line.losses.values())
            finals.plot([times[0]], [mean], "D", color=colours[line.name], markersize=8, label=line.name)
    controls = sorted(
        (line for line in lines if line.is_control and line.step_over_undropped), key=lambda c: c.batch_size
    )
    finals.plot(
        [line.step_over_undropped for line in controls],
        [statistics.mean(line.losses.values()) for line in controls],
        "k.-",
        label="undropped, by batch size",
    )
    for line in controls:
        where: Any = (line.step_over_undropped, statistics.mean(line.losses.values()))
        finals.annotate(f" {line.batch_size}", where, fontsize=8, va="bottom")
    curves.set(xlabel="steps", ylabel="training loss, mean over seeds and windows")
    finals.set(xlabel="time of a step, of the undropped one", ylabel="validation loss at the end (dots: seeds)")
    for axes in (curves, finals):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    finals.legend(fontsize=8)
    figure.suptitle(
        f"{group}: {task.model}, {adapter}, {task.data}, {task.steps} steps", fontsize=11, x=0.01, ha="left"
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _train_curve(row: dict[str, str]) -> list[float]:
    return [float(value) for value in row["train_curve"].split(";")]


# ---- the page


def with_tables(page: str, rows: Rows, steps: Rows) -> str:
    """The page with every marked place filled from the rows."""
    parts = page.split("<!-- convergence: ")
    out = [parts[0]]
    for part in parts[1:]:
        name, _, rest = part.partition(" -->")
        _, end, after = rest.partition("<!-- end -->")
        group, _, adapter = name.partition(", ")
        if not end:
            raise ValueError(f"page: expected <!-- end --> after <!-- convergence: {name} -->, found none")
        out.append(f"{name} -->\n{table(group, adapter, rows, steps)}{end}{after}")
    return "<!-- convergence: ".join(out)


def write(folder: Path) -> int:
    """Write the tables into the page, draw a picture of every group, and print all tables."""
    rows, steps = read_rows(folder / FILE), read_rows(folder / STEP_FILE)
    for group, adapter in dict.fromkeys((row["group"], row["adapter"]) for row in rows):
        if (
            group in GROUPS
            and (GROUPS[group].points[0].adapter or adapter) == adapter
            and (text := table(group, adapter, rows, steps))
        ):
            print(f"{group}, {adapter}: {text}")
            draw(group, adapter, rows, steps, DOCS / f"convergence-{group}-{adapter}.png")
    PAGE.write_text(with_tables(PAGE.read_text(), rows, steps))
    return 0
