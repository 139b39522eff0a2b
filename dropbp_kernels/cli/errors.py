"""What a user did wrong, in one sentence, and what is missing on this machine."""

import importlib.util
from collections.abc import Sequence

# Everything that `finetune` needs beyond the package itself; `pip install 'dropbp_kernels[finetune]'` brings all of it.
FINETUNE_PACKAGES = ("transformers", "peft", "safetensors", "rich", "tqdm", "matplotlib")


class UserError(Exception):
    """Ends the command with one line on stderr and exit code 2, without a traceback."""


def require_finetune_packages() -> None:
    """Raise a UserError that names what is missing and how to get it."""
    require_packages("finetune", FINETUNE_PACKAGES)


def require_packages(command: str, packages: Sequence[str]) -> None:
    """Raise a UserError that names which of `packages` the command lacks here, and how to get them."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"{command} needs {', '.join(missing)}, not installed here; run: pip install 'dropbp_kernels[finetune]'"
        )
