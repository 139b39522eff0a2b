"""Find the residual branches of blocks that no family knows, by tracing one small forward, and prove them.

What is looked for is a pre-norm block: from its output a path of adds, views and constant factors leads back to its
input (the stream), and what else enters those adds are the branches. A branch's modules are the largest ones that
compute it alone. Nothing is taken on trust: with everything dropped, no branch parameter may be reached from the
block's output any more, and the gradient of the block's input has to be that of detaching the branches, bit for bit.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

from ..layer import DropBP
from .family import Family
from .gating import first_tensor

# Autograd nodes that leave the stream a stream, when they have one input that needs a gradient.
_UNARY = ("View", "Reshape", "Transpose", "Permute", "Squeeze", "Unsqueeze", "Clone", "Alias", "ToCopy", "Mul", "Div")
_KINDS = {
    "attention": ("attn", "attention"),
    "mlp": ("mlp", "ffn", "feed", "moe", "expert", "dense", "fc"),
    "mixer": ("mixer", "mamba", "ssm", "conv", "rec", "time", "temporal"),
}
_NO_STREAM = "it does not map a stream to a stream of the same shape"


class NotFound(ValueError):
    """No provable branches; the message says why, and how to name them by hand."""


def discover(model: nn.Module, inputs: dict[str, Any], *, is_guess: bool = False) -> list[tuple[nn.Module, Family]]:
    """The blocks of `model` and the branches of each, found by one forward on `inputs`; the model is as it was after.

    is_guess: whether `inputs` are those of `example_inputs`, which the model may not take.
    Errors: NotFound when no block, or not every block of a stack, is a pre-norm residual block, or a guess was wrong;
            those of the model for other inputs.
    Cost:   one forward that records gradients.
    """
    candidates = dict(_candidates(model))
    found: dict[str, Family] = {}
    reasons: dict[str, str] = {}
    with _traceable(model), ExitStack() as hooks:
        for name, block in candidates.items():
            hooks.enter_context(_traced(name, block, found, reasons))
        try:
            model(**inputs)
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            if not is_guess:
                raise
            first_line = str(error).strip().partition("\n")[0]
            raise NotFound(
                f"model: no block of a known family was found, and {type(model).__name__} does not run on four token "
                f"ids alone ({type(error).__name__}: {first_line}). Pass inputs=..., a batch of its arguments by name, "
                "to have branches looked for, or name them with register_family."
            ) from error
    if not found:
        raise NotFound(_refusal(candidates, reasons))
    stacks = {name.rpartition(".")[0] for name in found}
    missing = {name: why for name, why in reasons.items() if name.rpartition(".")[0] in stacks}
    if missing:
        raise NotFound(_refusal({name: candidates[name] for name in missing}, missing))
    return [(candidates[name], family) for name, family in found.items()]


def prove(model: nn.Module, inputs: dict[str, Any], gates: dict[nn.Module, list[Any]]) -> None:
    """Check, on the patched model, that dropping everything drops the branches and nothing else; the plan is restored.

    gates: the gates of each block. Errors: NotFound, naming the block. Cost: two forwards that record gradients.
    """
    plan = {gate: gate.kept for block in gates.values() for gate in block}
    gradients: list[dict[nn.Module, Tensor]] = [{}, {}]
    try:
        for way, measured in zip(("gated", "detached"), gradients, strict=True):
            with _traceable(model), ExitStack() as hooks:
                for block, members in gates.items():
                    for gate in members:
                        gate.kept = way == "detached"
                        if way == "detached":
                            hooks.enter_context(_detached(gate.modules_of_branch[-1]))
                    hooks.enter_context(_proved(block, members, measured, must_be_free=way == "gated"))
                model(**inputs)
    finally:
        for gate, kept in plan.items():
            gate.kept = kept
    for block in gates:
        ours, expected = (measured.get(block) for measured in gradients)
        if ours is None or expected is None or not torch.equal(ours, expected) or not ours.any():
            raise NotFound(f"model: the branches found in {type(block).__name__} fail the proof: {_three_lines(block)}")


def check_streams(
    model: nn.Module, inputs: dict[str, Any], gates: dict[nn.Module, list[Any]], *, is_guess: bool = False
) -> None:
    """Check, on the patched model, that with everything dropped a gradient still passes through each block.

    For branches that somebody named: a norm behind the add, taken for a part of one, would cut the stream. Blocks that
    do not run on `inputs`, or return no tensor of an input's shape, are not checked. The plan is restored.

    gates: the gates of each block. is_guess: as in `discover`; a guess that the model does not take checks nothing.
    Errors: NotFound, naming the block; those of the model for other inputs.
    Cost:   one forward that records gradients.
    """
    plan = {gate: gate.kept for block in gates.values() for gate in block}
    cut: list[nn.Module] = []
    try:
        with _traceable(model), ExitStack() as hooks:
            for block, members in gates.items():
                for gate in members:
                    gate.kept = False
                hooks.enter_context(_watched_for_a_cut(block, cut))
            model(**inputs)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        if not is_guess:
            raise
    finally:
        for gate, kept in plan.items():
            gate.kept = kept
    if cut:
        named = "; ".join(", ".join(gate.paths) for gate in gates[cut[0]])
        raise NotFound(
            f"model: with its branches dropped ({named}), no gradient passes through {type(cut[0]).__name__}. A branch "
            "ends before its add: leave out a norm that runs behind it, on the stream."
        )


def example_inputs(model: nn.Module) -> dict[str, Any] | None:
    """Four tokens for a language model of transformers; None for a model of which it is not known what it takes."""
    if not (hasattr(model, "get_input_embeddings") and hasattr(model, "config")):
        return None
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return {"input_ids": torch.arange(3, 7, device=device)[None], "use_cache": False}


def ungated_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """What looks like a residual block, by its place in a list, a norm and a linear layer, and has no gate in it."""
    return [
        (name, block)
        for name, block in _candidates(model)
        if not any(isinstance(module, DropBP) for module in block.modules())
        and any("norm" in type(module).__name__.lower() for module in block.modules())
        and any(hasattr(module, "in_features") or type(module).__name__ == "Conv1D" for module in block.modules())
    ]


# ---- tracing


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The members of the outermost lists of modules: where blocks are."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential) and not name.startswith(inside):
            inside = (*inside, name + ".")
            for index, block in module.named_children():
                if any(True for _ in block.parameters()):
                    yield f"{name}.{index}" if name else index, block


@contextmanager
def _traceable(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and gradients for every floating parameter, until the end."""
    modes = [(module, module.training) for module in model.modules()]
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    try:
        model.eval()
        for parameter in frozen:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for module, training in modes:
            module.training = training


