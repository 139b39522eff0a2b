"""A whole fine-tuning step with LoRA where part of the tokens carry a loss: undropped, and by target plan.

undropped            forward and backward of all tokens
none, one_hop, full  target plan with that context_gradient: tokens without a loss run without autograd (full: with it)
... fused            the same with fused=True
... checkpointed     the same under transformers' gradient checkpointing of whole blocks, non-reentrant

All are compared with the undropped step of the unpatched model, under the same checkpointing. The targets are the last
tokens of every sample.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from torch import Tensor

from dropbp_kernels import apply_dropbp
from dropbp_kernels.cli.models import twin
from dropbp_kernels.integrations.checkpointing import set_checkpointing
from dropbp_kernels.targets import IGNORED

from .rows import machine
from .settings import Settings
from .steps import ModelRow, Stepper, build, over, size_of, time_columns, times_in_turn

TARGET_SHARES = (0.25, 1.0, 0.0625, 0.5)  # those with a bound first, in case time runs out
CHECKPOINTED = " checkpointed"
METHODS = (
    *("undropped", "undropped fused", "none", "none fused", "one_hop", "full"),
    *("undropped checkpointed", "undropped fused checkpointed", "none checkpointed", "none fused checkpointed"),
)
NUM_ROUNDS = {"full": 11, "quick": 5, "tiny": 1}
# What a step by target plan may take of the undropped one, at a target share; with LoRA the ideal is (1 + share) / 2.
ALLOWED_OVER_UNDROPPED = {
    ("none", 0.25): 0.66,
    ("none fused", 0.25): 0.66,
    ("none", 1.0): 1.02,
    ("none checkpointed", 0.25): 0.52,  # ideal (1 + 2 share) / 3
    ("none fused checkpointed", 0.25): 0.52,
}


@dataclass(frozen=True)
class TargetStepRow(ModelRow):
    """One method at one target share. results/README.md says what each column means."""

    method: str
    target_share: float
    num_samples: int
    forward_ms: float
    backward_ms: float
    step_ms: float
    step_p20_ms: float
    step_p80_ms: float
    step_over_undropped: float
    saved_bytes: int
    peak_live_bytes: int

    HEADER: ClassVar[str] = f"{'method':<30} {ModelRow.TIMES} {'of undropped':>12} {'saved':>10} {'peak live':>10}"

    def __str__(self) -> str:
        return (
            f"{self.method + f' {self.target_share:g}':<30} {self.times()} {self.step_over_undropped:>12.3f} "
            f"{self.saved_bytes / 2**20:>6.1f} MiB {self.peak_live_bytes / 2**20:>6.1f} MiB"
        )


def run(settings: Settings) -> Iterator[list[TargetStepRow]]:
    """One list of rows, a row for each method, at every target share."""
    if not settings.has_time():
        return
    where = machine(settings.device, settings.commit)
    size = size_of(settings)
    model, batch = build(size, settings.device)
    models = {method: twin(model) for method in METHODS}
    for method, each in models.items():
        gradient, *others = method.split()
        if method.endswith(CHECKPOINTED):
            set_checkpointing(each, {"use_reentrant": False})
        fused = "fused" in others
        if gradient != "undropped":
            apply_dropbp(each, 0.0, strict=False, fused=fused, context="inference", context_gradient=gradient)
        elif fused:
            apply_dropbp(each, 0.0, strict=False, fused=True)
    for share in TARGET_SHARES:
        if not settings.has_time():
            continue
        steppers = {method: Stepper(models[method], with_targets(batch, share), settings.device) for method in METHODS}
        memory = {method: stepper.bytes() for method, stepper in steppers.items()}
        measured = times_in_turn(steppers, NUM_ROUNDS, settings, f"target share {share:g}")
        yield [
            TargetStepRow(
                **asdict(where),
                **size.columns(),
                method=method,
                target_share=share,
                **time_columns(measured[method]),
                step_over_undropped=over(measured[method], measured[_control(method)]),
                **memory[method],
            )
            for method in METHODS
        ]


def with_targets(batch: dict[str, Tensor], share: float) -> dict[str, Any]:
    """The batch with labels on the last `share` of its tokens, at least one."""
    labels = batch["input_ids"].clone()
    num_targets = max(1, round(share * labels.shape[1]))
    labels[:, : labels.shape[1] - num_targets] = IGNORED
    return {**batch, "labels": labels}


def verdicts(rows: list[TargetStepRow]) -> dict[str, bool]:
    """What a step by target plan must hold on to, by name."""
    return {
        f"{row.method}: step at {row.target_share:g} targets within {allowed} of undropped": row.step_over_undropped
        <= allowed
        for row in rows
        if (allowed := ALLOWED_OVER_UNDROPPED.get((row.method, row.target_share))) is not None
    }


def _control(method: str) -> str:
    return "undropped" + CHECKPOINTED * method.endswith(CHECKPOINTED)
