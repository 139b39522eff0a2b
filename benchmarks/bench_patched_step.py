"""What a patched model costs at drop rate 0: a step with LoRA, unpatched, patched, and patched with fused=True.

Copies of one model, which share the frozen weights. Every round runs each once on the same batch; what counts is the
median of the rounds' quotients.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import ClassVar

from dropbp_kernels import apply_dropbp
from dropbp_kernels.cli.models import twin

from .rows import machine
from .settings import Settings
from .steps import ModelRow, Stepper, build, over, size_of, time_columns, times_in_turn

NUM_ROUNDS = {"full": 41, "quick": 9, "tiny": 2}
METHODS = {"unpatched": None, "patched": False, "fused": True}  # name -> option `fused` of apply_dropbp
ALLOWED_OVER_UNPATCHED = 1.01


@dataclass(frozen=True)
class PatchedStepRow(ModelRow):
    """One way to patch, at drop rate 0. results/README.md says what each column means."""

    method: str
    num_samples: int
    forward_ms: float
    backward_ms: float
    step_ms: float
    step_p20_ms: float
    step_p80_ms: float
    step_over_unpatched: float

    HEADER: ClassVar[str] = f"{'method':<10} {ModelRow.TIMES} {'of unpatched':>12}"

    def __str__(self) -> str:
        return f"{self.method:<10} {self.times()} {self.step_over_unpatched:>12.4f}"


def run(settings: Settings) -> Iterator[list[PatchedStepRow]]:
    """One list with a row for each method."""
    if not settings.has_time():
        return
    where = machine(settings.device, settings.commit)
    size = size_of(settings)
    model, batch = build(size, settings.device)
    steppers = {}
    for name, fused in METHODS.items():
        own = twin(model)
        if fused is not None:
            apply_dropbp(own, 0.0, fused=fused, strict=False)
        steppers[name] = Stepper(own, batch, settings.device)

    times = times_in_turn(steppers, NUM_ROUNDS, settings)
    yield [
        PatchedStepRow(
            **asdict(where),
            **size.columns(),
            method=name,
            **time_columns(times[name]),
            step_over_unpatched=over(times[name], times["unpatched"]),
        )
        for name in METHODS
    ]


def verdicts(rows: list[PatchedStepRow]) -> dict[str, bool]:
    """What a patched step must hold on to, by name."""
    return {
        f"{row.method} step within {ALLOWED_OVER_UNPATCHED} of unpatched": (
            row.step_over_unpatched <= ALLOWED_OVER_UNPATCHED
        )
        for row in rows
        if row.method != "unpatched"
    }
