"""A whole fine-tuning step with LoRA under gradient checkpointing: undropped, published DropBP, ours in each way.

undropped     transformers' checkpointing of whole blocks, non-reentrant
published     its sampler, branches detached after the forward, reentrant: every block is computed again
transformers  ours under transformers' checkpointing: dropped branches are not computed again
kept, sliced  ours with checkpoint="kept" and "sliced"

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
from dropbp_kernels.integrations.checkpointing import set_checkpointing
from dropbp_kernels.layer import checkpoint_branch
from dropbp_kernels.slicing import SLICE_TOKENS

from .bench_step import Method
from .rows import machine
from .settings import Settings
from .steps import DROP_RATES, NUM_MEMORY_ROUNDS, ModelRow, Stepper, build, size_of, time_columns
from .timing import in_turn

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
            gate.checkpoint = checkpoint_branch if self.name in ("kept", "sliced") else None
            gate.slice_tokens = SLICE_TOKENS if self.name == "sliced" and gate.per_token else 0
        return super().set_plan(handler, step)


WAYS = [
    Way("undropped", 0.0),
    *(Way(name, rate) for rate in DROP_RATES for name in ("published", "transformers", "kept", "sliced")),
]


@dataclass(frozen=True)
class CheckpointedStepRow(ModelRow):
    """One way at one drop rate. results/README.md says what each column means."""

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
        f"{'method':<18} {'kept':>5} {ModelRow.TIMES} {'of undropped':>12} {'saved':>10} {'peak live':>10}"
    )

    def __str__(self) -> str:
        return (
            f"{self.method + f' {self.drop_rate:g}':<18} {self.flops_kept:>5.0%} {self.times()} "
            f"{self.step_over_undropped:>12.3f} {self.saved_bytes / 2**20:>6.1f} MiB "
            f"{self.peak_live_bytes / 2**20:>6.1f} MiB"
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
    size = size_of(settings)
    model, batch = build(size, settings.device)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "gradient checkpointing: it is reentrant.*", UserWarning)
        set_checkpointing(model, {"use_reentrant": False})
        handler = apply_dropbp(model, 0.0, strict=False)
        stepper = Stepper(model, batch, settings.device)
        memory = {}
        for way in tqdm(WAYS, desc="counting memory", leave=False, disable=None):
            plans = range(NUM_MEMORY_ROUNDS[settings.scale] if way.drop_rate else 1)
            counts = [_memory(way, handler, stepper, step) for step in plans]
            memory[way] = max(counts, key=lambda one: (one["peak_live_bytes"], one["saved_bytes"]))
        measured = in_turn(
            {way: way.in_rounds(handler, stepper) for way in WAYS},
            NUM_ROUNDS[settings.scale],
            NUM_WARM_UP_ROUNDS[settings.scale],
        )

    rows = []
    undropped_ms = time_columns([times for _, times in measured[WAYS[0]]])["step_ms"]
    for way in WAYS:
        kept, times = zip(*measured[way], strict=True)
        columns = time_columns(times)
        rows.append(
            CheckpointedStepRow(
                **asdict(where),
                **size.columns(),
                method=way.name,
                drop_rate=way.drop_rate,
                flops_kept=statistics.fmean(kept),
                **columns,
                step_over_undropped=columns["step_ms"] / undropped_ms,
                **memory[way],
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
        if row.method in ("transformers", "kept", "sliced") and row.drop_rate == 0.75
    }


def _memory(way: Way, handler: DropBPHandler, stepper: Stepper, step: int) -> dict[str, int]:
    way.set_plan(handler, step)
    return stepper.bytes()
