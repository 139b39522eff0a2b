"""PaCA, partial connections, as a tuner of PEFT: train a few input columns of each weight, store as few channels.

    from dropbp_kernels.paca import PacaConfig
    model = peft.get_peft_model(model, PacaConfig(r=16, alpha=64, target_modules="all-linear"))

Importing this makes PEFT know the method: `PeftModel.from_pretrained` then loads what `save_pretrained` wrote. See
docs/paca.md. Source: PaCA (arXiv 2503.01905).
"""

import warnings

try:
    import peft
except ImportError as error:
    raise ImportError("dropbp_kernels.paca needs PEFT 0.20 or later: pip install 'peft>=0.20'") from error

from .config import METHOD, PEFT_TYPE, PREFIX, PacaConfig
from .convert import convert_to_lora
from .gradient import select_columns
from .layer import Linear, PacaLayer
from .model import PacaModel

__all__ = ["Linear", "PacaConfig", "PacaLayer", "PacaModel", "convert_to_lora", "select_columns"]


def _register() -> None:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils import register_peft_method

    if PEFT_TYPE not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=METHOD, config_cls=PacaConfig, model_cls=PacaModel, prefix=PREFIX)
    if hasattr(peft, "PacaConfig"):
        warnings.warn(
            f"peft {peft.__version__} has a PaCA of its own. Both work: dropbp_kernels.paca.PacaConfig makes ours "
            f"(peft_type {PEFT_TYPE.value}), peft.PacaConfig makes PEFT's.",
            stacklevel=3,
        )


_register()
