"""Gate a branch by its modules: the block's own forward and its residual add stay untouched.

A branch is a chain of child modules (pre-norms, sublayer, post-norms) between the residual stream and the add. When its
gate says dropped, those modules run like inference. What they return is then a constant, and so is everything the
block computes from it (dropout, a constant scale) until the add: the stream alone carries a gradient. So any layout
works: parallel branches, a norm that two branches read (it runs like inference when both are dropped), norms inside the
branch, scaled residuals, cross-attention, experts.

A module is gated by giving the instance a subclass of its own class whose `__call__` asks the gates (`swapping`), so an
instance whose `forward` somebody else replaces (accelerate, liger-kernel) stays gated.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..by_rows import RowSplit
from ..layer import DropBP, as_inference
from ..row_plan import Rows
from . import fused_lora
from .swapping import is_swapped, subclass, swap, swap_back


class ModuleGate(DropBP):
    """The gate of a branch that consists of modules of `block`, in the order in which they run.

    Args:
        block: the module below which the branch's modules live. paths: their names, dotted, first to last; the last
            one's output enters the residual stream (a constant factor or dropout may stand between).
        flops, per_token: as in `DropBP`.

    Modules are gated from the first `refresh` until `release`. One may be replaced meanwhile (PEFT puts an adapter
    around a linear): `refresh`, called with every plan, finds and gates the one that bears the name now.
    """

    def __init__(
        self,
        block: nn.Module,
        paths: Sequence[str],
        flops: Callable[[int, int], float] | None = None,
        *,
        per_token: bool = False,
    ):
        super().__init__(flops, per_token=per_token)
        self.paths = tuple(paths)
        self._block: tuple[nn.Module, ...] = (block,)  # in a tuple, so that nn.Module does not register its own parent

    def refresh(self) -> None:
        """Gate the modules that bear the branch's names now, and release those that bore them before.

        Errors: ValueError, with all as it was, for a module that ends another branch already.
        """
        if not self._block:
            return
        (block,) = self._block
        fused_lora.refresh(block)
        modules = tuple(block.get_submodule(path) for path in self.paths)
        if modules == self.modules_of_branch:
            return
        if vars(modules[-1]).get("_dropbp_last_of", self) is not self:
            raise ValueError(
                f"model: expected a module of its own at the end of every branch, but {self.paths[-1]} of "
                f"{type(block).__name__} ends two; share the whole block, or give each its own"
            )
        self._unbind()
        for module in modules:
            _bind(module, self, is_last=module is modules[-1])
        self.modules_of_branch = modules

    def release(self) -> None:
        """Give the branch's modules their own class back, unless another gate still holds them; gate none again."""
        self._unbind()
        self._block = ()

    def _unbind(self) -> None:
        for module in self.modules_of_branch:
            _unbind(module, self)
        self.modules_of_branch = ()

    @property
    def is_checkpointable(self) -> bool:
        """Whether one module does the work, so that checkpointing each module keeps hardly more than the input."""
        return sum(any(p.dim() > 1 for p in module.parameters()) for module in self.modules_of_branch) < 2

    def pass_output(self, output: Any, *, is_kept: bool) -> Any:
        """What the branch's last module returned, as the stream shall see it: scaled when kept, constant when not."""
        if is_kept:
            output = self.shown(output)
        if is_kept and self.grad_scale == 1.0:
            return output
        return tree_map_only(Tensor, self._scale if is_kept else Tensor.detach, output)

    def _scale(self, output: Tensor) -> Tensor:
        if output.requires_grad:
            # A hook and not an autograd.Function, whose result no block could add to in place (Falcon does).
            output.register_hook(functools.partial(_times, self.grad_scale))
        return output


def _times(factor: float, grad: Tensor) -> Tensor:
    return grad * factor


def _bind(module: nn.Module, gate: ModuleGate, *, is_last: bool) -> None:
    state = vars(module)
    state["_dropbp_gates"] = (*state.get("_dropbp_gates", ()), gate)
    if is_last:
        state["_dropbp_last_of"] = gate
    if not is_swapped(module):
        swap(module, _gated_class)


def _unbind(module: nn.Module, gate: ModuleGate) -> None:
    state = vars(module)
    state["_dropbp_gates"] = tuple(other for other in state["_dropbp_gates"] if other is not gate)
    if state.get("_dropbp_last_of") is gate:
        del state["_dropbp_last_of"]
    if not state["_dropbp_gates"]:
        del state["_dropbp_gates"]
        swap_back(module)


@functools.cache
def _gated_class(original: Any) -> Any:
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        gates = self._dropbp_gates
        run = functools.partial(original.__call__, self)

        def whole(run: Callable[..., Any]) -> Callable[..., Any]:
            return gates[0].without_padding(run) if all(gate.real_rows is not None for gate in gates) else run

        if not torch.is_grad_enabled():
            return whole(gates[0].as_kept(run))(*args, **kwargs)
        stream = first_tensor(*args, *kwargs.values())
        if stream is not None:
            for gate in gates:
                gate.note_call(stream)
        entries = [bool(gate.kept) if stream is None else gate.entry(stream) for gate in gates]
        if stream is not None and (split := _common_split(gates, entries, stream)) is not None:
            return _call_by_rows(self, run, split, args, kwargs)
        if not any(entry or gate.dropped_runs == "detach" for gate, entry in zip(gates, entries, strict=True)):
            with as_inference("cpu" if stream is None else stream.device.type):
                output = whole(gates[0].as_dropped(run))(*args, **kwargs)
            if isinstance(output, Tensor) and output.requires_grad and "_dropbp_last_of" in vars(self):
                return output.detach()  # an identity's
            return output
        kept = next((gate for gate, entry in zip(gates, entries, strict=True) if entry), None)
        output = whole(run if kept is None else kept.as_kept(run))(*args, **kwargs)
        last_of = vars(self).get("_dropbp_last_of")
        if last_of is None:
            return output
        return last_of.pass_output(output, is_kept=bool(entries[gates.index(last_of)]))

    return subclass(original, (_gated_class,), __call__=__call__)


def _common_split(gates: Sequence[ModuleGate], entries: Sequence[bool | Rows], stream: Tensor) -> RowSplit | None:
    """How to take the call of a module of these branches apart by rows; None where it runs as a whole.

    A norm of two branches that keep different rows runs as a whole, with autograd: its rows get a gradient from the
    branches behind it, or none.
    """
    kept = [entry for entry in entries if entry]
    first = kept[0] if kept else False
    if isinstance(first, bool) or not all(first.is_like(entry) for entry in kept):
        return None
    return RowSplit(first, gates[0].batch_of(stream), stream)


def _call_by_rows(module: Any, call: Callable[..., Any], split: RowSplit, args: Any, kwargs: Any) -> Any:
    """The module's output for all rows, of which the kept ones have a graph."""
    last_of = vars(module).get("_dropbp_last_of")
    gate = last_of or module._dropbp_gates[0]
    kept, dropped = gate.run_rows(split, call, args, kwargs)
    return split.merge(kept, dropped, 1.0 if last_of is None else last_of.grad_scale)


def first_tensor(*candidates: Any) -> Tensor | None:
    """The first floating tensor of at least two dimensions among arguments or results, or None."""
    for candidate in candidates:
        if isinstance(candidate, Tensor) and candidate.is_floating_point() and candidate.dim() > 1:
            return candidate
    return None
