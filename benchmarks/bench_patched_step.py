"""What a patched model costs at drop rate 0: a step with LoRA, unpatched, patched, and patched with fused norms.

Copies of one model. Every round runs each once on the same batch, starting with another one each time; what counts is
the median of the rounds' quotients, so that a slow minute meets all alike.
"""

import copy
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import ClassVar

from dropbp_kernels import apply_dropbp

from .bench_step import SIZES, Stepper, build
from .rows import Machine, machine
from .settings import Settings
from .timing import quantile

NUM_ROUNDS = {"full": 41, "quick": 9, "tiny": 2}
NUM_WARM_UP_ROUNDS = {"full": 2, "quick": 1, "tiny": 0}
METHODS = {"unpatched": None, "patched": False, "fused": True}  # name -> option `fused` of apply_dropbp
ALLOWED_OVER_UNPATCHED = 1.01


@dataclass(frozen=True)
class PatchedStepRow(Machine):
    """One way to patch, at drop rate 0. results/README.md says what each column means."""

    model: str
    dtype: str
    batch_size: int
    seq_len: int
    method: str
    num_samples: int
    forward_ms: float
    backward_ms: float
    step_ms: float
    step_p20_ms: float
    step_p80_ms: float
    step_over_unpatched: float

    HEADER: ClassVar[str] = (
        f"{'method':<10} {'forward':>10} {'backward':>10} {'step':>10} {'p20-p80':>17} {'of unpatched':>12}"
    )

    def __str__(self) -> str:
        return (
            f"{self.method:<10} {self.forward_ms:>7.1f} ms {self.backward_ms:>7.1f} ms {self.step_ms:>7.1f} ms "
            f"{f'{self.step_p20_ms:.1f}-{self.step_p80_ms:.1f} ms':>17} {self.step_over_unpatched:>12.4f}"
        )


def run(settings: Settings) -> Iterator[list[PatchedStepRow]]:
    """One list with a row for each method."""
    if not settings.has_time():
        return
    from tqdm import tqdm

    where = machine(settings.device, settings.commit)
    size = SIZES["tiny" if settings.scale == "tiny" else settings.device.type]
    model, batch = build(size, settings.device)
    steppers = {}
    for name, fused in METHODS.items():
        own = copy.deepcopy(model)
        if fused is not None:
            apply_dropbp(own, 0.0, fused=fused, strict=False)
        steppers[name] = Stepper(own, batch, settings.device)

    times: dict[str, list[tuple[float, float]]] = {name: [] for name in METHODS}
    num_warm_up, names = NUM_WARM_UP_ROUNDS[settings.scale], list(METHODS)
    for step in tqdm(range(num_warm_up + NUM_ROUNDS[settings.scale]), desc="rounds", leave=False, disable=None):
        for place in range(len(names)):
            name = names[(place + step) % len(names)]
            elapsed = steppers[name].timed_step()
            if step >= num_warm_up:
                times[name].append(elapsed)

    rows = []
    for name in METHODS:
        steps_ms = [sum(both) for both in times[name]]
        rows.append(
            PatchedStepRow(
                **asdict(where),
                model=size.name,
                dtype=str(size.dtype).removeprefix("torch."),
                batch_size=size.batch_size,
                seq_len=size.seq_len,
                method=name,
                num_samples=len(steps_ms),
                forward_ms=statistics.median(forward for forward, _ in times[name]),
                backward_ms=statistics.median(backward for _, backward in times[name]),
                step_ms=statistics.median(steps_ms),
                step_p20_ms=quantile(steps_ms, 0.2),
                step_p80_ms=quantile(steps_ms, 0.8),
                step_over_unpatched=statistics.median(
                    ours / sum(plain) for ours, plain in zip(steps_ms, times["unpatched"], strict=True)
                ),
            )
        )
    yield rows


def verdicts(rows: list[PatchedStepRow]) -> dict[str, bool]:
    """What a patched step must hold on to, by name."""
    return {
        f"{row.method} step within {ALLOWED_OVER_UNPATCHED} of unpatched": (
            row.step_over_unpatched <= ALLOWED_OVER_UNPATCHED
        )
        for row in rows
        if row.method != "unpatched"
    }
