"""rope through its public function: forward, backward, both, and in place as a dropped branch runs.

Heads of 64 channels in the layout a projection returns, (1, rows, width / 64, 64); the gradient comes with the heads
first, as attention hands it back. liger-kernel's rope turns queries and keys in one call and has no case here.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from dropbp_kernels import _backend, reference
from dropbp_kernels.blocks import rotary_embedding
from dropbp_kernels.ops import rope

from .baselines import compiled, right_ones
from .directions import Inputs, results, variant
from .rows import Row, measured_rows
from .settings import Settings
from .timing import Case

OP = "rope"
HEAD_DIM = 64
Turn = Callable[[Tensor, Tensor, Tensor], Tensor]
MOVED = {  # elements, in units of x; cos and sin stay in the cache
    "fwd": 2,  # I/O: read x + write output
    "fwd in place": 2,  # I/O: read x + write x
    "bwd": 2,  # I/O: read grad + write grad_x
    "fwd+bwd": 4,
}


def eager(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As transformers' models do."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]


def make_inputs(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    """x (1, rows, width / 64, 64), cos, sin (rows, 64); and a gradient whose heads come first in memory."""
    num_heads = width // HEAD_DIM
    x = torch.randn(1, rows, num_heads, HEAD_DIM, device=device, dtype=dtype).requires_grad_()
    grad = torch.randn(1, num_heads, rows, HEAD_DIM, device=device, dtype=dtype).transpose(1, 2)
    return (x, *rotary_embedding(rows, HEAD_DIM, device=device, dtype=dtype)), (grad,)


def make_cases(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> dict[str, Case]:
    """A case for each direction, in all variants, each checked against the reference in float64."""
    serving = _backend.serving(OP, device.type)
    variants: dict[str, Turn] = {"eager": eager, serving: rope, "compile": compiled(eager)}
    inputs = make_inputs(rows, width, dtype, device)
    x, cos, sin, grad = (tensor.detach().double() for part in inputs for tensor in part)
    exact = [reference.rope_reference(x, cos, sin, False), reference.rope_reference(grad, cos, sin, True)]
    what = f"{OP}, {dtype}, {rows} x {width}"
    variants = right_ones(what, variants, lambda function: results(function, inputs), results(eager, inputs), exact)
    in_place = {**variants, serving: lambda x, cos, sin: rope(x, cos, sin, inplace=True)}
    return {
        direction: Case(
            op=OP,
            case="in place" if direction == "fwd in place" else "new tensor",
            direction=direction.split()[0],
            dtype=dtype,
            rows=rows,
            width=width,
            moved_bytes=moved * rows * width * dtype.itemsize,
            make_inputs=lambda: make_inputs(rows, width, dtype, device),
            variants={
                name: variant(function, direction)
                for name, function in (in_place if direction == "fwd in place" else variants).items()
            },
        )
        for direction, moved in MOVED.items()
    }


def run(settings: Settings) -> Iterator[list[Row]]:
    """Rows of every case, one list a case. Raises WrongResult before a wrong variant is timed."""
    return measured_rows(settings, [OP], lambda _, *case: make_cases(*case).values())


@pytest.mark.parametrize("variant", ["eager", "compile", "cpp"])
@pytest.mark.parametrize("direction", MOVED)
def test_bench_rope(benchmark, direction, variant):
    case = make_cases(1024, 1024, torch.bfloat16, torch.device("cpu"))[direction]
    if variant not in case.variants:
        pytest.skip(f"{variant} cannot serve here")
    chosen, inputs = case.variants[variant], case.make_inputs()
    benchmark.pedantic(chosen.run, setup=lambda: ((chosen.prepare(inputs),), {}), rounds=20, warmup_rounds=2)
