"""What a run cost and reached: for the table that ends a run, for report.json and losses.csv."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..coreset.budgets import num_kept
from ..measure import PeakLiveBytes, saved_bytes
from .compare import count_targets_of, in_words, measured_step
from .output import console
from .settings import Settings
from .training import Run

NUM_MEASURED_PLANS = 4


def measure_memory(run: Run) -> dict[str, float]:
    """Bytes saved for backward (mean over some plans) and the peak allocated in forward and backward (largest).

    On steps of their own, that are not timed and change nothing: counting is slow. Where nothing is dropped all plans
    are the same, and one is measured.
    """
    batch = [tensor.to(run.device) for tensor in run.data.batch(0, run.batch_size)]
    saved, peaks = [], []
    plan = None if run.handler is None else run.handler.plan.kept
    drops = run.handler is not None and run.handler.drop_rate > 0.0
    for index in range(NUM_MEASURED_PLANS if drops else 1):
        if run.handler is not None:
            run.handler.set_plan(run.handler.draw(measured_step(run.settings, index, NUM_MEASURED_PLANS)).kept)
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


def result(run: Run) -> dict[str, Any]:
    """What a run cost and reached, for the table and for report.json; its bytes are left to `measure_memory`.

    Times are medians, in milliseconds.
    """
    history = run.history
    last = history.train_loss[-max(1, len(history.train_loss) // 10) :]
    kept: float | None = 1.0 if run.handler is None else run.handler.report()["flops_kept"]
    rows = 1.0
    targets = None if run.handler is None else run.handler.targets
    if targets is not None:
        rows = count_targets_of(run.data, run.batch_size, len(history.step_s) or 1).backward * targets.trained_share
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
        "saved_bytes": None,
        "peak_live_bytes": None,
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
    from rich.table import Table

    table = Table()
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
    screen = console()
    title = f"{in_words(settings)}, {settings.adapter}, {settings.dtype} on {settings.device}"
    screen.print(title, highlight=False, soft_wrap=True)
    screen.print(table)
