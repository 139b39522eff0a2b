"""A whole fine-tuning step with LoRA where every branch drops a share: of the steps, of the samples, or of the tokens.

branch   all rows of a share of the branches keep their backward
sample   a share of the samples, in every branch
token    a share of the tokens in MLP branches, of the samples in attention branches

Every round runs each method once on the same batch, with the plan of that round. Drawing it is in the time of the
forward.
"""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import ClassVar

from dropbp_kernels import DropBPHandler, apply_dropbp, remove_dropbp
from dropbp_kernels.choices import GRANULARITIES
from dropbp_kernels.cli.models import twin

from . import steps
from .rows import machine
from .settings import Settings
from .timing import in_turn

NUM_ROUNDS = {"full": 15, "quick": 9, "tiny": 1}
TWICE_THE_BATCH = (0.75, 0.875)  # drop rates that are measured at twice the batch, too: where few samples are kept
# What a step by rows may take of one by branches, at batch 8 or more.
ALLOWED_OVER_BRANCH = 1.05


@dataclass(frozen=True)
class RowStepRow(steps.ModelRow):
    """One granularity at one drop rate. results/README.md says what each column means."""

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
        f"{'granularity':<16} {'kept':>6} {steps.ModelRow.TIMES} {'over branch':>11} {'saved':>10} {'peak live':>10}"
    )

    def __str__(self) -> str:
        return (
            f"{f'{self.granularity} {self.drop_rate:g} x{self.batch_size}':<16} {self.flops_kept:>6.1%} {self.times()} "
            f"{self.step_over_branch:>11.3f} {self.saved_bytes / 2**20:>6.1f} MiB "
            f"{self.peak_live_bytes / 2**20:>6.1f} MiB"
        )


def run(settings: Settings) -> Iterator[list[RowStepRow]]:
    """One list of rows, a row for each granularity, at every drop rate."""
    if not settings.has_time():
        return
    where = machine(settings.device, settings.commit)
    size = steps.size_of(settings)
    model, batch = steps.build(size, settings.device)
    models = {name: model if name == "branch" else twin(model) for name in GRANULARITIES}
    for rate, times_batch in [*((rate, 1) for rate in steps.DROP_RATES), *((rate, 2) for rate in TWICE_THE_BATCH)]:
        if not settings.has_time():
            continue
        tokens = {name: each.repeat(times_batch, 1) for name, each in batch.items()}
        handlers = {name: apply_dropbp(models[name], rate, granularity=name, strict=False) for name in GRANULARITIES}
        steppers = {name: steps.Stepper(models[name], tokens, settings.device) for name in GRANULARITIES}
        measured = in_turn(
            {name: _drawn(handlers[name], steppers[name]) for name in GRANULARITIES},
            NUM_ROUNDS[settings.scale],
            steps.NUM_WARM_UP_ROUNDS[settings.scale],
            f"drop rate {rate:g}",
        )
        times = {name: steps.time_columns(measured[name]) for name in GRANULARITIES}
        rows = []
        for name in GRANULARITIES:
            counts = []
            for _ in range(steps.NUM_MEMORY_ROUNDS[settings.scale]):
                handlers[name].step()
                counts.append(steppers[name].bytes())
            rows.append(
                RowStepRow(
                    **asdict(where),
                    **{**size.columns(), "batch_size": len(tokens["input_ids"])},
                    granularity=name,
                    drop_rate=rate,
                    flops_kept=handlers[name].report()["flops_kept"],
                    **times[name],
                    step_over_branch=steps.over(measured[name], measured["branch"]),
                    **{column: round(statistics.mean(each[column] for each in counts)) for column in counts[0]},
                )
            )
        for name in GRANULARITIES:
            remove_dropbp(models[name])
        yield rows


def verdicts(rows: list[RowStepRow]) -> dict[str, bool]:
    """What a step by rows must hold on to, by name."""
    return {
        f"{row.granularity} step at drop rate {row.drop_rate:g}, batch {row.batch_size}, within {ALLOWED_OVER_BRANCH} "
        "of branch": row.step_over_branch <= ALLOWED_OVER_BRANCH
        for row in rows
        if row.granularity != "branch" and row.batch_size >= 8
    }


def _drawn(handler: DropBPHandler, stepper: steps.Stepper) -> Callable[[], steps.Times]:
    """For `in_turn`: a step under a new plan."""

    def run_step() -> steps.Times:
        handler.step()
        return stepper.times()

    return run_step
