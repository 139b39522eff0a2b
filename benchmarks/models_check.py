"""Is a patched model right? Its gradients against detach-after, done by hooks that share nothing with the gates.

problems, _ = check_gradients(model, inputs)   # patches, checks and unpatches; empty when all is right
problems, num_fused = check_fused(model, inputs)   # the same with fused=True, and how many adds that fused
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from dropbp_kernels import apply_dropbp, remove_dropbp


@contextmanager
def detached(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, everything these modules return is detached: the published way to drop a branch."""
    handles = [
        module.register_forward_hook(lambda module, args, output: tree_map_only(Tensor, Tensor.detach, output))
        for module in modules
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run_backward(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor | None]]:
    """(logits, gradient by parameter) of one step that always starts from the same random state."""
    torch.manual_seed(2)
    model.zero_grad(set_to_none=True)
    output = model(**inputs)
    loss = output["loss"]
    if loss.requires_grad:
        loss.backward()
    logits = output["logits"]
    return logits.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def plans(num_branches: int) -> list[tuple[bool, ...]]:
    """All kept, all dropped, each parity, and three at random."""
    generator = random.Random(0)
    drawn = [tuple(generator.random() < 0.5 for _ in range(num_branches)) for _ in range(3)]
    parities = [tuple(index % 2 == parity for index in range(num_branches)) for parity in (0, 1)]
    return [(True,) * num_branches, (False,) * num_branches, *parities, *drawn]


def check_gradients(model: nn.Module, batch: dict[str, Any], **options: Any) -> tuple[list[str], Any]:
    """(what is wrong with `apply_dropbp(model)`, (gates never called, gates by name)); the model is as before.

    Checked, bit for bit: logits at any plan; the gradient of every parameter against detach-after; nothing dropped
    against the unpatched model. And: with everything dropped, no branch parameter has a gradient. A difference within
    rounding is told by a line that begins with "rounding": some kernels are chosen by whether a gradient is needed.
    """
    keys, classes = list(model.state_dict()), [type(module) for module in model.modules()]
    # Fused norms and a fused loss take their sums in another order.
    handler = apply_dropbp(model, 0.5, fused_loss="off", **{"fused": False, **options})
    gates = list(handler.gates.values())
    last_modules = [gate.modules_of_branch[-1] for gate in gates]
    parameters = {p for gate in gates for module in gate.modules_of_branch for p in module.parameters()}
    names = {name for name, p in model.named_parameters() if p in parameters}
    problems = [] if list(model.state_dict()) == keys else ["state_dict keys changed"]
    ours = {}
    for kept in plans(len(gates)):
        handler.set_plan(kept)
        ours[kept] = run_backward(model, batch)
    missed = [name for name, gate in handler.gates.items() if not gate.was_called]
    remove_dropbp(model)
    if [type(module) for module in model.modules()] != classes or list(model.state_dict()) != keys:
        problems.append("not restored by remove_dropbp")
    for kept, (logits, grads) in ours.items():
        with detached([module for module, is_kept in zip(last_modules, kept, strict=True) if not is_kept]):
            expected_logits, expected = run_backward(model, batch)
        tensors = {"logits": (logits, expected_logits)}
        tensors |= {f"gradient of {name}": (grads[name], expected[name]) for name in grads}
        differing = {what: pair for what, pair in tensors.items() if not _same(*pair)}
        if differing:
            kind = "rounding" if all(_close(*pair) for pair in differing.values()) else "wrong"
            problems.append(
                f"{kind}: {len(differing)} tensors differ at {_show(kept)}, first the {next(iter(differing))}"
            )
        if not any(kept) and (left := [name for name in names if grads[name] is not None]):
            problems.append(f"gradients left with all dropped: {', '.join(left[:3])}")
    return problems, (missed, handler.gates)


class _FusedAdds(TorchDispatchMode):
    """Counts the adds that ran in one kernel with the norm behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.name() in (
            "dropbp_kernels::gated_residual_rms_norm",
            "dropbp_kernels::gated_residual_layer_norm",
        )
        return func(*args, **(kwargs or {}))


def check_fused(model: nn.Module, batch: dict[str, Any]) -> tuple[list[str], int]:
    """(what is wrong with `apply_dropbp(model, fused=True)`, adds fused in a forward); the model is as before.

    Checked, within rounding, with all kept and with every other branch: logits and the gradient of every parameter are
    those of fused=False.
    """
    results: dict[bool, list[Any]] = {False: [], True: []}
    counter = _FusedAdds()
    for fused, found in results.items():
        handler = apply_dropbp(model, 0.5, fused_loss="off", fused=fused)
        for kept in plans(len(handler.gates))[:3:2]:
            handler.set_plan(kept)
            found.append(run_backward(model, batch))
        if fused:
            with counter:
                model(**batch)
        remove_dropbp(model)
    problems = []
    for (logits, grads), (expected_logits, expected) in zip(results[True], results[False], strict=True):
        pairs = {"logits": (logits, expected_logits)} | {name: (grads[name], expected[name]) for name in grads}
        differing = [what for what, pair in pairs.items() if not _alike(*pair)]
        if differing:
            problems.append(f"fused: {len(differing)} tensors differ, first {differing[0]}")
    return problems, counter.count


def _alike(ours: Tensor | None, expected: Tensor | None) -> bool:
    """Whether two tensors are the same but for rounding, measured by the largest entry."""
    if ours is None or expected is None:
        return ours is expected
    return bool((ours - expected).abs().max() <= 1e-4 * expected.abs().max() + 1e-6)


def _same(ours: Tensor | None, expected: Tensor | None) -> bool:
    if ours is None or expected is None:
        return ours is expected
    return torch.equal(ours, expected)


def _close(ours: Tensor | None, expected: Tensor | None) -> bool:
    if ours is None or expected is None:
        return False
    return torch.allclose(ours, expected, rtol=1e-4, atol=1e-6)


def _show(kept: tuple[bool, ...]) -> str:
    return "".join("kd"[not is_kept] for is_kept in kept)
