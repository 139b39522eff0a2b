"""Where a command writes: its output folder, and tables."""

import datetime
import os
from pathlib import Path
from typing import Any

from .errors import UserError


def choose_folder(command: str, name: str | None, hint: str = "") -> Path:
    """The folder called `name`, or one of its own for each run under runs/; new, or empty. It is not made yet.

    Errors: UserError, with `hint`, when there is something in it or it cannot be written to.
    """
    if name is None:
        stem = Path("runs", f"{command}-{datetime.datetime.now():%Y%m%d-%H%M%S}")
        tries = (stem.with_name(f"{stem.name}{suffix}") for suffix in ("", *(f"-{n}" for n in range(2, 100))))
        folder = next(path for path in tries if not path.exists())
    else:
        folder = Path(name).expanduser()
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"--output {folder}: expected a new or empty folder{hint}")
    except OSError as error:
        raise UserError(f"--output {folder}: {error.strerror}") from error
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"--output {folder}: {there} is no folder that can be written to")
    return folder


def make_folder(folder: Path) -> None:
    """Errors: UserError when it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {folder}: {error.strerror}") from error


def console(width: int = 120) -> Any:
    """A console of rich: as wide as the terminal, or `width`: a log has room, and rich would take it for 80 columns."""
    from rich.console import Console

    found = Console()
    return found if found.is_terminal else Console(width=width)
