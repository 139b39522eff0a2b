"""The config of a model by name: one that ships with this package, a file, a folder, or a Hugging Face hub id."""

import difflib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from . import builtin
from .errors import UserError, one_line

CONFIGS = Path(__file__).resolve().parent / "configs"


def shipped() -> list[str]:
    """Names of the configs that ship with this package."""
    return sorted(path.stem for path in CONFIGS.glob("*.json"))


def load_config(name: str) -> Any:
    """The transformers config called `name`; of weights nothing is read.

    Errors: UserError when there is none, or it is no config of a model that transformers knows.
    """
    if name == builtin.NAME:
        return builtin.config(builtin.Recipe())
    if name in shipped():
        return _from_file(CONFIGS / f"{name}.json", name)
    path = Path(name).expanduser()
    if path.is_dir():
        path /= "config.json"
        if not path.is_file():
            raise UserError(f"--model {name}: {without_config(path.parent)}")
    if path.is_file():
        return _from_file(path, name)
    if path.suffix == ".json" or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"--model {name}: no such file or folder")
    return _from_hub(name)


def without_config(folder: Path) -> str:
    """What to say of a folder that has no config.json; those that `finetune` writes hold a model, or an adapter."""
    expected = "expected a Hugging Face checkpoint, but the folder has no config.json"
    if (folder / "adapter_config.json").is_file():
        return f"{expected}; it holds an adapter, not the model"
    if (folder / "model" / "config.json").is_file():
        return f"{expected}; did you mean {folder / 'model'}?"
    return expected


def check_spelling(name: str, known: Iterable[str]) -> None:
    """Errors: UserError for what looks like a slip for one of `known`: names of the hub have an owner, save a few."""
    if "/" not in name and (likely := difflib.get_close_matches(name.lower(), known, n=1)):
        raise UserError(f"--model {name}: no such model; did you mean {likely[0]}?")


def check_on_hub(name: str, known: Iterable[str]) -> None:
    """Errors: UserError unless the hub, or the cache of what it once gave, has a model called `name`.

    Asked before transformers is, which without a network tries for half a minute.
    """
    check_spelling(name, known)
    from huggingface_hub import model_info, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    client_error: Any = HfHubHTTPError.__bases__[0]  # of the HTTP client that this version of huggingface_hub uses
    try:
        if not isinstance(try_to_load_from_cache(name, "config.json"), str):
            model_info(name, timeout=10.0)
    except (OSError, client_error, HFValidationError) as error:
        raise UserError(
            f"--model {name}: not one of {', '.join(known)}, no folder, and not to be had from the Hugging Face hub: "
            f"{one_line(error)}"
        ) from error


def _from_file(path: Path, name: str) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        values = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"--model {name}: not a JSON file: {error}") from error
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        raise UserError(f"--model {name}: expected a JSON object with a model_type, as transformers writes it")
    try:
        return AutoConfig.for_model(**values)
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        raise UserError(f"--model {name}: not a config that transformers accepts: {one_line(error)}") from error


def _from_hub(name: str) -> Any:
    from transformers import AutoConfig

    check_on_hub(name, [builtin.NAME, *shipped()])
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {name}: no config of the Hugging Face hub: {one_line(error)}") from error
