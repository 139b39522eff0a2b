"""What a PaCA adapter is made of: a PEFT config, and the name that PEFT knows it by."""

import math
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig
from peft.utils import PeftType

METHOD, PREFIX = "dropbp_paca", "paca_"
SELECTIONS = ("random", "weight_norm", "gradient")


def _peft_type() -> Any:
    """The member of PEFT's enum of methods that is ours, added when first asked for.

    PEFT registers a method by a name in that enum, and has no call that adds one. The name says whose it is, so that a
    PaCA of PEFT's own never meets our files, nor ours its.
    """
    name = METHOD.upper()
    if name not in PeftType.__members__:
        member = str.__new__(PeftType, name)
        member._name_, member._value_ = name, name
        type.__setattr__(PeftType, name, member)
        PeftType._member_names_.append(name)
        PeftType._member_map_[name] = member
        PeftType._value2member_map_[name] = member
    return PeftType[name]


PEFT_TYPE = _peft_type()


@dataclass
class PacaConfig(PeftConfig):
    """Partial connections (PaCA): r input columns of every target linear are trained, in place of an adapter.

    Args:
        r: how many columns of each target are trained; published settings are 16 and 64.
        alpha: what is added to a column is alpha / r times what is trained; published: 64 with r=16.
        target_modules, exclude_modules, modules_to_save, layers_to_transform, layers_pattern, rank_pattern,
            alpha_pattern: as in PEFT's LoraConfig; "all-linear" is what was published. Targets are nn.Linear,
            transformers' Conv1D, and bitsandbytes' 8-bit and 4-bit linears.
        selection: which columns. "random": drawn once; linears of one parent module that have equally many inputs draw
            the same, so that query, key and value keep one copy of their common channels. "weight_norm": those of the
            largest norm. "gradient": those of the largest gradient; call `select_columns(model, backprop)` before
            training.
        seed: of the random columns; with it and the module's name they are the same everywhere.
        bias: "none", "all" or "paca_only": which biases of the model are trained too.
        published: train the columns themselves, divided by alpha / r, as the published code does, in place of their
            change; weight decay then pulls pretrained columns to zero. For comparison.
    Errors: ValueError, naming the argument, for values that mean nothing. What depends on the model is checked, before
        anything in it is replaced, by `peft.get_peft_model`.
    Source: PaCA (arXiv 2503.01905).
    """

    r: int = field(default=16, metadata={"help": "How many input columns of each target are trained."})
    alpha: float = field(default=64, metadata={"help": "A column changes by alpha / r times what is trained."})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names, or a regular expression of names, or 'all-linear'."}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Targets that are left out."})
    selection: str = field(default="random", metadata={"help": f"One of {', '.join(SELECTIONS)}."})
    seed: int = field(default=0, metadata={"help": "Seed of the random columns."})
    bias: str = field(default="none", metadata={"help": "Biases trained too: 'none', 'all' or 'paca_only'."})
    published: bool = field(default=False, metadata={"help": "Train columns, not their change, as published."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained as a whole and saved with the adapter."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Numbers of the layers whose targets get an adapter; default: all."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of layers, where it is not a common one."}
    )
    rank_pattern: dict = field(default_factory=dict, metadata={"help": "r by name or regular expression."})
    alpha_pattern: dict = field(default_factory=dict, metadata={"help": "alpha by name or regular expression."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("layers_to_transform: expected None where target_modules is a string, got both")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern: expected layers_to_transform with it, got None")
        if self.selection not in SELECTIONS:
            raise ValueError(f"selection: expected one of {', '.join(SELECTIONS)}, got {self.selection!r}")
        if self.bias not in ("none", "all", "paca_only"):
            raise ValueError(f"bias: expected none, all or paca_only, got {self.bias!r}")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed: expected an integer of at least 0, got {self.seed!r}")
        for name, r in {"r": self.r, **{f"rank_pattern[{key!r}]": r for key, r in self.rank_pattern.items()}}.items():
            if not isinstance(r, int) or isinstance(r, bool) or r < 1:
                raise ValueError(f"{name}: expected an integer of at least 1, got {r!r}")
        alphas = {"alpha": self.alpha, **{f"alpha_pattern[{key!r}]": a for key, a in self.alpha_pattern.items()}}
        for name, alpha in alphas.items():
            if not isinstance(alpha, (int, float)) or not 0 < alpha < math.inf:
                raise ValueError(f"{name}: expected a positive number, got {alpha!r}")
