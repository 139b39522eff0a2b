"""One model family: which modules of its blocks form their branches, and the gates made of that."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..flops import attention_core_flops, attention_shape, linear_flops
from ..layer import DropBP
from . import fused_lora
from .gating import ModuleGate
from .swapping import class_as_built


@dataclass(frozen=True)
class Family:
    """How to gate the blocks of one model family.

    block: class names of its blocks. branches: by branch name, the names of its modules, first to last.
    when: tells blocks of one class apart that their configuration lays out differently; None: all are alike.
    forward: a forward of the block that does the adds itself, through `gate_<branch>.run`, so that they can wait for
        the next norm (`fusing`, "fused"). None: the branches are gated by their modules (`gating`, "generic").
    per_token: the branches that treat each token for itself, of which granularity "token" keeps a share of the tokens.
    """

    block: tuple[str, ...]
    branches: Mapping[str, tuple[str, ...]]
    when: Callable[[Any], bool] | None = None
    forward: Callable[..., Tensor] | None = None
    per_token: tuple[str, ...] = ("mlp",)

    def fits(self, block: nn.Module) -> bool:
        """Whether `block` is one of this family's."""
        return class_as_built(block).__name__ in self.block and (self.when is None or self.when(block))

    def paths(self, block: nn.Module) -> dict[str, tuple[str, ...]]:
        """The names of the modules of each branch that `block` has.

        Errors: ValueError, naming the block's modules, when the block lacks one that it has to have.
        """
        paths = {branch.rstrip("?"): _find(block, branch, names) for branch, names in self.branches.items()}
        return {branch: found for branch, found in paths.items() if found}

    def forward_of(self, block: nn.Module) -> Callable[..., Tensor] | None:
        """`forward`; None where `block`, of code that comes with its weights, returns more than the stream.

        That is told by output_attentions: who takes it returns attention weights too, in a tuple.
        """
        is_stream_alone = "output_attentions" not in inspect.signature(class_as_built(block).forward).parameters
        return self.forward if is_stream_alone else None

    def gates(self, block: nn.Module) -> dict[str, DropBP]:
        """New gates for one block, by branch name, knowing their modules and FLOPs.

        Errors: those of `paths`.
        """
        kind = ModuleGate if self.forward_of(block) is None else _BlockGate
        gates: dict[str, DropBP] = {}
        for branch, paths in self.paths(block).items():
            flops = BranchFlops(block, paths, is_attention="attention" in branch)
            gates[branch] = kind(block, paths, flops, per_token=branch in self.per_token)
        return gates


class _BlockGate(DropBP):
    """The gate of a branch that its block calls; finds the branch's modules again where PEFT replaced them."""

    def __init__(self, block: nn.Module, paths: tuple[str, ...], flops: Callable[[int, int], float], per_token: bool):
        super().__init__(flops, per_token=per_token)
        self.paths = paths
        self._block = (block,)  # in a tuple, so that nn.Module does not register its own parent

    def refresh(self) -> None:
        (block,) = self._block
        fused_lora.refresh(block)
        self.modules_of_branch = tuple(block.get_submodule(path) for path in self.paths)


# A class rather than a closure, so that a patched model can be deep-copied and its copy counts its own modules.
@dataclass
class BranchFlops:
    """Forward FLOPs of a branch from the shapes of the modules that bear its names now, and from its attention's heads.

    Keys of a cross-attention are taken to be as many as its queries.
    """

    block: nn.Module
    paths: tuple[str, ...]
    is_attention: bool

    def __call__(self, batch_size: int, seq_len: int) -> float:
        modules = [self.block.get_submodule(path) for path in self.paths]
        flops = sum(linear_flops(module, batch_size * seq_len) for module in modules)
        if self.is_attention:
            parents = [self.block.get_submodule(path.rpartition(".")[0]) for path in self.paths if "." in path]
            shape = next((shape for module in (*modules, *parents) if (shape := attention_shape(module))), None)
            if shape is None:
                raise TypeError(f"module: no head count found in the attention of {type(self.block).__name__}")
            flops += attention_core_flops(batch_size, seq_len, *shape)
        return flops


def _find(block: nn.Module, branch: str, names: Sequence[str]) -> tuple[str, ...]:
    found, missing = [], []
    for name in names:
        path = next((path for path in name.rstrip("?").split("|") if _has(block, path)), None)
        if path is not None:
            found.append(path)
        elif not name.endswith("?"):
            missing.append(name)
    if missing and branch.endswith("?"):
        return ()
    if missing:
        children = ", ".join(name for name, _ in block.named_children())
        raise ValueError(
            f"family: expected branch {branch!r} of {type(block).__name__} to have {', '.join(names)}, but there is no "
            f"{', '.join(missing)}; the block's modules are {children}"
        )
    return tuple(found)


def _has(block: nn.Module, path: str) -> bool:
    try:
        return isinstance(block.get_submodule(path), nn.Module)
    except AttributeError:
        return False
