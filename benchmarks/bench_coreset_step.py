"""A whole fine-tuning step with LoRA on half of a batch: chosen by its gradients, against all of it and any half.

full          forward and backward of all B examples
half          of B / 2 of them, without choosing: what a subset costs at least
exact, spsa   CoresetSelector on the B examples with these features, then forward and backward of its B / 2

Scoring is the part of choosing that runs the model; selection is the rest: moments, distances, facility location, rows.
Every round runs each method once. Memory is counted, not timed.
"""

import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dropbp_kernels.coreset import CoresetSelector
from dropbp_kernels.measure import PeakLiveBytes

from .coreset_data import SOURCES
from .rows import machine
from .settings import Settings
from .steps import ModelRow, build, size_of
from .timing import in_turn

# (examples, rounds). On a GPU a step on all 32 examples of LLaMA-2-7B takes most of 139 GiB.
BATCHES = {
    ("cpu", "full"): ((32, 5), (64, 3), (128, 3), (256, 2), (512, 2)),
    ("cpu", "quick"): ((32, 3), (128, 2)),
    ("cuda", "full"): ((8, 5), (16, 5), (32, 3)),
    ("cuda", "quick"): ((16, 3),),
    ("tiny", "tiny"): ((8, 1),),
}
SEQ_LEN = {"cpu": 64, "cuda": 512, "tiny": 16}
MOST_EXAMPLES_OF_SPSA = 64  # eight directions are sixteen forwards of the last block and the head
ALLOWED_SELECTION_SHARE = 0.03
ALLOWED_PEAK_OVER_FULL = 0.55


@dataclass(frozen=True)
class CoresetStepRow(ModelRow):
    """One method at one batch size. results/README.md says what each column means."""

    method: str
    num_samples: int
    scoring_ms: float
    selection_ms: float
    training_ms: float
    step_ms: float
    step_over_full: float
    step_over_half: float
    selection_share: float
    peak_live_bytes: int
    peak_over_full: float

    HEADER: ClassVar[str] = (
        f"{'method':<12} {'batch':>5} {'scoring':>11} {'selection':>11} {'training':>11} {'step':>11} {'of full':>8} "
        f"{'of half':>8} {'selection':>9} {'peak live':>10} {'of full':>8}"
    )

    def __str__(self) -> str:
        return (
            f"{self.method:<12} {self.batch_size:>5} {self.scoring_ms:>8.1f} ms {self.selection_ms:>8.1f} ms "
            f"{self.training_ms:>8.1f} ms {self.step_ms:>8.1f} ms {self.step_over_full:>8.3f} "
            f"{self.step_over_half:>8.3f} {self.selection_share:>9.2%} {self.peak_live_bytes / 2**20:>6.1f} MiB "
            f"{self.peak_over_full:>8.3f}"
        )


class Stepper:
    """Runs steps of one method and takes the times of their parts."""

    def __init__(self, model: nn.Module, batch: dict[str, Tensor], sources: Tensor, method: str):
        self.model, self.batch, self.sources, self.method = model, batch, sources, method
        self.selector = None
        if method in ("exact", "spsa"):
            self.selector = CoresetSelector(model, 0.5, features=method)
            self.selector.score = self._timed(self.selector.score)  # type: ignore[method-assign]
        self.scoring_ms = 0.0

    def _timed(self, score: Any) -> Any:
        def timed_score(*args: Any) -> Any:
            start_ms = now_ms()
            result = score(*args)
            self.scoring_ms = now_ms() - start_ms
            return result

        return timed_score

    def step(self) -> tuple[float, float, float]:
        """Milliseconds of scoring, selection and training."""
        self.model.zero_grad(set_to_none=True)
        self.scoring_ms = 0.0
        start_ms = now_ms()
        if self.selector is not None:
            rows, _ = self.selector.subset(self.batch, self.sources)
        elif self.method == "half":
            rows = {name: value[::2] for name, value in self.batch.items()}
        else:
            rows = self.batch
        chosen_ms = now_ms()
        self.model(**rows).loss.backward()
        end_ms = now_ms()
        self.model.zero_grad(set_to_none=True)
        return self.scoring_ms, chosen_ms - start_ms - self.scoring_ms, end_ms - chosen_ms


def now_ms() -> float:
    """A clock that waits for the device."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter_ns() / 1e6


def run(settings: Settings) -> Iterator[list[CoresetStepRow]]:
    """One list of rows, a row for each method, at every batch size."""
    kind = "tiny" if settings.scale == "tiny" else settings.device.type
    size = replace(size_of(settings), seq_len=SEQ_LEN[kind])
    where = machine(settings.device, settings.commit)
    for batch_size, num_rounds in BATCHES[kind, settings.scale]:
        if not settings.has_time():
            continue
        size = replace(size, batch_size=batch_size)
        model, batch = build(size, settings.device)
        shares = torch.tensor(list(SOURCES.values())).cumsum(0)[:-1] * batch_size
        sources = (torch.arange(batch_size).unsqueeze(1) >= shares).sum(1)
        methods = ["full", "half", "exact", *(["spsa"] if batch_size <= MOST_EXAMPLES_OF_SPSA else [])]
        steppers = {method: Stepper(model, batch, sources, method) for method in methods}
        peaks = {method: _peak(stepper) for method, stepper in steppers.items()}
        times = in_turn({method: stepper.step for method, stepper in steppers.items()}, num_rounds)
        medians = {method: statistics.median(map(sum, times[method])) for method in methods}
        rows = []
        for method in methods:
            scoring, selection, training = (statistics.median(part) for part in zip(*times[method], strict=True))
            rows.append(
                CoresetStepRow(
                    **asdict(where),
                    **size.columns(),
                    method=method,
                    num_samples=num_rounds,
                    scoring_ms=scoring,
                    selection_ms=selection if steppers[method].selector is not None else 0.0,
                    training_ms=training,
                    step_ms=medians[method],
                    step_over_full=medians[method] / medians["full"],
                    step_over_half=medians[method] / medians["half"],
                    selection_share=selection / medians[method] if steppers[method].selector is not None else 0.0,
                    peak_live_bytes=peaks[method],
                    peak_over_full=peaks[method] / peaks["full"],
                )
            )
        yield rows


def _peak(stepper: Stepper) -> int:
    """The most bytes live in a step, of what it allocates; the first step of a method, so a warm-up too."""
    with PeakLiveBytes() as live:
        stepper.step()
    return live.peak_bytes


def verdicts(rows: list[CoresetStepRow]) -> dict[str, bool]:
    """What choosing half of a batch must hold on to, by name."""
    held = {}
    for row in rows:
        if row.method in ("exact", "spsa"):
            at = f"{row.method} at batch {row.batch_size}"
            held[f"selection, {at}: at most {ALLOWED_SELECTION_SHARE:.0%} of the step"] = (
                row.selection_share <= ALLOWED_SELECTION_SHARE
            )
            held[f"peak live bytes, {at}: at most {ALLOWED_PEAK_OVER_FULL} of the full batch's"] = (
                row.peak_over_full <= ALLOWED_PEAK_OVER_FULL
            )
    return held
