"""Does it still learn? Final validation loss of every method, at equal steps, over several seeds.

    python -m benchmarks.convergence --group targets --adapter lora --seeds 0 1 2
    python -m benchmarks.convergence --group targets --adapter lora --time    step times of the group, in turns
    python -m benchmarks.convergence --report                                 tables and pictures from the rows

One row is appended for each finished run; runs that have a row are skipped, so an interrupted command goes on where it
was. A seed decides the initial adapter, the order of the batches and the plans, alike for all methods: methods are
compared within a seed. How fast a run was is not recorded, so that runs may share a machine: step times come from
--time, which lets all methods of a group take turns.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from dropbp_kernels.cli.training import Run

from . import convergence_data, convergence_report, convergence_timing
from .convergence_methods import GROUPS, Group, Point, Task, group_of, label
from .convergence_runs import make_run
from .rows import RESULTS, Machine, append_rows, as_written, machine, read_rows

FILE = "convergence.csv"
NUM_CURVE_POINTS = 20
VALIDATE_AT = (0.5, 1.0)  # shares of the steps
KEY = ("group", "adapter", "method", "drop_rate", "batch_size", "steps", "learning_rate", "seed")


@dataclass(frozen=True)
class ConvergenceRow(Machine):
    """One finished run. results/README.md says what each column means."""

    group: str
    model: str
    data: str
    seq_len: int
    adapter: str
    method: str
    drop_rate: float
    batch_size: int
    steps: int
    learning_rate: float
    seed: int
    num_trained: int
    flops_kept: float | None
    validation_before: float
    validation_loss: float
    train_loss: float
    validation_parts: str
    validation_curve: str
    train_curve: str


@dataclass(frozen=True)
class Wanted:
    """A run that the command line asks for."""

    group: str
    adapter: str
    task: Task
    point: Point
    batch_size: int
    learning_rate: float
    seed: int

    def key(self) -> tuple[str, ...]:
        values = {**asdict(self.point), **vars(self), "steps": self.task.steps}
        return tuple(as_written(values[name]) for name in KEY)

    def __str__(self) -> str:
        size = f"batch {self.batch_size}, learning rate {self.learning_rate:g}, seed {self.seed}"
        return f"{self.group}, {self.adapter}: {label(self.point.method, self.point.drop_rate)}, {size}"


def wanted_runs(
    group: Group, adapter: str, seeds: Sequence[int], learning_rates: Sequence[float], recorded_as: str
) -> Iterator[Wanted]:
    """All seeds' runs, seed by seed. learning_rates: of a sweep, in place of the points' and the task's."""
    task = group.task
    for seed, swept in itertools.product(seeds, learning_rates or [None]):
        for point in group.points:
            own = point.adapter or adapter
            learning_rate = swept or point.learning_rate or task.learning_rates[own]
            yield Wanted(recorded_as, own, task, point, point.batch_size or task.batch_size, learning_rate, seed)


