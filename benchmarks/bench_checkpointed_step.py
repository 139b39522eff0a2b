"""A whole fine-tuning step with LoRA under gradient checkpointing: undropped, published DropBP, ours in both ways.

undropped     transformers' checkpointing of whole blocks, non-reentrant
published     its sampler, branches detached after the forward, reentrant: every block is computed again
transformers  ours under transformers' checkpointing: dropped branches are not computed again
kept          ours with checkpoint="kept"

As in `bench_step`: one model, every round runs each method once on the same batch, a step is forward and backward.
"""

import statistics
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import ClassVar

from torch import nn
from torch.utils.checkpoint import checkpoint

from dropbp_kernels import DropBPHandler, apply_dropbp
from dropbp_kernels.layer import checkpoint_branch
from dropbp_kernels.measure import PeakLiveBytes, saved_bytes

from .bench_step import DROP_RATES, NUM_MEMORY_ROUNDS, SIZES, Method, Stepper, build
from .rows import Machine, machine
from .settings import Settings
from .timing import quantile

NUM_ROUNDS = {"full": 9, "quick": 3, "tiny": 1}
NUM_WARM_UP_ROUNDS = {"full": 1, "quick": 1, "tiny": 0}
# What a step of ours at rate 0.75 may take of the undropped one; with LoRA the ideal is (1 + 0.25 x 2) / 3 = 0.5.
ALLOWED_OVER_UNDROPPED = 0.55


@dataclass(frozen=True)
class Way(Method):
    """A method of `bench_step` under checkpointing."""

    def set_plan(self, handler: DropBPHandler, step: int) -> float:
        """Set plan and checkpointing of `step`; return the share of the branches' FLOPs that the plan keeps."""
        function = partial(checkpoint, use_reentrant=self.name == "published")
        for block in checkpointed_blocks(handler.model):
            block._gradient_checkpointing_func = function  # type: ignore[assignment]
        for gate in handler.gates.values():
            gate.checkpoint = checkpoint_branch if self.name == "kept" else None
        return super().set_plan(handler, step)


WAYS = [
    Way("undropped", 0.0),
    *(Way(name, rate) for rate in DROP_RATES for name in ("published", "transformers", "kept")),
]


@dataclass(frozen=True)
class CheckpointedStepRow(Machine):
    """One way at one drop rate. results/README.md says what each column means."""

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
    step_over_undropped: float
    saved_bytes: int
    peak_live_bytes: int

    HEADER: ClassVar[str] = (
        f"{'method':<18} {'kept':>5} {'forward':>10} {'backward':>10} {'step':>10} {'p20-p80':>17} {'of undropped':>12}"
        f" {'saved':>10} {'peak live':>10}"
    )

    def __str__(self) -> str:
        return (
            f"{self.method + f' {self.drop_rate:g}':<18} {self.flops_kept:>5.0%} {self.forward_ms:>7.1f} ms "
            f"{self.backward_ms:>7.1f} ms {self.step_ms:>7.1f} ms "
            f"{f'{self.step_p20_ms:.1f}-{self.step_p80_ms:.1f} ms':>17} {self.step_over_undropped:>12.3f} "
            f"{self.saved_bytes / 2**20:>6.1f} MiB {self.peak_live_bytes / 2**20:>6.1f} MiB"
        )


def checkpointed_blocks(model: nn.Module) -> list[nn.Module]:
    """The modules that transformers checkpoints."""
    return [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]


def run(settings: Settings) -> Iterator[list[CheckpointedStepRow]]:
    """One list with a row for each way."""
    if not settings.has_time():
        return
    from tqdm import tqdm

    where = machine(settings.device, settings.commit)
    size = SIZES["tiny" if settings.scale == "tiny" else settings.device.type]
    model, batch = build(size, settings.device)
    times: dict[Way, list[tuple[float, float]]] = {way: [] for way in WAYS}
    kept: dict[Way, list[float]] = {way: [] for way in WAYS}
    num_warm_up = NUM_WARM_UP_ROUNDS[settings.scale]
    rounds = range(num_warm_up + NUM_ROUNDS[settings.scale])
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", ".*gradient_checkpointing.*", FutureWarning
        )  # transformers renames its switch
        warnings.filterwarnings("ignore", "gradient checkpointing: it is reentrant.*", UserWarning)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        handler = apply_dropbp(model, 0.0, strict=False)
        stepper = Stepper(model, batch, settings.device)
        memory = {
            way: max(
                _memory(way, handler, stepper, step)
                for step in range(NUM_MEMORY_ROUNDS[settings.scale] if way.drop_rate else 1)
            )
            for way in tqdm(WAYS, desc="counting memory", leave=False, disable=None)
        }
        for step in tqdm(rounds, desc="rounds of all methods", leave=False, disable=None):
            for way in WAYS:
                flops_kept = way.set_plan(handler, step)
                elapsed = stepper.timed_step()
                if step >= num_warm_up:
                    times[way].append(elapsed)
                    kept[way].append(flops_kept)

    undropped_ms = statistics.median(map(sum, times[WAYS[0]]))
    rows = []
    for way in WAYS:
        steps_ms = [forward + backward for forward, backward in times[way]]
        peak_live_bytes, num_saved_bytes = memory[way]
        rows.append(
            CheckpointedStepRow(
                **asdict(where),
                model=size.name,
                dtype=str(size.dtype).removeprefix("torch."),
                batch_size=size.batch_size,
                seq_len=size.seq_len,
                method=way.name,
                drop_rate=way.drop_rate,
                flops_kept=statistics.fmean(kept[way]),
                num_samples=len(steps_ms),
                forward_ms=statistics.median(forward for forward, _ in times[way]),
                backward_ms=statistics.median(backward for _, backward in times[way]),
                step_ms=statistics.median(steps_ms),
                step_p20_ms=quantile(steps_ms, 0.2),
                step_p80_ms=quantile(steps_ms, 0.8),
                step_over_undropped=statistics.median(steps_ms) / undropped_ms,
                saved_bytes=num_saved_bytes,
                peak_live_bytes=peak_live_bytes,
            )
        )
    yield rows


def verdicts(rows: list[CheckpointedStepRow]) -> dict[str, bool]:
    """What a step of ours must hold on to, by name: time at rate 0.75."""
    return {
        f"{row.method} at {row.drop_rate:g} within {ALLOWED_OVER_UNDROPPED} of undropped": (
            row.step_over_undropped <= ALLOWED_OVER_UNDROPPED
        )
        for row in rows
        if row.method in ("transformers", "kept") and row.drop_rate == 0.75
    }


def _memory(way: Way, handler: DropBPHandler, stepper: Stepper, step: int) -> tuple[int, int]:
    """Peak live bytes of a step and the bytes saved in its forward."""
    way.set_plan(handler, step)
    stepper.model.zero_grad(set_to_none=True)
    with saved_bytes() as saved:
        loss = stepper.forward()
    del loss
    with PeakLiveBytes() as live:
        stepper.forward().backward()
    stepper.model.zero_grad(set_to_none=True)
    return live.peak_bytes, saved.num_bytes
