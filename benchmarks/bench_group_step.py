"""A whole step with LoRA on groups of completions that share a prompt, as in GRPO: undropped, and by target plan.

undropped      forward and backward of all tokens, logits of completions alone
none           target plan: prompts run without autograd
none apart     and so do completions whose advantage is zero, in a call of their own
shared         target plan in which a prompt runs once for its group
shared apart   both

The batch is two groups; in one of them every advantage is zero. The loss is the mean of log-probabilities times
advantages.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dropbp_kernels import DropBPHandler, apply_dropbp
from dropbp_kernels.cli.models import twin
from dropbp_kernels.targets import IGNORED

from .rows import machine
from .settings import Settings
from .steps import ModelRow, Size, Stepper, build, over, size_of, time_columns, times_in_turn

METHODS = ("undropped", "none", "none apart", "shared", "shared apart")
COMPLETION_SHARES = (0.5, 0.25)
NUM_SAMPLES = 8
MIN_TOKENS = 16
NUM_ROUNDS = {"full": 11, "quick": 5, "tiny": 1}


@dataclass(frozen=True)
class GroupStepRow(ModelRow):
    """One method at one length of completions. results/README.md says what each column means."""

    method: str
    completion_share: float
    num_samples: int
    forward_ms: float
    backward_ms: float
    step_ms: float
    step_p20_ms: float
    step_p80_ms: float
    step_over_undropped: float
    saved_bytes: int
    peak_live_bytes: int

    HEADER: ClassVar[str] = f"{'method':<20} {ModelRow.TIMES} {'of undropped':>12} {'saved':>10} {'peak live':>10}"

    def __str__(self) -> str:
        return (
            f"{self.method + f' {self.completion_share:g}':<20} {self.times()} {self.step_over_undropped:>12.3f} "
            f"{self.saved_bytes / 2**20:>6.1f} MiB {self.peak_live_bytes / 2**20:>6.1f} MiB"
        )


class GroupStepper(Stepper):
    """Steps of a loss that is made of log-probabilities and advantages."""

    def __init__(
        self,
        model: nn.Module,
        batch: dict[str, Tensor],
        device: torch.device,
        handler: DropBPHandler | None,
        apart: bool,
    ) -> None:
        super().__init__(model, batch, device)
        self.handler, self.apart = handler, apart

    def forward(self) -> Tensor:
        tokens, labels, advantages = (self.batch[name] for name in ("input_ids", "labels", "advantages"))
        if self.handler is not None:
            self.handler.step(labels=labels, without_gradient=advantages == 0.0 if self.apart else None)
        length = int((labels[0] != IGNORED).sum())
        logits = self.model(input_ids=tokens, logits_to_keep=length + 1).logits[:, :-1]
        log_probs = -nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, -length:].flatten(), reduction="none")
        return -(log_probs.view(-1, length).mean(1) * advantages).mean()


def run(settings: Settings) -> Iterator[list[GroupStepRow]]:
    """One list of rows, a row for each method, at every length of completions."""
    if not settings.has_time():
        return
    where = machine(settings.device, settings.commit)
    size = as_groups(size_of(settings))
    model, batch = build(size, settings.device)
    models = {method: twin(model) for method in METHODS}
    handlers = {
        method: apply_dropbp(models[method], 0.0, strict=False, context="inference", shared_context="shared" in method)
        for method in METHODS[1:]
    }
    for share in COMPLETION_SHARES:
        if not settings.has_time():
            continue
        groups = with_groups(batch, share)
        steppers = {
            method: GroupStepper(models[method], groups, settings.device, handlers.get(method), "apart" in method)
            for method in METHODS
        }
        memory = {method: stepper.bytes() for method, stepper in steppers.items()}
        measured = times_in_turn(steppers, NUM_ROUNDS, settings, f"completions {share:g}")
        yield [
            GroupStepRow(
                **asdict(where),
                **size.columns(),
                method=method,
                completion_share=share,
                **time_columns(measured[method]),
                step_over_undropped=over(measured[method], measured["undropped"]),
                **memory[method],
            )
            for method in METHODS
        ]


def as_groups(size: Size) -> Size:
    """As many tokens in NUM_SAMPLES samples."""
    return replace(size, batch_size=NUM_SAMPLES, seq_len=max(MIN_TOKENS, size.batch_size * size.seq_len // NUM_SAMPLES))


def with_groups(batch: dict[str, Tensor], share: float) -> dict[str, Any]:
    """The batch as two groups of samples with a prompt each, labels on the last `share` of them, and advantages."""
    tokens = batch["input_ids"].clone()
    batch_size, seq_len = tokens.shape
    begin = seq_len - max(1, round(share * seq_len))
    half = batch_size // 2
    tokens[:half, :begin], tokens[half:, :begin] = tokens[0, :begin].clone(), tokens[half, :begin].clone()
    labels = tokens.clone()
    labels[:, :begin] = IGNORED
    advantages = torch.zeros(batch_size, device=tokens.device)
    advantages[half:] = torch.arange(batch_size - half, device=tokens.device) % 2 * 2.0 - 1.0
    return {"input_ids": tokens, "labels": labels, "advantages": advantages}
