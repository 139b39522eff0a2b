"""Write docs/kernels.md and its pictures from the rows in benchmarks/results.

    python -m benchmarks.page              write them
    python -m benchmarks.page --check      write nothing; exit code 1 when the page is not what the rows say

Of each point (op, case, direction, dtype, size, device) the newest run counts, and ratios are taken inside one run
only: variants took turns there. What is a win and what a loss is decided here and nowhere else.
"""

import argparse
import difflib
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from .rows import RESULTS, ROOT, Row, read_rows

PAGE = ROOT / "docs" / "kernels.md"
PEERS = ("eager", "aten", "compile", "liger", "quack")
OURS = ("cuda", "triton", "cpp", "reference")
TOLERANCE = 0.97  # nobody can tell a smaller difference on these machines
# One hue per variant in every picture: Okabe and Ito's palette, told apart by most colour-blind readers.
COLOURS = {"eager": "#999999", "aten": "#56B4E9", "compile": "#E69F00", "liger": "#CC79A7", "quack": "#F0E442"}
OUR_COLOURS = ("#0072B2", "#009E73", "#D55E00")  # of the package's own backends
HOST_TARGETS_US = {"no gradient": 3.0, "recorded": 10.0}


@dataclass(frozen=True)
class Point:
    """What is computed, on what: one line of a table."""

    op: str
    direction: str
    case: str
    dtype: str
    rows: int
    width: int
    device: str
    is_gpu: bool


Rows = dict[str, dict[str, str]]  # variant -> its row, of one run


def read_points(folder: Path) -> dict[Point, Rows]:
    """The newest run of every point, from every file of op rows in `folder`."""
    columns = [column.name for column in fields(Row)]
    runs: dict[Point, dict[str, Rows]] = {}
    for path in sorted(folder.glob("*.csv")):
        rows = read_rows(path)
        if not rows or list(rows[0]) != columns:
            continue
        for row in rows:
            is_gpu = not row["host"].endswith(row["device"])
            size = int(row["rows"]), int(row["width"])
            point = Point(row["op"], row["direction"], row["case"], row["dtype"], *size, row["device"], is_gpu)
            runs.setdefault(point, {}).setdefault(row["date_utc"], {})[row["backend"]] = row
    return {point: of_point[max(of_point)] for point, of_point in runs.items()}


def make_page(points: dict[Point, Rows]) -> str:
    """The whole page, as Markdown."""
    parts = [INTRODUCTION]
    for is_gpu, title in ((True, "GPU"), (False, "CPU")):
        chosen = {point: rows for point, rows in points.items() if point.is_gpu is is_gpu}
        parts.append(f"## {title}\n")
        if not chosen:
            parts.append(f"**There is no row of a {title} yet**: nothing on this page was measured on one.\n")
        for device in sorted({point.device for point in chosen}):
            parts += _of_device({point: rows for point, rows in chosen.items() if point.device == device})
    return "\n".join(parts)


INTRODUCTION = """# Kernels: what was measured

What every op costs at every size, against eager PyTorch, `torch.compile` and other packages. Written by `python -m
benchmarks.page` from the rows in `benchmarks/results`; do not edit. What each variant is and how a time is taken:
[benchmarks/results/README.md](../benchmarks/results/README.md). CPU and GPU are kept apart.

- A ratio ("vs eager") is the peer's median over ours in the same interleaved run: above 1 ours is faster. Below 0.97 it
  is a **loss**, printed bold; above 1/0.97 a win; in between, nobody can tell. Losses stay.
- "of copy" is the share of the bandwidth of a plain copy, measured in the same run. What fits the cache can exceed
  100 %.
- The newest run of each point counts.
"""
NOTES = {
    "gated_residual_add": (
        "These are the raw ops. The public function leaves the sum of two whole tensors and a plain scaled gradient to "
        "PyTorch's own kernels, so the losses of `sum`, `sum in place` and `scaled` affect nobody."
    )
}


