"""What a call costs before any work is done: one-element tensors, eager mode, against the equivalent aten calls.

Where a public function is one raw op, that op alone is there too, called through the dispatcher: what the function
takes longer is Python and autograd. Targets: 3 us without a gradient, 10 us where autograd records the call.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dropbp_kernels import DropBP
from dropbp_kernels.ops import gated_residual_add, gated_residual_rms_norm
from dropbp_kernels.ops.raw import raw

from .baselines import add_then_aten_norm, add_then_norm
from .rows import Row, machine, op_rows
from .settings import Settings
from .timing import Case, Variant, measure

NUM_CASES = 11
NUM_CALLS = {"full": 200, "quick": 200, "tiny": 2}


def make_cases(device: torch.device, num_calls: int) -> Iterator[Case]:
    """Each function of ours next to the aten calls that it replaces, here named eager."""
    residual, branch, weight = (torch.randn(1, 1, device=device) for _ in range(3))
    weight, rows = weight[0], torch.zeros(1, dtype=torch.int64, device=device)
    trained = residual.clone().requires_grad_(), branch.clone().requires_grad_()
    kept, dropped = DropBP(), DropBP()
    dropped.kept = False

    def case(op: str, name: str, direction: str, **calls: Callable[[], Any]) -> Case:
        return Case(
            op=op,
            case=name,
            direction=direction,
            dtype=torch.float32,
            rows=1,
            width=1,
            moved_bytes=0,
            make_inputs=lambda: (),
            variants={name: Variant(_ignore_state(call)) for name, call in calls.items()},
            num_calls=num_calls,
        )

    yield case(
        "gated_residual_add",
        "no gradient",
        "fwd",
        eager=lambda: residual + branch,
        raw=lambda: raw.gated_residual_add(residual, branch, None),
        ours=lambda: gated_residual_add(residual, branch),
    )
    yield case(
        "gated_residual_add",
        "rows, no gradient",
        "fwd",
        eager=lambda: residual.index_add(0, rows, branch),
        raw=lambda: raw.gated_residual_add(residual, branch, rows),
        ours=lambda: gated_residual_add(residual, branch, rows=rows),
    )
    yield case(
        "gated_residual_add",
        "scaled, recorded",
        "fwd",
        eager=lambda: trained[0] + _scale_gradient(trained[1]),
        raw=lambda: raw.gated_residual_add(residual, branch, None),
        ours=lambda: gated_residual_add(*trained, grad_scale=4.0),
    )
    yield case(
        "gated_residual_add",
        "kept",
        "fwd+bwd",
        eager=lambda: _gradients(trained[0] + trained[1], trained),
        ours=lambda: _gradients(gated_residual_add(*trained), trained),
    )
    yield case(
        "gated_residual_add",
        "scaled",
        "fwd+bwd",
        eager=lambda: _gradients(trained[0] + _scale_gradient(trained[1]), trained),
        ours=lambda: _gradients(gated_residual_add(*trained, grad_scale=4.0), trained),
    )
    yield case(
        "DropBP.residual_add",
        "kept",
        "fwd+bwd",
        eager=lambda: _gradients(trained[0] + trained[0].neg(), trained[:1]),
        ours=lambda: _gradients(kept.residual_add(trained[0], torch.neg), trained[:1]),
    )
    yield case(
        "DropBP.residual_add",
        "dropped",
        "fwd+bwd",
        eager=lambda: _gradients(trained[0] + trained[0].neg().detach(), trained[:1]),
        ours=lambda: _gradients(dropped.residual_add(trained[0], torch.neg), trained[:1]),
    )
    yield case(
        "gated_residual_rms_norm",
        "no gradient",
        "fwd",
        eager=lambda: add_then_norm(residual, branch, weight),
        aten=lambda: add_then_aten_norm(residual, branch, weight),
        raw=lambda: raw.gated_residual_rms_norm(residual, branch, weight, 1e-6, False),
        ours=lambda: gated_residual_rms_norm(residual, branch, weight),
    )
    yield case(
        "gated_residual_rms_norm",
        "kept, kept, recorded",
        "fwd",
        eager=lambda: add_then_norm(*trained, weight),
        aten=lambda: add_then_aten_norm(*trained, weight),
        raw=lambda: raw.gated_residual_rms_norm(residual, branch, weight, 1e-6, False),
        ours=lambda: gated_residual_rms_norm(*trained, weight),
    )
    yield case(
        "gated_residual_rms_norm",
        "kept, kept",
        "fwd+bwd",
        eager=lambda: _gradients(add_then_norm(*trained, weight), trained),
        aten=lambda: _gradients(add_then_aten_norm(*trained, weight), trained),
        ours=lambda: _gradients(gated_residual_rms_norm(*trained, weight), trained),
    )
    yield case(
        "gated_residual_rms_norm",
        "kept, dropped",
        "fwd+bwd",
        eager=lambda: _gradients(_without_norm_graph(*trained, weight), trained),
        ours=lambda: _gradients(gated_residual_rms_norm(*trained, weight, next_kept=False)[1], trained),
    )


def run(settings: Settings) -> Iterator[list[Row]]:
    """Rows of every case, one list a case; the times are of one call."""
    where = machine(settings.device, settings.commit)
    for case in make_cases(settings.device, NUM_CALLS[settings.scale]):
        if settings.has_time():
            timings = measure(case, settings.device, seconds=settings.seconds, min_rounds=settings.min_rounds)
            yield op_rows(case, timings, where, None)


@pytest.mark.parametrize("variant", ["eager", "ours"])
@pytest.mark.parametrize("index", range(NUM_CASES))
def test_bench_host_overhead(benchmark, index, variant):
    case = list(make_cases(torch.device("cpu"), 1))[index]
    benchmark.extra_info["case"] = f"{case.op}, {case.case}, {case.direction}"
    benchmark(case.variants[variant].run, ())


def _ignore_state(call: Callable[[], Any]) -> Callable[[Any], Any]:
    return lambda _: call()


def _gradients(outputs: Tensor | tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return torch.autograd.grad(outputs, inputs, outputs)


def _scale_gradient(branch: Tensor) -> Tensor:
    """The value of branch with four times its gradient, the way one writes it without a function of one's own."""
    return branch * 4.0 - (branch * 3.0).detach()


def _without_norm_graph(residual: Tensor, branch: Tensor, weight: Tensor) -> Tensor:
    new_residual = residual + branch
    with torch.no_grad():
        torch.nn.functional.rms_norm(new_residual, weight.shape, weight, 1e-6)
    return new_residual
