"""swiglu and geglu through their public functions: forward, backward, both, and in place as a dropped branch runs."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dropbp_kernels import _backend, reference
from dropbp_kernels.ops import geglu, swiglu

from .baselines import available, compiled, peer, right_ones
from .directions import Inputs, results, variant
from .rows import Row, measured_rows
from .settings import Settings
from .timing import Case

OP = "glu"
Glu = Callable[[Tensor, Tensor], Tensor]
# name: (activation of the raw op, as models write it, our function)
KINDS: dict[str, tuple[str, Glu, Callable[..., Tensor]]] = {
    "swiglu": ("silu", lambda gate, up: F.silu(gate) * up, swiglu),
    "geglu": ("gelu", lambda gate, up: F.gelu(gate) * up, geglu),
    "geglu tanh": (
        "gelu_tanh",
        lambda gate, up: F.gelu(gate, approximate="tanh") * up,
        lambda *tensors, **options: geglu(*tensors, approximate="tanh", **options),
    ),
}
# liger-kernel has geglu by tanh alone. Its backward writes into its inputs.
LIGER = {"swiglu": ("swiglu", "LigerSiLUMulFunction"), "geglu tanh": ("geglu", "LigerGELUMulFunction")}
MOVED = {  # elements, in units of one input
    "fwd": 3,  # I/O: read gate + read up + write product
    "fwd in place": 3,  # I/O: read gate + read up + write gate
    "bwd": 5,  # I/O: read grad + read gate + read up + write grad_gate + write grad_up
    "fwd+bwd": 8,
}


def make_inputs(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    """gate and up, and the gradient of the product, each (rows, width)."""
    gate, up, grad = (torch.randn(rows, width, device=device, dtype=dtype) for _ in range(3))
    return (gate.requires_grad_(), up.requires_grad_()), (grad,)


def functions(kind: str, device: torch.device) -> dict[str, Glu]:
    """Every way to compute the product that can run on `device`."""
    _, eager, ours = KINDS[kind]
    peers = {}
    if kind in LIGER:
        module, name = LIGER[kind]
        peers["liger"] = lambda device: peer("liger-kernel", f"liger_kernel.ops.{module}", name, device).apply
    return {
        "eager": eager,
        _backend.serving(OP, device.type): ours,
        **available(peers, device),
        "compile": compiled(eager),
    }


def make_cases(kind: str, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> dict[str, Case]:
    """A case for each direction, in all variants, each checked against the reference in float64."""
    variants = functions(kind, device)
    inputs = make_inputs(rows, width, dtype, device)
    activation, eager, ours = KINDS[kind]
    gate, up, grad = (tensor.detach().double() for part in inputs for tensor in part)
    exact = [
        reference.glu_reference(gate, up, activation),
        *reference.glu_backward_reference(grad, gate, up, activation),
    ]
    what = f"{kind}, {dtype}, {rows} x {width}"
    variants = right_ones(what, variants, lambda function: results(function, inputs), results(eager, inputs), exact)

    in_place = {**variants, _backend.serving(OP, device.type): lambda gate, up: ours(gate, up, inplace=True)}
    return {
        direction: Case(
            op=kind.split()[0],
            case="in place" if direction == "fwd in place" else kind.partition(" ")[2] or "new tensor",
            direction=direction.split()[0],
            dtype=dtype,
            rows=rows,
            width=width,
            moved_bytes=moved * rows * width * dtype.itemsize,
            make_inputs=lambda: make_inputs(rows, width, dtype, device),
            variants={
                name: variant(function, direction, is_writing=name == "liger")
                for name, function in (in_place if direction == "fwd in place" else variants).items()
            },
        )
        for direction, moved in MOVED.items()
        if direction != "fwd in place" or kind == "swiglu"
    }


def run(settings: Settings) -> Iterator[list[Row]]:
    """Rows of every case, one list a case. Raises WrongResult before a wrong variant is timed."""
    return measured_rows(settings, KINDS, lambda *case: make_cases(*case).values())


@pytest.mark.parametrize("variant", ["eager", "compile", "cpp"])
@pytest.mark.parametrize("direction", MOVED)
def test_bench_glu(benchmark, direction, variant):
    case = make_cases("swiglu", 1024, 1024, torch.bfloat16, torch.device("cpu"))[direction]
    if variant not in case.variants:
        pytest.skip(f"{variant} cannot serve here")
    chosen, inputs = case.variants[variant], case.make_inputs()
    benchmark.pedantic(chosen.run, setup=lambda: ((chosen.prepare(inputs),), {}), rounds=20, warmup_rounds=2)
