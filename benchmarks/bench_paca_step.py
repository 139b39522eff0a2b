"""A step with PaCA, with PEFT's LoRA at about as many trained parameters, and of the model's products alone.

Three models of the same weights. Every round runs each once on the same batch; what counts is the median of the rounds'
quotients. "frozen" has LoRA of rank one whose adapters are off, but for one linear of the first block, so that
gradients flow to there: what no adapter can be faster than.
"""

import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from torch import nn

from .rows import machine
from .settings import Settings
from .steps import ModelRow, Size, Stepper, build, over, size_of, time_columns, times_in_turn

NUM_ROUNDS = {"full": 41, "quick": 9, "tiny": 2}
METHODS = ("lora", "paca", "frozen")


@dataclass(frozen=True)
class PacaStepRow(ModelRow):
    """One adapter, nothing dropped. results/README.md says what each column means."""

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
        f"{'method':<8} {'rank':>4} {'trained':>9} {ModelRow.TIMES} {'of LoRA':>8} {'saved':>10} {'peak live':>10}"
    )

    def __str__(self) -> str:
        return (
            f"{self.method:<8} {self.rank:>4} {self.num_trained:>9} {self.times()} {self.step_over_lora:>8.4f} "
            f"{self.saved_bytes / 2**20:>6.1f} MiB {self.peak_live_bytes / 2**20:>6.1f} MiB"
        )


def build_all(settings: Settings) -> tuple[Size, dict[str, nn.Module], dict[str, Any], dict[str, int]]:
    """The size, the models by method, the batch, and the ranks."""
    from peft import get_peft_model

    from dropbp_kernels.paca import PacaConfig

    size = size_of(settings)
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
    where = machine(settings.device, settings.commit)
    size, models, batch, ranks = build_all(settings)
    steppers = {name: Stepper(model, batch, settings.device) for name, model in models.items()}
    memory = {name: stepper.bytes() for name, stepper in steppers.items()}
    times = times_in_turn(steppers, NUM_ROUNDS, settings)
    yield [
        PacaStepRow(
            **asdict(where),
            **size.columns(),
            method=name,
            rank=ranks[name],
            num_trained=sum(p.numel() for p in models[name].parameters() if p.requires_grad),
            **time_columns(times[name]),
            step_over_lora=over(times[name], times["lora"]),
            **memory[name],
        )
        for name in METHODS
    ]
