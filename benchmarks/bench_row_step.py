"""A whole fine-tuning step with LoRA where every branch drops a share: of the steps, of the samples, or of the tokens.

branch   all rows of a share of the branches keep their backward
sample   a share of the samples, in every branch
token    a share of the tokens in MLP branches, of the samples in attention branches

As in `bench_step`: one model in one process, every round runs each method once on the same batch, with the plan of that
round; a step is forward and backward. Drawing the plan is in the time of the forward.
"""

import copy
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from dropbp_kernels import apply_dropbp, remove_dropbp
from dropbp_kernels.measure import PeakLiveBytes, saved_bytes
from dropbp_kernels.row_plan import GRANULARITIES

from .bench_step import SIZES, Stepper, build
from .rows import Machine, machine
from .settings import Settings
from .timing import quantile

DROP_RATES = (0.5, 0.75, 0.875)
NUM_ROUNDS = {"full": 15, "quick": 7, "tiny": 1}
NUM_MEMORY_ROUNDS = {"full": 3, "quick": 2, "tiny": 1}
NUM_WARM_UP_ROUNDS = {"full": 2, "quick": 1, "tiny": 0}
# What a step by rows may take of one by branches, at batch 8 or more.
ALLOWED_OVER_BRANCH = 1.05


@dataclass(frozen=True)
class RowStepRow(Machine):
    """One granularity at one drop rate. results/README.md says what each column means."""

    model: str
    dtype: str
    batch_size: int
    seq_len: int
    granularity: str
    drop_rate: float
    flops_kept: float
    num_samples: int
    forward_ms: float
    backward_ms: float
    step_ms: float
    step_p20_ms: float
    step_p80_ms: float
    step_over_branch: float
    saved_bytes: int
    peak_live_bytes: int

    HEADER: ClassVar[str] = (
        f"{'granularity':<16} {'kept':>6} {'forward':>10} {'backward':>10} {'step':>10} {'p20-p80':>17} "
        f"{'over branch':>11} {'saved':>10} {'peak live':>10}"
    )

    def __str__(self) -> str:
        return (
            f"{self.granularity + f' {self.drop_rate:g}':<16} {self.flops_kept:>6.1%} {self.forward_ms:>7.1f} ms "
            f"{self.backward_ms:>7.1f} ms {self.step_ms:>7.1f} ms "
            f"{f'{self.step_p20_ms:.1f}-{self.step_p80_ms:.1f} ms':>17} {self.step_over_branch:>11.3f} "
            f"{self.saved_bytes / 2**20:>6.1f} MiB {self.peak_live_bytes / 2**20:>6.1f} MiB"
        )


def run(settings: Settings) -> Iterator[list[RowStepRow]]:
    """One list of rows, a row for each granularity, at every drop rate."""
    if not settings.has_time():
        return
    from tqdm import tqdm

    where = machine(settings.device, settings.commit)
    size = SIZES["tiny" if settings.scale == "tiny" else settings.device.type]
    model, batch = build(size, settings.device)
    models = {name: model if name == "branch" else copy.deepcopy(model) for name in GRANULARITIES}
    num_warm_up = NUM_WARM_UP_ROUNDS[settings.scale]
    for rate in DROP_RATES:
        if not settings.has_time():
            continue
        handlers = {name: apply_dropbp(models[name], rate, granularity=name, strict=False) for name in GRANULARITIES}
        steppers = {name: Stepper(models[name], batch, settings.device) for name in GRANULARITIES}
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in GRANULARITIES}
        rounds = range(num_warm_up + NUM_ROUNDS[settings.scale])
        for number in tqdm(rounds, desc=f"drop rate {rate:g}", leave=False, disable=None):
            for name, stepper in steppers.items():
                handlers[name].step()
                elapsed = stepper.timed_step()
                if number >= num_warm_up:
                    times[name].append(elapsed)
        branch_ms = statistics.median(map(sum, times["branch"]))
        rows = []
        for name in GRANULARITIES:
            steps_ms = [forward + backward for forward, backward in times[name]]
            memory = [_memory(handlers[name].step, steppers[name]) for _ in range(NUM_MEMORY_ROUNDS[settings.scale])]
            rows.append(
                RowStepRow(
                    **asdict(where),
                    model=size.name,
                    dtype=str(size.dtype).removeprefix("torch."),
                    batch_size=size.batch_size,
                    seq_len=size.seq_len,
                    granularity=name,
                    drop_rate=rate,
                    flops_kept=handlers[name].report()["flops_kept"],
                    num_samples=len(steps_ms),
                    forward_ms=statistics.median(forward for forward, _ in times[name]),
                    backward_ms=statistics.median(backward for _, backward in times[name]),
                    step_ms=statistics.median(steps_ms),
                    step_p20_ms=quantile(steps_ms, 0.2),
                    step_p80_ms=quantile(steps_ms, 0.8),
                    step_over_branch=statistics.median(steps_ms) / branch_ms,
                    saved_bytes=round(statistics.mean(saved for saved, _ in memory)),
                    peak_live_bytes=round(statistics.mean(peak for _, peak in memory)),
                )
            )
        for name in GRANULARITIES:
            remove_dropbp(models[name])
        yield rows


def verdicts(rows: list[RowStepRow]) -> dict[str, bool]:
    """What a step by rows must hold on to, by name."""
    return {
        f"{row.granularity} step at drop rate {row.drop_rate:g} within {ALLOWED_OVER_BRANCH} of branch": (
            row.step_over_branch <= ALLOWED_OVER_BRANCH
        )
        for row in rows
        if row.granularity != "branch" and row.batch_size >= 8
    }


def _memory(draw: Callable[[], Any], stepper: Stepper) -> tuple[int, int]:
    """(bytes saved, peak of live bytes) of one step under a new plan."""
    draw()
    stepper.model.zero_grad(set_to_none=True)
    with saved_bytes() as saved:
        loss = stepper.forward()
    del loss
    with PeakLiveBytes() as live:
        stepper.forward().backward()
    stepper.model.zero_grad(set_to_none=True)
    return saved.num_bytes, live.peak_bytes
