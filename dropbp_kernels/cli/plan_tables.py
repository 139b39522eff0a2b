"""What `dropbp-kernels plan` shows: the report as tables, and which setting to take, in words."""

from collections.abc import Iterator
from typing import Any

from .output import console

MiB, GiB = 2**20, 2**30


def show(report: dict[str, Any]) -> None:
    """Print the report of `plan`."""
    from rich.table import Table

    options, asked = report["options"], report["asked"]
    screen = console()

    def say(line: str) -> None:
        screen.print(line, highlight=False, soft_wrap=True)

    say(
        f"{report['model']}, {report['num_parameters'] / 1e9:.2f} billion parameters, {options['adapter']}: batch "
        f"{options['batch_size']} x {options['seq_len']} tokens, {_words(asked['setting'])}"
    )
    unit, size = ("GiB", GiB) if asked["peak_bytes"] >= GiB / 4 else ("MiB", MiB)
    parts = Table()
    parts.add_column("live at the peak")
    parts.add_column(unit, justify="right")
    for tag, num_bytes in asked["bytes"].items():
        parts.add_row(tag, f"{num_bytes / size:.2f}")
    parts.add_row("peak", f"{asked['peak_bytes'] / size:.2f}", style="bold")
    screen.print(parts)

    say("Step time is by FLOPs, relative to dropping and checkpointing nothing.")
    is_bounded = "budget_bytes" in report
    table = Table()
    bounded = ("fits", "longest sequence", "largest batch") if is_bounded else ()
    for name in ("drop rate", "checkpoint", f"peak, {unit}", "step time", *bounded):
        table.add_column(name, justify="right")
    for row in report["settings"]:
        setting = row["setting"]
        cells = [f"{setting['drop_rate']:g}", setting["checkpoint"], f"{row['peak_bytes'] / size:.2f}"]
        cells.append(f"{row['relative_step_time']:.2f}")
        if is_bounded:
            cells += ["yes" if row["fits"] else "no", f"{row['longest_seq_len']:,}", f"{row['largest_batch_size']:,}"]
        table.add_row(*cells, style="bold" if row is asked else None)
    screen.print(table)
    for title, rows in _of_targets(report, unit, size):
        say(title)
        table = Table()
        for name in rows[0]:
            table.add_column(name, justify="right")
        for shown in rows:
            table.add_row(*shown.values())
        screen.print(table)
    for line in [*_advice(report, unit, size), f"Assumed: {'; '.join(report['assumptions'])}."]:
        say(line)


def _advice(report: dict[str, Any], unit: str, size: int) -> list[str]:
    if "recommended" not in report:
        return []
    recommended = report["recommended"]
    if "longest" in recommended:
        row = recommended["longest"]
        if not row["longest_seq_len"]:
            return ["No setting fits, not even 64 tokens at this batch size."]
        return [
            f"No setting fits {row['setting']['seq_len']} tokens. The longest sequence, {row['longest_seq_len']:,} "
            f"tokens, fits with {_words(row['setting'])}."
        ]
    gentlest, fastest = recommended["gentlest"], recommended["fastest"]
    named = {"Fastest": fastest} if gentlest is fastest else {"Dropping least": gentlest, "Fastest": fastest}
    return [
        f"{name}: {_words(row['setting'])}: {row['peak_bytes'] / size:.1f} {unit}, "
        f"{row['relative_step_time']:.2f} of the time."
        for name, row in named.items()
    ]


def _words(setting: dict[str, Any]) -> str:
    checkpoint = setting["checkpoint"]
    return f"drop rate {setting['drop_rate']:g}, " + (
        "no checkpointing" if checkpoint == "none" else f'checkpoint="{checkpoint}"'
    )


def _of_targets(report: dict[str, Any], unit: str, size: int) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """The title and rows of a table for the data and one for target plans, where they were asked for."""
    if "data" in report:
        rows = [
            {
                "batch": size,
                "length": f"{found['seq_len']:,}",
                "targets": f"{found['targets']:.1%}",
                "rows run": f"{found['forward']:.1%}",
                "with a backward": f"{found['backward']:.1%}",
                "passes": f"{found['passes']:.1f}",
                "step time, LoRA": f"{found['relative_step_time']['lora']:.2f}",
                "full": f"{found['relative_step_time']['full']:.2f}",
            }
            for size, found in report["data"]["by_batch_size"].items()
        ]
        yield f"{report['data']['name']} by batch size; step time by rows alone, of an undropped step's:", rows
    if "target_plans" in report:
        rows = [
            {
                "targets": "no plan" if (share := row["setting"]["target_share"]) is None else f"{share:.1%}",
                f"peak, {unit}": f"{row['peak_bytes'] / size:.2f}",
                "step time": f"{row['relative_step_time']:.2f}",
            }
            for row in report["target_plans"]
        ]
        yield (
            'Target plans (context="inference"), nothing dropped; step time by FLOPs, of the step without a plan:',
            rows,
        )
