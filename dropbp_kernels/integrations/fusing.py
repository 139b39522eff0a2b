"""Pre-norm blocks whose residual adds are fused with the norms that follow them, across blocks too.

As in `dropbp_kernels.blocks`, a branch's output is not added to the residual at once: it stays pending until the next
norm reads the sum, and there one kernel adds and normalises (`ops.gated_residual_rms_norm` or its twin for LayerNorm).
Inside a block that is decided branch by branch, by what the norm is. From block to block, and to the final norm, a
`Pending` is handed on in place of the hidden states, and that is decided before the model runs: only when transformers'
own loop over the blocks will be the one to pass it, and nobody watches (hooks, recorded hidden states, wrappers) or
checkpoints. Otherwise every block adds as written and returns hidden states. A block that is called by hand always
returns hidden states.

Under torch.compile nothing is fused here: the compiler fuses the plain add and norm itself. Under checkpointing nothing
is either, so that a value does not depend on what is checkpointed.
"""

import functools
import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .. import _backend
from ..blocks import Stream
from ..layer import DropBP
from ..ops.gated_residual_layer_norm import gated_residual_layer_norm
from ..ops.gated_residual_rms_norm import gated_residual_rms_norm
from ..ops.permuted_norm import permuted_layer_norm, permuted_rms_norm
from ..plain_linear import is_watched
from ..row_plan import Rows
from .same_code import is_same_code
from .swapping import subclass, swap

FUSED = (True, False, "auto")
# liger-kernel's norms tell by their settings: (offset, casting_mode).
_LIGER_CASTINGS = {(0.0, "llama"): "llama", (1.0, "gemma"): "gemma"}
_LAYER_NORM = "layer_norm"  # stands for nn.LayerNorm among the castings
# Where models have their blocks and the norm behind the last one.
_BLOCKS_AND_NORMS = (
    *(("layers", name) for name in ("norm", "final_layer_norm", "final_layernorm", "layer_norm", "layernorm")),
    ("h", "ln_f"),
)
_HANDS_ON = "dropbp_hands_on"  # keyword that travels from the model's forward to its blocks


class Pending:
    """A residual and a branch's output still to be added, passed on so that no frame on the way keeps them alive."""

    __slots__ = ("_stream",)

    def __init__(self, stream: Stream) -> None:
        self._stream: Stream | None = stream

    @property
    def device(self) -> torch.device:
        """Where the tensors are; RuntimeError when they were taken."""
        return self._held().residual.device

    def take(self) -> Stream:
        """Hand the tensors out and forget them; RuntimeError when they were taken already."""
        stream = self._held()
        self._stream = None
        return stream

    def _held(self) -> Stream:
        if self._stream is None:
            raise RuntimeError("a block's pending output was taken twice; call the model, or its blocks one by one")
        return self._stream

    def put(self, stream: Stream) -> None:
        """Hold the tensors from now on."""
        self._stream = stream


