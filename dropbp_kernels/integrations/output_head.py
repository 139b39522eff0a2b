"""The output head of a model whose loss is taken without its logits: which heads can defer them, and for how long.

Whatever module holds the head gets a subclass of its own class too, by which a head that is put in its place
(`resize_token_embeddings`, `set_output_embeddings`, an assignment) defers as the old one did.
"""

import functools
import importlib.util
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..choices import check_choice
from ..plain_linear import is_whole
from .fused_loss import deferring_forward
from .swapping import is_swapped, subclass, swap, swap_back

_OWNER = "_dropbp_original_owner"  # of its own: target plans may make a class of the one that is made here
KINDS = ("auto", "off", "chunked", "torch", "liger")


def check_fused_loss(kind: str) -> None:
    """Raise ValueError for an unknown kind, RuntimeError for one that is not installed."""
    check_choice("fused_loss", kind, KINDS)
    if kind == "torch" and not hasattr(F, "linear_cross_entropy"):
        raise RuntimeError(f"fused_loss: 'torch' needs torch >= 2.13, this is {torch.__version__}; use 'chunked'")
    if kind == "liger" and importlib.util.find_spec("liger_kernel") is None:
        raise RuntimeError("fused_loss: 'liger' needs liger-kernel, which is not installed; use 'chunked'")


def patch_head(model: nn.Module, kind: str) -> bool:
    """Let the output head of `model` defer its logits in training; return whether it does.

    "auto" leaves models alone whose head is not a plain nn.Linear with whole weights: quantised, adapted by PEFT,
    sharded, offloaded. Errors: those of `check_fused_loss`; ValueError for such a head with any other kind but "off".
    """
    check_fused_loss(kind)
    if kind == "off":
        return False
    find_head = getattr(model, "get_output_embeddings", None)
    head: Any = find_head() if callable(find_head) else None
    reason = _why_not(head)
    if reason is None:
        for owner in list(model.modules()):
            for name, child in owner.named_children():
                if child is head:
                    swap(owner, _owner_class, name, kind)
        swap(head, _head_class, kind)
    elif kind != "auto":
        raise ValueError(f"fused_loss: expected a model with a plain nn.Linear as its head for {kind!r}, got {reason}")
    return reason is None


def unpatch_head(model: nn.Module) -> None:
    """Undo `patch_head`; nothing happens where there is nothing to undo."""
    for module in model.modules():
        if _defers(module):
            swap_back(module)
        if is_swapped(module, _OWNER):
            swap_back(module, _OWNER)


@functools.cache
def _head_class(original: Any, kind: str) -> Any:
    return subclass(original, (_head_class, kind), forward=deferring_forward, _dropbp_head=kind)


@functools.cache
def _owner_class(original: Any, head: str, kind: str) -> Any:
    def __setattr__(self: Any, name: str, value: Any) -> None:
        old = self._modules.get(head)
        original.__setattr__(self, name, value)
        if name == head and value is not old and isinstance(value, nn.Module):
            _succeed(old, value, kind)

    return subclass(original, (_owner_class, head, kind), _OWNER, __setattr__=__setattr__)


def _succeed(old: nn.Module | None, new: nn.Module, kind: str) -> None:
    """Let a new head defer its logits; warn of one that cannot, unless "auto" left that open."""
    if old is not None and _defers(old) and old not in new.modules():
        swap_back(old)
    reason = _why_not(new)
    if reason is None:
        swap(new, _head_class, kind)
    elif kind != "auto" and not _defers(new) and not hasattr(new, "modules_to_save"):  # PEFT's copies of a head defer
        warnings.warn(
            f"fused_loss: expected a plain nn.Linear in place of the head for {kind!r}, got {reason}; its logits are "
            "computed as a whole from now on",
            UserWarning,
            stacklevel=4,
        )


def _defers(module: nn.Module) -> bool:
    return hasattr(type(module), "_dropbp_head")


def _why_not(head: nn.Module | None) -> str | None:
    if head is None:
        return "none"
    if _defers(head):
        return "one that is patched already"
    if type(head) is not nn.Linear:
        return type(head).__name__
    if hasattr(head, "_hf_hook"):
        return "one that accelerate moves between devices"
    return None if is_whole(head.weight) else f"a sharded weight ({type(head.weight).__name__})"
