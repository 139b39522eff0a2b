"""What was dropped so far: the books of a handler, and for people its report, a dict that prints and draws itself."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

COLUMNS = ("branch", "kept", "dropped", "drop rate", "realised", "GFLOPs")


class Report(dict[str, Any]):
    """A plain dict (good for JSON) whose text is a table, one line per branch.

    Keys: num_steps, drop_rate, realised_drop_rate, flops_kept (None before the first step) and branches, a list of
    dicts: name, drop_rate, num_kept, num_dropped, realised_drop_rate, flops (forward FLOPs of one call).
    `rich.print(report)` shows it in colour; rich is not needed for `print(report)`.
    """

    def __str__(self) -> str:
        rows = [COLUMNS, *self._rows()]
        widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
        lines = [
            "  ".join(cell.rjust(width) if place else cell.ljust(width) for place, (cell, width) in enumerate(pairs))
            for pairs in (list(zip(row, widths, strict=True)) for row in rows)
        ]
        return "\n".join([self.summary(), "", *lines])

    def __rich__(self) -> Any:
        """What rich prints."""
        from rich.table import Table

        table = Table(title=self.summary(), title_justify="left")
        for place, column in enumerate(COLUMNS):
            table.add_column(column, justify="right" if place else "left")
        for branch, row in zip(self["branches"], self._rows(), strict=True):
            never = self["num_steps"] > 0 and branch["num_kept"] == 0
            table.add_row(*row, style="dim" if never else None)
        return table

    def summary(self) -> str:
        """One line on all branches together."""
        if self["realised_drop_rate"] is None:
            return f"no step yet, {len(self['branches'])} branches, drop rate {self['drop_rate']:g}"
        return (
            f"{self['num_steps']} steps, {len(self['branches'])} branches, drop rate {self['drop_rate']:g} "
            f"(realised {self['realised_drop_rate']:.3f}), backward FLOPs kept {self['flops_kept']:.1%}"
        )

    def draw(self, path: str | Path) -> None:
        """Write a picture: for each branch, in model order, its drop rate and the share of steps it was dropped in.

        Errors: ImportError without matplotlib; OSError when the file cannot be written.
        """
        from matplotlib.figure import Figure

        branches = self["branches"]
        figure = Figure(figsize=(8, 1.2 + 0.18 * len(branches)), layout="constrained")
        axes = figure.subplots()
        places = range(len(branches))
        realised = [branch["realised_drop_rate"] or 0.0 for branch in branches]
        axes.barh(places, realised, color="#D55E00", alpha=0.75, label="dropped, share of the steps")
        rates = [branch["drop_rate"] for branch in branches]
        axes.plot(rates, places, "|", color="black", markersize=7, label="drop rate")
        axes.set_yticks(places, [branch["name"] for branch in branches], fontsize=6)
        axes.set_ylim(len(branches) - 0.4, -0.6)
        axes.set_xlim(0.0, 1.0)
        axes.set_title(self.summary(), loc="left", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
        figure.savefig(path, dpi=150)

    def _rows(self) -> list[tuple[str, ...]]:
        return [
            (
                branch["name"],
                str(branch["num_kept"]),
                str(branch["num_dropped"]),
                f"{branch['drop_rate']:.3f}",
                "-" if branch["realised_drop_rate"] is None else f"{branch['realised_drop_rate']:.3f}",
                f"{branch['flops'] / 1e9:.3g}",
            )
            for branch in self["branches"]
        ]


class Books:
    """What was kept so far of each branch, in model order: num_kept of num_rows steps, samples or tokens.

    Which rows a plan keeps is known once its batch ran. So the last plan stays open until the next one is drawn.
    """

    def __init__(self, num_kept: Sequence[int], num_rows: Sequence[int]):
        self._closed = list(zip(num_kept, num_rows, strict=True))
        self._open: tuple[Any, ...] = ()

    def open(self, plan: Iterable[Any]) -> None:
        """Close the plan before, and count `plan` from now on."""
        self._closed, self._open = self.counts(), tuple(plan)

    def reopen(self, plan: Iterable[Any]) -> None:
        """Go on with `plan`, which these books count already: what its rows keep from now on comes on top."""
        counts, self._open = self.counts(), tuple(plan)
        self._closed = [(0, 0)] * len(counts)
        now = self.counts()
        self._closed = [(k - kept, n - rows) for (k, n), (kept, rows) in zip(counts, now, strict=True)]

    def counts(self) -> list[tuple[int, int]]:
        """(num_kept, num_rows) of each branch: of a bool one step, of an entry over rows those of its batches."""
        if not self._open:
            return self._closed
        of_open = [(int(entry), 1) if isinstance(entry, bool) else entry.counts() for entry in self._open]
        return [(k + kept, n + rows) for (k, n), (kept, rows) in zip(self._closed, of_open, strict=True)]

    def report(
        self,
        names: Sequence[str],
        drop_rate: float,
        drop_rates: Sequence[float],
        flops: Sequence[float],
        num_steps: int,
    ) -> Report:
        """The report of num_steps plans for branches of these names, drop rates and FLOPs."""
        counts = self.counts()
        shares = [kept / rows if rows else None for kept, rows in counts]
        branches = [
            {
                "name": name,
                "drop_rate": rate,
                "num_kept": kept,
                "num_dropped": rows - kept,
                "realised_drop_rate": None if share is None else 1.0 - share,
                "flops": branch_flops,
            }
            for name, rate, (kept, rows), share, branch_flops in zip(
                names, drop_rates, counts, shares, flops, strict=True
            )
        ]
        known = [(share, cost) for share, cost in zip(shares, flops, strict=True) if share is not None]
        return Report(
            num_steps=num_steps,
            drop_rate=drop_rate,
            realised_drop_rate=1.0 - sum(share for share, _ in known) / len(known) if known else None,
            flops_kept=sum(share * cost for share, cost in known) / sum(cost for _, cost in known) if known else None,
            branches=branches,
        )
