"""DropBP on a Hugging Face model, in one line and reversibly.

    handler = apply_dropbp(model, drop_rate=0.75)
    ...
    remove_dropbp(model)

What is patched is an instance (`swapping`), so transformers' gradient checkpointing, which is attached when a layer
class is created, stays in force. Which instances, says the family: the modules of each branch (generic), or the block
(fused); and the layers that transformers may checkpoint, so that they follow the plan. Gates live in the block, as
`gate_<branch>`.
"""

import difflib
import functools
import inspect
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

from torch import nn

from ..gates import check_model, find_gates
from ..handler import DropBPHandler, check_drop_rate
from ..targets import TargetRule
from . import fused_lora, fused_mlp, fusing
from .checkpointing import CheckpointByPlan, takes_cache, without_cache
from .discovery import check_streams, discover, example_inputs, prove, ungated_blocks
from .families import FAMILIES, SHIPPED
from .family import Family
from .gating import ModuleGate
from .output_head import check_fused_loss, patch_head, unpatch_head
from .row_batches import check_batch_first, recorded_outputs, stop_telling, tell_gates_of_batches
from .swapping import is_swapped, subclass, swap, swap_back
from .target_checks import check_context
from .target_plans import patch_targets, unpatch_targets

_PATCHED_WITH = "_dropbp_options"


def apply_dropbp(
    model: nn.Module,
    drop_rate: float,
    *,
    families: Iterable[str | Family] | None = None,
    fused: bool | str = False,
    fused_loss: str = "auto",
    inputs: dict[str, Any] | None = None,
    context: str | None = None,
    context_gradient: str = "none",
    context_keep: float = 0.0,
    shared_context: bool = False,
    target_windows: int = 1,
    target_keep: float = 1.0,
    **options: Any,
) -> DropBPHandler:
    """Patch a model (with or without PEFT) so that a step can drop branches; return the handler that draws its plans.

    A branch is the attention or the MLP of a block, with its norm; dropped, it runs like inference and has no backward.
    Call `handler.step()` before the forward of each optimizer step. Works before or after `get_peft_model`;
    `state_dict` keys stay, `remove_dropbp` undoes it, docs/models.md lists the models that were checked. Under
    transformers' own gradient checkpointing dropped branches are not recomputed (see `checkpointing`).

    drop_rate: the probability that a step drops a branch, 0 <= drop_rate < 1; 0 drops none.
    families: the names or entries of `integrations.families` to look for, in place of all. A model without known blocks
        is traced by a forward on `inputs` (default: four tokens), and what is found is proved (see `discovery`).
    inputs: a batch of the model's arguments by name. On it, or on four tokens, branches that you registered are checked
        for one that ends behind its add.
    fused: True fuses residual adds with the norms behind them, where the family's norms allow it (see `fusing`), the
        activation and product of gated MLPs (see `fused_mlp`), and PEFT's LoRA layers, those that come later from the
        handler's next step on (see `fused_lora`). Results are then equal to rounding. "auto": where something faster
        than plain PyTorch serves the op.
    fused_loss: how cross entropy is taken of the output head's logits in training: "chunked", a slice of the rows at a
        time, so that they are never stored whole; "torch" or "liger", by their operators; "off"; "auto", chunked where
        that needs less memory, nothing where the head is no plain linear. Logits are then computed when they are read.
    context: "inference" runs tokens without a loss (context) like inference, by the labels that the model is called
        with or that `handler.step(labels=...)` is given (see docs/target_plans.md, also for the logits that come back).
    context_gradient: what the keys and values of context contribute to the gradient: "none"; "one_hop", that of the
        projections that made them; "full", everything.
    context_keep: share of the context, drawn at random in each step, that runs with autograd all the same.
    shared_context: run a context that several samples of a batch begin with once for all of them.
    target_windows: into how many windows the labelled tokens of each sample are cut; a step trains on one, the others
        are context. For losses that are means over the labels. 4, with context_gradient="one_hop", does a quarter of
        the backward where every token has a label.
    target_keep: share of the labelled tokens, drawn at random in each step, that a step trains on; the others are
        context. For the same losses.
    options: those of `DropBPHandler`: sampler, grad_scale, seed, keep_one, strict, dropped_runs, checkpoint,
        granularity, aligned.

    Errors: ValueError when the model is patched already, has no branch that is known or can be found and proved (the
            message says why, and how to register a family) or an option is out of range; TypeError for a wrong type;
            RuntimeError for a fused_loss that is not installed. The model is unchanged then.
    Cost:   no parameter, no buffer; one gate a branch.
    Source: DropBP (arXiv 2402.17812).
    """
    check_model(model)
    check_drop_rate(drop_rate)
    check_options(options, DropBPHandler)
    if fused not in fusing.FUSED:
        raise ValueError(f'fused: expected True, False or "auto", got {fused!r}')
    check_fused_loss(fused_loss)
    rule = TargetRule(context_gradient, context_keep, shared_context, target_windows, target_keep)
    check_context(model, context, rule)
    if shared_context and context_gradient == "full" and options.get("granularity", "branch") != "branch":
        raise ValueError(
            'granularity: expected "branch" with shared_context and context_gradient="full", since a context that '
            f"samples share is kept for all of them or for none, got {options['granularity']!r}"
        )
    if inputs is not None and not isinstance(inputs, Mapping):
        raise TypeError(f"inputs: expected a dict of the model's arguments by name, got {type(inputs).__name__}")
    if find_gates(model):
        raise ValueError("model: expected one without DropBP gates, got one that has them; call remove_dropbp first")
    known = _known(families)
    blocks = _find_blocks(model, known)
    traced = None
    can_look = families is None and not any(parameter.is_meta for parameter in model.parameters())  # proofs need values
    if not blocks and can_look and (traced := inputs or example_inputs(model)) is not None:
        blocks = discover(model, traced, is_guess=not inputs)
    if not blocks:
        found = ", ".join(sorted({type(module).__name__ for module in model.modules()}))
        classes = dict.fromkeys(name for family in known for name in family.block)
        names = ", ".join(classes) if families else "docs/models.md"
        raise ValueError(
            f"model: expected blocks of a known family ({names}), got none; module types found: {found}. "
            "Name your blocks' branches with register_family, or pass inputs=... to have them looked for."
        )
    with ExitStack() as undo:
        undo.callback(_unpatch, model)
        fused_mlp.install(model, fused)
        for block, family in blocks:
            fused_lora.install(block, fused)
            _patch(block, family)
        if traced is not None:
            prove(model, traced, {block: list(find_gates(block).values()) for block, _ in blocks})
        else:
            _check_named(model, blocks, inputs)
        _patch_checkpointed(model)
        fusing.install(model, fused)
        _check_flops(model)
        patch_head(model, fused_loss)
        if context is not None:
            patch_targets(model, rule)
        handler = DropBPHandler(model, drop_rate, **options)
        vars(model)[_PATCHED_WITH] = {
            "fused": fused,
            "fused_loss": fused_loss,
            "context": context,
            "context_gradient": context_gradient,
            "context_keep": context_keep,
            "shared_context": shared_context,
            "target_windows": target_windows,
            "target_keep": target_keep,
        }
        if handler.granularity != "branch":
            check_batch_first(handler.gates)
            tell_gates_of_batches(model)
        if families is None and (ungated := ungated_blocks(model)):
            _warn_of_ungated(ungated)
        undo.pop_all()
    return handler


