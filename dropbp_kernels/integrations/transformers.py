"""DropBP on a Hugging Face model, in one line and reversibly.

    handler = apply_dropbp(model, drop_rate=0.75)
    ...
    remove_dropbp(model)

A block is patched by giving the instance a subclass of its own class, whose forward reads the gates. Its class keeps
its name and its ancestors, so wrappers that look for a block by class (FSDP, accelerate, output recording) still find
it, and transformers' gradient checkpointing, which is attached when a layer class is created, stays in force.
"""

from typing import Any

from torch import nn

from ..handler import DropBPHandler, check_drop_rate, find_gates
from .checkpointing import CheckpointByPlan, without_cache
from .families import FAMILIES, Family


def apply_dropbp(model: nn.Module, drop_rate: float, **options: Any) -> DropBPHandler:
    """Gate every branch of a Llama-family model (with or without PEFT) and return the handler that draws its plans.

    Works on Llama, Mistral, Qwen2 and Qwen3 decoders, before or after `get_peft_model`; `state_dict` keys stay.
    `options` are those of `DropBPHandler`: sampler, grad_scale, seed, keep_one, strict, dropped_runs, checkpoint.
    With transformers' own gradient checkpointing a block is checkpointed as far as it is kept (see `checkpointing`).

    Errors: ValueError when the model is patched already, has no branch of a known family (the message names the module
            types found) or an option is out of range; TypeError for a wrong type. The model is unchanged then.
    Cost:   no parameter, no buffer; two gates a block.
    Source: DropBP (arXiv 2402.17812).
    """
    check_drop_rate(drop_rate)
    if find_gates(model):
        raise ValueError("model: expected one without DropBP gates, got one that has them; call remove_dropbp first")
    blocks = _find_blocks(model)
    if not blocks:
        found = ", ".join(sorted({type(module).__name__ for module in model.modules()}))
        known = ", ".join(family.block for family in FAMILIES.values())
        raise ValueError(f"model: expected blocks of a known family ({known}), got none; module types found: {found}")
    for block, family in blocks:
        _patch(block, family)
    try:
        return DropBPHandler(model, drop_rate, **options)
    except (TypeError, ValueError):
        remove_dropbp(model)
        raise


def remove_dropbp(model: nn.Module) -> None:
    """Undo `apply_dropbp`: classes, forwards and submodules are again what they were.

    Errors: ValueError when the model was not patched.
    """
    patched = [module for module in model.modules() if "_dropbp_original" in vars(type(module))]
    if not patched:
        raise ValueError("model: expected one patched by apply_dropbp, got one without patched blocks")
    for block in patched:
        del block.gate_attention, block.gate_mlp
        block.__class__ = vars(type(block))["_dropbp_original"]


def _find_blocks(model: nn.Module) -> list[tuple[nn.Module, Family]]:
    by_name = {family.block: family for family in FAMILIES.values()}
    return [(module, by_name[type(module).__name__]) for module in model.modules() if type(module).__name__ in by_name]


def _patch(block: nn.Module, family: Family) -> None:
    original = type(block)
    for name, gate in family.gates(block).items():
        block.add_module(name, gate)
    block.__class__ = type(
        original.__name__,
        (original,),
        {
            "forward": without_cache(family.forward),
            "_gradient_checkpointing_func": CheckpointByPlan(),
            "__module__": original.__module__,
            "__doc__": original.__doc__,
            "_dropbp_original": original,
        },
    )
