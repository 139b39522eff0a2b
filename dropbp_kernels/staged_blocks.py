"""Target plans on a model of our own blocks: context rows run like inference, target rows with autograd.

    plan = plan_targets(labels)
    hidden = run_by_targets(plan, embedding(tokens), blocks, final_norm, rope)
    loss = linear_cross_entropy(hidden, head.weight, target_labels(plan))

Each stage of the plan runs through all blocks, fused adds and gates included, and leaves its keys and values to the
stages behind it; of context the last block makes nothing else. `integrations.target_plans` does the same with
transformers' models, through their cache.
"""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from .blocks import LlamaBlock, RMSNorm, SeenKeys, Stream, finish
from .choices import CONTEXT_GRADIENTS, check_choice
from .layer import DropBP, as_inference
from .plan import running
from .stage_masks import StageMasks
from .targets import IGNORED, TargetPlan


def run_by_targets(
    plan: TargetPlan,
    x: Tensor,
    blocks: Sequence[LlamaBlock],
    norm: RMSNorm,
    rope: tuple[Tensor, Tensor],
    *,
    position_ids: Tensor | None = None,
    context_gradient: str = "none",
) -> Tensor:
    """The final hidden states of the target rows, in the order of `target_labels`.

    context_gradient: what keys and values of context contribute to the gradient (docs/target_plans.md).

    Shapes: x (B, S, D), embedded tokens; rope two tensors (positions, head_dim); position_ids int64 (B, S) or (1, S),
            rows of rope, default 0 ... S - 1; result (B, T, D).
    Errors: ValueError when x is no batch of the plan's shape, the plan has no target (skip such a batch) or shares
            context between samples, or context_gradient is unknown.
    Cost:   a pass through the blocks for each stage (`plan.with_slices` bounds how many rows of context run at a time);
            saves what its target rows save, and the keys that they see.
    """
    check_choice("context_gradient", context_gradient, CONTEXT_GRADIENTS)
    if x.dim() != 3 or x.shape[:2] != plan.documents.shape:
        raise ValueError(
            f"x: expected (batch, seq_len) of the plan, {tuple(plan.documents.shape)}, got {tuple(x.shape)}"
        )
    if plan.num_target == 0:
        raise ValueError("plan: expected at least one target, got none; skip such a batch")
    if any(stage.samples is not None for stage in plan.stages):
        raise ValueError("plan: expected one without shared context, got one of with_shared_context")
    if position_ids is None:
        position_ids = torch.arange(x.shape[1], device=x.device).unsqueeze(0)
    position_ids = position_ids.expand_as(plan.documents)

    before: list[list[tuple[Tensor, Tensor]]] = [[] for _ in blocks]
    masks = StageMasks(plan.documents)
    hidden = []
    gates = [module for block in blocks for module in block.modules() if isinstance(module, DropBP)]
    staged = plan.staged_rows(with_context=context_gradient == "full")
    for stage in plan.stages:
        masks.add(stage)
        mask = None if masks.is_causal else masks.mask()
        places = stage.gather(position_ids)
        rope_of_rows = rope[0][places], rope[1][places]
        has_graph = torch.is_grad_enabled() and (stage.is_target or context_gradient == "full")
        one_hop = context_gradient == "one_hop" and not stage.is_target and torch.is_grad_enabled()
        with running(gates, staged, stage), nullcontext() if has_graph else as_inference(x.device.type):
            stream = Stream(stage.gather(x))
            for block, keys in zip(blocks, before, strict=True):
                seen = SeenKeys(keys, mask, has_gradient=one_hop)
                if keys is before[-1] and not stage.is_target and context_gradient != "full":
                    block.leave_keys(stream, rope_of_rows, seen)
                else:
                    stream = block(stream, rope_of_rows, seen)
                if seen.own is not None:
                    keys.append(seen.own)
        if stage.is_target:
            hidden.append(stage.of_targets(finish(stream, norm)))
    return torch.cat(hidden, dim=1)


def target_labels(plan: TargetPlan) -> Tensor:
    """What the rows of `run_by_targets` have to predict: int64 (B, T), -100 where padding."""
    rows, is_row = plan.head_rows
    return plan.shift_labels.gather(1, rows).masked_fill(~is_row, IGNORED)
