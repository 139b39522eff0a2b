"""What gates have to be told of a batch where a plan differs from row to row: that it begins, how many samples it has,
and what is padding.

A gate sees the residual stream alone. The modules above the blocks (the model, its decoder) see the inputs: a hook in
front of each tells the gates below it. The innermost speaks last, so an encoder and a decoder each tell their own.
"""

import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn

from ..layer import DropBP
from ..row_plan import RowsOfBranch

_HANDLE = "_dropbp_batch_handle"
_GATES = "_dropbp_gates_below"


def check_batch_first(gates: dict[str, DropBP]) -> None:
    """Errors: ValueError for a branch whose attention takes the sequence first: steps would be taken for samples."""
    for name, gate in gates.items():
        for module in gate.modules_of_branch:
            if isinstance(module, nn.MultiheadAttention) and not module.batch_first:
                raise ValueError(
                    f"granularity: expected a stream of (batch, seq, ...) for a plan by rows, but {name} has an "
                    'nn.MultiheadAttention of (seq, batch, ...); build it with batch_first=True or use "branch"'
                )


def tell_gates_of_batches(model: nn.Module) -> None:
    """Let every module above the patched blocks of `model` tell the gates below it of its batch."""
    blocks = {id(below) for module in model.modules() if _is_block(module) for below in module.modules()}
    for module in model.modules():
        if id(module) in blocks:
            continue
        gates = tuple(below for below in module.modules() if isinstance(below, DropBP))
        if gates and not isinstance(module, nn.ModuleList):
            vars(module)[_GATES] = gates  # in a tuple, so that nn.Module does not register them
            hook = _tell_anew if module is model else _tell
            vars(module)[_HANDLE] = module.register_forward_pre_hook(hook, with_kwargs=True)


def stop_telling(model: nn.Module) -> None:
    """Undo `tell_gates_of_batches`."""
    for module in model.modules():
        if (handle := vars(module).pop(_HANDLE, None)) is not None:
            handle.remove()
            del vars(module)[_GATES]


def recorded_outputs() -> dict[str, list[Any]]:
    """Where transformers keeps, during a forward, what routers or attentions of all layers return; empty where nowhere.

    An auxiliary loss reads its router logits layer by layer, in the order of the attention mask.
    """
    capturing = sys.modules.get("transformers.utils.output_capturing")
    collector = getattr(capturing, "_active_collector", None)
    found = collector.get() if collector is not None else None
    return {name: values for name, values in (found or {}).items() if isinstance(values, list)}


def _is_block(module: nn.Module) -> bool:
    return "_dropbp_gate_names" in vars(module)


def _tell_anew(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """As `_tell`, for the outermost module: what the batch before left is forgotten."""
    for gate in vars(module)[_GATES]:
        gate.num_samples, gate.is_real = 0, None
    _tell(module, args, kwargs)


def _tell(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    names = list(inspect.signature(module.forward).parameters)
    inputs = {**dict(zip(names, args, strict=False)), **kwargs}
    first = next((value for value in inputs.values() if isinstance(value, Tensor) and value.dim() > 1), None)
    for gate in vars(module)[_GATES]:
        if first is not None:
            gate.num_samples = first.shape[0]
        if torch.is_grad_enabled() and isinstance(gate.kept, RowsOfBranch):
            gate.kept.expect_batch()
    if "attention_mask" not in names and "attention_mask" not in inputs:
        return
    mask = inputs.get("attention_mask")
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        return  # made of one by a module above, for attention
    is_real = None if mask is None else mask != 0
    for gate in vars(module)[_GATES]:
        gate.is_real = is_real
