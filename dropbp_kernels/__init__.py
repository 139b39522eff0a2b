"""dropbp_kernels: dropped branches run like inference, kept branches like the leanest training code there is.

apply_dropbp, remove_dropbp   one line on a Hugging Face model      integrations/transformers.py
DropBPCallback                the same in a Trainer or SFTTrainer   integrations/trainer.py
register_family               the same for your own blocks          integrations/families.py
DropBP                        the gate of one residual branch       layer.py
DropBPHandler, DropPlan       draws the plan of each step           handler.py, plan.py
blocks                        fused transformer blocks              blocks.py
ops                           the fused operators                   ops/
losses                        cross entropy without whole logits    losses.py
missing_grad                  optimizers and dropped branches       missing_grad.py
measure                       exact counts of saved work            measure.py
paca                          partial connections, a PEFT tuner     paca/
coreset                       examples worth a backward             coreset/
"""

import importlib
from typing import TYPE_CHECKING, Any

from . import blocks, losses, measure, ops
from .handler import DropBPHandler
from .integrations.families import register_family
from .integrations.transformers import apply_dropbp, remove_dropbp
from .layer import DropBP
from .plan import DropPlan

__all__ = [
    "DropBP",
    "DropBPHandler",
    "DropPlan",
    "apply_dropbp",
    "blocks",
    "losses",
    "measure",
    "ops",
    "register_family",
    "remove_dropbp",
]
__version__ = "0.1.0"

# Imported when they are asked for: DropBPCallback is a subclass of transformers', PaCA one of PEFT's.
_LATER = {"DropBPCallback": "integrations.trainer", "coreset": "", "missing_grad": "", "paca": ""}

if TYPE_CHECKING:
    from . import coreset as coreset
    from . import missing_grad as missing_grad
    from . import paca as paca
    from .integrations.trainer import DropBPCallback as DropBPCallback
else:

    def __getattr__(name: str) -> Any:
        if name not in _LATER:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = importlib.import_module(f".{_LATER[name] or name}", __name__)
        return getattr(module, name) if _LATER[name] else module


def __dir__() -> list[str]:
    return sorted([*__all__, *_LATER, "__version__"])