def _of_device(points: dict[Point, Rows]) -> list[str]:
    newest = max((row for rows in points.values() for row in rows.values()), key=lambda row: row["date_utc"])
    versions = f"torch {newest['torch']}, triton {newest['triton'] or 'not installed'}"
    parts = [f"### {newest['device']}\n", f"{newest['host']}; {newest['threads']} threads; {versions}.\n"]
    ops = sorted({point.op for point, rows in points.items() if "ours" not in rows})
    if ops:
        parts.append(_summary(points, ops))
    for op in ops:
        chosen = {point: rows for point, rows in points.items() if point.op == op and "ours" not in rows}
        parts += [f"#### {op}\n", *([NOTES[op] + "\n"] if op in NOTES else [])]
        parts += [f"![{op}]({picture_of(chosen).name})\n"] if any(map(has_bandwidth, chosen.values())) else []
        parts.append(_table(chosen))
    host = {point: rows for point, rows in points.items() if "ours" in rows}
    if host:
        parts += ["#### Host overhead of a call, one element, eager mode\n", _host_table(host)]
    return parts


def verdict(ratio: float) -> str:
    """win, even or loss, from a peer's time over ours."""
    return "loss" if ratio < TOLERANCE else "win" if ratio > 1 / TOLERANCE else "even"


def _ratios(rows: Rows) -> Iterable[tuple[str, str, float]]:
    """(backend of ours, peer, peer's median over ours)."""
    for ours in (name for name in OURS if name in rows):
        for peer in (name for name in PEERS if name in rows):
            yield ours, peer, float(rows[peer]["median_ms"]) / float(rows[ours]["median_ms"])


def _summary(points: dict[Point, Rows], ops: list[str]) -> str:
    """Wins, evens and losses of every op against every peer, and the worst ratio."""
    lines = ["| op | backend | peer | points | wins | even | losses | worst |", "|---|---|---|--:|--:|--:|--:|--:|"]
    for op in ops:
        found: dict[tuple[str, str], list[float]] = {}
        for point, rows in points.items():
            if point.op == op:
                for ours, peer, ratio in _ratios(rows):
                    found.setdefault((ours, peer), []).append(ratio)
        for (ours, peer), ratios in sorted(found.items(), key=lambda entry: (entry[0][0], PEERS.index(entry[0][1]))):
            counts = [sum(verdict(ratio) == word for ratio in ratios) for word in ("win", "even", "loss")]
            numbers = " | ".join(map(str, [len(ratios), *counts]))
            lines.append(f"| `{op}` | {ours} | {peer} | {numbers} | {_ratio(min(ratios))} |")
    return "\n".join(lines) + "\n"


def _table(points: dict[Point, Rows]) -> str:
    peers = [name for name in PEERS if any(name in rows for rows in points.values())]
    head = ["", "dtype", "rows x width", "backend", "median", "of copy", *(f"vs {peer}" for peer in peers), "commit"]
    lines = [f"| {' | '.join(head)} |", "|---|---|--:|---|--:|--:|" + "--:|" * len(peers) + "---|"]
    for point in sorted(points, key=_order):
        rows = points[point]
        for ours in (name for name in OURS if name in rows):
            row = rows[ours]
            cells = [f"{point.direction}, {point.case}", point.dtype, f"{point.rows} x {point.width}", ours]
            cells += [_time(row["median_ms"]), f"{float(row['copy_fraction']):.0%}" if row["copy_fraction"] else ""]
            ratios = {peer: ratio for backend, peer, ratio in _ratios(rows) if backend == ours}
            cells += [_ratio(ratios[peer]) if peer in ratios else "" for peer in peers]
            lines.append(f"| {' | '.join([*cells, row['commit']])} |")
    return "\n".join(lines) + "\n"


