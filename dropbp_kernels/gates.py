"""The gates of a model, seen together: which there are, what their branches cost, whether they were called."""

import warnings
from collections.abc import Iterable
from typing import Any

from torch import nn

from .layer import DropBP

# Sequence length at which FLOPs are compared before the first training call has shown the real one.
DEFAULT_SEQ_LEN = 512
# FLOPs of every branch when gates do not know theirs: all alike, and large, since the published allocation truncates.
UNKNOWN_FLOPS = 1e9


def check_model(model: object) -> None:
    """Errors: TypeError for what is no module; ValueError for one that runs as replicas, whose gates nobody tells."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, nn.DataParallel):
        raise ValueError(
            "model: expected one that runs itself, got DataParallel, which runs replicas; use DistributedDataParallel"
        )


def find_gates(model: nn.Module) -> dict[str, DropBP]:
    """The gates of `model` by module name, in model order; a gate that several blocks share appears once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, DropBP)}


def flops_of(gates: dict[str, DropBP], shape: tuple[int, int] | None = None) -> list[float]:
    """Forward FLOPs of each branch for a (batch_size, seq_len); None: those that it last saw (before that 1 x 512).

    All alike when no gate knows its FLOPs. Errors: ValueError when only some do; the message names one that lacks.
    """
    unknown = [name for name, gate in gates.items() if gate.flops is None]
    if len(unknown) == len(gates):
        return [UNKNOWN_FLOPS] * len(unknown)
    if unknown:
        raise ValueError(
            f"gates: expected all {len(gates)} with flops or all without, but {len(unknown)} lack them ({unknown[0]})"
        )
    return [
        float(gate.flops(*(shape or (gate.batch_size or 1, gate.seq_len or DEFAULT_SEQ_LEN))))
        for gate in gates.values()
        if gate.flops is not None
    ]


def check_called(gates: dict[str, DropBP]) -> None:
    """Errors: RuntimeError when a gate was not called with gradients enabled since the last plan."""
    missed = [name for name, gate in gates.items() if not gate.was_called]
    if missed:
        shown = ", ".join(missed[:4]) + (", ..." if len(missed) > 4 else "")
        hint = "Run the patched model's forward between two steps, or pass strict=False."
        if len(missed) < len(gates):
            hint = "Pass strict=False if the model leaves them out of some steps (layerdrop, a batch without images)."
        raise RuntimeError(
            f"step: {len(missed)} of {len(gates)} gates were not called with gradients enabled since the last "
            f"step ({shown}). {hint}"
        )


def check_engine(model: nn.Module, kept: Iterable[object]) -> None:
    """Errors: RuntimeError unless a plan for a model that DeepSpeed's ZeRO-3 trains keeps every branch whole.

    It keeps gradients in buffers that only the next ones overwrite: a parameter without one is moved by an old one. A
    plan by rows may leave a branch without a gradient, too.
    """
    trained = next((parameter for parameter in model.parameters() if parameter.requires_grad), None)
    if hasattr(trained, "ds_id") and any(entry is not True for entry in kept):
        raise RuntimeError(
            "plan: expected a gradient for every parameter under DeepSpeed's ZeRO-3, which moves one without by the "
            "gradient of an earlier step, got a plan that drops branches or rows; use ZeRO-2 or FSDP2"
        )


class UnsteppedCalls:
    """Warns, once, of a training loop that forgot `handler.step`, or left it outside of the loop.

    Known by weights that an optimizer changed between two training calls under one plan: micro-batches, recomputes and
    evaluations change none. An optimizer that writes past PyTorch's version counters is not seen.

    block: the module around the gate; its trainable parameters stand for all.
    """

    def __init__(self, block: nn.Module):
        self.block = block
        self.has_warned = False
        self._versions: dict[int, int] = {}  # of each parameter that was trainable at the last call, by id

    def __getstate__(self) -> dict[str, Any]:
        """For a copy, whose parameters are others with counters of their own."""
        return {**vars(self), "_versions": {}}

    def note_call(self) -> None:
        if self.has_warned:
            return
        # One by one: disabling an adapter leaves fewer that are trainable, and changes none.
        before = self._versions
        self._versions = {id(each): each._version for each in self.block.parameters() if each.requires_grad}
        if any(before.get(key, version) != version for key, version in self._versions.items()):
            self.has_warned = True
            warnings.warn(
                "step: expected handler.step() before the forward of each optimizer step, but weights changed between "
                "two forwards without it; the plan stays what it was (before the first step: nothing is dropped). In "
                "a Trainer use DropBPCallback; LBFGS and SAM, which run several forwards a step, may ignore this",
                UserWarning,
                stacklevel=2,
            )


def look_out_for_steps(model: nn.Module, gates: dict[str, DropBP]) -> None:
    """Let `UnsteppedCalls` look at the first gate whose block has something to train."""
    ours = set(gates.values())
    for block in model.modules():  # not by the gates' names: blocks may have left since, to other pipeline stages
        gate = next((child for child in block.children() if child in ours), None)
        if isinstance(gate, DropBP) and any(parameter.requires_grad for parameter in block.parameters()):
            gate.unstepped = UnsteppedCalls(block)
            return
