"""gated_residual_add, its in-place form and its backward, whole and by rows.

Here the raw ops are measured. The public function leaves the plain sum of two whole tensors and a plain scaled gradient
to PyTorch's own kernels; what its Python costs is in bench_host_overhead.py.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from dropbp_kernels import reference

from .baselines import backends, compiled, raw_op, right_ones
from .rows import Row, measured_rows
from .settings import Settings
from .timing import Case, Variant

OP = "gated_residual_add"
GRAD_SCALE = 4.0  # 1 / (1 - 0.75)


@dataclass(frozen=True)
class _Problem:
    """A case in its variants. eager and ours take the inputs of `make`; ours is first given the raw op."""

    case: str
    direction: str
    raw_name: str
    elements_moved: float  # in units of the elements of residual
    eager: Callable[..., Tensor]
    ours: Callable[..., Any]


# branch (R, D) belongs to all rows, half (R/2, D) to `rows`.
PROBLEMS = [
    # I/O: read residual + read branch + write sum
    _Problem(
        "sum",
        "fwd",
        "gated_residual_add",
        3,
        lambda residual, branch, half, rows, scale: residual + branch,
        lambda raw, residual, branch, half, rows, scale: raw(residual, branch, None),
    ),
    # I/O: read residual + read branch + write residual
    _Problem(
        "sum in place",
        "fwd",
        "gated_residual_add_",
        3,
        lambda residual, branch, half, rows, scale: residual.add_(branch),
        lambda raw, residual, branch, half, rows, scale: raw(residual, branch, None),
    ),
    # I/O: read residual + read half + write sum
    _Problem(
        "half the rows",
        "fwd",
        "gated_residual_add",
        2.5,
        lambda residual, branch, half, rows, scale: residual.index_add(0, rows, half),
        lambda raw, residual, branch, half, rows, scale: raw(residual, half, rows),
    ),
    # I/O: read half of residual + read half + write half of residual
    _Problem(
        "half the rows in place",
        "fwd",
        "gated_residual_add_",
        1.5,
        lambda residual, branch, half, rows, scale: residual.index_add_(0, rows, half),
        lambda raw, residual, branch, half, rows, scale: raw(residual, half, rows),
    ),
    # I/O: read grad_output + write grad_branch
    _Problem(
        "scaled",
        "bwd",
        "gated_residual_add_backward",
        2,
        lambda grad, branch, half, rows, scale: grad * GRAD_SCALE,
        lambda raw, grad, branch, half, rows, scale: raw(grad, None, None, GRAD_SCALE, grad.dtype),
    ),
    # I/O: read half of grad_output + write grad_branch
    _Problem(
        "half the rows, each scaled",
        "bwd",
        "gated_residual_add_backward",
        1,
        lambda grad, branch, half, rows, scale: grad.index_select(0, rows) * scale.unsqueeze(1),
        lambda raw, grad, branch, half, rows, scale: raw(grad, rows, scale, 1.0, grad.dtype),
    ),
]


def make_inputs(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """residual (R, D), branch (R, D), half (R/2, D), rows (R/2,) sorted, row_scale (R/2,)."""
    half = max(rows // 2, 1)
    chosen = torch.randperm(rows, device=device)[:half].sort().values
    tensors = (torch.randn(count, width, device=device, dtype=dtype) for count in (rows, rows, half))
    return *tensors, chosen, torch.rand(half, device=device, dtype=dtype) + 0.5


def make_case(problem: _Problem, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Case:
    """The case in all variants that can run on `device`, each checked against the reference in float64."""
    functions: dict[str, Callable[..., Any]] = {"eager": problem.eager, "compile": compiled(problem.eager)}
    for backend in backends(OP, device):
        functions[backend] = _bind(problem, raw_op(backend, OP, problem.raw_name, device))

    inputs = make_inputs(rows, width, dtype, device)
    truth = _bind(problem, getattr(reference, f"{problem.raw_name}_reference"))
    exact = _result(problem, truth, tuple(t.double() if t.is_floating_point() else t for t in inputs))
    eager = _result(problem, problem.eager, inputs)
    what = f"{OP}, {problem.case}, {dtype}, {rows} x {width}"
    functions = right_ones(what, functions, lambda function: [_result(problem, function, inputs)], [eager], [exact])
    return Case(
        op=OP,
        case=problem.case,
        direction=problem.direction,
        dtype=dtype,
        rows=rows,
        width=width,
        moved_bytes=round(problem.elements_moved * rows * width * dtype.itemsize),
        make_inputs=lambda: make_inputs(rows, width, dtype, device),
        variants={name: Variant(_unpack(function)) for name, function in functions.items()},
    )


def run(settings: Settings) -> Iterator[list[Row]]:
    """Rows of every case, one list a case. Raises WrongResult before a wrong variant is timed."""
    return measured_rows(settings, PROBLEMS, lambda *case: [make_case(*case)])


@pytest.mark.parametrize("variant", ["eager", "compile", "cpp"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: f"{problem.direction} {problem.case}")
def test_bench_gated_residual_add(benchmark, problem, variant):
    case = make_case(problem, 1024, 1024, torch.bfloat16, torch.device("cpu"))
    if variant not in case.variants:
        pytest.skip(f"{variant} cannot serve here")
    benchmark(case.variants[variant].run, case.make_inputs())


def _bind(problem: _Problem, raw: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *inputs: problem.ours(raw, *inputs)


def _unpack(function: Callable[..., Any]) -> Callable[[tuple[Tensor, ...]], Any]:
    return lambda inputs: function(*inputs)


def _result(problem: _Problem, function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Tensor:
    """The result of one call; of an in-place function, what it left in a copy of its first input."""
    copies = (inputs[0].clone(), *inputs[1:])
    result = function(*copies)
    return copies[0] if problem.raw_name.endswith("_") else result