@dataclass(frozen=True)
class _Branch:
    """One branch of a block by the names of its gate, its pre-norm and its other modules, first to last.

    A number among the modules is the probability of a dropout. takes_arguments: whether the first module is given what
    else the block is given. scale: the block's attribute that the branch is multiplied with.
    """

    gate: str
    norm: str
    modules: tuple[str, ...]
    takes_arguments: bool
    scale: str | None

    def run(self, block: nn.Module, kwargs: Any, x: Tensor) -> Tensor:
        """What the branch makes of the normalised residual x."""
        first, *others = (getattr(block, name) for name in self.modules)
        # By name, as nearly all blocks do: wrappers (PEFT's AdaptedAttention) and hooks may count on it.
        output = first(hidden_states=x, **kwargs) if self.takes_arguments else first(x)
        output = output[0] if isinstance(output, tuple) else output
        for part in others:
            is_module = callable(part)
            output = part(output) if is_module else nn.functional.dropout(output, part, block.training)
        return output * getattr(block, self.scale) if self.scale else output

    def extend(self, block: nn.Module, pending: Pending, kwargs: Any, is_fused: bool) -> None:
        """Add what is pending and run the branch on it; then the branch's output is pending."""
        gate, norm = getattr(block, self.gate), getattr(block, self.norm)
        stream = pending.take()
        if torch.is_grad_enabled() and not isinstance(gate.kept, bool):
            pending.put(Stream(self.add_by_rows(block, gate, stream.added(), norm, kwargs)))
            return
        run = functools.partial(self.run, block, kwargs)
        casting = _casting(norm, stream) if is_fused else None
        if casting is None:
            residual = stream.added()
            del stream
            output = gate.run(residual, lambda x: run(norm(x)))
        else:
            normed, residual = _add_and_normalise(stream, norm, casting, gate.records_graph)
            del stream
            output = gate.run(normed, run)
        pending.put(Stream(residual, output, gate.grad_scale))

    def add_by_rows(self, block: nn.Module, gate: DropBP, residual: Tensor, norm: Any, kwargs: Any) -> Tensor:
        """The residual and the branch, under a plan that differs from row to row: the add is the gate's."""

        def run(rows: Tensor, **kwargs: Any) -> Tensor:
            return self.run(block, kwargs, rows)

        if not self.takes_arguments:
            kwargs = {}
        split = gate.split(residual)
        casting = None if split is None or gate.checkpoint is not None else _permuted_casting(norm, residual)
        if split is None or casting is None:
            return gate.residual_add(residual, lambda rows, **kwargs: run(norm(rows), **kwargs), **kwargs)
        rows = _normalise_rows(residual, norm, casting, split.rows)
        return gate.add_rows(split, rows, run, **kwargs)


