"""What the benchmarks of the fused boundary norms share: cases, their checks, and how each direction is run."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from .baselines import available, compiled, right_ones
from .rows import Row, measured_rows
from .settings import Settings
from .timing import Case, Variant

DIRECTIONS = ("fwd", "bwd", "fwd+bwd")
Function = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Norm:
    """A fused op and what it is compared with; every function takes (residual, branch, *parameters, eps=...).

    functions(device): every way to compute (normed, new_residual) there, "eager" among them, not compiled.
    peers: how to load those of other packages (baselines.peer).
    exact(inputs, eps): normed, new_residual, and the gradients of residual, branch and trained parameters, in float64.
    """

    op: str
    num_parameters: int  # weight; or weight and bias
    eps: float
    functions: Callable[[torch.device], dict[str, Function]]
    exact: Callable[[tuple[Tensor, ...], float], list[Tensor]]
    peers: dict[str, Callable[[torch.device], Function]] = field(default_factory=dict)


def make_inputs(
    norm: Norm, rows: int, width: int, dtype: torch.dtype, device: torch.device, trains_weight: bool
) -> tuple[Tensor, ...]:
    """residual, branch (R, D), parameters (D,) each, and the gradients of normed and new_residual (R, D)."""
    residual, branch, *grads = (torch.randn(rows, width, device=device, dtype=dtype) for _ in range(4))
    offsets = [1, 0][: norm.num_parameters]
    parameters = [(offset + 0.1 * torch.randn(width, device=device)).to(dtype) for offset in offsets]
    for parameter in parameters:
        parameter.requires_grad_(trains_weight)
    return residual.requires_grad_(), branch.requires_grad_(), *parameters, *grads


def make_cases(
    norm: Norm, rows: int, width: int, dtype: torch.dtype, device: torch.device, trains_weight: bool
) -> dict[str, Case]:
    """A case for each direction, in all variants, each checked against the reference in float64."""
    functions = norm.functions(device)
    variants = {**functions, **available(norm.peers, device), "compile": compiled(functions["eager"])}
    inputs = make_inputs(norm, rows, width, dtype, device, trains_weight)
    exact = norm.exact(inputs, norm.eps)
    eager = _results(norm, functions["eager"], inputs)
    what = f"{norm.op}, {dtype}, {rows} x {width}"
    variants = right_ones(what, variants, lambda function: _results(norm, function, inputs), eager, exact)

    num_bytes = rows * width * dtype.itemsize
    moved = {
        "fwd": 4 * num_bytes,  # I/O: read residual + read branch + write new_residual + write normed
        "bwd": 4 * num_bytes,  # I/O: read grad_normed + read grad_new_residual + read new_residual + write grad
        "fwd+bwd": 8 * num_bytes,
    }
    return {
        direction: Case(
            op=norm.op,
            case="weight trained" if trains_weight else "weight frozen",
            direction=direction,
            dtype=dtype,
            rows=rows,
            width=width,
            moved_bytes=moved[direction],
            make_inputs=lambda: make_inputs(norm, rows, width, dtype, device, trains_weight),
            variants={name: _variant(norm, function, direction) for name, function in variants.items()},
        )
        for direction in DIRECTIONS
    }


def run(norm: Norm, settings: Settings) -> Iterator[list[Row]]:
    """Rows of every case, one list a case. Raises WrongResult before a wrong variant is timed."""

    def cases_of(trains_weight: bool, *case: Any) -> Iterable[Case]:
        cases = make_cases(norm, *case, trains_weight)
        return [cases["bwd"]] if trains_weight else cases.values()  # its forward is the same

    return measured_rows(settings, (False, True), cases_of)


def benchmark_variant(benchmark: Any, case: Case, variant: str) -> None:
    """Time one variant with pytest-benchmark; skips where it cannot serve."""
    if variant not in case.variants:
        pytest.skip(f"{variant} cannot serve here")
    chosen = case.variants[variant]
    inputs = case.make_inputs()
    benchmark.pedantic(chosen.run, setup=lambda: ((chosen.prepare(inputs),), {}), rounds=20, warmup_rounds=2)


def _split(norm: Norm, inputs: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """(what the function takes, the gradients of its results)."""
    return inputs[: 2 + norm.num_parameters], inputs[2 + norm.num_parameters :]


def _gradients(norm: Norm, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    arguments, grads = _split(norm, inputs)
    return torch.autograd.grad(outputs, [tensor for tensor in arguments if tensor.requires_grad], grads)


def _variant(norm: Norm, function: Function, direction: str) -> Variant:
    def forward(inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        return function(*_split(norm, inputs)[0], eps=norm.eps)

    def backward(state: tuple[tuple[Tensor, ...], tuple[Tensor, Tensor]]) -> Any:
        return _gradients(norm, *state)

    if direction == "fwd":
        return Variant(forward)
    if direction == "bwd":
        return Variant(backward, prepare=lambda inputs: (inputs, forward(inputs)))
    return Variant(lambda inputs: backward((inputs, forward(inputs))))


def _results(norm: Norm, function: Function, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """normed, new_residual and the gradients of residual, branch and the parameters that are trained."""
    outputs = function(*_split(norm, inputs)[0], eps=norm.eps)
    return [tensor.detach() for tensor in (*outputs, *_gradients(norm, inputs, outputs))]
