"""Gradient checkpointing of a patched transformers block: a dropped branch is never computed again.

transformers checkpoints whole blocks: it keeps a block's input and runs the block again in the backward. By its plan:

==================  ===================================================================================================
branches            what happens
==================  ===================================================================================================
all dropped         the block just runs: it saves nothing that could be computed again
some kept           each kept branch is checkpointed by itself, with the function that transformers was told to use;
                    where a branch is several sublayers with the block's code between them (Bloom), the block is
                    checkpointed as usual, and its dropped branches are run again as inference
all kept            the block is checkpointed as usual (in a compiled model branch by branch)
==================  ===================================================================================================

A fully kept block stays whole because it then keeps one tensor of the residual stream instead of two, so that drop rate
0 needs exactly the memory it needs without this package. At high rates such blocks are rare ((1 - rate)**2 of all) and
checkpointing by branch is better, since only one branch at a time is computed again: ``apply_dropbp(...,
checkpoint="kept")`` does that for every kept branch, with or without transformers' switch.

What is computed again follows the plan of its forward, also when the next plan has been drawn by then.
"""

import functools
import inspect
import itertools
import operator
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..layer import DropBP

_FUNCTION = "_gradient_checkpointing_func"
_CACHES = {"past_key_values", "layer_past"}  # names under which blocks are given their key/value cache


class CheckpointByPlan:
    """The attribute of a patched block where transformers puts its checkpointing function and looks for it.

    What was put stays in the instance, where remove_dropbp leaves it; what is found asks the plan first.
    """

    def __get__(self, block: nn.Module | None, owner: type) -> Any:
        if block is None:
            return self
        if _FUNCTION not in vars(block):
            raise AttributeError(_FUNCTION)  # nn.Module says it in full
        return functools.partial(_checkpoint_block, block, vars(block)[_FUNCTION])

    def __set__(self, block: nn.Module, function: Callable[..., Any]) -> None:
        vars(block)[_FUNCTION] = function


def _checkpoint_block(block: nn.Module, function: Callable[..., Any], run: Callable[..., Any], *args: Any) -> Any:
    """Run the block's forward `run`, checkpointed by `function` as far as its branches are kept."""
    gates = [module for module in block.modules() if isinstance(module, DropBP)]
    recorded = [gate for gate in gates if gate.records_graph]
    if not recorded or any(gate.checkpoint is not None for gate in gates):
        return run(*args)
    may_be_reentrant = _may_be_reentrant(function)
    if may_be_reentrant:
        _warn_of_reentrant()
    # torch.compile refuses the notes that gates take inside of what is checkpointed; by branch they stay outside.
    is_whole = all(gate.kept is True for gate in recorded) and len(recorded) == len(gates)
    is_whole &= not torch.compiler.is_compiling()
    is_whole |= not all(gate.is_checkpointable for gate in recorded)
    if may_be_reentrant or is_whole:
        return function(_with_this_plan(gates, run), *args)
    with _checkpointed(recorded, function):
        return run(*args)


def _may_be_reentrant(function: Callable[..., Any]) -> bool:
    return getattr(function, "keywords", {}).get("use_reentrant") is not False


def is_reentrant(modules: Iterable[nn.Module]) -> bool:
    """Whether transformers checkpoints one of `modules` by reentrant checkpointing, or by a kind that is unknown."""
    return any(
        getattr(module, "gradient_checkpointing", False) and _may_be_reentrant(vars(module)[_FUNCTION])
        for module in modules
        if _FUNCTION in vars(module)
    )


@contextmanager
def _checkpointed(gates: list[DropBP], function: Callable[..., Any]) -> Iterator[None]:
    for gate in gates:
        gate.checkpoint = function
    try:
        yield
    finally:
        for gate in gates:
            gate.checkpoint = None


def _with_this_plan(gates: list[DropBP], run: Callable[..., Any]) -> Callable[..., Any]:
    """`run` under the plan of now, whenever it is called. Only a recompute can meet another plan, and puts it back."""
    plan = _plan_of(gates)

    def run_with_this_plan(*args: Any) -> Any:
        found = _plan_of(gates)
        if all(map(operator.is_, itertools.chain(*found), itertools.chain(*plan))):
            return run(*args)
        _set(gates, plan)
        try:
            return run(*args)
        finally:
            _set(gates, found)

    return run_with_this_plan