def patched_with(model: nn.Module) -> dict[str, Any] | None:
    """The options with which `apply_dropbp` patched `model` or what it wraps; None where it did not."""
    return next((vars(module)[_PATCHED_WITH] for module in model.modules() if _PATCHED_WITH in vars(module)), None)


def check_options(options: Iterable[str], *functions: Callable[..., Any]) -> None:
    """Raise TypeError for the first of `options` that none of these functions takes, with the name most like it."""
    known = {name for function in functions for name in inspect.signature(function).parameters}
    for name in options:
        if name not in known - {"model", "options"}:
            likely = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {likely[0]}?" if likely else f", which are {', '.join(sorted(known))}"
            raise TypeError(f"{name}: expected an option of apply_dropbp or DropBPHandler{hint}")


def _warn_of_ungated(blocks: list[tuple[str, nn.Module]]) -> None:
    by_class: dict[str, list[str]] = {}
    for name, block in blocks:
        by_class.setdefault(type(block).__name__, []).append(name)
    kinds = [
        f"{kind} ({names[0]}{f' and {len(names) - 1} more' * (len(names) > 1)})" for kind, names in by_class.items()
    ]
    warnings.warn(
        f"model: only part of its blocks is of a known family; left ungated, with their full backward: "
        f"{', '.join(kinds)}. Name their branches with register_family, or say that this is meant with families=...",
        UserWarning,
        stacklevel=3,
    )


