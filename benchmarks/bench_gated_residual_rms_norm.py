"""gated_residual_rms_norm through its public function: forward, backward, and both, as a training step calls it."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dropbp_kernels import _backend, reference
from dropbp_kernels.ops import gated_residual_rms_norm

from .baselines import (
    WrongResult,
    add_then_aten_norm,
    add_then_norm,
    available,
    check_results,
    compiled,
    liger_add_rms_norm,
    quack_add_rms_norm,
    say_once,
)
from .rows import Row, machine, op_rows
from .settings import Settings
from .timing import Case, Variant, copy_bandwidth, measure

OP = "gated_residual_rms_norm"
EPS = 1e-6
PEERS = {"liger": liger_add_rms_norm, "quack": quack_add_rms_norm}
DIRECTIONS = ("fwd", "bwd", "fwd+bwd")


def make_inputs(
    rows: int, width: int, dtype: torch.dtype, device: torch.device, trains_weight: bool
) -> tuple[Tensor, ...]:
    """residual, branch (R, D), weight (D,), and the gradients of normed and new_residual (R, D)."""
    residual, branch, grad_normed, grad_new = (torch.randn(rows, width, device=device, dtype=dtype) for _ in range(4))
    weight = (1 + 0.1 * torch.randn(width, device=device)).to(dtype)
    weight.requires_grad_(trains_weight)
    return residual.requires_grad_(), branch.requires_grad_(), weight, grad_normed, grad_new


def functions(device: torch.device) -> dict[str, Callable[..., tuple[Tensor, Tensor]]]:
    """Every way to compute (normed, new_residual) that can run on `device`, not compiled."""
    return {
        "eager": add_then_norm,
        "aten": add_then_aten_norm,
        _backend.serving(OP, device.type): gated_residual_rms_norm,
        **available(PEERS, device),
    }


def make_cases(rows: int, width: int, dtype: torch.dtype, device: torch.device, trains_weight: bool) -> dict[str, Case]:
    """A case for each direction, in all variants, each checked against the reference in float64."""
    variants = {**functions(device), "compile": compiled(add_then_norm)}
    inputs = make_inputs(rows, width, dtype, device, trains_weight)
    exact = _exact(inputs)
    eager = _results(add_then_norm, inputs)
    for name, function in list(variants.items()):
        what = f"{OP}, {name}, {dtype}, {rows} x {width}"
        try:
            check_results(what, _results(function, inputs), eager, exact)
        except WrongResult as error:
            if name not in PEERS:
                raise
            say_once(f"{name} is left out: {error}")  # a peer's fault must not keep ours from being timed
            del variants[name]

    num_bytes = rows * width * dtype.itemsize
    moved = {
        "fwd": 4 * num_bytes,  # I/O: read residual + read branch + write new_residual + write normed
        "bwd": 4 * num_bytes,  # I/O: read grad_normed + read grad_new_residual + read new_residual + write grad
        "fwd+bwd": 8 * num_bytes,
    }
    return {
        direction: Case(
            op=OP,
            case="weight trained" if trains_weight else "weight frozen",
            direction=direction,
            dtype=dtype,
            rows=rows,
            width=width,
            moved_bytes=moved[direction],
            make_inputs=lambda: make_inputs(rows, width, dtype, device, trains_weight),
            variants={name: _variant(function, direction) for name, function in variants.items()},
        )
        for direction in DIRECTIONS
    }


def run(settings: Settings) -> Iterator[list[Row]]:
    """Rows of every case, one list a case. Raises WrongResult before a wrong variant is timed."""
    where, copy_gb_s = machine(settings.device, settings.commit), copy_bandwidth(settings.device, settings.copy_bytes)
    for dtype in settings.dtypes:
        for rows, width in settings.sizes:
            for trains_weight in (False, True):
                if not settings.has_time():
                    continue
                cases = make_cases(rows, width, dtype, settings.device, trains_weight)
                if trains_weight:  # its forward is the same
                    del cases["fwd"], cases["fwd+bwd"]
                for case in cases.values():
                    timings = measure(case, settings.device, seconds=settings.seconds, min_rounds=settings.min_rounds)
                    yield op_rows(case, timings, where, copy_gb_s)


@pytest.mark.parametrize("variant", ["eager", "aten", "compile", "cpp"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_bench_gated_residual_rms_norm(benchmark, direction, variant):
    case = make_cases(1024, 1024, torch.bfloat16, torch.device("cpu"), trains_weight=False)[direction]
    if variant not in case.variants:
        pytest.skip(f"{variant} cannot serve here")
    chosen = case.variants[variant]
    inputs = case.make_inputs()
    benchmark.pedantic(chosen.run, setup=lambda: ((chosen.prepare(inputs),), {}), rounds=20, warmup_rounds=2)


def _variant(function: Callable[..., tuple[Tensor, Tensor]], direction: str) -> Variant:
    def forward(inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        return function(*inputs[:3], eps=EPS)

    def backward(state: tuple[tuple[Tensor, ...], tuple[Tensor, Tensor]]) -> Any:
        inputs, outputs = state
        wanted = [tensor for tensor in inputs[:3] if tensor.requires_grad]
        return torch.autograd.grad(outputs, wanted, inputs[3:])

    if direction == "fwd":
        return Variant(forward)
    if direction == "bwd":
        return Variant(backward, prepare=lambda inputs: (inputs, forward(inputs)))
    return Variant(lambda inputs: backward((inputs, forward(inputs))))


def _results(function: Callable[..., tuple[Tensor, Tensor]], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """normed, new_residual and the gradients of residual, branch and, when it is trained, weight."""
    outputs = function(*inputs[:3], eps=EPS)
    wanted = [tensor for tensor in inputs[:3] if tensor.requires_grad]
    gradients = torch.autograd.grad(outputs, wanted, inputs[3:])
    return [tensor.detach() for tensor in (*outputs, *gradients)]


def _exact(inputs: tuple[Tensor, ...]) -> list[Tensor]:
    residual, branch, weight, grad_normed, grad_new = (tensor.detach().double() for tensor in inputs)
    normed, new_residual, rstd = reference.gated_residual_rms_norm_reference(residual, branch, weight, EPS, False)
    grad, grad_weight = reference.gated_residual_rms_norm_backward_reference(
        grad_normed, grad_new, new_residual, weight, rstd, False, inputs[2].requires_grad
    )
    return [normed, new_residual, grad, grad, *([grad_weight] if inputs[2].requires_grad else [])]
