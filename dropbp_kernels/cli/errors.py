"""What a user did wrong, in one sentence, and what is missing on this machine."""

import importlib.util
from collections.abc import Sequence


class UserError(Exception):
    """Ends the command with one line on stderr and exit code 2, without a traceback."""


def require_packages(command: str, packages: Sequence[str]) -> None:
    """Raise a UserError that names which of `packages` the command lacks here, and how to get them."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"{command} needs {', '.join(missing)}, not installed here; run: pip install 'dropbp_kernels[finetune]'"
        )


def first_line(error: Exception) -> str:
    """What an error of another package says, without the advice that follows."""
    return str(error).strip().partition("\n")[0]


def one_line(error: Exception) -> str:
    """All that it says, on one line: strict configs of transformers explain themselves over several."""
    return " ".join(str(error).split())
