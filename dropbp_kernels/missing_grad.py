"""What an optimizer does with a parameter that got no gradient in a step, because its branch was dropped throughout.

"skip"   nothing, which is what PyTorch's optimizers do with a gradient of None: no weight decay, no step by momentum,
         and Adam's moments and step count stay. Each parameter then sees a run of its own, of the steps that kept it.
"zero"   a step with a gradient of zeros: weight decay acts, momentum and Adam's moments decay and move the parameter
         on, and Adam's count goes up, as for every other parameter.

Under accumulation a gradient is missing only where no micro-batch of the step gave one. Ranks that draw the same plans
miss the same gradients.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .choices import MISSING_GRAD, check_choice


def fill_missing_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Give every trainable parameter without a gradient one of zeros; between backward and optimizer step.

    Cost: memory of the gradients that were missing.
    """
    for parameter in parameters:
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def register_missing_grad(optimizer: torch.optim.Optimizer, missing_grad: str) -> RemovableHandle | None:
    """Let `optimizer` treat missing gradients so from now on; "zero" is a hook before each of its steps.

    Errors: ValueError for an unknown mode.
    """
    check_choice("missing_grad", missing_grad, MISSING_GRAD)
    if missing_grad == "skip":
        return None

    def fill(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            fill_missing_gradients(group["params"])

    return optimizer.register_step_pre_hook(fill)
