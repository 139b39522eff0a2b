"""A whole fine-tuning step with LoRA on conversations of many turns: undropped, and by target plan.

undropped   forward and backward of all tokens
apart       target plan with two stages for every turn, in which a row runs once
together    target plan with two stages in all, in which the targets that context sees run twice

A batch has targets in as many places of every sample as there are turns; their lengths are drawn, as a chat's differ.
Which way a plan takes by itself is `is_chosen`: decided by `targets.PASS_ROWS`, of which these rows say whether it is
right.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor

from dropbp_kernels import apply_dropbp
from dropbp_kernels.cli.models import twin
from dropbp_kernels.integrations import target_plans
from dropbp_kernels.targets import IGNORED, plan_targets

from .rows import machine
from .settings import Settings
from .steps import ModelRow, Stepper, Times, build, over, size_of, time_columns, times_in_turn

METHODS = ("undropped", "apart", "together")
TURNS = (2, 8, 4, 16)
TARGET_SHARE = 0.25
MIN_TURN = 4  # tokens
NUM_ROUNDS = {"full": 9, "quick": 5, "tiny": 1}


@dataclass(frozen=True)
class TurnStepRow(ModelRow):
    """One method at one number of turns. results/README.md says what each column means."""

    method: str
    num_turns: int
    target_share: float
    num_passes: int
    is_chosen: bool
    num_samples: int
    forward_ms: float
    backward_ms: float
    step_ms: float
    step_p20_ms: float
    step_p80_ms: float
    step_over_undropped: float

    HEADER: ClassVar[str] = f"{'method':<20} {'passes':>6} {'chosen':>6} {ModelRow.TIMES} {'of undropped':>12}"

    def __str__(self) -> str:
        return (
            f"{f'{self.method}, {self.num_turns} turns':<20} {self.num_passes:>6} {'yes' * self.is_chosen:>6} "
            f"{self.times()} {self.step_over_undropped:>12.3f}"
        )


class TurnStepper(Stepper):
    """Steps whose turns run in the way `turns` says."""

    def __init__(self, *args: Any, turns: str) -> None:
        super().__init__(*args)
        self.turns = turns

    def times(self) -> Times:
        """Of one step."""
        with mock.patch.object(target_plans, "_turns", return_value=self.turns):
            return super().times()


def run(settings: Settings) -> Iterator[list[TurnStepRow]]:
    """One list of rows, a row for each method, at every number of turns."""
    if not settings.has_time():
        return
    where = machine(settings.device, settings.commit)
    size = size_of(settings)
    model, batch = build(size, settings.device)
    models = {method: twin(model) for method in METHODS}
    for method in METHODS[1:]:
        apply_dropbp(models[method], 0.0, strict=False, context="inference")
    for num_turns in TURNS:
        if not settings.has_time() or size.seq_len < MIN_TURN * num_turns:
            continue
        talks = with_turns(batch, num_turns)
        steppers = {method: TurnStepper(models[method], talks, settings.device, turns=method) for method in METHODS}
        measured = times_in_turn(steppers, NUM_ROUNDS, settings, f"{num_turns} turns")
        passes = {"undropped": 1} | {
            turns: len(plan_targets(talks["labels"], turns=turns).stages) for turns in METHODS[1:]
        }
        num_chosen = len(plan_targets(talks["labels"]).stages)
        yield [
            TurnStepRow(
                **asdict(where),
                **size.columns(),
                method=method,
                num_turns=num_turns,
                target_share=TARGET_SHARE,
                num_passes=passes[method],
                is_chosen=method != "undropped" and passes[method] == num_chosen,
                **time_columns(measured[method]),
                step_over_undropped=over(measured[method], measured["undropped"]),
            )
            for method in METHODS
        ]


def with_turns(batch: dict[str, Tensor], num_turns: int) -> dict[str, Any]:
    """The batch with labels on the last tokens of each of num_turns equal parts: 0.5 to 1.5 times TARGET_SHARE."""
    labels = batch["input_ids"].clone()
    starts = [turn * labels.shape[1] // num_turns for turn in range(num_turns + 1)]
    shares = TARGET_SHARE * (0.5 + torch.rand(len(labels), num_turns, generator=torch.Generator().manual_seed(0)))
    for sample, of_sample in zip(labels, shares.tolist(), strict=True):
        for start, end, share in zip(starts, starts[1:], of_sample, strict=False):
            sample[start : end - max(1, round(share * (end - start)))] = IGNORED
    return {**batch, "labels": labels}
