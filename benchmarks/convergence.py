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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dropbp_kernels import apply_dropbp
from dropbp_kernels.cli import builtin, models
from dropbp_kernels.cli.settings import Settings
from dropbp_kernels.cli.training import Run
from dropbp_kernels.coreset import CoresetSelector

from . import convergence_data
from .convergence_methods import GROUPS, METHODS, Group, Point, Task, group_of, label
from .rows import RESULTS, Machine, append_rows, machine, read_rows

FILE = "convergence.csv"
NUM_CURVE_POINTS = 20
VALIDATE_AT = (0.5, 1.0)  # shares of the steps
PACA_RANK = 16  # 221,184 trained parameters of the built-in model; LoRA of rank 8 has 217,088
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
        return tuple(_text(values[name]) for name in KEY)

    def __str__(self) -> str:
        size = f"batch {self.batch_size}, learning rate {self.learning_rate:g}, seed {self.seed}"
        return f"{self.group}, {self.adapter}: {label(self.point.method, self.point.drop_rate)}, {size}"


def wanted_runs(
    group_name: str,
    group: Group,
    adapter: str,
    seeds: Sequence[int],
    learning_rates: Sequence[float],
    timed: Sequence[dict[str, str]],
) -> Iterator[Wanted]:
    """All seeds' runs, seed by seed. A point whose batch size waits for a timing that is not there is left out."""
    for seed, place in itertools.product(seeds, range(len(learning_rates) or 1)):
        seen = set()
        for point in group.points:
            batch_size = batch_size_of(point, group.task, group_name, adapter, timed)
            if batch_size is None:
                print(f"{group_name}, {adapter}: {point} waits for a timing", flush=True)
                continue
            own = point.adapter or adapter
            learning_rate = learning_rates[place] if learning_rates else group.task.learning_rates[own]
            run = Wanted(group_name, own, group.task, point, batch_size, learning_rate, seed)
            if run.key() not in seen:  # two methods may be as fast as the same smaller batch
                seen.add(run.key())
                yield run


def batch_size_of(point: Point, task: Task, group: str, adapter: str, timed: Sequence[dict[str, str]]) -> int | None:
    """The point's batch size; None where it follows from a timing that is not among the rows `timed`."""
    if point.as_fast_as is None:
        return point.batch_size or task.batch_size
    method, rate = point.as_fast_as
    for row in reversed(timed):
        if (row["group"], row["adapter"], row["method"], float(row["drop_rate"])) == (group, adapter, method, rate):
            return max(1, round(float(row["undropped_batch"])))
    return None


def settings_of(task: Task, adapter: str, learning_rate: float, seed: int) -> Settings:
    folder = builtin.ensure_pretrained(task.recipe, torch.device("cpu"))
    return Settings(
        model=str(folder),
        data=task.data,
        adapter="lora" if adapter == "lora" else "full",
        steps=task.steps,
        batch_size=task.batch_size,
        seq_len=task.seq_len,
        learning_rate=learning_rate,
        dtype="float32",
        device="cpu",
        seed=seed,
        compare=False,
    )


def load(task: Task, seed: int) -> Any:
    return convergence_data.load(task.data, task.seq_len, seed)


def with_paca(model: nn.Module, seed: int) -> nn.Module:
    """The model with PaCA on all linear layers, of about as many trained parameters as the command line's LoRA."""
    from peft import get_peft_model

    from dropbp_kernels.paca import PacaConfig

    config = PacaConfig(r=PACA_RANK, alpha=64, target_modules="all-linear", seed=seed, task_type="CAUSAL_LM")
    return get_peft_model(model, config).train()


class CoresetRun(Run):
    """A run whose steps train on a part of each batch, chosen inside the step so that it counts into its time."""

    def __init__(self, *args: Any, options: dict[str, Any]):
        super().__init__(*args)
        seed = self.settings.seed
        self.selector = CoresetSelector(self.model, keep=0.5, sources=self.data.counts, seed=seed, **options)

    def loss(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        if self.model.training:
            batch, _ = self.selector.subset({"input_ids": input_ids, "labels": labels}, self.data.sources)
            input_ids, labels = batch["input_ids"], batch["labels"]
        return super().loss(input_ids, labels)


def make_run(task: Task, adapter: str, point: Point, batch_size: int, learning_rate: float, seed: int) -> Run:
    """A model patched by the point's method, before its first step."""
    settings, data = settings_of(task, adapter, learning_rate, seed), load(task, seed)
    model = models.load_model(settings, data)
    if adapter == "paca":
        model = with_paca(model, seed)
    options = METHODS[point.method]
    found = {} if options is None else options(point.drop_rate)
    if "coreset" in found:
        return CoresetRun(point.method, model, None, batch_size, data, settings, options=found["coreset"])
    handler = None if options is None else apply_dropbp(model, point.drop_rate, seed=seed, **found)
    return Run(point.method, model, handler, batch_size, data, settings)


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


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.convergence", description=__doc__.splitlines()[0])
    parser.add_argument("--group", choices=GROUPS)
    parser.add_argument("--adapter", choices=("lora", "full", "paca"), default="lora")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", metavar="POINT", help='only these points of the group: "published 0.75"')
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[], help="in place of the task's: a sweep")
    parser.add_argument("--time", action="store_true", help="time the group's steps, train nothing")
    parser.add_argument("--report", action="store_true", help="write tables and pictures, train nothing")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV files")
    parser.add_argument("--scale", choices=("full", "tiny"), default="full", help="tiny: to see every code path run")
    options = parser.parse_args(arguments)
    if options.report:
        from . import convergence_report

        return convergence_report.write(options.out)
    if options.group is None:
        parser.error("--group: expected one, got none")
    group = group_of(options.group, options.scale)
    if unknown := set(options.only or ()) - {str(point) for point in group.points}:
        parser.error(f"--only: expected some of {', '.join(map(str, group.points))}, got {', '.join(sorted(unknown))}")
    if options.only:
        group = Group(group.task, tuple(point for point in group.points if str(point) in options.only))
    from . import convergence_timing

    if options.time:
        return convergence_timing.run(options.group, group, options.adapter, options.out, options.scale)
    timed = read_rows(options.out / convergence_timing.FILE)
    runs = list(wanted_runs(options.group, group, options.adapter, options.seeds, options.learning_rates, timed))
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
