"""dropbp_kernels: dropped branches run like inference, kept branches like the leanest training code there is.

apply_dropbp, remove_dropbp   one line on a Hugging Face model      integrations/transformers.py
DropBPCallback                the same in a Trainer or SFTTrainer   integrations/trainer.py
register_family               the same for your own blocks          integrations/families.py
DropBP                        the gate of one residual branch       layer.py
DropBPHandler, DropPlan       draws the plan of each step           handler.py, plan.py
blocks                        fused transformer blocks              blocks.py
ops                           the fused operators                   ops/
measure                       exact counts of saved work            measure.py
"""

from typing import Any

from . import blocks, measure, ops
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
    "measure",
    "ops",
    "register_family",
    "remove_dropbp",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "DropBPCallback":  # a subclass of transformers' callback: imported when it is asked for
        from .integrations.trainer import DropBPCallback

        return DropBPCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
