"""What a fine-tuning run is asked to do: one flat, frozen record that a checkpoint can hold."""

import argparse
import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..choices import ALLOCATIONS, CONTEXT_GRADIENTS, GRANULARITIES, MISSING_GRAD
from ..samplers import SAMPLERS
from ..schedules import get_schedule
from . import builtin
from .documents import check_data_path
from .errors import UserError, first_line
from .model_config import check_spelling, without_config

if TYPE_CHECKING:
    import torch

ADAPTERS = ("lora", "paca", "full")
RATES = ("uniform", "depth_linear", "sensitivity")  # or the path of a calibration
MAX_SEED = 1 << 32  # what every generator takes
DTYPES = ("auto", "float32", "bfloat16")
CONTEXTS = ("auto", "off", "inference")
DROP_RATES = {"off": 0.75, "inference": 0.0}  # by context: with a target plan, tokens are dropped in place of branches
LEARNING_RATES = {  # (is built-in, adapter): the built-in model is small and takes larger steps
    (True, "lora"): 4e-3,
    (True, "full"): 1e-3,
    (True, "paca"): 2e-3,
    (False, "lora"): 2e-4,
    (False, "paca"): 1e-4,
    (False, "full"): 2e-5,
}
# How branches are dropped: where one of these, or a coreset, is asked for, context "auto" is off.
DROP_OPTIONS = ("drop_rate", "rates", "allocation", "sampler", "granularity", "schedule", "grad_scale", "missing_grad")
# What a resumed run may have different without being another run.
FREE_ON_RESUME = ("save_every", "device")


@dataclass(frozen=True)
class Settings:
    """Fields are the options of `dropbp-kernels finetune`; None and "auto" are decided by `resolve`.

    But for context "auto" without drop options, and with it drop_rate None, which need the data: `with_context`.
    """

    model: str = builtin.NAME
    data: str = "builtin:docstrings"
    adapter: str = "lora"
    lora_rank: int = 8
    drop_rate: float | None = None
    rates: str = "uniform"
    allocation: str = "published"
    sampler: str = "balanced"
    granularity: str = "branch"
    schedule: str | None = None
    grad_scale: float | str = 1.0
    context: str = "auto"
    context_gradient: str = "none"
    target_windows: int = 1
    target_keep: float = 1.0
    coreset: float | None = None
    missing_grad: str = "skip"
    fused: bool = False
    steps: int = 80
    batch_size: int = 8
    seq_len: int = 256
    learning_rate: float | None = None
    dtype: str = "auto"
    device: str = "auto"
    seed: int = 0
    compare: bool | None = None
    save_every: int = 50
    pretrain_steps: int = builtin.Recipe.steps

    def recipe(self) -> builtin.Recipe:
        """How the built-in model is pretrained."""
        return replace(builtin.Recipe(), steps=self.pretrain_steps)

    def calibration_file(self) -> Path | None:
        """Where the rates come from, when it is an earlier calibration."""
        return Path(self.rates).expanduser() if self.rates.endswith(".json") else None

    def torch_dtype(self) -> "torch.dtype":
        import torch

        return getattr(torch, self.dtype)


def resolve(settings: Settings) -> Settings:
    """Check every value and decide those that are left to us. Reads nothing but the names of files.

    Errors: UserError that names the option, what was expected and what came.
    """
    drops = any(getattr(settings, name) != getattr(Settings, name) for name in (*DROP_OPTIONS, "coreset"))
    if settings.context == "auto" and drops:
        settings = replace(settings, context="off")
    if settings.context == "auto" and (settings.target_windows, settings.target_keep) != (1, 1.0):
        settings = replace(settings, context="inference")
    if settings.drop_rate is None and settings.context in DROP_RATES:
        settings = replace(settings, drop_rate=DROP_RATES[settings.context])
    _check(settings)
    is_builtin = settings.model == builtin.NAME
    folder = Path(settings.model).expanduser()
    device = _device(settings.device)
    dtype = settings.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    learning_rate = settings.learning_rate
    if learning_rate is None:
        learning_rate = LEARNING_RATES[is_builtin, settings.adapter]
    return replace(
        settings,
        model=str(folder) if folder.is_dir() and not is_builtin else settings.model,
        device=str(device),
        dtype=dtype,
        learning_rate=learning_rate,
        compare=is_builtin if settings.compare is None else settings.compare,
    )


def with_context(settings: Settings, context: str) -> Settings:
    """Resolved settings whose context was left open, with that context and its drop rate."""
    return replace(settings, context=context, drop_rate=DROP_RATES[context])


