"""Columns chosen by the gradient of a batch: `select_columns`."""

import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..layer import DropBP
from ..sensitivity import left_as_found
from .layer import PacaLayer
from .selection import largest_columns


def select_columns(model: nn.Module, backprop: Callable[[], Any], adapter_name: str = "default") -> None:
    """Choose the columns of an adapter with selection="gradient": those whose gradient is the longest.

    backprop runs one forward and backward through `model`, or several, and nothing else (no optimizer step). Linears
    that read the same tensor choose together, so that they keep one copy of its channels. Adapters are off meanwhile
    and every branch of DropBP is kept; gradients, RNG states, train/eval modes and plans are left as found. What was
    trained of the adapter so far is set to nothing. Under torch.distributed every rank calls this on its own batch, and
    all choose by the sum.

    Errors: ValueError when the model has no such adapter; RuntimeError when a target got no gradient, or one that is
        not finite. Nothing is chosen then.
    Cost:   as a step of full fine-tuning without its weight gradients, of which one at a time exists.
    Source: PaCA (arXiv 2503.01905), selection by gradient.
    """
    config = getattr(model, "peft_config", {}).get(adapter_name)
    if getattr(config, "selection", None) != "gradient":
        raise ValueError(f"adapter_name: expected an adapter with selection='gradient', got {adapter_name!r}")
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, PacaLayer) and adapter_name in module.paca_columns
    }
    scores = _Scores(layers)
    gates = {name: module for name, module in model.named_modules() if isinstance(module, DropBP)}
    disabled = {name: layer.disable_adapters for name, layer in layers.items()}
    hooks = [layer.register_forward_hook(scores.hook) for layer in layers.values()]  # type: ignore[attr-defined]
    try:
        with left_as_found(SimpleNamespace(model=model, gates=gates)), torch.enable_grad():
            for parameter in model.parameters():
                parameter.grad = None
            for gate in gates.values():
                gate.kept = True
            for layer in layers.values():
                layer._disable_adapters = True
            backprop()
    finally:
        for hook in hooks:
            hook.remove()
        for name, layer in layers.items():
            layer._disable_adapters = disabled[name]
    for name, values in scores.summed().items():
        layers[name].choose(adapter_name, largest_columns(layers[name].r[adapter_name], values))


class _Scores:
    """The squared length of every column's gradient, summed over calls and over the linears that read one tensor."""

    def __init__(self, layers: dict[str, Any]) -> None:
        self.names = {layer: name for name, layer in layers.items()}
        self.squares = {name: torch.zeros(layer.in_features, dtype=torch.float64) for name, layer in layers.items()}
        self.leader = {name: name for name in layers}
        self.seen: set[str] = set()
        self._input: Any = lambda: None
        self._first = ""

    def hook(self, layer: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        x, name = args[0], self.names[layer]
        if not torch.is_grad_enabled():
            return output
        if self._input() is x and layer.in_features == self.squares[self._first].numel():
            self.leader[name] = self.leader[self._first]
        else:
            self._input, self._first = weakref.ref(x), name
        if not output.requires_grad:  # nothing is trained before the first target
            output = output.detach().requires_grad_()
        rows = x.detach().reshape(-1, x.shape[-1])
        output.register_hook(lambda grad: self._add(name, grad.reshape(-1, grad.shape[-1]), rows))
        return output

    def _add(self, name: str, grad: Tensor, rows: Tensor) -> None:
        gradient = grad.t().mm(rows.to(grad.dtype))
        self.squares[name] += gradient.float().square_().sum(0).double().cpu()
        self.seen.add(name)

    def summed(self) -> dict[str, Tensor]:
        together = torch.cat(list(self.squares.values()))
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
            together = together.to(device)
            dist.all_reduce(together)
            together = together.cpu()
        if missing := sorted(set(self.squares) - self.seen):
            raise RuntimeError(f"backprop: expected a gradient for every target, but {missing[0]} got none")
        if not torch.isfinite(together).all():
            raise RuntimeError("backprop: expected finite gradients, but those of some target are not")
        parts = together.split([squares.numel() for squares in self.squares.values()])
        alone = dict(zip(self.squares, parts, strict=True))
        totals = {name: torch.zeros_like(values) for name, values in alone.items()}
        for name, values in alone.items():
            totals[self.leader[name]] += values
        return {name: totals[self.leader[name]] for name in alone}