# A class rather than a closure, so that a patched model can be pickled.
@dataclass(frozen=True)
class PreNormForward:
    """The forward of a block that adds its branches to the residual one after the other, each through its gate.

    clamps_half: whether the block keeps a float16 result finite (Whisper); then it is added here.
    """

    branches: tuple[_Branch, ...]
    clamps_half: bool = False

    def __call__(self, block: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        hands_on = kwargs.pop(_HANDS_ON, False)
        # By name, since a block and its attention may take the same in another order.
        kwargs.update(zip(block._dropbp_arguments, args, strict=False))
        if kwargs.get("encoder_hidden_states") is not None:
            raise ValueError(f"encoder_hidden_states: {type(block).__name__} has no cross-attention that reads them")
        is_fused = _is_fused(block, hidden_states.device)
        pending = hidden_states if isinstance(hidden_states, Pending) else Pending(Stream(hidden_states))
        for branch in self.branches:
            branch.extend(block, pending, kwargs, is_fused)
        stream = pending.take()
        is_clamped = self.clamps_half and stream.residual.dtype is torch.float16
        # transformers records hidden states by hooks, which it installs after the decision to hand on.
        if hands_on and not block._forward_hooks and not is_clamped:
            return Pending(stream)
        hidden_states = stream.added()
        if not is_clamped:
            return hidden_states
        limit = torch.finfo(torch.float16).max - 1000
        return hidden_states.clamp(-limit, limit)


def pre_norm_forward(
    chains: Mapping[str, Sequence[str]], scale: str | None = None, clamps_half: bool = False
) -> PreNormForward:
    """The forward of a block that adds attention(norm(x)), then mlp(norm(x)).

    chains: by branch, in their order, the names of its modules, the pre-norm first, and of what else runs between them:
    an activation, or a number, the probability of a dropout. scale: the block's attribute that multiplies what is
    added. clamps_half: as in `PreNormForward`.
    """
    branches = tuple(
        _Branch(f"gate_{name}", norm, tuple(modules), name == "attention", scale)
        for name, (norm, *modules) in chains.items()
    )
    return PreNormForward(branches, clamps_half)


def _final_norm_forward(self: Any, hidden_states: Any) -> Tensor:
    """The forward of a model's final norm, which may be handed what is still to be added."""
    if not isinstance(hidden_states, Pending):
        return type(self)._dropbp_original.forward(self, hidden_states)
    stream = hidden_states.take()
    casting = _casting(self, stream)
    if casting is None:  # of another dtype than what it reads
        return type(self)._dropbp_original.forward(self, stream.added())
    return _add_and_normalise(stream, self, casting, True)[0]


# ---- inside a block


def _add_and_normalise(stream: Stream, norm: Any, casting: str, next_kept: bool) -> tuple[Tensor, Tensor]:
    assert stream.branch is not None  # or `_casting` had found none
    options: dict[str, Any] = {"eps": _eps(norm), "next_kept": next_kept, "grad_scale": stream.grad_scale}
    if casting == _LAYER_NORM:
        return gated_residual_layer_norm(stream.residual, stream.branch, norm.weight, norm.bias, **options)
    return gated_residual_rms_norm(stream.residual, stream.branch, norm.weight, casting=casting, **options)


def _normalise_rows(residual: Tensor, norm: Any, casting: str, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    where = rows.permutation, rows.num_kept
    if casting == _LAYER_NORM:
        return permuted_layer_norm(residual, norm.weight, norm.bias, *where, eps=_eps(norm))
    return permuted_rms_norm(residual, norm.weight, *where, eps=_eps(norm), casting=casting)


def _is_fused(block: Any, device: torch.device) -> bool:
    """Whether the block's adds wait for the norms behind them, where those allow it."""
    setting = block._dropbp_fused
    if setting is False or torch.compiler.is_compiling() or _is_checkpointed(block):
        return False
    return setting is True or has_kernel(device.type)


def _is_checkpointed(block: Any) -> bool:
    by_transformers = getattr(block, "gradient_checkpointing", False) and block.training
    return by_transformers or block.gate_mlp.checkpoint is not None


@functools.cache
def has_kernel(device_type: str, op: str = "gated_residual_rms_norm") -> bool:
    """Whether something faster than plain PyTorch serves the op: the measured default."""
    return _backend.serving(op, device_type) != "reference"


def _casting(norm: Any, stream: Stream) -> str | None:
    """How to compute `norm` of what is pending in `stream` in one kernel; None: not at all."""
    dtype = stream.residual.dtype
    if stream.branch is None or stream.branch.dtype is not dtype:
        return None
    casting = _known_casting(norm)
    return casting if casting is not None and norm.weight.dtype is dtype else None


def _permuted_casting(norm: Any, residual: Tensor) -> str | None:
    """How to compute `norm` of rows that are read through a permutation in one kernel; None: by the norm itself.

    Whatever `fused` says: under a plan by rows values equal those of the unpatched model to rounding alone. Not in
    float64, of which RMSNorms take statistics in float32.
    """
    if residual.dtype is torch.float64:
        return None
    if torch.compiler.is_compiling() or not has_kernel(residual.device.type, "permuted_norm"):
        return None
    casting = _known_casting(norm)
    return casting if casting is not None and norm.weight.dtype is residual.dtype else None


def _known_casting(norm: Any) -> str | None:
    """How `norm` casts when it is known, of weight and statistics alone, and nobody watches it; else None."""
    if is_watched(norm):
        return None
    name, forward = type(norm).__name__, vars(norm).get("forward")
    if name.startswith("LigerRMSNorm") or getattr(forward, "__qualname__", "") == "LigerRMSNorm.forward":
        return _LIGER_CASTINGS.get((norm.offset, norm.casting_mode)) if norm.weight is not None else None
    if isinstance(norm, nn.LayerNorm):
        is_plain = type(norm).forward in (nn.LayerNorm.forward, _final_norm_forward) and norm.weight is not None
        return _LAYER_NORM if is_plain and forward is None and len(norm.normalized_shape) == 1 else None
    if forward is not None or "transformers" not in sys.modules:
        return None
    found: Any = type(norm)
    return _casting_of(getattr(found, "_dropbp_original", found))


@functools.cache
def _casting_of(norm: Any) -> str | None:
    """How an RMSNorm of this class casts: "llama" rounds before the product with the weight, "gemma" scales by
    1 + weight. None where its forward is neither Llama's nor Gemma's.
    """
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    if is_same_code(norm.forward, LlamaRMSNorm.forward):
        return "llama"
    is_gemma = is_same_code(norm.forward, GemmaRMSNorm.forward)
    return "gemma" if is_gemma and is_same_code(norm._norm, GemmaRMSNorm._norm) else None


def _eps(norm: Any) -> float:
    return norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps


# ---- from block to block


def install(model: nn.Module, fused: bool | str) -> None:
    """Tell the patched blocks of `model` whether to fuse; let their models hand on from block to block.

    A model is one that is named like its blocks, in the module where they are: its forward is known then.
    """
    for block in model.modules():
        block_class: Any = type(block)
        if isinstance(inspect.unwrap(block_class.forward), PreNormForward):
            _, _, *arguments = inspect.signature(block_class._dropbp_original.forward).parameters
            vars(block).update(_dropbp_fused=fused, _dropbp_arguments=tuple(arguments))
    backbones: list[Any] = [module for module in model.modules() if fused is not False and _is_backbone(module)]
    for backbone in backbones:
        vars(backbone)["_dropbp_handle"] = backbone.register_forward_pre_hook(_hand_on, with_kwargs=True)
        norm = _blocks_and_norm(backbone)[1]
        if not hasattr(type(norm), "_dropbp_original"):
            swap(norm, _final_norm_class)


def uninstall(model: nn.Module) -> None:
    """Undo `install`, but for the class of the final norm, which is given back with those of all patched modules."""
    for module in model.modules():
        for name in ("_dropbp_fused", "_dropbp_arguments"):
            vars(module).pop(name, None)
        if (handle := vars(module).pop("_dropbp_handle", None)) is not None:
            handle.remove()


@functools.cache
def _final_norm_class(original: Any) -> Any:
    return subclass(original, (_final_norm_class,), forward=_final_norm_forward, _dropbp_is_final_norm=True)


def _blocks_and_norm(module: Any) -> tuple[Any, Any]:
    """A model's blocks and the norm behind them; (None, None) where they are not to be found."""
    pairs = ((getattr(module, blocks, None), getattr(module, norm, None)) for blocks, norm in _BLOCKS_AND_NORMS)
    return next(
        (pair for pair in pairs if isinstance(pair[0], nn.ModuleList) and isinstance(pair[1], nn.Module)), (None, None)
    )


def _is_backbone(module: Any) -> bool:
    blocks, norm = _blocks_and_norm(module)
    if not blocks or not all("_dropbp_fused" in vars(block) for block in blocks) or _known_casting(norm) is None:
        return False
    block = type(blocks[0])
    layers = block.__name__.removesuffix("Layer")  # Whisper's encoder of encoder layers, OPT's decoder
    name = layers.removesuffix("Decoder").removesuffix("Block")
    takes_keywords = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(type(module).forward).parameters.values())
    is_named_alike = type(module).__name__ in (f"{name}Model", f"{name}TextModel", layers)
    return takes_keywords and is_named_alike and type(module).__module__ == block.__module__


def _hand_on(backbone: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """Forward pre-hook of a model: decides whether its blocks hand on what is pending in this call."""
    blocks, norm = _blocks_and_norm(backbone)
    if torch.compiler.is_compiling() or _has_any_global_hook() or not hasattr(type(norm), "_dropbp_is_final_norm"):
        return None
    if "forward" in vars(norm) or _known_casting(norm) is None:
        return None
    device: Any = norm.weight.device
    for block in blocks:
        # What wraps or replaces a block (FSDP, accelerate's device map) would be passed something unknown to it; and
        # one that is compiled by itself would be compiled for it as well, and fuses nothing.
        is_ours = "_dropbp_fused" in vars(block) and not ("forward" in vars(block) or is_watched(block))
        if not is_ours or block._compiled_call_impl is not None or not _is_fused(block, device):
            return None
    return args, {**kwargs, _HANDS_ON: True}
