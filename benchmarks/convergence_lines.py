"""The lines of a table of `benchmarks.convergence`, from its rows: losses by seed, step times, how two lines differ."""

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from .convergence_methods import GROUPS, Point, Task, is_simulated

FIRST_SWEEP_SEED = 100  # seeds from here on are for choosing settings, and stand in no table
# Two-sided 5 % quantiles of Student's t, by degrees of freedom.
T_QUANTILES = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}

Rows = list[dict[str, str]]


@dataclass(frozen=True)
class Line:
    """One line of a table. losses: final validation loss by seed; shares of the undropped step: None if not timed.

    timed_on: the machine of these shares; None where not timed, or on the lines between two times.
    """

    point: Point
    batch_size: int
    losses: dict[int, float]
    step_over_undropped: float | None
    backward_over_undropped: float | None
    rows: Rows
    is_control: bool
    timed_on: str | None


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
    """The lines that have rows, in the group's order. None where undropped at the full batch has no row.

    Only rows with the task's steps and the point's learning rate count, of each seed the newest; so of step times.
    """
    task, points = GROUPS[group].task, GROUPS[group].points
    recorded_as = GROUPS[group].rows_of or group
    rows = [row for row in rows if row["group"] == recorded_as and int(row["seed"]) < FIRST_SWEEP_SEED]
    rows = [row for row in rows if int(row["steps"]) == task.steps]
    timed = _newest([row for row in steps if row["group"] == recorded_as], (adapter, "undropped", 0.0, task.batch_size))
    lines = [_line(point, adapter, rows, timed, task) for point in points]
    lines = [line for line in lines if line.losses]
    return lines if lines and lines[0].point == points[0] else []


def _line(point: Point, adapter: str, rows: Rows, timed: dict["Key", dict[str, str]], task: Task) -> Line:
    key = (point.adapter or adapter, point.method, point.drop_rate, point.batch_size or task.batch_size)
    learning_rate = point.learning_rate or task.learning_rates.get(key[0])
    chosen = [row for row in rows if _key(row) == key and float(row["learning_rate"]) == learning_rate]
    newest = {int(row["seed"]): row for row in chosen}
    is_control = point.method == "undropped" and key[0] == adapter
    full = (adapter, "undropped", 0.0, task.batch_size)
    step, backward = _undropped_cost(key, timed, full) if is_control else _cost(key, timed, full)
    if is_simulated(point.method, point.drop_rate):
        _, backward = _cost((key[0], "token", *key[2:]), timed, full)
    return Line(
        point=point,
        batch_size=key[3],
        losses={seed: float(row["validation_loss"]) for seed, row in newest.items()},
        step_over_undropped=step,
        backward_over_undropped=backward,
        rows=list(newest.values()),
        is_control=is_control,
        timed_on=_machine(timed[key]) if key in timed else None,
    )


def _machine(row: dict[str, str]) -> str:
    return f"{row['device']}, {row['threads']} thread" + "s" * (row["threads"] != "1")


Key = tuple[str, str, float, int]


def _key(row: dict[str, str]) -> Key:
    return row["adapter"], row["method"], float(row["drop_rate"]), int(row["batch_size"])


def _newest(timed: Rows, full: Key) -> dict[Key, dict[str, str]]:
    """The newest row of each point, of timings whose full batch was that of `full`."""
    whole = {row["date_utc"] for row in timed if _key(row) == full and float(row["step_over_undropped"]) == 1.0}
    return {_key(row): row for row in timed if row["date_utc"] in whole}


def _cost(key: Key, timed: dict[Key, dict[str, str]], full: Key) -> tuple[float | None, float | None]:
    """(step time, backward FLOPs) over undropped's at the full batch."""
    if key not in timed:
        return None, None
    backward = float(timed[key]["backward_gflop"]) / float(timed[full]["backward_gflop"])
    return float(timed[key]["step_over_undropped"]), backward


def _undropped_cost(key: Key, timed: dict[Key, dict[str, str]], full: Key) -> tuple[float | None, float | None]:
    """The same of undropped at any batch size, on the lines between those that were measured."""
    batch_size = key[3]
    sizes = sorted(size for *other, size in timed if other == list(key[:3]))
    costs = [(size, *_cost((*key[:3], size), timed, full)) for size in sizes]
    for (low, *low_costs), (high, *high_costs) in itertools.pairwise(costs):
        if low <= batch_size <= high:
            share = (batch_size - low) / (high - low)
            step, flops = (a + share * (b - a) for a, b in zip(low_costs, high_costs, strict=True))
            return step, flops
    return None, None


SAME_BACKWARD = 0.03  # shares of the undropped backward that differ by less count as the same


def control_in_time(line: Line, lines: Sequence[Line]) -> Line | None:
    """The undropped line with the largest batch whose step takes no longer than this one's; None without one."""
    if line.is_control or line.step_over_undropped is None:
        return None
    limit = line.step_over_undropped + 1e-9
    fits = [c for c in lines if c.is_control and c.step_over_undropped and c.step_over_undropped <= limit]
    return max(fits, key=lambda control: control.batch_size, default=None)


def control_in_backward(line: Line, lines: Sequence[Line]) -> Line | None:
    """The undropped line whose backward FLOPs are the same; None without one."""
    share = line.backward_over_undropped
    if line.is_control or share is None:
        return None
    distances = {c.batch_size: abs((c.backward_over_undropped or 0.0) - share) for c in lines if c.is_control}
    controls = [c for c in lines if c.is_control and distances[c.batch_size] < SAME_BACKWARD]
    return min(controls, key=lambda control: distances[control.batch_size], default=None)


def published_beside(line: Line, lines: Sequence[Line]) -> Line | None:
    """The line of published DropBP that this one is compared with; None without one."""
    rate = line.point.drop_rate if line.point.published_rate is None else line.point.published_rate
    found = [other for other in lines if other.point == Point("published", rate) and other is not line]
    return None if line.is_control or not found else found[0]
