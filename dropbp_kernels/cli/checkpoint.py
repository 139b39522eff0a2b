"""A checkpoint: everything a run needs to go on exactly where it stood. One file, written whole or not at all."""

import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UserError, first_line

if TYPE_CHECKING:
    from .training import Run

FILENAME = "checkpoint.pt"
VERSION = 1


def save(folder: Path, settings: dict[str, Any], identity: dict[str, str], step: int, runs: Sequence["Run"]) -> Path:
    """Write the checkpoint of `folder`. identity: fingerprints of model and data, compared by `check`."""
    import torch

    state = {
        "version": VERSION,
        "settings": settings,
        "identity": identity,
        "step": step,
        "runs": {run.name: run.state_dict() for run in runs},
    }
    path, unfinished = folder / FILENAME, folder / f".{FILENAME}.unfinished"
    torch.save(state, unfinished)
    os.replace(unfinished, path)
    return path


def load(path: str) -> tuple[Path, dict[str, Any]]:
    """(output folder, state) of a checkpoint file or of the folder that holds one.

    Errors: UserError when there is none or it is not one of ours.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        file /= FILENAME
    if not file.is_file():
        ended = "; the run in this folder has ended" if (file.parent / "report.json").is_file() else ""
        raise UserError(
            f"--resume {path}: expected an output folder with a {FILENAME}, or such a file; found none{ended}"
        )
    import torch

    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        raise UserError(f"--resume {path}: not a checkpoint: {first_line(error)}") from error
    if not isinstance(state, dict) or state.get("version") != VERSION:
        raise UserError(f"--resume {path}: expected a checkpoint of version {VERSION} of this command")
    return file.parent, state


def check(state: dict[str, Any], identity: dict[str, str]) -> None:
    """Raise a UserError unless model and data are those the checkpoint was made with."""
    for what, value in identity.items():
        if state["identity"][what] != value:
            raise UserError(f"--resume: expected the {what} that the checkpoint was made with, got another one")