def _check(settings: Settings) -> None:
    choices = {
        "adapter": ADAPTERS,
        "rates": RATES if settings.calibration_file() is None else (settings.rates,),
        "dtype": DTYPES,
        "allocation": ALLOCATIONS,
        "missing_grad": MISSING_GRAD,
        "sampler": tuple(SAMPLERS),
        "granularity": GRANULARITIES,
        "context": CONTEXTS,
        "context_gradient": CONTEXT_GRADIENTS,
    }
    for name, allowed in choices.items():
        if (value := getattr(settings, name)) not in allowed:
            raise UserError(f"{_option(name)}: expected one of {', '.join(allowed)}, got {value!r}")
    for name in ("lora_rank", "steps", "batch_size", "pretrain_steps", "target_windows"):
        if (value := getattr(settings, name)) < 1:
            raise UserError(f"{_option(name)}: expected at least 1, got {value}")
    if settings.seq_len < 16:
        raise UserError(f"--seq-len: expected at least 16, got {settings.seq_len}")
    if not 0 <= settings.seed < MAX_SEED:
        raise UserError(f"--seed: expected 0 to {MAX_SEED - 1}, got {settings.seed}")
    if settings.save_every < 0:
        raise UserError(f"--save-every: expected 0 (only when interrupted) or more, got {settings.save_every}")
    if settings.context_gradient != "none" and settings.context != "inference":
        raise UserError(f"--context-gradient {settings.context_gradient}: expected --context inference with it")
    if not 0.0 < settings.target_keep <= 1.0:
        raise UserError(f"--target-keep: expected 0 < target_keep <= 1, got {settings.target_keep}")
    for name in ("target_windows", "target_keep"):
        if (value := getattr(settings, name)) != 1 and settings.context != "inference":
            raise UserError(f"{_option(name)} {value}: expected --context inference with it")
    if settings.drop_rate is not None and not 0.0 <= settings.drop_rate < 1.0:
        raise UserError(f"--drop-rate: expected 0 <= drop_rate < 1, got {settings.drop_rate}")
    try:
        get_schedule(settings.schedule)
    except ValueError as error:
        raise UserError(f"--{error}") from error
    if settings.coreset is not None and not 0.0 < settings.coreset <= 1.0:
        raise UserError(f"--coreset: expected 0 < coreset <= 1, got {settings.coreset}")
    if settings.grad_scale != "unbiased" and not math.isfinite(settings.grad_scale):  # type: ignore[arg-type]
        raise UserError(f"--grad-scale: expected a finite number or 'unbiased', got {settings.grad_scale}")
    if settings.learning_rate is not None and not 0.0 < settings.learning_rate < float("inf"):
        raise UserError(f"--learning-rate: expected a positive number, got {settings.learning_rate}")
    if settings.drop_rate is not None:
        check_rates(settings, settings.drop_rate)
    if settings.model == builtin.NAME:
        if settings.seq_len > builtin.MAX_SEQ_LEN:
            raise UserError(f"--seq-len: expected at most {builtin.MAX_SEQ_LEN}, got {settings.seq_len}")
    else:
        _check_model_path(settings.model)
    check_data_path(settings.data)


def check_rates(settings: Settings, drop_rate: float) -> None:
    """Raise a UserError unless `drop_rate` can be shared out as `settings.rates` says."""
    file = settings.calibration_file()
    if file is None and settings.rates != "sensitivity":
        return
    from ..allocation import allocate
    from ..calibration import Calibration

    try:
        calibration = None if file is None else Calibration.load(file)
    except OSError as error:
        raise UserError(f"--rates {settings.rates}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"--rates {error}") from error
    try:
        if calibration is not None:
            calibration.reallocated(drop_rate, settings.allocation)
        else:  # FLOPs differ between branches; the limit does not depend on them
            allocate([1.0, 1.0], [1e9, 1e9], drop_rate, method=settings.allocation)
    except ValueError as error:
        raise UserError(f"--drop-rate with --rates {settings.rates}: {error}") from error


def _check_model_path(name: str) -> None:
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"--model {name}: {without_config(path)}")
    elif path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"--model {name}: expected 'builtin', a folder or a hub id such as owner/name; no such folder")
    else:
        check_spelling(name, [builtin.NAME])


def _device(name: str) -> "torch.device":
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # a torch without CUDA asserts
        raise UserError(f"--device {name}: {first_line(error)}") from error
    return device


def parse_grad_scale(text: str) -> float | str:
    """ "unbiased" or a number."""
    try:
        return text if text == "unbiased" else float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a finite number or 'unbiased', got {text!r}") from error


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def settings_of(saved: dict[str, Any], explicit: dict[str, Any]) -> Settings:
    """Settings of a resumed run: those saved; `explicit` are the options on the command line.

    Errors: UserError when an option contradicts the saved run.
    """
    names = {field.name for field in fields(Settings)}
    if set(saved) != names:
        raise UserError("--resume: the checkpoint was written by another version of dropbp_kernels")
    for name, value in explicit.items():
        if name not in FREE_ON_RESUME and value != saved[name]:
            raise UserError(f"--resume: the checkpoint was made with {_option(name)} {saved[name]}, got {value}")
    return replace(Settings(**saved), **{name: explicit[name] for name in FREE_ON_RESUME if name in explicit})
