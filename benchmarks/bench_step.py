"""A whole fine-tuning step with LoRA: undropped, published DropBP (detach after the forward), ours; times and memory.

One model in one process; every round runs each method once on the same batch, with the plan of that round. A step is
forward and backward: the optimizer is the same for all and left out.
"""

import statistics
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dropbp_kernels import DropBPHandler, apply_dropbp
from dropbp_kernels.measure import PeakLiveBytes, saved_bytes
from dropbp_kernels.samplers import get_sampler

from .rows import Machine, machine
from .settings import Settings
from .timing import quantile

DROP_RATES = (0.5, 0.75, 0.875)
NUM_ROUNDS = {"full": 15, "quick": 7, "tiny": 1}
NUM_MEMORY_ROUNDS = {"full": 3, "quick": 2, "tiny": 1}
NUM_WARM_UP_ROUNDS = {"full": 2, "quick": 1, "tiny": 0}
# How far a step may be from forward + (1 - drop_rate) * backward of the undropped one.
ALLOWED_OVER_IDEAL = 1.05


@dataclass(frozen=True)
class Size:
    """A Llama's sizes, the batch it is given and the rank of its adapters."""

    name: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    batch_size: int
    seq_len: int
    dtype: torch.dtype = torch.float32
    lora_rank: int = 8


# The first is the size of the command line's built-in model, the second that of LLaMA-2-7B, with random weights.
SIZES = {
    "cpu": Size("byte Llama, 8 blocks, width 192", 259, 192, 512, 8, 6, 2, 8, 256),
    "cuda": Size("Llama, 32 blocks, width 4096", 32000, 4096, 11008, 32, 32, 32, 2, 2048, torch.bfloat16, 16),
    "tiny": Size("Llama, 4 blocks, width 32", 64, 32, 64, 4, 2, 1, 2, 16),
}


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


METHODS = [
    Method("undropped", 0.0),
    *(Method(name, rate) for rate in DROP_RATES for name in ("published", "ours")),
]


@dataclass(frozen=True)
class StepRow(Machine):
    """One method at one drop rate. results/README.md says what each column means."""

    model: str
    dtype: str
    batch_size: int
    seq_len: int
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
        f"{'method':<16} {'kept':>5} {'forward':>10} {'backward':>10} {'step':>10} {'p20-p80':>17} {'speedup':>8} "
        f"{'over ideal':>10} {'saved':>10} {'peak live':>10} {'of ideal':>8} {'allocated':>10}"
    )

    def __str__(self) -> str:
        allocated = "" if self.peak_allocated_bytes is None else f"{self.peak_allocated_bytes / 2**20:.0f} MiB"
        return (
            f"{self.method + f' {self.drop_rate:g}':<16} {self.flops_kept:>5.0%} {self.forward_ms:>7.1f} ms "
            f"{self.backward_ms:>7.1f} ms {self.step_ms:>7.1f} ms "
            f"{f'{self.step_p20_ms:.1f}-{self.step_p80_ms:.1f} ms':>17} {self.speedup_vs_undropped:>8.2f} "
            f"{self.step_over_ideal:>10.3f} {self.saved_bytes / 2**20:>6.1f} MiB "
            f"{self.peak_live_bytes / 2**20:>6.1f} MiB {self.peak_live_bytes / self.ideal_peak_bytes:>8.2f} "
            f"{allocated:>10}"
        )


