"""The ways that are compared, the honest control among them.

==================  =====================================================================================
full backward       nothing dropped
smaller batch       nothing dropped, with the batch whose step takes as long as ours: the honest control
published DropBP    branches dropped by detaching them after their forward, plans drawn as published, at the same
                    backward FLOPs as ours
target plan         no branch dropped, tokens without a loss run like inference; where the data have such tokens and
                    ours is another way
DropBP              where ours is that target plan: branches decided before the forward, a dropped one runs like
                    inference, at the same backward FLOPs
ours                what was asked for, or chosen by `decide_context`
==================  =====================================================================================
"""

import statistics
from typing import Any

from torch import nn

from ..allocation import depth_linear_rates
from ..coreset import CoresetSelector
from ..handler import DropBPHandler
from ..integrations.target_checks import check_context
from ..integrations.transformers import apply_dropbp
from ..target_share import TargetShare, count_targets
from ..targets import TargetRule
from .data import Data
from .errors import UserError
from .models import twin
from .settings import Settings, check_rates, with_context
from .training import Run

FULL, SMALLER, PUBLISHED, OURS = "full backward", "smaller batch", "published DropBP", "ours"
TARGETS, BRANCHES = "target plan", "DropBP"
MOST_TARGETS = 0.9  # of the rows of a batch: above that a target plan has little to leave out and is not compared
NUM_COUNTED_BATCHES = 64
WARM_UP_ROUNDS, TIMED_ROUNDS = 1, 5
# Of the time of a batch: where half of it takes more, launches are what takes time, and the line would lead anywhere.
MOST_OF_HALF = 0.9
# Plans drawn for measurements come from steps far beyond any training, so that they are none of its own.
FIRST_MEASURED_PLAN = 1 << 40


def gate(model: nn.Module, settings: Settings, drop_rate: float, **options: Any) -> DropBPHandler:
    """`apply_dropbp` with the run's settings; a model that it cannot gate is a user's error."""
    names = ("sampler", "schedule", "grad_scale", "granularity", "fused")
    ours = {name: getattr(settings, name) for name in names}
    try:
        handler = apply_dropbp(model, drop_rate, seed=settings.seed, total_steps=settings.steps, **{**ours, **options})
    except ValueError as error:
        raise UserError(f"--model {settings.model}: {error}") from error
    if drop_rate == 0.0:
        return handler
    check_rates(settings, drop_rate)  # published DropBP is given another one than ours with --context inference
    if settings.rates == "depth_linear":
        handler.set_drop_rates(depth_linear_rates(handler.flops(), drop_rate))
    elif (file := settings.calibration_file()) is not None:
        try:
            handler.use_calibration(file, allocation=settings.allocation)
        except ValueError as error:  # of another model
            raise UserError(f"--rates {settings.rates}: {error}") from error
    return handler


def make_runs(model: nn.Module, data: Data, settings: Settings, control_batch: int | None) -> list[Run]:
    """Ours alone, or all ways, each with its own trainable parameters, all starting from the same values.

    control_batch: batch size of the smaller-batch control; None: measure it.
    """
    assert settings.drop_rate is not None
    by_targets = {"context": "inference", "context_gradient": settings.context_gradient}
    parts = {name: getattr(settings, name) for name in ("target_windows", "target_keep")}
    asked = by_targets | parts if settings.context == "inference" else {}
    if not settings.compare:
        handler = gate(model, settings, settings.drop_rate, **asked)
        coreset = _coreset(model, settings)
        return [Run(OURS, model, handler, settings.batch_size, data, settings, coreset)]
    share = count_targets_of(data, settings.batch_size, settings.steps).backward
    is_target_plan = bool(asked) and settings.drop_rate == 0.0
    others = [FULL, SMALLER, PUBLISHED, *[BRANCHES] * is_target_plan]
    others += [TARGETS] * (not is_target_plan and _has_targets(model, settings, share, "compared"))
    models = {name: twin(model) for name in others} | {OURS: model}
    handlers = {}
    if settings.fused:  # in every run, so that what is compared is the backward
        for name in (FULL, SMALLER):
            handlers[name] = gate(models[name], settings, 0.0, granularity="branch")
    if TARGETS in others:
        handlers[TARGETS] = gate(models[TARGETS], settings, 0.0, granularity="branch", **by_targets)
    published = {
        "sampler": "published",
        "schedule": None,
        "grad_scale": 1.0,
        "granularity": "branch",
        "dropped_runs": "detach",
        "keep_one": False,
    }
    handlers[OURS] = gate(models[OURS], settings, settings.drop_rate, **asked)
    targets = handlers[OURS].targets
    rate = 1.0 - (1.0 - settings.drop_rate) * (1.0 if targets is None else share * targets.trained_share)
    handlers[PUBLISHED] = gate(models[PUBLISHED], settings, rate, **published)
    if BRANCHES in others:
        handlers[BRANCHES] = gate(models[BRANCHES], settings, rate)
    runs = {name: Run(name, models[name], handlers.get(name), settings.batch_size, data, settings) for name in models}
    runs[OURS].coreset = _coreset(model, settings)
    runs[SMALLER].batch_size = control_batch or equal_time_batch(runs[FULL], runs[OURS])
    return list(runs.values())


