"""The ways that are compared, the honest control among them, and what is measured of each.

==================  =====================================================================================
full backward       nothing dropped
smaller batch       nothing dropped, with the batch whose step takes as long as ours: the honest control
published DropBP    branches dropped by detaching them after their forward, plans drawn as published, at the same
                    backward FLOPs as ours
target plan         no branch dropped, tokens without a loss run like inference; where the data have such tokens
ours                what was asked for: branches decided before the forward, a dropped one runs like inference; with
                    --context inference by target plan
==================  =====================================================================================
"""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..allocation import depth_linear_rates
from ..coreset import CoresetSelector
from ..coreset.budgets import num_kept
from ..handler import DropBPHandler
from ..integrations.target_plans import check_context
from ..integrations.transformers import apply_dropbp
from ..measure import PeakLiveBytes, saved_bytes
from ..target_share import TargetShare, count_targets
from .data import Data
from .errors import UserError
from .models import twin
from .settings import Settings
from .training import Run

FULL, SMALLER, PUBLISHED, OURS = "full backward", "smaller batch", "published DropBP", "ours"
TARGETS = "target plan"
MOST_TARGETS = 0.9  # of the rows of a batch: above that a target plan has little to leave out and is not compared
NUM_COUNTED_BATCHES = 64
WARM_UP_ROUNDS, TIMED_ROUNDS = 1, 5
NUM_MEASURED_PLANS = 4
# Plans drawn for measurements come from steps far beyond any training, so that they are none of its own.
FIRST_MEASURED_PLAN = 1 << 40


def gate(model: nn.Module, settings: Settings, drop_rate: float, **options: Any) -> DropBPHandler:
    """`apply_dropbp` with the run's settings; a model that it cannot gate is a user's error."""
    names = ("sampler", "schedule", "grad_scale", "granularity")
    ours = {name: getattr(settings, name) for name in names}
    try:
        handler = apply_dropbp(model, drop_rate, seed=settings.seed, total_steps=settings.steps, **{**ours, **options})
    except ValueError as error:
        raise UserError(f"--model {settings.model}: {error}") from error
    if settings.rates == "depth_linear":
        handler.set_drop_rates(depth_linear_rates(handler.flops(), drop_rate))
    return handler


def make_runs(model: nn.Module, data: Data, settings: Settings, control_batch: int | None) -> list[Run]:
    """Ours alone, or all ways, each with its own trainable parameters, all starting from the same values.

    control_batch: batch size of the smaller-batch control; None: measure it.
    """
    assert settings.drop_rate is not None
    by_targets = {"context": "inference", "context_gradient": settings.context_gradient}
    asked = by_targets if settings.context == "inference" else {}
    if not settings.compare:
        handler = gate(model, settings, settings.drop_rate, **asked)
        coreset = _coreset(model, settings)
        return [Run(OURS, model, handler, settings.batch_size, data, settings, bool(asked), coreset)]
    share = _count_targets(data, settings.batch_size, settings.steps).backward
    others = [FULL, SMALLER, PUBLISHED, *[TARGETS] * _is_of_use(model, settings, share)]
    models = {name: twin(model) for name in others} | {OURS: model}
    handlers = {}
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
    rate = 1.0 - (1.0 - settings.drop_rate) * (share if asked else 1.0)
    handlers[PUBLISHED] = gate(models[PUBLISHED], settings, rate, **published)
    handlers[OURS] = gate(models[OURS], settings, settings.drop_rate, **asked)
    by_plan = {TARGETS, *[OURS] * bool(asked)}
    runs = {
        name: Run(name, models[name], handlers.get(name), settings.batch_size, data, settings, name in by_plan)
        for name in models
    }
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


def _count_targets(data: Data, batch_size: int, steps: int) -> TargetShare:
    """Over the first batches of the training."""
    batches = (data.batch(step, batch_size) for step in range(min(steps, NUM_COUNTED_BATCHES)))
    return count_targets({"input_ids": ids, "labels": labels} for ids, labels in batches)


def _is_of_use(model: nn.Module, settings: Settings, share: float) -> bool:
    """Whether a target plan without dropping is a way of its own: there is context, and ours does not do just that."""
    if share > MOST_TARGETS or (settings.context == "inference" and settings.drop_rate == 0.0):
        return False
    try:
        check_context(model, "inference", settings.context_gradient)
    except ValueError as error:
        print(f"no target plan is compared: {error}")
        return False
    return True


