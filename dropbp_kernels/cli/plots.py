"""comparison.png: loss against steps and against time, and what a step costs in time and memory."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .compare import BRANCHES, FULL, OURS, PUBLISHED, SMALLER, TARGETS, in_words
from .settings import Settings
from .training import Run

# Colours that stay apart for colour-blind readers and in grey (Okabe and Ito).
COLORS = {FULL: "#555555", SMALLER: "#E69F00", PUBLISHED: "#56B4E9", TARGETS: "#009E73", OURS: "#D55E00"}
COLORS[BRANCHES] = COLORS[TARGETS]  # there is one of the two
MiB = 2**20


def draw_comparison(runs: Sequence[Run], results: dict[str, dict[str, Any]], settings: Settings, path: Path) -> None:
    """Draw the four panels into `path`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style: dict[Any, Any] = {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlelocation": "left",
    }
    with plt.rc_context(style):
        figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
        _draw_losses(axes[0, 0], runs, against="steps")
        _draw_losses(axes[0, 1], runs, against="seconds")
        _draw_times(axes[1, 0], results)
        _draw_memory(axes[1, 1], results)
        figure.suptitle(
            f"{settings.model} on {settings.data}: {settings.adapter}, {in_words(settings)}, "
            f"batch {settings.batch_size} x {settings.seq_len} tokens, {settings.device} {settings.dtype}",
            fontsize=11,
            x=0.01,
            ha="left",
        )
        figure.legend(
            *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(runs), frameon=False
        )
        figure.savefig(path, dpi=150)
        plt.close(figure)


def _draw_losses(axes: Any, runs: Sequence[Run], against: str) -> None:
    for run in runs:
        history, color = run.history, COLORS[run.name]
        seconds = [0.0]
        for step_s in history.step_s:
            seconds.append(seconds[-1] + step_s)
        places: Sequence[float] = seconds if against == "seconds" else range(len(seconds))
        if against == "steps":  # against time, the noise of a small batch would hide the rest
            axes.plot(places[1:], _smooth(history.train_loss), color=color, linewidth=1, alpha=0.4)
        steps = [step for step, _ in history.validation]
        losses = [loss for _, loss in history.validation]
        label = f"{run.name} (batch {run.batch_size})" if run.name == SMALLER else run.name
        axes.plot([places[step] for step in steps], losses, "o-", color=color, markersize=4, label=label)
    axes.set_xlabel("seconds of training" if against == "seconds" else "steps")
    axes.set_ylabel("loss")
    axes.set_title("Validation loss against time" if against == "seconds" else "Loss (thin: training) against steps")
    axes.grid(alpha=0.25)


def _smooth(values: Sequence[float]) -> list[float]:
    """Mean over the last tenth of the values up to each."""
    window = max(1, len(values) // 10)
    return [statistics.mean(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]


def _draw_times(axes: Any, results: dict[str, dict[str, Any]]) -> None:
    names = list(results)
    forward = [results[name]["forward_ms"] for name in names]
    backward = [results[name]["backward_ms"] for name in names]
    steps = [results[name]["step_ms"] for name in names]
    rest = [max(0.0, step - f - b) for step, f, b in zip(steps, forward, backward, strict=True)]
    colors = [COLORS[name] for name in names]
    axes.bar(names, forward, color=colors, alpha=0.45)
    axes.bar(names, backward, bottom=forward, color=colors)
    below = [f + b for f, b in zip(forward, backward, strict=True)]
    axes.bar(names, rest, bottom=below, color=colors, alpha=0.2)
    for place, (f, b, total) in enumerate(zip(forward, backward, steps, strict=True)):
        axes.text(place, f / 2, f"{f:.0f}", ha="center", va="center", fontsize=8)
        axes.text(place, f + b / 2, f"{b:.0f}", ha="center", va="center", fontsize=8, color="white")
        axes.text(place, total, f"{total:.0f} ms", ha="center", va="bottom")
    axes.set_xticks(range(len(names)), _wrapped(names))
    axes.set_ylabel("ms, median")
    axes.set_title("Time of a step (pale: forward, dark: backward, top: optimizer)")


def _wrapped(names: Sequence[str]) -> list[str]:
    return [name.replace(" ", "\n") for name in names]


def _draw_memory(axes: Any, results: dict[str, dict[str, Any]]) -> None:
    names = list(results)
    width = 0.4
    for offset, key, alpha in ((-width / 2, "peak_live_bytes", 1.0), (width / 2, "saved_bytes", 0.45)):
        values = [results[name][key] / MiB for name in names]
        places = [place + offset for place in range(len(names))]
        axes.bar(places, values, width, color=[COLORS[name] for name in names], alpha=alpha)
        for place, value in zip(places, values, strict=True):
            axes.text(place, value, f"{value:.0f}", ha="center", va="bottom")
    axes.set_xticks(range(len(names)), _wrapped(names))
    axes.set_ylabel("MiB, peak of a step")
    axes.set_title("Memory (pale: saved for backward in all)")
