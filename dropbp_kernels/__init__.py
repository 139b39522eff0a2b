"""dropbp_kernels: fine-tuning with parts of the backward pass left out; what is left out runs like inference.

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

Importing the package imports neither torch nor any of these: each name is imported when it is asked for, so that the
command line, which starts here too, answers at once.
"""

import importlib
from typing import TYPE_CHECKING, Any

__all__ = [  # without what needs an optional package: DropBPCallback and paca
    "DropBP",
    "DropBPHandler",
    "DropPlan",
    "apply_dropbp",
    "blocks",
    "coreset",
    "losses",
    "measure",
    "missing_grad",
    "ops",
    "register_family",
    "remove_dropbp",
]
__version__ = "0.1.0"

_MODULE_OF = {
    "DropBP": "layer",
    "DropBPCallback": "integrations.trainer",
    "DropBPHandler": "handler",
    "DropPlan": "plan",
    "apply_dropbp": "integrations.transformers",
    "register_family": "integrations.families",
    "remove_dropbp": "integrations.transformers",
}
_MODULES = ("blocks", "coreset", "losses", "measure", "missing_grad", "ops", "paca")

if TYPE_CHECKING:
    from . import blocks, coreset, losses, measure, missing_grad, ops
    from . import paca as paca  # so written, type checkers take it for a public name
    from .handler import DropBPHandler
    from .integrations.families import register_family
    from .integrations.trainer import DropBPCallback as DropBPCallback
    from .integrations.transformers import apply_dropbp, remove_dropbp
    from .layer import DropBP
    from .plan import DropPlan
else:

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            return importlib.import_module(f".{name}", __name__)
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted([*_MODULE_OF, *_MODULES, "__version__"])
