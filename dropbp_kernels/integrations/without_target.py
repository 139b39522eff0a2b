"""A batch none of whose tokens has a loss, under a target plan: it runs under no_grad, once it was warned of.

==================================  ===================================================================================
who trains                          what the loss is
==================================  ===================================================================================
a loop of one's own                 one without a gradient: skip its backward
a Trainer                           its backward gives one parameter a gradient of zero and the others none
several ranks (torch.distributed)   its backward gives every parameter of a kept branch a gradient of zero, since the
                                    other ranks wait for them: one token runs with autograd
==================================  ===================================================================================
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ..derivative import first_derivative
from ..gates import find_gates
from ..targets import TargetRule
from .swapping import with_attribute
from .target_checks import has_ranks


def run_without_target(
    module: nn.Module, rule: TargetRule, run: Callable[..., Any], args: Any, kwargs: dict[str, Any]
) -> Any:
    """run(*args, **kwargs) of a batch without a target."""
    if not rule.has_warned:
        ends = "its gradient is zero" if has_ranks() or rule.zero_gradient else "its loss has no gradient"
        warnings.warn(f"labels: no target in a batch; {ends}", UserWarning, stacklevel=5)
    rule.has_warned = True
    with torch.no_grad():
        output = run(*args, **kwargs)
    anchor = None
    if has_ranks():
        anchor = one_token(module, rule, run)
    elif rule.zero_gradient:
        # Of one and not of none, since a GradScaler stops at a step without any gradient; not of all, since an
        # optimizer would then move parameters of dropped branches.
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        anchor = min(trained, key=Tensor.numel, default=None)
    return output if anchor is None else with_zero_gradient(output, anchor)


def with_zero_gradient(output: Any, anchor: Tensor) -> Any:
    """The output, of which a loss may be taken and differentiated: what `anchor` depends on gets a gradient of zero."""
    return tree_map_only(Tensor, lambda x: _WithZeroGradient.apply(x, anchor) if x.is_floating_point() else x, output)


def one_token(module: nn.Module, rule: TargetRule, run: Callable[..., Any]) -> Tensor | None:
    """A number that depends on every parameter that a batch with targets would train; None where there is none."""
    token = torch.zeros(1, 1, dtype=torch.long, device=next(module.parameters()).device)
    by_rows = [gate for gate in find_gates(module).values() if not isinstance(gate.kept, bool)]
    labels, rule.labels, rule.is_anchor = rule.labels, None, True
    try:
        with with_attribute(by_rows, "kept", True):  # whole, so that every branch with a kept row has a gradient
            output = run(input_ids=token, use_cache=False)
    finally:
        rule.labels, rule.is_anchor = labels, False
    return next((leaf.sum() for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad), None)


class _WithZeroGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, anchor: Tensor) -> Tensor:
        ctx.save_for_backward(anchor)
        return values.clone()

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (anchor,) = ctx.saved_tensors
        return grad, torch.zeros_like(anchor)
