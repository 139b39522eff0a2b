"""What is written: one CSV row per timing, with all that is needed to judge it. Files are only ever appended to."""

import csv
import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

import torch

import dropbp_kernels
from dropbp_kernels.cli.hardware import cpu_name

from .settings import Settings
from .timing import Case, Timing, copy_bandwidth, measure

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Machine:
    """Where, when and with what a row was measured."""

    date_utc: str
    commit: str
    version: str
    host: str
    device: str
    threads: int
    torch: str
    triton: str


@dataclass(frozen=True)
class Row(Machine):
    """One timing of one variant of an op. results/README.md says what each column means."""

    op: str
    case: str
    direction: str
    backend: str
    dtype: str
    rows: int
    width: int
    num_samples: int
    median_ms: float
    p20_ms: float
    p80_ms: float
    moved_bytes: int
    gb_s: float | None
    copy_gb_s: float | None
    copy_fraction: float | None
    speedup_vs_eager: float | None
    speedup_vs_compile: float | None

    HEADER: ClassVar[str] = (
        f"{'op':<23} {'case':<34} {'backend':<9} {'dtype':<9} {'rows x width':>13} {'median':>11} {'p20-p80':>17} "
        f"{'GB/s':>7} {'of copy':>8} {'vs eager':>9} {'vs compile':>10}"
    )

    def __str__(self) -> str:
        return (
            f"{self.op:<23} {self.direction + ' ' + self.case:<34} {self.backend:<9} {self.dtype:<9} "
            f"{f'{self.rows} x {self.width}':>13} {_time(self.median_ms):>11} "
            f"{_time(self.p20_ms) + '-' + _time(self.p80_ms):>17} {_number(self.gb_s, '.1f'):>7} "
            f"{_number(self.copy_fraction, '.0%'):>8} {_number(self.speedup_vs_eager, '.2f'):>9} "
            f"{_number(self.speedup_vs_compile, '.2f'):>10}"
        )


def machine(device: torch.device, commit: str = "") -> Machine:
    """The machine, for a benchmark that runs on `device` now; commit is for a copy without git."""
    return Machine(
        date_utc=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        commit=_commit() or commit,
        version=dropbp_kernels.__version__,
        host=f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs, {cpu_name()}",
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        triton=_version("triton"),
    )


def op_rows(case: Case, timings: dict[str, Timing], where: Machine, copy_gb_s: float | None) -> list[Row]:
    """A row for each variant of `case`, compared with the variants named eager and compile."""
    rows = []
    for backend, timing in timings.items():
        gb_s = case.moved_bytes / timing.median_ms / 1e6 if case.moved_bytes else None
        rows.append(
            Row(
                **asdict(where),
                op=case.op,
                case=case.case,
                direction=case.direction,
                backend=backend,
                dtype=str(case.dtype).removeprefix("torch."),
                rows=case.rows,
                width=case.width,
                num_samples=len(timing.samples_ms),
                median_ms=timing.median_ms,
                p20_ms=timing.p20_ms,
                p80_ms=timing.p80_ms,
                moved_bytes=case.moved_bytes,
                gb_s=gb_s,
                copy_gb_s=copy_gb_s if case.moved_bytes else None,
                copy_fraction=gb_s / copy_gb_s if gb_s and copy_gb_s else None,
                speedup_vs_eager=_speedup(timings, "eager", backend),
                speedup_vs_compile=_speedup(timings, "compile", backend),
            )
        )
    return rows


def measured_rows(
    settings: Settings, problems: Iterable[Any], make_cases: Callable[..., Iterable[Case]]
) -> Iterator[list[Row]]:
    """The rows of each of make_cases(problem, rows, width, dtype, device), at every dtype and size; one list a case.

    Errors: WrongResult of make_cases, before a wrong variant is timed.
    """
    where, copy_gb_s = machine(settings.device, settings.commit), copy_bandwidth(settings.device, settings.copy_bytes)
    for dtype in settings.dtypes:
        for rows, width in settings.sizes:
            for problem in problems:
                if not settings.has_time():
                    continue
                for case in make_cases(problem, rows, width, dtype, settings.device):
                    timings = measure(case, settings.device, seconds=settings.seconds, min_rounds=settings.min_rounds)
                    yield op_rows(case, timings, where, copy_gb_s)


def append_rows(path: Path, rows: Sequence[Machine]) -> None:
    """Append `rows`, all of one type, to the CSV file `path`; the header is written once.

    Errors: ValueError when the file has other columns; it is unchanged then.
    """
    if not rows:
        return
    columns = [column.name for column in fields(rows[0])]
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists() or path.stat().st_size == 0
    if not is_new:
        with path.open(newline="") as file:
            found = next(csv.reader(file))
        if found != columns:
            raise ValueError(f"{path}: expected the columns {columns}, found {found}; start a new file")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if is_new:
            writer.writeheader()
        for row in rows:
            writer.writerow({name: as_written(value) for name, value in asdict(row).items()})


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file as written, oldest first; none when there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _time(milliseconds: float) -> str:
    return f"{milliseconds:.3g} ms" if milliseconds >= 0.1 else f"{1000 * milliseconds:.3g} us"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def as_written(value: object) -> str:
    """A value as it stands in a file."""
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _speedup(timings: dict[str, Timing], baseline: str, backend: str) -> float | None:
    return timings[baseline].median_ms / timings[backend].median_ms if baseline in timings else None


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _commit() -> str:
    """The commit measured, with "+" when the sources differ from it; "" outside a git checkout."""
    sources = ["dropbp_kernels", "csrc", "setup.py", "benchmarks/*.py"]
    commands = ["git", "rev-parse", "--short=9", "HEAD"], ["git", "status", "--porcelain", "-uno", "--", *sources]
    try:
        head, changes = (subprocess.run(c, cwd=ROOT, capture_output=True, text=True, check=True) for c in commands)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head.stdout.strip() + ("+" if changes.stdout.strip() else "")