def build(size: Size, device: torch.device) -> tuple[nn.Module, dict[str, Tensor]]:
    """A Llama with random weights and LoRA on all linear layers, and a batch of random tokens."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size.vocab_size,
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
        num_hidden_layers=size.num_hidden_layers,
        num_attention_heads=size.num_attention_heads,
        num_key_value_heads=size.num_key_value_heads,
        max_position_embeddings=size.seq_len,
        use_cache=False,
    )
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=size.dtype)
    lora = LoraConfig(r=size.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", ".*is_gradient_checkpointing.*", FutureWarning
        )  # between peft and transformers
        model = get_peft_model(model, lora, autocast_adapter_dtype=False).train()
    tokens = torch.randint(size.vocab_size, (size.batch_size, size.seq_len), device=device)
    return model, {"input_ids": tokens, "labels": tokens}


def run(settings: Settings) -> Iterator[list[StepRow]]:
    """One list with a row for each method."""
    if not settings.has_time():
        return
    from tqdm import tqdm

    where = machine(settings.device, settings.commit)
    size = SIZES["tiny" if settings.scale == "tiny" else settings.device.type]
    model, batch = build(size, settings.device)
    handler = apply_dropbp(model, 0.0, strict=False)
    stepper = Stepper(model, batch, settings.device)

    memory = {}
    for method in tqdm(METHODS, desc="counting memory", leave=False, disable=None):
        plans = range(NUM_MEMORY_ROUNDS[settings.scale] if method.drop_rate else 1)
        measured = [_memory(method, handler, stepper, step) for step in plans]
        memory[method] = {key: max((one[key] for one in measured), key=lambda b: b or 0) for key in measured[0]}
    transient_bytes = _largest_forward_transient(handler, stepper)

    times: dict[Method, list[tuple[float, float]]] = {method: [] for method in METHODS}
    kept: dict[Method, list[float]] = {method: [] for method in METHODS}
    num_warm_up = NUM_WARM_UP_ROUNDS[settings.scale]
    rounds = range(num_warm_up + NUM_ROUNDS[settings.scale])
    for step in tqdm(rounds, desc="rounds of all methods", leave=False, disable=None):
        for method in METHODS:
            flops_kept = method.set_plan(handler, step)
            elapsed = stepper.timed_step()
            if step >= num_warm_up:
                times[method].append(elapsed)
                kept[method].append(flops_kept)
    print(f"largest forward transient of a branch: {transient_bytes / 2**20:.1f} MiB", flush=True)

    undropped = METHODS[0]
    forward_ms, backward_ms = (statistics.median(column) for column in zip(*times[undropped], strict=True))
    rows = []
    for method in METHODS:
        steps_ms = [forward + backward for forward, backward in times[method]]
        ideal_ms = forward_ms + (1 - method.drop_rate) * backward_ms
        rows.append(
            StepRow(
                **asdict(where),
                model=size.name,
                dtype=str(size.dtype).removeprefix("torch."),
                batch_size=size.batch_size,
                seq_len=size.seq_len,
                method=method.name,
                drop_rate=method.drop_rate,
                flops_kept=statistics.fmean(kept[method]),
                num_samples=len(steps_ms),
                forward_ms=statistics.median(forward for forward, _ in times[method]),
                backward_ms=statistics.median(backward for _, backward in times[method]),
                step_ms=statistics.median(steps_ms),
                step_p20_ms=quantile(steps_ms, 0.2),
                step_p80_ms=quantile(steps_ms, 0.8),
                speedup_vs_undropped=statistics.median(map(sum, times[undropped])) / statistics.median(steps_ms),
                ideal_step_ms=ideal_ms,
                step_over_ideal=statistics.median(steps_ms) / ideal_ms,
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


class Stepper:
    """Runs one forward and backward of `model` on `batch`; gradients start at None."""

    def __init__(self, model: nn.Module, batch: dict[str, Tensor], device: torch.device) -> None:
        self.model, self.batch, self.device = model, batch, device

    def forward(self) -> Tensor:
        return self.model(**self.batch).loss

    def timed_step(self) -> tuple[float, float]:
        """Milliseconds of the forward and of the backward."""
        self.model.zero_grad(set_to_none=True)
        if self.device.type == "cpu":
            start_ns = time.perf_counter_ns()
            loss = self.forward()
            middle_ns = time.perf_counter_ns()
            loss.backward()
            return (middle_ns - start_ns) / 1e6, (time.perf_counter_ns() - middle_ns) / 1e6
        start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        torch.cuda.synchronize()
        start.record()
        loss = self.forward()
        middle.record()
        loss.backward()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(middle), middle.elapsed_time(end)


def _memory(method: Method, handler: DropBPHandler, stepper: Stepper, step: int) -> dict[str, Any]:
    method.set_plan(handler, step)
    stepper.model.zero_grad(set_to_none=True)
    with saved_bytes() as saved:
        loss = stepper.forward()
    del loss
    with PeakLiveBytes() as live:
        stepper.forward().backward()
    result: dict[str, Any] = {"saved_bytes": saved.num_bytes, "peak_live_bytes": live.peak_bytes}
    result["peak_allocated_bytes"] = None
    stepper.model.zero_grad(set_to_none=True)
    if stepper.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        stepper.forward().backward()
        result["peak_allocated_bytes"] = torch.cuda.max_memory_allocated() - before
        stepper.model.zero_grad(set_to_none=True)
    return result


def _largest_forward_transient(handler: DropBPHandler, stepper: Stepper) -> int:
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