def _host_table(points: dict[Point, Rows]) -> str:
    """Microseconds of ours, of the aten calls it replaces and of the raw op; ours less that one has a target."""
    lines = [
        "Above raw: how much longer the public function takes than the raw op that it calls through the dispatcher:",
        "its checks, and the node where autograd records the call. Targets: 3 us without a gradient, 10 us recorded.",
        "",
        "| op | | eager | aten | raw op | ours | vs eager | above raw | target | |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for point in sorted(points, key=_order):
        us = {name: 1000 * float(row["median_ms"]) for name, row in points[point].items()}
        cells = [f"{us[name]:.1f} us" if name in us else "" for name in ("eager", "aten", "raw", "ours")]
        cells.append(_ratio(us["eager"] / us["ours"]) if "eager" in us else "")
        target = next((bound for word, bound in HOST_TARGETS_US.items() if point.case.endswith(word)), None)
        if "raw" in us and target is not None:
            above = us["ours"] - us["raw"]
            cells += [f"{above:.1f} us", f"{target:g} us", "met" if above <= target else "**missed**"]
        else:
            cells += ["", "", ""]
        lines.append(f"| `{point.op}` | {point.direction}, {point.case} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _order(point: Point) -> Any:
    directions = ("fwd", "bwd", "fwd+bwd")
    return (
        point.op,
        directions.index(point.direction) if point.direction in directions else len(directions),
        point.case,
        point.dtype,
        point.rows * point.width,
        point.rows,
    )


def _ratio(value: float) -> str:
    return f"**{value:.2f}**" if verdict(value) == "loss" else f"{value:.2f}"


def _time(milliseconds: str) -> str:
    value = float(milliseconds)
    return f"{value:.3g} ms" if value >= 0.1 else f"{1000 * value:.3g} us"


# ---- pictures


def picture_of(points: Iterable[Point]) -> Path:
    """Where the picture of one op on one device goes."""
    point = next(iter(points))
    device = re.sub(r"[^a-z0-9]+", "-", point.device.lower()).strip("-")
    return PAGE.parent / f"kernels-{point.op}-{'gpu' if point.is_gpu else 'cpu'}-{device}.png"


def draw(points: dict[Point, Rows], path: Path) -> None:
    """Share of copy bandwidth of every variant against size: a line of panels for each case, one column a dtype."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = list(dict.fromkeys((point.direction, point.case) for point in sorted(points, key=_order)))
    dtypes = sorted({point.dtype for point in points})
    names = [name for name in (*PEERS, *OURS) if any(name in rows for rows in points.values())]
    ours = [name for name in names if name in OURS]
    figure, axes = plt.subplots(
        len(cases), len(dtypes), figsize=(4.6 * len(dtypes), 2.3 * len(cases)), squeeze=False, sharey="row"
    )
    for line, (direction, case) in zip(axes, cases, strict=True):
        for axis, dtype in zip(line, dtypes, strict=True):
            chosen = [p for p in points if (p.direction, p.case, p.dtype) == (direction, case, dtype)]
            chosen.sort(key=_order)
            for name in names:
                heights = [100 * float(points[p][name]["copy_fraction"]) if name in points[p] else None for p in chosen]
                colour = COLOURS.get(name) or OUR_COLOURS[ours.index(name) % len(OUR_COLOURS)]
                axis.plot(range(len(chosen)), heights, "o-", color=colour, label=name, markersize=3, linewidth=1.2)
            axis.axhline(100, color="black", linewidth=0.6, linestyle=":")
            axis.set_title(f"{direction}, {case}, {dtype}", fontsize=8)
            axis.set_xticks(range(len(chosen)), [f"{p.rows}\nx {p.width}" for p in chosen], fontsize=6)
            axis.tick_params(axis="y", labelsize=7)
            axis.grid(axis="y", alpha=0.3)
        line[0].set_ylabel("% of copy", fontsize=8)
        line[0].set_ylim(bottom=0)  # once both columns are drawn: it fixes the top that they share
    axes[0][0].legend(fontsize=6)
    figure.suptitle(f"{next(iter(points)).op} on {next(iter(points)).device} (rows x width)", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def has_bandwidth(rows: Rows) -> bool:
    return all(row["copy_fraction"] for row in rows.values())


def draw_all(points: dict[Point, Rows]) -> list[Path]:
    """A picture for every op and device that has bandwidths; the paths."""
    groups: dict[Path, dict[Point, Rows]] = {}
    for point, rows in points.items():
        if has_bandwidth(rows):
            groups.setdefault(picture_of([point]), {})[point] = rows
    for path, chosen in groups.items():
        draw(chosen, path)
    return list(groups)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.page", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 when the page is not what the rows say")
    parser.add_argument("--rows", type=Path, default=RESULTS, help="folder of the CSV files")
    parser.add_argument("--out", type=Path, help="write the text alone, to this file")
    options = parser.parse_args(arguments)
    points = read_points(options.rows)
    page = make_page(points)
    if options.check:
        written = PAGE.read_text() if PAGE.exists() else ""
        lines = difflib.unified_diff(written.splitlines(), page.splitlines(), str(PAGE), "the rows", lineterm="", n=0)
        difference = list(lines)
        print("\n".join(difference[:40]) or f"{PAGE} is what the rows say")
        return 1 if difference else 0
    if options.out:
        options.out.write_text(page)
        return 0
    PAGE.write_text(page)
    print(PAGE, *draw_all(points), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
