"""A step with PaCA, with PEFT's LoRA at about as many trained parameters, and of the model's products alone.

Three models of the same weights. Every round runs each once on the same batch, starting with another one each time;
what counts is the median of the rounds' quotients, so that a slow minute meets all alike. "frozen" has LoRA of rank one
whose adapters are off, but for one linear of the first block, so that gradients flow to there: what no adapter can be
faster than.
"""

import copy
import dataclasses
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from torch import nn

from dropbp_kernels.measure import PeakLiveBytes, saved_bytes

from .bench_step import SIZES, Stepper, build
from .rows import Machine, machine
from .settings import Settings
from .timing import quantile

NUM_ROUNDS = {"full": 41, "quick": 9, "tiny": 2}
NUM_WARM_UP_ROUNDS = {"full": 2, "quick": 1, "tiny": 0}
METHODS = ("lora", "paca", "frozen")


@dataclass(frozen=True)
class PacaStepRow(Machine):
    """One adapter, nothing dropped. results/README.md says what each column means."""

    model: str
    dtype: str
    batch_size: int
    seq_len: int
    method: str
    rank: int
    num_trained: int
    num_samples: int
    forward_ms: float
    backward_ms: float
    step_ms: float
    step_p20_ms: float
    step_p80_ms: float
    step_over_lora: float
    saved_bytes: int
    peak_live_bytes: int

    HEADER: ClassVar[str] = (
        f"{'method':<8} {'rank':>4} {'trained':>9} {'forward':>10} {'backward':>10} {'step':>10} {'p20-p80':>17} "
        f"{'of LoRA':>8} {'saved':>10} {'peak live':>10}"
    )

    def __str__(self) -> str:
        return (
            f"{self.method:<8} {self.rank:>4} {self.num_trained:>9} {self.forward_ms:>7.1f} ms "
            f"{self.backward_ms:>7.1f} ms {self.step_ms:>7.1f} ms "
            f"{f'{self.step_p20_ms:.1f}-{self.step_p80_ms:.1f} ms':>17} {self.step_over_lora:>8.4f} "
            f"{self.saved_bytes / 2**20:>6.1f} MiB {self.peak_live_bytes / 2**20:>6.1f} MiB"
        )


def build_all(settings: Settings) -> tuple[Any, dict[str, nn.Module], dict[str, Any], dict[str, int]]:
    """The size, the models by method, the batch, and the ranks."""
    from peft import get_peft_model

    from dropbp_kernels.paca import PacaConfig

    size = SIZES["tiny" if settings.scale == "tiny" else settings.device.type]
    lora, batch = build(size, settings.device)
    base = copy.deepcopy(lora).unload()
    frozen, _ = build(dataclasses.replace(size, lora_rank=1), settings.device)
    layers = [module for module in frozen.modules() if hasattr(module, "lora_A") and hasattr(module, "base_layer")]
    for layer in layers[1:]:
        layer.enable_adapters(False)
    num_lora = sum(p.numel() for p in lora.parameters() if p.requires_grad)
    outputs = sum(layer.out_features for layer in layers)
    ranks = {"lora": size.lora_rank, "paca": -(-num_lora // outputs), "frozen": 1}  # PaCA trains no fewer than LoRA
    paca = get_peft_model(
        base, PacaConfig(r=ranks["paca"], target_modules="all-linear"), autocast_adapter_dtype=False
    ).train()
    return size, {"lora": lora, "paca": paca, "frozen": frozen}, batch, ranks


def run(settings: Settings) -> Iterator[list[PacaStepRow]]:
    """One list with a row for each method."""
    if not settings.has_time():
        return
    from tqdm import tqdm

    where = machine(settings.device, settings.commit)
    size, models, batch, ranks = build_all(settings)
    steppers = {name: Stepper(model, batch, settings.device) for name, model in models.items()}
    memory = {name: _memory(stepper) for name, stepper in steppers.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in METHODS}
    num_warm_up = NUM_WARM_UP_ROUNDS[settings.scale]
    for step in tqdm(range(num_warm_up + NUM_ROUNDS[settings.scale]), desc="rounds", leave=False, disable=None):
        for place in range(len(METHODS)):
            name = METHODS[(place + step) % len(METHODS)]
            elapsed = steppers[name].timed_step()
            if step >= num_warm_up:
                times[name].append(elapsed)

    rows = []
    for name in METHODS:
        steps_ms = [sum(both) for both in times[name]]
        rows.append(
            PacaStepRow(
                **asdict(where),
                model=size.name,
                dtype=str(size.dtype).removeprefix("torch."),
                batch_size=size.batch_size,
                seq_len=size.seq_len,
                method=name,
                rank=ranks[name],
                num_trained=sum(p.numel() for p in models[name].parameters() if p.requires_grad),
                num_samples=len(steps_ms),
                forward_ms=statistics.median(forward for forward, _ in times[name]),
                backward_ms=statistics.median(backward for _, backward in times[name]),
                step_ms=statistics.median(steps_ms),
                step_p20_ms=quantile(steps_ms, 0.2),
                step_p80_ms=quantile(steps_ms, 0.8),
                step_over_lora=statistics.median(
                    ours / sum(lora) for ours, lora in zip(steps_ms, times["lora"], strict=True)
                ),
                **memory[name],
            )
        )
    yield rows


def _memory(stepper: Stepper) -> dict[str, int]:
    for parameter in stepper.model.parameters():
        parameter.grad = None
    with saved_bytes() as saved:
        loss = stepper.forward()
    del loss
    with PeakLiveBytes() as live:
        stepper.forward().backward()
    return {"saved_bytes": saved.num_bytes, "peak_live_bytes": live.peak_bytes}
