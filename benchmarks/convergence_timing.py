"""What a step of every method of a group costs, relative to undropped: all of them in turns, in one process.

From the times of undropped steps at several batch sizes follows the batch size at which an undropped step takes as long
as a method's (`undropped_batch`): the control that the method has to beat. FLOPs are counted beside it, by PyTorch's
counter, which knows what was run and not what was meant. A method with a schedule is not timed, since its steps differ,
nor is a simulated one, which saves no work.
"""

import random
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch.utils.flop_counter import FlopCounterMode

from dropbp_kernels.cli.training import Run

from .convergence_methods import METHODS, Group, Point, is_simulated, label
from .convergence_runs import WindowRun, make_run
from .rows import Machine, append_rows, machine
from .timing import quantile

FILE = "convergence_step.csv"
# Of the task's batch: undropped steps between which times are interpolated.
BATCH_SHARES = (1.0, 0.75, 0.5, 0.25, 0.125)
NUM_WARM_UP_ROUNDS = 2
NUM_COUNTED_STEPS = 8  # plans by whole branches differ in their FLOPs from step to step


@dataclass(frozen=True)
class ConvergenceStepRow(Machine):
    """One point of a group. results/README.md says what each column means."""

    group: str
    model: str
    data: str
    seq_len: int
    adapter: str
    method: str
    drop_rate: float
    batch_size: int
    num_samples: int
    forward_ms: float
    backward_ms: float
    step_ms: float
    step_p20_ms: float
    step_p80_ms: float
    step_over_undropped: float
    undropped_batch: float
    forward_gflop: float
    backward_gflop: float

    HEADER: ClassVar[str] = (
        f"{'method':<30} {'batch':>5} {'forward':>10} {'backward':>10} {'step':>10} {'p20-p80':>18} "
        f"{'of undropped':>12} {'as undropped':>12} {'GFLOP fwd, bwd':>16}"
    )

    def __str__(self) -> str:
        return (
            f"{label(self.method, self.drop_rate):<30} {self.batch_size:>5} "
            f"{self.forward_ms:>7.1f} ms {self.backward_ms:>7.1f} ms {self.step_ms:>7.1f} ms "
            f"{f'{self.step_p20_ms:.1f}-{self.step_p80_ms:.1f} ms':>18} {self.step_over_undropped:>12.3f} "
            f"{self.undropped_batch:>12.2f} {f'{self.forward_gflop:.2f}, {self.backward_gflop:.2f}':>16}"
        )


def run(name: str, group: Group, adapter: str, out: Path, num_rounds: int) -> int:
    """Time every point of the group that has a batch size of its own, and the undropped batches between."""
    from tqdm import tqdm

    task, where = group.task, machine(torch.device("cpu"))
    batches = [max(1, round(share * task.batch_size)) for share in BATCH_SHARES]
    undropped_points = [Point("undropped", batch_size=batch) for batch in dict.fromkeys(batches)]
    others = [point for point in group.points if _is_timed(point, adapter)]
    runs = {}
    for point in [*undropped_points, *others]:
        own = point.adapter or adapter
        batch_size = point.batch_size or task.batch_size
        runs[point] = make_run(task, own, point, batch_size, task.learning_rates[own], 0)
    flops = {point: _count_flops(run, min(NUM_COUNTED_STEPS, num_rounds)) for point, run in runs.items()}
    for run in runs.values():
        if isinstance(run, WindowRun):
            run.numbers.clear()
    order, num_warm_up = random.Random(0), min(NUM_WARM_UP_ROUNDS, num_rounds - 1)
    for step in tqdm(range(num_warm_up + num_rounds), desc=f"timing {name}, {adapter}", leave=False, disable=None):
        for run in order.sample(list(runs.values()), len(runs)):
            run.step(step)
    samples = {point: [1e3 * s for s in run.history.step_s[num_warm_up:]] for point, run in runs.items()}
    undropped = {point.batch_size or 0: statistics.median(samples[point]) for point in undropped_points}
    rows = []
    for point, run in runs.items():
        history, step_ms = run.history, _typical(samples[point], run, num_warm_up)
        rows.append(
            ConvergenceStepRow(
                **asdict(where),
                group=name,
                model=task.model,
                data=task.data,
                seq_len=task.seq_len,
                adapter=point.adapter or adapter,
                method=point.method,
                drop_rate=point.drop_rate,
                batch_size=run.batch_size,
                num_samples=len(samples[point]),
                forward_ms=1e3 * statistics.median(history.forward_s[num_warm_up:]),
                backward_ms=1e3 * statistics.median(history.backward_s[num_warm_up:]),
                step_ms=step_ms,
                step_p20_ms=quantile(samples[point], 0.2),
                step_p80_ms=quantile(samples[point], 0.8),
                step_over_undropped=step_ms / undropped[task.batch_size],
                undropped_batch=batch_as_fast_as(step_ms, undropped),
                forward_gflop=flops[point][0],
                backward_gflop=flops[point][1],
            )
        )
    append_rows(out / FILE, rows)
    print(ConvergenceStepRow.HEADER, *rows, sep="\n")
    return 0


def _is_timed(point: Point, adapter: str) -> bool:
    make_options = METHODS[point.method]
    if make_options is None:
        return point.adapter not in (None, adapter)  # the others stand among the undropped batches
    if is_simulated(point.method, point.drop_rate):
        return False
    return point.learning_rate is None and "schedule" not in make_options(point.drop_rate)


def _typical(samples: Sequence[float], run: Run, num_warm_up: int) -> float:
    """The median; of windows, whose steps differ by the context before them, the mean of each one's median."""
    if not isinstance(run, WindowRun):
        return statistics.median(samples)
    by_window: dict[int, list[float]] = {}
    for number, sample in zip(run.numbers[num_warm_up:], samples, strict=True):
        by_window.setdefault(number, []).append(sample)
    return statistics.fmean(statistics.median(times) for times in by_window.values())


def batch_as_fast_as(step_ms: float, undropped: dict[int, float]) -> float:
    """The batch size at which an undropped step takes step_ms, on the lines between the measured (batch size, ms).

    Beyond the largest measured it is the largest, and at least 1.
    """
    known = sorted(undropped.items())
    if len(known) == 1 or step_ms >= known[-1][1]:
        return float(known[-1][0])
    place = next((i for i in range(1, len(known)) if step_ms <= known[i][1]), len(known) - 1)
    (batch, time), (next_batch, next_time) = known[place - 1], known[place]
    if next_time <= time:  # too short to tell apart
        return float(next_batch)
    return max(1.0, batch + (step_ms - time) * (next_batch - batch) / (next_time - time))


def _count_flops(run: Run, num_steps: int) -> tuple[float, float]:
    """Mean GFLOP of forward and backward over the batches and plans of the first steps; the run stays at its start."""
    forwards: Sequence[int]
    forwards, backwards = [], []
    state = None if run.handler is None else run.handler.state_dict()
    for step in range(num_steps):
        batch = run.data.batch(step, run.batch_size)
        if run.handler is not None:
            run.handler.step()
        with FlopCounterMode(display=False) as forward:
            loss = run.loss(*batch)
        with FlopCounterMode(display=False) as backward:
            if loss.requires_grad:
                loss.backward()
        forwards.append(forward.get_total_flops())
        backwards.append(backward.get_total_flops())
        run.optimizer.zero_grad()
    if run.handler is not None:
        run.handler.load_state_dict(state)
    return statistics.mean(forwards) / 1e9, statistics.mean(backwards) / 1e9