def remove_dropbp(model: nn.Module) -> None:
    """Undo `apply_dropbp`: classes, forwards and submodules are again what they were.

    Errors: ValueError when the model was not patched, TypeError for what is no module.
    """
    check_model(model)
    if not _unpatch(model):
        raise ValueError("model: expected one patched by apply_dropbp, got one without patched blocks")


def _known(families: Iterable[str | Family] | None) -> list[Family]:
    if families is None:
        return list(FAMILIES.values())
    known = []
    for family in families:
        entry = FAMILIES.get(family) if isinstance(family, str) else family
        if not isinstance(entry, Family):
            raise ValueError(f"families: expected names among {', '.join(FAMILIES)} or Family entries, got {family!r}")
        known.append(entry)
    return known


def _find_blocks(model: nn.Module, families: list[Family]) -> list[tuple[nn.Module, Family]]:
    return [
        (module, family)
        for module in model.modules()
        if (family := next((family for family in families if family.fits(module)), None)) is not None
    ]


def _patch(block: nn.Module, family: Family) -> None:
    forward = family.forward_of(block)
    gates = {f"gate_{branch}": gate for branch, gate in family.gates(block).items()}
    vars(block)["_dropbp_gate_names"] = tuple(gates)
    for name, gate in gates.items():
        block.add_module(name, gate)
        gate.records = recorded_outputs
    for gate in gates.values():
        gate.refresh()
    if forward is not None:
        swap(block, _class_with, forward)


def _check_named(model: nn.Module, blocks: list[tuple[nn.Module, Family]], inputs: dict[str, Any] | None) -> None:
    """Check the branches that somebody registered, where weights have values and it is known what the model takes."""
    named = [block for block, family in blocks if not any(family is shipped for shipped in SHIPPED)]
    given = inputs or example_inputs(model)
    if named and given is not None and not any(parameter.is_meta for parameter in model.parameters()):
        check_streams(model, given, {block: list(find_gates(block).values()) for block in named}, is_guess=not inputs)


def _patch_checkpointed(model: nn.Module) -> None:
    """Let the layers that transformers may checkpoint, and that hold gates, ask the plan first; and other blocks that
    are given a cache keep it from what is computed again.
    """
    if "transformers" not in sys.modules:
        return
    from transformers.modeling_layers import GradientCheckpointingLayer

    for module in model.modules():
        may_be_checkpointed = isinstance(module, GradientCheckpointingLayer) and find_gates(module)
        is_block = "_dropbp_gate_names" in vars(module) and takes_cache(module)
        if (may_be_checkpointed or is_block) and not is_swapped(module):
            swap(module, _class_with, None)


@functools.cache
def _class_with(original: Any, forward: Callable[..., Any] | None) -> Any:
    """`original` as a layer that transformers may checkpoint by the plan; forward: None for its own."""
    return subclass(
        original,
        (_class_with, forward),
        forward=without_cache(forward or original.forward, list(inspect.signature(original.forward).parameters)[1:]),
        _gradient_checkpointing_func=CheckpointByPlan(),
    )


def _unpatch(model: nn.Module) -> bool:
    """Undo `_patch` wherever it was done; whether there was anything to undo."""
    unpatch_targets(model)  # first: it was put on last
    unpatch_head(model)
    blocks = [module for module in model.modules() if "_dropbp_gate_names" in vars(module)]
    for block in blocks:
        for name in vars(block).pop("_dropbp_gate_names"):
            gate = getattr(block, name)
            if isinstance(gate, ModuleGate):
                gate.release()
            delattr(block, name)
    fusing.uninstall(model)
    stop_telling(model)
    for module in model.modules():
        vars(module).pop(_PATCHED_WITH, None)
    for module in filter(is_swapped, model.modules()):
        swap_back(module)
    fused_mlp.uninstall(model)  # last: these were put on first
    fused_lora.uninstall(model)
    return bool(blocks)


def _check_flops(model: nn.Module) -> None:
    """Let all branches count alike when the FLOPs of one cannot be told from its modules, and say so."""
    gates = find_gates(model)
    for name, gate in gates.items():
        try:
            if gate.flops is not None:
                gate.flops(1, 1)
        except TypeError as error:
            warnings.warn(f"{name}: FLOPs unknown ({error}); all branches count as equally expensive", stacklevel=3)
            break
    else:
        return
    for gate in gates.values():
        gate.flops = None
