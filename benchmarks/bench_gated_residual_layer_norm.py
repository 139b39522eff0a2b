"""gated_residual_layer_norm through its public function: forward, backward, and both, as a training step calls it."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from dropbp_kernels import _backend, reference
from dropbp_kernels.ops import gated_residual_layer_norm

from . import boundary_norms
from .baselines import LAYER_EPS, add_then_aten_layer_norm
from .boundary_norms import DIRECTIONS, Function, Norm
from .directions import Inputs
from .rows import Row
from .settings import Settings

OP = "gated_residual_layer_norm"


def functions(device: torch.device) -> dict[str, Function]:
    """Every way to compute (normed, new_residual) without a peer package on `device`, not compiled."""
    return {"eager": add_then_aten_layer_norm, _backend.serving(OP, device.type): gated_residual_layer_norm}


def exact(inputs: Inputs) -> list[Tensor]:
    """Results and gradients in float64, by the reference."""
    residual, branch, weight, bias, grad_normed, grad_new = (t.detach().double() for part in inputs for t in part)
    found = reference.gated_residual_layer_norm_reference(residual, branch, weight, bias, LAYER_EPS)
    normed, new_residual, mean, rstd = found
    is_trained = inputs[0][2].requires_grad
    grad, *grads = reference.gated_residual_layer_norm_backward_reference(
        grad_normed, grad_new, new_residual, weight, mean, rstd, is_trained, is_trained
    )
    return [normed, new_residual, grad, grad, *(grads if is_trained else [])]


NORM = Norm(OP, num_parameters=2, functions=functions, exact=exact)


def run(settings: Settings) -> Iterator[list[Row]]:
    """Rows of every case, one list a case. Raises WrongResult before a wrong variant is timed."""
    return boundary_norms.run(NORM, settings)


@pytest.mark.parametrize("variant", ["eager", "compile", "cpp"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_bench_gated_residual_layer_norm(benchmark, direction, variant):
    cases = boundary_norms.make_cases(NORM, 1024, 1024, torch.bfloat16, torch.device("cpu"), trains_weight=False)
    boundary_norms.benchmark_variant(benchmark, cases[direction], variant)
