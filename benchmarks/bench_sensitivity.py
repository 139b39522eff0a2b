"""The sensitivities of all branches: as published, from one forward (exact), and from one backward (estimate).

16 branches of the byte Llama, with LoRA and with all weights trained, after some steps on random tokens. Every round
runs each method once, in turn, on the same micro-batch.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import nn

from dropbp_kernels import apply_dropbp
from dropbp_kernels.exact_sensitivity import METHODS, measure_sensitivity
from dropbp_kernels.measure import PeakLiveBytes
from dropbp_kernels.sensitivity import DEFINITIONS

from .coreset_agreement import rank_correlation
from .rows import machine
from .settings import Settings
from .steps import ModelRow, build, size_of
from .timing import Timing, in_turn, milliseconds

ADAPTERS = ("lora", "full")
NUM_ROUNDS = {"full": 5, "quick": 3, "tiny": 1}
NUM_STEPS = 10
BATCH_SIZE = 2  # a micro-batch is enough to calibrate on


@dataclass(frozen=True)
class SensitivityRow(ModelRow):
    """One method on one model. results/README.md says what each column means."""

    adapter: str
    num_branches: int
    method: str
    num_forwards: int
    num_samples: int
    median_ms: float
    p20_ms: float
    p80_ms: float
    speedup_vs_published: float
    peak_live_bytes: int
    rank_correlation_norm: float
    rank_correlation_element: float
    largest_difference_norm: float
    largest_difference_element: float

    HEADER: ClassVar[str] = (
        f"{'adapter':<8} {'method':<10} {'forwards':>8} {'median':>10} {'p20-p80':>19} {'speedup':>8} "
        f"{'peak live':>10} {'rank correlation':>17} {'largest difference':>19}"
    )

    def __str__(self) -> str:
        return (
            f"{self.adapter:<8} {self.method:<10} {self.num_forwards:>8} {self.median_ms:>7.0f} ms "
            f"{f'{self.p20_ms:.0f}-{self.p80_ms:.0f} ms':>19} {self.speedup_vs_published:>8.2f} "
            f"{self.peak_live_bytes / 2**20:>6.1f} MiB "
            f"{f'{self.rank_correlation_norm:.3f}, {self.rank_correlation_element:.3f}':>17} "
            f"{f'{self.largest_difference_norm:.1e}, {self.largest_difference_element:.1e}':>19}"
        )


def run(settings: Settings) -> Iterator[list[SensitivityRow]]:
    """One list of rows, a row for each method, for each way of training."""
    for adapter in ADAPTERS:
        if settings.has_time():
            yield _measure(settings, adapter)


def _measure(settings: Settings, adapter: str) -> list[SensitivityRow]:
    size = replace(size_of(settings), batch_size=BATCH_SIZE)
    model, batch = build(size, settings.device)
    if adapter == "full":
        model = model.merge_and_unload().train()  # type: ignore[operator]
        model.requires_grad_(True)
    _train(model, batch)
    handler = apply_dropbp(model, 0.5)
    num_forwards: list[int] = []
    model.register_forward_pre_hook(lambda *_: num_forwards.append(1))

    def measure(method: str, definition: str = "norm") -> list[float]:
        return measure_sensitivity(handler, lambda: model(**batch).loss, definition, method)

    found = {(method, definition): measure(method, definition) for method in METHODS for definition in DEFINITIONS}
    peaks, forwards = {}, {}
    for method in METHODS:
        num_forwards.clear()
        with PeakLiveBytes() as live:
            measure(method)
        peaks[method], forwards[method] = live.peak_bytes, len(num_forwards)
    runs = {method: lambda method=method: milliseconds(lambda: measure(method), settings.device) for method in METHODS}
    times = {method: Timing(samples) for method, samples in in_turn(runs, NUM_ROUNDS[settings.scale]).items()}
    rows = []
    for method in METHODS:
        pairs = {d: (found[method, d], found["published", d]) for d in DEFINITIONS}
        rows.append(
            SensitivityRow(
                **asdict(machine(settings.device, settings.commit)),
                **size.columns(),
                adapter=adapter,
                num_branches=len(handler.gates),
                method=method,
                num_forwards=forwards[method],
                num_samples=len(times[method].samples_ms),
                median_ms=times[method].median_ms,
                p20_ms=times[method].p20_ms,
                p80_ms=times[method].p80_ms,
                speedup_vs_published=times["published"].median_ms / times[method].median_ms,
                peak_live_bytes=peaks[method],
                **{f"rank_correlation_{d}": rank_correlation(*map(torch.tensor, pair)) for d, pair in pairs.items()},
                **{f"largest_difference_{d}": _largest_difference(*pair) for d, pair in pairs.items()},
            )
        )
    return rows


def _train(model: nn.Module, batch: dict[str, Any]) -> None:
    """Some steps, so that adapters are not zero and branches are not alike."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(NUM_STEPS):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def _largest_difference(values: list[float], expected: list[float]) -> float:
    """Of any branch, as a share of the largest sensitivity."""
    return max(abs(a - b) for a, b in zip(values, expected, strict=True)) / max(expected)