def in_words(settings: Settings) -> str:
    """What ours does."""
    words = f"drop rate {settings.drop_rate:g}"
    words += f" by {settings.granularity}" * (settings.granularity != "branch")
    if settings.context == "inference":
        words += ", tokens without a loss as inference"
        words += f" (context gradient {settings.context_gradient})" * (settings.context_gradient != "none")
    if settings.coreset is not None:
        words += f", coresets of {settings.coreset:g} of each batch"
    return words


def equal_time_batch(full: Run, ours: Run) -> int:
    """The batch size at which a step without dropping takes as long as a step of ours.

    Times forward and backward of ours, of the full batch and of half of it, in turn; the time of other batch sizes is
    taken to lie on the line through those two.
    """
    batch_size = full.batch_size
    half = max(1, batch_size // 2)
    if half == batch_size:
        return 1
    times: dict[str, list[float]] = {"full": [], "half": [], "ours": []}
    for turn in range(WARM_UP_ROUNDS + TIMED_ROUNDS):
        assert ours.handler is not None
        step = _measured_step(ours.settings, turn, WARM_UP_ROUNDS + TIMED_ROUNDS)
        ours.handler.set_plan(ours.handler.draw(step).kept)
        for key, run, size in (("full", full, batch_size), ("half", full, half), ("ours", ours, batch_size)):
            seconds = _time_backprop(run, size)
            if turn >= WARM_UP_ROUNDS:
                times[key].append(seconds)
    median = {key: statistics.median(values) for key, values in times.items()}
    per_row = (median["full"] - median["half"]) / (batch_size - half)
    if per_row <= 0.0:  # steps too short to tell apart: no smaller batch is faster
        return batch_size
    return min(batch_size, max(1, round(batch_size - (median["full"] - median["ours"]) / per_row)))


def _measured_step(settings: Settings, number: int, total: int) -> int:
    """The step whose plan is measured as that number of `total`; with a schedule they are spread over the run."""
    if settings.schedule is None:
        return FIRST_MEASURED_PLAN + number
    return (2 * number + 1) * settings.steps // (2 * total)


def _time_backprop(run: Run, batch_size: int) -> float:
    batch = run.data.batch(0, batch_size)
    start = run.now()
    loss = run.loss(*run.chosen(batch, is_trial=True))
    if loss.requires_grad:
        loss.backward()
    seconds = run.now() - start
    run.optimizer.zero_grad()
    return seconds


# ---- memory


def measure_memory(run: Run) -> dict[str, float]:
    """Bytes saved for backward (mean over some plans) and the peak allocated in forward and backward (largest).

    On steps of their own, that are not timed and change nothing: counting is slow.
    """
    batch = [tensor.to(run.device) for tensor in run.data.batch(0, run.batch_size)]
    saved, peaks = [], []
    plan = None if run.handler is None else run.handler.plan.kept
    for index in range(NUM_MEASURED_PLANS if run.handler is not None else 1):
        if run.handler is not None:
            run.handler.set_plan(run.handler.draw(_measured_step(run.settings, index, NUM_MEASURED_PLANS)).kept)
        chosen = run.chosen(batch, is_trial=True)
        with saved_bytes() as counted:
            loss = run.loss(*chosen)
        saved.append(counted.num_bytes)
        del loss
        peaks.append(_peak_bytes(run, batch))
        run.optimizer.zero_grad()
    if run.handler is not None and plan is not None:
        run.handler.set_plan(plan)
    return {"saved_bytes": statistics.mean(saved), "peak_live_bytes": max(peaks)}


def _peak_bytes(run: Run, batch: Sequence[torch.Tensor]) -> int:
    def backprop() -> None:
        loss = run.loss(*run.chosen(batch, is_trial=True))
        if loss.requires_grad:
            loss.backward()

    if run.device.type == "cuda":
        before = torch.cuda.memory_allocated(run.device)
        torch.cuda.reset_peak_memory_stats(run.device)
        backprop()
        return torch.cuda.max_memory_allocated(run.device) - before
    with PeakLiveBytes() as live:
        backprop()
    return live.peak_bytes


# ---- numbers


def result(run: Run, with_memory: bool = True) -> dict[str, Any]:
    """What a run cost and reached, for the table and for report.json. Times are medians, in milliseconds."""
    history = run.history
    last = history.train_loss[-max(1, len(history.train_loss) // 10) :]
    kept: float | None = 1.0 if run.handler is None else run.handler.report()["flops_kept"]
    rows = 1.0
    if run.by_targets:
        rows = _count_targets(run.data, run.batch_size, len(history.step_s) or 1).backward
        if kept is not None and run.settings.context_gradient == "none":
            kept *= rows
        else:  # context has a part of its backward: not counted
            kept = None
    if kept is not None and run.coreset is not None:
        kept *= num_kept(run.batch_size, run.coreset.keep) / run.batch_size
    return {
        "batch_size": run.batch_size,
        "steps": len(history.step_s),
        "forward_ms": _median_ms(history.forward_s),
        "backward_ms": _median_ms(history.backward_s),
        "step_ms": _median_ms(history.step_s),
        "training_s": sum(history.step_s),
        "calibration_s": history.calibration_s,
        **(measure_memory(run) if with_memory else {"saved_bytes": None, "peak_live_bytes": None}),
        "rows_with_backward": rows,
        # Of the branches' backward work for the full batch without dropping.
        "backward_flops_kept": None if kept is None else kept * run.batch_size / run.settings.batch_size,
        "train_loss": statistics.mean(last) if last else None,
        "validation_loss_before": history.validation[0][1] if history.validation else None,
        "validation_loss_after": history.validation[-1][1] if len(history.validation) > 1 else None,
        "dropbp": None if run.handler is None else run.handler.report(),
    }


def _median_ms(seconds: Sequence[float]) -> float | None:
    return 1e3 * statistics.median(seconds) if seconds else None


LOSS_FIELDS = (
    "run",
    "step",
    "examples",
    "seconds",
    "forward_ms",
    "backward_ms",
    "step_ms",
    "train_loss",
    "validation_loss",
)


def loss_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One row per run and step, for losses.csv; validation_loss is of the model after this step."""
    rows = []
    for run in runs:
        history = run.history
        validation = dict(history.validation)
        seconds = 0.0
        for index, loss in enumerate(history.train_loss):
            seconds += history.step_s[index]
            rows.append(
                {
                    "run": run.name,
                    "step": index + 1,
                    "examples": (index + 1) * run.batch_size,
                    "seconds": round(seconds, 6),
                    "forward_ms": round(1e3 * history.forward_s[index], 3),
                    "backward_ms": round(1e3 * history.backward_s[index], 3),
                    "step_ms": round(1e3 * history.step_s[index], 3),
                    "train_loss": loss,
                    "validation_loss": validation.get(index + 1),
                }
            )
    return rows


def print_table(results: dict[str, dict[str, Any]], settings: Settings) -> None:
    """The table that ends a run."""
    from rich.console import Console
    from rich.table import Table

    title = f"{in_words(settings)}, {settings.adapter}, {settings.dtype} on {settings.device}"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for name in results:
        table.add_column(name, justify="right")

    def add(label: str, key: str, show: Callable[[Any], str]) -> None:
        cells = [r[key] for r in results.values()]
        table.add_row(label, *("-" if cell is None else show(cell) for cell in cells))

    add("batch size", "batch_size", str)
    for part in ("forward", "backward", "step"):
        add(f"{part} time, ms (median)", f"{part}_ms", lambda v: f"{v:.1f}")
    add("peak live bytes, MiB", "peak_live_bytes", lambda v: f"{v / 2**20:.1f}")
    add("saved for backward, MiB", "saved_bytes", lambda v: f"{v / 2**20:.1f}")
    add("rows with a backward", "rows_with_backward", lambda v: f"{v:.1%}")
    add("backward FLOPs kept", "backward_flops_kept", lambda v: f"{v:.1%}")
    add("train loss (last tenth)", "train_loss", lambda v: f"{v:.4f}")
    add("validation loss before", "validation_loss_before", lambda v: f"{v:.4f}")
    add("validation loss after", "validation_loss_after", lambda v: f"{v:.4f}")
    console = Console()
    if not console.is_terminal:  # a log has room, and rich would take it for 80 columns
        console = Console(width=120)
    console.print(table)
