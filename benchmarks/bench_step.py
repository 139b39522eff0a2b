"""A whole fine-tuning step with LoRA: undropped, published DropBP (detach after the forward), ours; times and memory.

One model in one process; every round runs each method once on the same batch, with the plan of that round.
"""

import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dropbp_kernels import DropBPHandler, apply_dropbp
from dropbp_kernels.measure import PeakLiveBytes
from dropbp_kernels.samplers import get_sampler

from . import steps
from .rows import machine
from .settings import Settings
from .timing import in_turn

NUM_ROUNDS = {"full": 15, "quick": 7, "tiny": 1}
# How far a step may be from forward + (1 - drop_rate) * backward of the undropped one.
ALLOWED_OVER_IDEAL = 1.05


@dataclass(frozen=True)
class Method:
    """undropped, published or ours, at a drop rate."""

    name: str
    drop_rate: float

    def set_plan(self, handler: DropBPHandler, step: int) -> float:
        """Set the plan of `step`; return the share of the branches' FLOPs that it keeps."""
        handler.sampler = get_sampler("published" if self.name == "published" else "balanced")
        handler.set_drop_rates([self.drop_rate] * len(handler.gates))
        for gate in handler.gates.values():
            gate.dropped_runs = "detach" if self.name == "published" else "inference"
        plan = handler.set_plan(handler.draw(step).kept)
        flops = handler.flops()
        return sum(f for f, is_kept in zip(flops, plan, strict=True) if is_kept) / sum(flops)

    def in_rounds(self, handler: DropBPHandler, stepper: steps.Stepper) -> Callable[[], tuple[float, steps.Times]]:
        """For `in_turn`: a step under the plan of its round; the share that the plan keeps, and the times."""
        numbers = itertools.count()
        return lambda: (self.set_plan(handler, next(numbers)), stepper.times())


METHODS = [
    Method("undropped", 0.0),
    *(Method(name, rate) for rate in steps.DROP_RATES for name in ("published", "ours")),
]


@dataclass(frozen=True)
class StepRow(steps.ModelRow):
    """One method at one drop rate. results/README.md says what each column means."""

    method: str
    drop_rate: float
    flops_kept: float
    num_samples: int
    forward_ms: float
    backward_ms: float
    step_ms: float
    step_p20_ms: float
    step_p80_ms: float
    speedup_vs_undropped: float
    ideal_step_ms: float
    step_over_ideal: float
    saved_bytes: int
    peak_live_bytes: int
    ideal_peak_bytes: int
    peak_allocated_bytes: int | None

    HEADER: ClassVar[str] = (
        f"{'method':<16} {'kept':>5} {steps.ModelRow.TIMES} {'speedup':>8} {'over ideal':>10} {'saved':>10} "
        f"{'peak live':>10} {'of ideal':>8} {'allocated':>10}"
    )

    def __str__(self) -> str:
        allocated = "" if self.peak_allocated_bytes is None else f"{self.peak_allocated_bytes / 2**20:.0f} MiB"
        return (
            f"{self.method + f' {self.drop_rate:g}':<16} {self.flops_kept:>5.0%} {self.times()} "
            f"{self.speedup_vs_undropped:>8.2f} {self.step_over_ideal:>10.3f} {self.saved_bytes / 2**20:>6.1f} MiB "
            f"{self.peak_live_bytes / 2**20:>6.1f} MiB {self.peak_live_bytes / self.ideal_peak_bytes:>8.2f} "
            f"{allocated:>10}"
        )


def run(settings: Settings) -> Iterator[list[StepRow]]:
    """One list with a row for each method."""
    if not settings.has_time():
        return
    from tqdm import tqdm

    where = machine(settings.device, settings.commit)
    size = steps.size_of(settings)
    model, batch = steps.build(size, settings.device)
    handler = apply_dropbp(model, 0.0, strict=False)
    stepper = steps.Stepper(model, batch, settings.device)

    memory = {}
    for method in tqdm(METHODS, desc="counting memory", leave=False, disable=None):
        plans = range(steps.NUM_MEMORY_ROUNDS[settings.scale] if method.drop_rate else 1)
        counts = [_memory(method, handler, stepper, step) for step in plans]
        memory[method] = {key: max((one[key] for one in counts), key=lambda b: b or 0) for key in counts[0]}
    transient_bytes = _largest_forward_transient(handler, stepper)

    measured = in_turn(
        {method: method.in_rounds(handler, stepper) for method in METHODS},
        NUM_ROUNDS[settings.scale],
        steps.NUM_WARM_UP_ROUNDS[settings.scale],
    )
    print(f"largest forward transient of a branch: {transient_bytes / 2**20:.1f} MiB", flush=True)

    undropped = METHODS[0]
    undropped_times = steps.time_columns([times for _, times in measured[undropped]])
    rows = []
    for method in METHODS:
        kept, times = zip(*measured[method], strict=True)
        columns = steps.time_columns(times)
        ideal_ms = undropped_times["forward_ms"] + (1 - method.drop_rate) * undropped_times["backward_ms"]
        rows.append(
            StepRow(
                **asdict(where),
                **size.columns(),
                method=method.name,
                drop_rate=method.drop_rate,
                flops_kept=statistics.fmean(kept),
                **columns,
                speedup_vs_undropped=undropped_times["step_ms"] / columns["step_ms"],
                ideal_step_ms=ideal_ms,
                step_over_ideal=columns["step_ms"] / ideal_ms,
                ideal_peak_bytes=round((1 - method.drop_rate) * memory[undropped]["peak_live_bytes"] + transient_bytes),
                **memory[method],
            )
        )
    yield rows


def verdicts(rows: list[StepRow]) -> dict[str, bool]:
    """What a step of ours must hold on to, by name: time at rate 0.75, peak memory at every rate."""
    ours = [row for row in rows if row.method == "ours"]
    result = {
        f"step at {row.drop_rate:g} within {ALLOWED_OVER_IDEAL} of forward + {1 - row.drop_rate:g} backward": (
            row.step_over_ideal <= ALLOWED_OVER_IDEAL
        )
        for row in ours
        if row.drop_rate == 0.75
    }
    for row in ours:
        name = f"peak live bytes at {row.drop_rate:g} within {1 - row.drop_rate:g} of undropped + one branch's forward"
        result[name] = row.peak_live_bytes <= row.ideal_peak_bytes
    return result


def _memory(method: Method, handler: DropBPHandler, stepper: steps.Stepper, step: int) -> dict[str, Any]:
    method.set_plan(handler, step)
    result: dict[str, Any] = {**stepper.bytes(), "peak_allocated_bytes": None}
    if stepper.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        stepper.forward().backward()
        result["peak_allocated_bytes"] = torch.cuda.max_memory_allocated() - before
        stepper.model.zero_grad(set_to_none=True)
    return result


def _largest_forward_transient(handler: DropBPHandler, stepper: steps.Stepper) -> int:
    """The most bytes live while one branch runs without a graph, the residual stream that it reads included."""
    peaks = []
    gates = list(handler.gates.values())
    handler.set_plan((False,) * len(gates))
    with PeakLiveBytes() as live:
        for gate in gates:
            gate.dropped_runs = "inference"

            def measured_run(residual: Tensor, branch: Any, original: Any = gate.run) -> Tensor:
                live.peak_bytes = live.live_bytes
                output = original(residual, branch)
                peaks.append(live.peak_bytes)
                return output

            gate.run = measured_run  # type: ignore[method-assign]
        stepper.forward()
    for gate in gates:
        del gate.run
    return max(peaks)