@contextmanager
def _from_leaf(block: nn.Module, finish: Any) -> Iterator[None]:
    """In the first call of `block` its stream is a leaf; `finish(leaf, output)` sees what came of it."""
    leaves: list[Tensor] = []
    seen: list[bool] = []

    def start(module: nn.Module, args: Any, kwargs: Any) -> Any:
        stream = first_tensor(*args, *kwargs.values())
        if stream is None:
            return None
        leaves.append(stream.detach().requires_grad_())

        def swap(value: Any) -> Any:
            return leaves[-1] if value is stream else value

        return tuple(map(swap, args)), {name: swap(value) for name, value in kwargs.items()}

    def end(module: nn.Module, args: Any, output: Any) -> None:
        if leaves and not seen:
            seen.append(True)
            finish(leaves[0], _first_of(output))

    with block.register_forward_pre_hook(start, with_kwargs=True), block.register_forward_hook(end):
        yield


def _first_of(output: Any) -> Tensor | None:
    """What a module returned, or of a tuple the first tensor that may be a stream."""
    return output if isinstance(output, Tensor) else first_tensor(*output) if isinstance(output, tuple) else None


@contextmanager
def _traced(name: str, block: nn.Module, found: dict[str, Family], reasons: dict[str, str]) -> Iterator[None]:
    outputs: list[tuple[str, Any]] = []  # module name and the node of what it returned, in the order of the calls

    def note(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            result = _first_of(output)
            if result is not None and result.grad_fn is not None:
                outputs.append((path, result.grad_fn))

        return hook

    def finish(leaf: Tensor, output: Tensor | None) -> None:
        try:
            found[name] = _branches(block, leaf, output, outputs)
        except NotFound as error:
            reasons[name] = str(error)

    with ExitStack() as hooks, _from_leaf(block, finish):
        for path, module in block.named_modules():
            if path and any(True for _ in module.parameters()):
                hooks.enter_context(module.register_forward_hook(note(path)))
        yield


def _branches(block: nn.Module, leaf: Tensor, output: Tensor | None, outputs: list[tuple[str, Any]]) -> Family:
    if output is None or output.shape != leaf.shape or output.grad_fn is None:
        raise NotFound(_NO_STREAM)
    is_output = {node for _, node in outputs}
    roots, stream = _roots(output.grad_fn, leaf, is_output)
    if not roots:
        raise NotFound("no path of plain adds leads from its output to its input (is there a norm after the add?)")
    owner = {id(p): name for name, p in block.named_parameters()}
    branches: dict[str, tuple[str, ...]] = {}
    for root in roots:
        nodes = _below(root, stream)
        inside = {path for path, node in outputs if node in nodes}
        paths = [path for path, node in outputs if node in nodes and not _has_parent(path, inside)]
        paths = list(dict.fromkeys(paths))  # a module may be called more than once
        parameters = {owner[id(node.variable)] for node in nodes if id(getattr(node, "variable", None)) in owner}
        loose = sorted(name for name in parameters if not any(name.startswith(path + ".") for path in paths))
        if loose:
            raise NotFound(f"{', '.join(loose)} is applied between modules, not by one of the branch's modules")
        if parameters:
            branches[_name(paths, branches)] = tuple(paths)
    if not branches:
        raise NotFound("nothing with parameters is added to the stream")
    return Family((type(block).__name__,), branches, per_token=())  # what a name promises was not proved


def _roots(end: Any, leaf: Tensor, is_output: set[Any]) -> tuple[list[Any], set[Any]]:
    """The nodes that enter the stream by an add, from the block's input to its output; and those of the stream."""
    clean: dict[Any, bool] = {}
    order: list[Any] = []

    def is_clean(node: Any) -> bool:
        if node in clean:
            return clean[node]
        parents = [parent for parent, _ in node.next_functions if parent is not None]
        if getattr(node, "variable", None) is leaf:
            result = True
        elif node.name().startswith("Add"):
            result = any([is_clean(parent) for parent in parents])
        else:
            result = node.name().startswith(_UNARY) and len(parents) == 1 and is_clean(parents[0])
        clean[node] = result
        order.append(node)
        return result

    if not is_clean(end):
        return [], set()
    stream = {node for node, result in clean.items() if result}
    roots: list[Any] = []

    def split(node: Any) -> None:
        parents = [parent for parent, _ in node.next_functions if parent is not None]
        is_sum = node.name().startswith("Add") and len(parents) == 2
        if node in is_output or not (is_sum or (node.name().startswith(_UNARY) and len(parents) == 1)):
            roots.append(node)
            return
        for parent in parents:
            split(parent)

    for node in order:
        if node in stream:
            for parent, _ in node.next_functions:
                if parent is not None and parent not in stream:
                    split(parent)
    return list(dict.fromkeys(roots)), stream


def _below(root: Any, stream: set[Any]) -> set[Any]:
    stack, seen = [root], {root}
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is not None and node not in seen and node not in stream:
                seen.add(node)
                stack.append(node)
    return seen


def _has_parent(path: str, paths: set[str]) -> bool:
    parts = path.split(".")
    return any(".".join(parts[:end]) in paths for end in range(1, len(parts)))


def _name(paths: list[str], taken: dict[str, Any]) -> str:
    """What the modules' names say a branch is, those of norms aside: they are named after their neighbours."""
    sublayers = " ".join(path for path in map(str.lower, paths) if "norm" not in path and "ln" not in path)
    kinds = (kind for kind, words in _KINDS.items() if any(word in sublayers for word in words))
    name = next(kinds, "branch")
    return name if name not in taken else f"{name}_{sum(other.startswith(name) for other in taken) + 1}"


# ---- proof


def _detached(module: nn.Module) -> RemovableHandle:
    return module.register_forward_hook(lambda module, args, output: tree_map_only(Tensor, Tensor.detach, output))


@contextmanager
def _watched_for_a_cut(block: nn.Module, cut: list[nn.Module]) -> Iterator[None]:
    """Add `block` to `cut` if in its first call no input of its output's shape gets a gradient from it."""
    leaves: list[Tensor] = []
    seen: list[bool] = []

    def start(module: nn.Module, args: Any, kwargs: Any) -> Any:
        def from_leaf(value: Any) -> Any:
            if seen or not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            leaves.append(value.detach().requires_grad_())
            return leaves[-1].clone()  # a leaf could not be added to in place

        return tuple(map(from_leaf, args)), {name: from_leaf(value) for name, value in kwargs.items()}

    def end(module: nn.Module, args: Any, output: Any) -> None:
        result = _first_of(output)
        if result is not None and not seen:
            streams = {id(leaf) for leaf in leaves if leaf.shape == result.shape}
            nodes = _below(result.grad_fn, set()) if result.requires_grad else ()
            if streams and streams.isdisjoint(id(getattr(node, "variable", None)) for node in nodes):
                cut.append(block)
        seen.append(True)

    with block.register_forward_pre_hook(start, with_kwargs=True), block.register_forward_hook(end):
        yield


@contextmanager
def _proved(block: nn.Module, gates: list[Any], measured: dict[Any, Tensor], must_be_free: bool) -> Iterator[None]:
    def finish(leaf: Tensor, output: Tensor | None) -> None:
        if output is None or output.grad_fn is None:
            return
        parameters = {id(p) for gate in gates for module in gate.modules_of_branch for p in module.parameters()}
        reached = {id(getattr(node, "variable", None)) for node in _below(output.grad_fn, set())}
        if must_be_free and parameters & reached:
            return
        weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
        (grad,) = torch.autograd.grad(output, leaf, weight, allow_unused=True)
        if grad is not None:
            measured[block] = grad

    with _from_leaf(block, finish):
        yield


# ---- what to say


def _refusal(blocks: dict[str, nn.Module], reasons: dict[str, str]) -> str:
    if not blocks:
        return "model: no list of blocks found in it. Put gates into its forward (DropBP), or use register_family."
    called = [name for name in blocks if name in reasons] or list(blocks)
    name = min(called, key=lambda name: reasons.get(name) == _NO_STREAM)  # convolutions of an input stand before blocks
    why = reasons.get(name, "the forward did not call it")
    block = blocks[name]
    return f"model: found no residual branches in {name} ({type(block).__name__}): {why}. {_three_lines(block)}"


def _three_lines(block: nn.Module) -> str:
    children = ", ".join(name for name, _ in block.named_children())
    return (
        f"If you know its branches, name what runs before each add:\n    from dropbp_kernels import register_family\n"
        f'    branches = {{"attention": ("<norm>", "<attention>"), "mlp": ("<norm>", "<mlp>")}}  # of: {children}\n'
        f'    register_family("mine", block="{type(block).__name__}", branches=branches)'
    )