def _coreset(model: nn.Module, settings: Settings) -> CoresetSelector | None:
    if settings.coreset is None:
        return None
    try:
        return CoresetSelector(model, settings.coreset, seed=settings.seed)
    except ValueError as error:
        raise UserError(f"--coreset with --model {settings.model}: {error}") from error


def count_targets_of(data: Data, batch_size: int, steps: int) -> TargetShare:
    """What target plans have to do in the first batches of so many steps."""
    batches = (data.batch(step, batch_size) for step in range(min(steps, NUM_COUNTED_BATCHES)))
    return count_targets({"input_ids": ids, "labels": labels} for ids, labels in batches)


def decide_context(model: nn.Module, data: Data, settings: Settings) -> Settings:
    """Settings whose context was left open: a target plan where there is something to leave out; says what and why."""
    share = count_targets_of(data, settings.batch_size, settings.steps)
    if not _has_targets(model, settings, share.backward, "run"):
        return with_context(settings, "off")
    print(
        f"{share.targets:.0%} of the tokens carry a loss: the others run as inference, and no branch is dropped "
        "(--context off, or a --drop-rate: branches are dropped instead)"
    )
    return with_context(settings, "inference")


def _has_targets(model: nn.Module, settings: Settings, share: float, done: str) -> bool:
    """Whether there is context to leave out, and the model can; says so if it cannot."""
    if share > MOST_TARGETS:
        return False
    try:
        check_context(model, "inference", TargetRule(settings.context_gradient))
    except ValueError as error:
        print(f"no target plan is {done}: {error}")
        return False
    return True


def in_words(settings: Settings) -> str:
    """What ours does."""
    words = f"drop rate {settings.drop_rate:g}"
    words += f" by {settings.granularity}" * (settings.granularity != "branch")
    if settings.context == "inference":
        words += ", tokens without a loss as inference"
        words += f" (context gradient {settings.context_gradient})" * (settings.context_gradient != "none")
        words += f", {settings.target_windows} windows of targets in turn" * (settings.target_windows > 1)
        words += f", {settings.target_keep:g} of the targets drawn" * (settings.target_keep < 1.0)
    if settings.coreset is not None:
        words += f", coresets of {settings.coreset:g} of each batch"
    return words


def equal_time_batch(full: Run, ours: Run) -> int:
    """The batch size at which a step without dropping takes as long as a step of ours.

    Times forward and backward of ours, of the full batch and of half of it, in turn, each time on other rows, since
    batches differ in length and in targets; the time of other batch sizes is taken to lie on the line through those
    two. The whole batch where smaller ones take as long, as on a GPU that waits
    for launches.
    """
    batch_size = full.batch_size
    half = max(1, batch_size // 2)
    if half == batch_size:
        return 1
    times: dict[str, list[float]] = {"full": [], "half": [], "ours": []}
    for turn in range(WARM_UP_ROUNDS + TIMED_ROUNDS):
        assert ours.handler is not None
        step = measured_step(ours.settings, turn, WARM_UP_ROUNDS + TIMED_ROUNDS)
        ours.handler.set_plan(ours.handler.draw(step).kept)
        for key, run, size in (("full", full, batch_size), ("half", full, half), ("ours", ours, batch_size)):
            seconds = _time_backprop(run, size, turn)
            if turn >= WARM_UP_ROUNDS:
                times[key].append(seconds)
    median = {key: statistics.median(values) for key, values in times.items()}
    if median["half"] > MOST_OF_HALF * median["full"]:  # no smaller batch is faster
        return batch_size
    per_row = (median["full"] - median["half"]) / (batch_size - half)
    return min(batch_size, max(1, round(batch_size - (median["full"] - median["ours"]) / per_row)))


def measured_step(settings: Settings, number: int, total: int) -> int:
    """The step whose plan is measured as that number of `total`; with a schedule they are spread over the run."""
    if settings.schedule is None:
        return FIRST_MEASURED_PLAN + number
    return (2 * number + 1) * settings.steps // (2 * total)


def _time_backprop(run: Run, batch_size: int, number: int) -> float:
    batch = run.data.batch(number, batch_size)
    start = run.now()
    loss = run.loss(*run.chosen(batch, is_trial=True))
    if loss.requires_grad:
        loss.backward()
    seconds = run.now() - start
    run.optimizer.zero_grad()
    return seconds