def _plan_of(gates: list[DropBP]) -> list[tuple[Any, ...]]:
    """What decides which rows are kept, gate by gate, and how much they count: plan entry, scale, and the batch."""
    return [(gate.kept, gate.grad_scale, gate.num_samples, gate.is_real, gate.stage, gate.real_rows) for gate in gates]


def _set(gates: list[DropBP], plan: list[tuple[Any, ...]]) -> None:
    for gate, entry in zip(gates, plan, strict=True):
        gate.kept, gate.grad_scale, gate.num_samples, gate.is_real, gate.stage, gate.real_rows = entry


@functools.cache  # once a process
def _warn_of_reentrant() -> None:
    warnings.warn(
        "gradient checkpointing: it is reentrant (or of unknown kind), so a block with a kept branch also computes its "
        "dropped branches again, and all of it to the block's end. Gradients are the same. For the whole saving use "
        'gradient_checkpointing_kwargs={"use_reentrant": False}, or apply_dropbp(..., checkpoint="kept").',
        UserWarning,
        stacklevel=2,
    )


def set_checkpointing(model: Any, options: dict[str, Any] | None) -> None:
    """Let transformers checkpoint the blocks of `model` with these options of torch.utils.checkpoint; None: no longer.

    The methods have other names from transformers 5.23 on, which is to drop the old ones in release 6.
    """
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if options is None:
        getattr(model, f"{kind}_checkpointing_disable")()
    else:
        getattr(model, f"{kind}_checkpointing_enable")(options)


def takes_cache(block: nn.Module) -> bool:
    """Whether the forward of `block` has an argument for a key/value cache."""
    return not _CACHES.isdisjoint(inspect.signature(block.forward).parameters)


def without_cache(forward: Callable[..., Any], names: Iterable[str]) -> Callable[..., Any]:
    """`forward` of a block that passes no key/value cache on while it trains with gates that checkpoint or go by rows.

    names: of its arguments, in order; some models (GPT-2) give their blocks the cache by its place.

    A branch that is computed again would append its keys twice, unless the cache `is_recomputable`. transformers takes
    the cache away from the blocks that it checkpoints; this is for apply_dropbp(..., checkpoint="kept"). A branch by
    rows would append those of some samples, and then those of others, unless the cache can be taken apart, as the
    recomputable one can (`stage_keys`).

    Errors of the forward: ValueError for a cache that holds keys already, as that of prefix tuning does.
    """

    places = [place for place, name in enumerate(names) if name in _CACHES]

    @functools.wraps(forward)
    def forward_without_cache(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        caches = [kwargs[name] for name in _CACHES if kwargs.get(name) is not None]
        caches += [args[place] for place in places if place < len(args) and args[place] is not None]
        is_safe = not torch.is_grad_enabled() or all(getattr(cache, "is_recomputable", False) for cache in caches)
        if not is_safe and _leaves_keys_twice(self):
            _check_empty(self, caches)
            args = tuple(None if place in places else argument for place, argument in enumerate(args))
            kwargs.update(dict.fromkeys(_CACHES & kwargs.keys()))
            if "use_cache" in kwargs:
                kwargs["use_cache"] = False
        return forward(self, *args, **kwargs)

    return forward_without_cache


def _check_empty(block: nn.Module, caches: list[Any]) -> None:
    layer = next((vars(module)["layer_idx"] for module in block.modules() if "layer_idx" in vars(module)), 0)
    layers = [getattr(cache, "layers", [])[layer : layer + 1] for cache in caches]
    if any(found and hasattr(found[0], "get_seq_length") and found[0].get_seq_length() for found in layers):
        raise ValueError(
            "past_key_values: expected none, or an empty cache, where branches are checkpointed or keep some rows, got "
            'one that holds keys (prefix tuning?); patch with checkpoint=None and granularity="branch"'
        )


def _leaves_keys_twice(block: nn.Module) -> bool:
    """Whether a branch runs again in the backward, or is called with some rows at a time: neither suits a cache."""
    gates = (gate for gate in block.modules() if isinstance(gate, DropBP))
    return any(not isinstance(gate.kept, bool) or (block.training and gate.checkpoint is not None) for gate in gates)