def train(wanted: Wanted, validation_before: dict[str, float], where: Machine) -> ConvergenceRow:
    """Run to the end. validation_before: loss of the untrained model by task, filled here: no adapter changes it."""
    from tqdm import tqdm

    task, point = wanted.task, wanted.point
    run = make_run(task, wanted.adapter, point, wanted.batch_size, wanted.learning_rate, wanted.seed)
    before = validation_before.get(wanted.group)
    if before is None:
        before = validation_before[wanted.group] = run.validate(0)
    curve = [(0, before)]
    validations = {round(share * task.steps) for share in VALIDATE_AT}
    for step in tqdm(range(task.steps), desc=str(wanted), leave=False, mininterval=5, disable=None):
        run.step(step)
        if step + 1 in validations:
            curve.append((step + 1, run.validate(step + 1)))
    losses = run.history.train_loss
    return ConvergenceRow(
        **asdict(where),
        group=wanted.group,
        model=task.model,
        data=task.data,
        seq_len=task.seq_len,
        adapter=wanted.adapter,
        method=point.method,
        drop_rate=point.drop_rate,
        batch_size=wanted.batch_size,
        steps=task.steps,
        learning_rate=wanted.learning_rate,
        seed=wanted.seed,
        num_trained=sum(parameter.numel() for parameter in run.parameters.values()),
        flops_kept=None if run.handler is None else run.handler.report()["flops_kept"],
        validation_before=before,
        validation_loss=curve[-1][1],
        train_loss=_mean(losses[-max(1, len(losses) // 10) :]),
        validation_parts=";".join(f"{source}:{loss:.5g}" for source, loss in validate_parts(run)),
        validation_curve=";".join(f"{step}:{loss:.5g}" for step, loss in curve),
        train_curve=";".join(f"{loss:.4g}" for loss in window_means(losses, NUM_CURVE_POINTS)),
    )


@torch.no_grad()
def validate_parts(run: Run) -> Iterator[tuple[str, float]]:
    """(source, validation loss) of each source of a mixture; rows of a source have one length, so means are plain."""
    if not isinstance(run.data, convergence_data.MixtureData):
        return
    run.model.eval()
    for source in convergence_data.SOURCES:
        batches = run.data.mixture.validation_batches(source, run.settings.batch_size)
        yield source, _mean([loss for ids, labels in batches for loss in [run.loss(ids, labels).item()] * len(ids)])
    run.model.train()


def window_means(values: Sequence[float], num: int) -> list[float]:
    """Means over `num` windows of nearly equal length, in order."""
    num = min(num, len(values))
    ends = [round(place * len(values) / num) for place in range(num + 1)]
    return [_mean(values[start:end]) for start, end in itertools.pairwise(ends)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.convergence", description=__doc__.splitlines()[0])
    parser.add_argument("--group", choices=GROUPS)
    parser.add_argument("--adapter", choices=convergence_report.ADAPTERS, default="lora")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", metavar="POINT", help='only these points of the group: "published 0.75"')
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[], help="in place of the task's: a sweep")
    parser.add_argument("--time", action="store_true", help="time the group's steps, train nothing")
    parser.add_argument("--rounds", type=int, default=15, help="of --time: steps of every method, in turns")
    parser.add_argument("--report", action="store_true", help="write tables and pictures, train nothing")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV files")
    parser.add_argument("--scale", choices=("full", "tiny"), default="full", help="tiny: to see every code path run")
    options = parser.parse_args(arguments)
    if options.report:
        return convergence_report.write(options.out)
    if options.group is None:
        parser.error("--group: expected one, got none")
    group = group_of(options.group, options.scale)
    if unknown := set(options.only or ()) - {str(point) for point in group.points}:
        parser.error(f"--only: expected some of {', '.join(map(str, group.points))}, got {', '.join(sorted(unknown))}")
    if options.only:
        group = replace(group, points=tuple(point for point in group.points if str(point) in options.only))
    recorded_as = group.rows_of or options.group
    if options.time:
        return convergence_timing.run(recorded_as, group, options.adapter, options.out, options.rounds)
    runs = list(wanted_runs(group, options.adapter, options.seeds, options.learning_rates, recorded_as))
    done = {tuple(row[name] for name in KEY) for row in read_rows(options.out / FILE)}
    left = [run for run in runs if run.key() not in done]
    print(f"{options.group}, {options.adapter}: {len(left)} of {len(runs)} runs to do", flush=True)
    validation_before: dict[str, float] = {}
    for number, wanted in enumerate(left, 1):
        start, where = time.process_time(), machine(torch.device("cpu"))
        row = train(wanted, validation_before, where)
        append_rows(options.out / FILE, [row])
        seconds = time.process_time() - start
        print(f"{number}/{len(left)} {wanted}: {row.validation_loss:.4f} ({seconds:.0f} s of CPU)", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
