"""What the benchmarks of whole fine-tuning steps share: the model, one step's times and bytes, and their columns.

A step is forward and backward: the optimizer is the same for all and left out. Runs that are compared are timed in turn
(`timing.in_turn`), in one process, on the same batch.
"""

import statistics
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dropbp_kernels.measure import PeakLiveBytes, saved_bytes

from .rows import Machine
from .settings import Settings
from .timing import in_turn, quantile

DROP_RATES = (0.5, 0.75, 0.875)
NUM_MEMORY_ROUNDS = {"full": 3, "quick": 2, "tiny": 1}  # plans whose bytes are counted
NUM_WARM_UP_ROUNDS = {"full": 2, "quick": 1, "tiny": 0}

Times = tuple[float, float]  # milliseconds of the forward and of the backward


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

    def columns(self) -> dict[str, Any]:
        """The columns of `ModelRow`."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {"model": self.name, "dtype": dtype, "batch_size": self.batch_size, "seq_len": self.seq_len}


# Random weights, in the sizes of the command line's built-in model, of eight of SmolLM-135M's 30 blocks (and a smaller
# vocabulary), and of LLaMA-2-7B. At width 192 calls of the host take a good part of the time; at 576 products do.
SIZES = {
    "cpu": Size("byte Llama, 8 blocks, width 192", 259, 192, 512, 8, 6, 2, 8, 256),
    "cpu-wide": Size("Llama, 8 blocks, width 576", 4096, 576, 1536, 8, 9, 3, 8, 256),
    "cuda": Size("Llama, 32 blocks, width 4096", 32000, 4096, 11008, 32, 32, 32, 2, 2048, torch.bfloat16, 16),
    "tiny": Size("Llama, 4 blocks, width 32", 64, 32, 64, 4, 2, 1, 2, 16),
}


def size_of(settings: Settings) -> Size:
    """The size to measure at."""
    if settings.scale == "tiny":
        return SIZES["tiny"]
    return SIZES["cpu-wide" if settings.is_wide and settings.device.type == "cpu" else settings.device.type]


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
    with warnings.catch_warnings():  # between peft and transformers
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        model = get_peft_model(model, lora, autocast_adapter_dtype=False).train()
    tokens = torch.randint(size.vocab_size, (size.batch_size, size.seq_len), device=device)
    return model, {"input_ids": tokens, "labels": tokens}


class Stepper:
    """Runs one forward and backward of `model` on `batch`; gradients start at None."""

    def __init__(self, model: nn.Module, batch: dict[str, Tensor], device: torch.device) -> None:
        self.model, self.batch, self.device = model, batch, device

    def forward(self) -> Tensor:
        return self.model(**self.batch).loss

    def times(self) -> Times:
        """Of one step."""
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

    def bytes(self) -> dict[str, int]:
        """What a forward saves, and the most that is live in a step."""
        self.model.zero_grad(set_to_none=True)
        with saved_bytes() as saved:
            loss = self.forward()
        del loss
        with PeakLiveBytes() as live:
            self.forward().backward()
        self.model.zero_grad(set_to_none=True)
        return {"saved_bytes": saved.num_bytes, "peak_live_bytes": live.peak_bytes}


def times_in_turn(
    steppers: Mapping[str, Stepper], num_rounds: Mapping[str, int], settings: Settings, what: str = "rounds"
) -> dict[str, list[Times]]:
    """Of one step of each, in as many rounds as the scale has."""
    runs = {name: stepper.times for name, stepper in steppers.items()}
    return in_turn(runs, num_rounds[settings.scale], NUM_WARM_UP_ROUNDS[settings.scale], what)


def steps_ms(times: Sequence[Times]) -> list[float]:
    """Milliseconds of whole steps."""
    return [forward + backward for forward, backward in times]


def time_columns(times: Sequence[Times]) -> dict[str, Any]:
    """num_samples and the medians and quantiles of one run's steps."""
    steps = steps_ms(times)
    return {
        "num_samples": len(steps),
        "forward_ms": statistics.median(forward for forward, _ in times),
        "backward_ms": statistics.median(backward for _, backward in times),
        "step_ms": statistics.median(steps),
        "step_p20_ms": quantile(steps, 0.2),
        "step_p80_ms": quantile(steps, 0.8),
    }


def over(times: Sequence[Times], control: Sequence[Times]) -> float:
    """The median of the rounds' quotients, so that a slow minute meets both alike."""
    return statistics.median(ours / other for ours, other in zip(steps_ms(times), steps_ms(control), strict=True))


@dataclass(frozen=True)
class ModelRow(Machine):
    """The columns that every row of a whole step begins with. It also has those of `time_columns`."""

    model: str
    dtype: str
    batch_size: int
    seq_len: int

    TIMES: ClassVar[str] = f"{'forward':>10} {'backward':>10} {'step':>10} {'p20-p80':>17}"

    def times(self) -> str:
        """What stands under TIMES."""
        return (
            f"{self.forward_ms:>7.1f} ms {self.backward_ms:>7.1f} ms {self.step_ms:>7.1f} ms "
            f"{f'{self.step_p20_ms:.1f}-{self.step_p80_ms:.1f} ms':>17}"
        )
