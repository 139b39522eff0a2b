"""gated_residual_rms_norm through its public function: forward, backward, and both, as a training step calls it."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from dropbp_kernels import _backend, reference
from dropbp_kernels.ops import gated_residual_rms_norm

from . import boundary_norms
from .baselines import RMS_EPS, add_then_aten_norm, add_then_norm, liger_add_rms_norm, quack_add_rms_norm
from .boundary_norms import DIRECTIONS, Function, Norm
from .directions import Inputs
from .rows import Row
from .settings import Settings

OP = "gated_residual_rms_norm"


def functions(device: torch.device) -> dict[str, Function]:
    """Every way to compute (normed, new_residual) without a peer package on `device`, not compiled."""
    return {
        "eager": add_then_norm,
        "aten": add_then_aten_norm,
        _backend.serving(OP, device.type): gated_residual_rms_norm,
    }


def exact(inputs: Inputs) -> list[Tensor]:
    """Results and gradients in float64, by the reference."""
    residual, branch, weight, grad_normed, grad_new = (t.detach().double() for part in inputs for t in part)
    normed, new_residual, rstd = reference.gated_residual_rms_norm_reference(residual, branch, weight, RMS_EPS, False)
    is_trained = inputs[0][2].requires_grad
    grad, grad_weight = reference.gated_residual_rms_norm_backward_reference(
        grad_normed, grad_new, new_residual, weight, rstd, False, is_trained
    )
    return [normed, new_residual, grad, grad, *([grad_weight] if is_trained else [])]


PEERS = {"liger": liger_add_rms_norm, "quack": quack_add_rms_norm}
NORM = Norm(OP, num_parameters=1, functions=functions, exact=exact, peers=PEERS)


def run(settings: Settings) -> Iterator[list[Row]]:
    """Rows of every case, one list a case. Raises WrongResult before a wrong variant is timed."""
    return boundary_norms.run(NORM, settings)


@pytest.mark.parametrize("variant", ["eager", "aten", "compile", "cpp"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_bench_gated_residual_rms_norm(benchmark, direction, variant):
    cases = boundary_norms.make_cases(NORM, 1024, 1024, torch.bfloat16, torch.device("cpu"), trains_weight=False)
    boundary_norms.benchmark_variant(benchmark, cases[direction], variant)
