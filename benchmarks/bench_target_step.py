"""A whole fine-tuning step with LoRA where part of the tokens carry a loss: undropped, and by target plan.

undropped            forward and backward of all tokens
none, one_hop, full  target plan with that context_gradient: tokens without a loss run without autograd (full: with it)
... checkpointed     the same under transformers' gradient checkpointing of whole blocks, non-reentrant

As in `bench_step`: every round runs each method once on the same batch, a step is forward and backward. The targets are
the last tokens of every sample.
"""

import copy
import statistics
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from dropbp_kernels import apply_dropbp
from dropbp_kernels.measure import PeakLiveBytes, saved_bytes
from dropbp_kernels.targets import IGNORED

from .bench_step import SIZES, Stepper, build
from .rows import Machine, machine
from .settings import Settings
from .timing import quantile

TARGET_SHARES = (0.25, 1.0, 0.0625, 0.5)  # those with a bound first, in case time runs out
CHECKPOINTED = " checkpointed"
METHODS = ("undropped", "none", "one_hop", "full", f"undropped{CHECKPOINTED}", f"none{CHECKPOINTED}")
NUM_ROUNDS = {"full": 11, "quick": 5, "tiny": 1}
NUM_WARM_UP_ROUNDS = {"full": 2, "quick": 1, "tiny": 0}
# What a step by target plan may take of the undropped one, at a target share; with LoRA the ideal is (1 + share) / 2.
ALLOWED_OVER_UNDROPPED = {
    ("none", 0.25): 0.66,
    ("none", 1.0): 1.02,
    (f"none{CHECKPOINTED}", 0.25): 0.52,  # ideal (1 + 2 share) / 3
}


@dataclass(frozen=True)
class TargetStepRow(Machine):
    """One method at one target share. results/README.md says what each column means."""

    model: str
    dtype: str
    batch_size: int
    seq_len: int
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

    HEADER: ClassVar[str] = (
        f"{'method':<24} {'forward':>10} {'backward':>10} {'step':>10} {'p20-p80':>17} {'of undropped':>12}"
        f" {'saved':>10} {'peak live':>10}"
    )

    def __str__(self) -> str:
        return (
            f"{self.method + f' {self.target_share:g}':<24} {self.forward_ms:>7.1f} ms {self.backward_ms:>7.1f} ms "
            f"{self.step_ms:>7.1f} ms {f'{self.step_p20_ms:.1f}-{self.step_p80_ms:.1f} ms':>17} "
            f"{self.step_over_undropped:>12.3f} {self.saved_bytes / 2**20:>6.1f} MiB "
            f"{self.peak_live_bytes / 2**20:>6.1f} MiB"
        )


def run(settings: Settings) -> Iterator[list[TargetStepRow]]:
    """One list of rows, a row for each method, at every target share."""
    if not settings.has_time():
        return
    from tqdm import tqdm

    where = machine(settings.device, settings.commit)
    size = SIZES["tiny" if settings.scale == "tiny" else settings.device.type]
    model, batch = build(size, settings.device)
    models = {method: copy.deepcopy(model) for method in METHODS}
    for method, each in models.items():
        gradient = method.removesuffix(CHECKPOINTED)
        if method.endswith(CHECKPOINTED):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*gradient_checkpointing.*", FutureWarning)  # a switch renamed
                each.gradient_checkpointing_enable({"use_reentrant": False})
        if gradient != "undropped":
            apply_dropbp(each, 0.0, strict=False, context="inference", context_gradient=gradient)
    num_warm_up = NUM_WARM_UP_ROUNDS[settings.scale]
    for share in TARGET_SHARES:
        if not settings.has_time():
            continue
        steppers = {method: Stepper(models[method], with_targets(batch, share), settings.device) for method in METHODS}
        memory = {method: _memory(stepper) for method, stepper in steppers.items()}
        times: dict[str, list[tuple[float, float]]] = {method: [] for method in METHODS}
        rounds = range(num_warm_up + NUM_ROUNDS[settings.scale])
        for number in tqdm(rounds, desc=f"target share {share:g}", leave=False, disable=None):
            for method, stepper in steppers.items():
                elapsed = stepper.timed_step()
                if number >= num_warm_up:
                    times[method].append(elapsed)
        rows = []
        for method in METHODS:
            steps_ms = [forward + backward for forward, backward in times[method]]
            control = times["undropped" + CHECKPOINTED * method.endswith(CHECKPOINTED)]
            undropped_ms = statistics.median(map(sum, control))
            rows.append(
                TargetStepRow(
                    **asdict(where),
                    model=size.name,
                    dtype=str(size.dtype).removeprefix("torch."),
                    batch_size=size.batch_size,
                    seq_len=size.seq_len,
                    method=method,
                    target_share=share,
                    num_samples=len(steps_ms),
                    forward_ms=statistics.median(forward for forward, _ in times[method]),
                    backward_ms=statistics.median(backward for _, backward in times[method]),
                    step_ms=statistics.median(steps_ms),
                    step_p20_ms=quantile(steps_ms, 0.2),
                    step_p80_ms=quantile(steps_ms, 0.8),
                    step_over_undropped=statistics.median(steps_ms) / undropped_ms,
                    **memory[method],
                )
            )
        yield rows


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


def _memory(stepper: Stepper) -> dict[str, int]:
    model: nn.Module = stepper.model
    model.zero_grad(set_to_none=True)
    with saved_bytes() as saved:
        loss = stepper.forward()
    del loss
    with PeakLiveBytes() as live:
        stepper.forward().backward()
    model.zero_grad(set_to_none=True)
    return {"saved_bytes": saved.num_bytes, "peak_live_bytes": live.peak_bytes}
