"""What a calibration measured and the drop rates it led to: a record to save, look at and use again.

handler.calibrate(loss)
handler.calibration.save("calibration.json")
handler.calibration.draw("calibration.png")  # a bar per branch: sensitivity, FLOPs, drop rate
...
other_handler.use_calibration("calibration.json")
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from .allocation import allocate


@dataclass(frozen=True)
class Calibration:
    """Sensitivities and FLOPs of the branches, by name and in model order, and the rates allocated from them.

    definition, method: of the sensitivity and of measuring it, see `calibrate`. drop_rate: the target. min_rate,
    allocation: what `allocate` was told besides. drop_rates: empty until they are allocated.
    """

    branches: tuple[str, ...]
    sensitivities: tuple[float, ...]
    flops: tuple[float, ...]
    definition: str
    method: str
    drop_rate: float
    min_rate: float
    allocation: str
    drop_rates: tuple[float, ...] = ()

    def reallocated(self, drop_rate: float, allocation: str) -> "Calibration":
        """The same measurement with the rates for another target or by another method. Errors: those of `allocate`."""
        rates = allocate(self.sensitivities, self.flops, drop_rate, method=allocation, min_rate=self.min_rate)
        return replace(self, drop_rate=drop_rate, allocation=allocation, drop_rates=tuple(rates))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint or a JSON file."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, content: Any, where: str) -> "Calibration":
        """The calibration of `to_dict`. Errors: ValueError, which begins with `where`, for anything else."""
        names = [field.name for field in fields(cls)]
        if not isinstance(content, Mapping) or set(content) != set(names):
            found = ", ".join(content) if isinstance(content, Mapping) else type(content).__name__
            raise ValueError(f"{where}: expected a calibration with the keys {', '.join(names)}, got {found}")
        columns = {name: content[name] for name in ("branches", "sensitivities", "flops", "drop_rates")}
        lengths = {len(column) if isinstance(column, list | tuple) else None for column in columns.values()}
        if len(lengths) > 1 or lengths == {None}:
            raise ValueError(f"{where}: expected {', '.join(columns)} to be lists of one length, got {columns}")
        values: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in content.items()}
        return cls(**values)

    def save(self, path: str | Path) -> None:
        """Write a JSON file that `load` and `DropBPHandler.use_calibration` read."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Calibration":
        """The calibration in a file of `save`. Errors: ValueError when it holds none; OSError without such a file."""
        try:
            content = json.loads(Path(path).read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: expected a JSON file with a calibration, got {error}") from error
        return cls.from_dict(content, str(path))

    def draw(self, path: str | Path) -> None:
        """Write a picture: for each branch, in model order, its sensitivity, its FLOPs and its drop rate.

        Errors: ImportError without matplotlib; OSError when the file cannot be written.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 1.2 + 0.18 * len(self.branches)), layout="constrained")
        panels = figure.subplots(1, 3, sharey=True)
        columns = [
            (f"sensitivity ({self.definition})", self.sensitivities, "#0072B2"),
            ("GFLOPs, forward", [flops / 1e9 for flops in self.flops], "#555555"),
            ("drop rate", self.drop_rates, "#D55E00"),
        ]
        places = range(len(self.branches))
        for axes, (title, values, color) in zip(panels, columns, strict=True):
            axes.barh(places, values, color=color)
            axes.set_title(title, loc="left", fontsize=9)
            axes.spines[["top", "right"]].set_visible(False)
        panels[0].set_yticks(places, self.branches, fontsize=6)
        panels[0].set_ylim(len(self.branches) - 0.4, -0.6)
        panels[2].set_xlim(0.0, 1.0)
        panels[2].axvline(self.drop_rate, color="black", linewidth=0.8, linestyle=":")
        figure.savefig(path, dpi=150)


def check_branches(names: Sequence[str], expected: Sequence[str], where: str) -> None:
    """Raise a ValueError, which begins with `where`, unless `names` are the branches that are expected."""
    if list(names) == list(expected):
        return
    other = next((name for name in names if name not in expected), None)
    lacks = next((name for name in expected if name not in names), None)
    raise ValueError(
        f"{where}: expected the {len(expected)} branches of this model, got {len(names)} of another one"
        + (f"; this model has no {other}" if other else "")
        + (f"; it lacks {lacks}" if lacks else "")
    )
