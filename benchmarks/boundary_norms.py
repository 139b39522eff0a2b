"""What the benchmarks of the fused boundary norms share: cases, their checks, and how each direction is run."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from .baselines import available, compiled, right_ones
from .directions import Inputs, results, variant
from .rows import Row, measured_rows
from .settings import Settings
from .timing import Case

DIRECTIONS = ("fwd", "bwd", "fwd+bwd")
Function = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Norm:
    """A fused op and what it is compared with; every function takes (residual, branch, *parameters).

    functions(device): every way to compute (normed, new_residual) there, "eager" among them, not compiled.
    peers: how to load those of other packages (baselines.peer).
    exact(inputs): normed, new_residual, and the gradients of residual, branch and trained parameters, in float64.
    """

    op: str
    num_parameters: int  # weight; or weight and bias
    functions: Callable[[torch.device], dict[str, Function]]
    exact: Callable[[Inputs], list[Tensor]]
    peers: dict[str, Callable[[torch.device], Function]] = field(default_factory=dict)


def make_inputs(
    norm: Norm, rows: int, width: int, dtype: torch.dtype, device: torch.device, trains_weight: bool
) -> Inputs:
    """residual, branch (R, D), parameters (D,) each; and the gradients of normed and new_residual (R, D)."""
    residual, branch, *grads = (torch.randn(rows, width, device=device, dtype=dtype) for _ in range(4))
    offsets = [1, 0][: norm.num_parameters]
    parameters = [(offset + 0.1 * torch.randn(width, device=device)).to(dtype) for offset in offsets]
    for parameter in parameters:
        parameter.requires_grad_(trains_weight)
    return (residual.requires_grad_(), branch.requires_grad_(), *parameters), tuple(grads)


def make_cases(
    norm: Norm, rows: int, width: int, dtype: torch.dtype, device: torch.device, trains_weight: bool
) -> dict[str, Case]:
    """A case for each direction, in all variants, each checked against the reference in float64."""
    functions = norm.functions(device)
    variants = {**functions, **available(norm.peers, device), "compile": compiled(functions["eager"])}
    inputs = make_inputs(norm, rows, width, dtype, device, trains_weight)
    eager = results(functions["eager"], inputs)
    what = f"{norm.op}, {dtype}, {rows} x {width}"
    variants = right_ones(what, variants, lambda function: results(function, inputs), eager, norm.exact(inputs))

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
            variants={name: variant(function, direction) for name, function in variants.items()},
        )
        for direction in DIRECTIONS
    }


def run(norm: Norm, settings: Settings) -> Iterator[list[Row]]:
    """Rows of every case, one list a case. Raises WrongResult before a wrong variant is timed."""

    def cases_of(trains_weight: bool, *case: Any) -> Iterable[Case]:
        cases = make_cases(norm, *case, trains_weight)
        return [cases["bwd"]] if trains_weight else cases.values()  # its forward is the same

    return measured_rows(settings, (False, True), cases_of)


def benchmark_variant(benchmark: Any, case: Case, name: str) -> None:
    """Time one variant with pytest-benchmark; skips where it cannot serve."""
    if name not in case.variants:
        pytest.skip(f"{name} cannot serve here")
    chosen = case.variants[name]
    inputs = case.make_inputs()
    benchmark.pedantic(chosen.run, setup=lambda: ((chosen.prepare(inputs),), {}), rounds=20, warmup_rounds=2)
