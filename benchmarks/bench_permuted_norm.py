"""permuted_rms_norm and permuted_residual_add, a quarter of the rows kept, against the unpermuted kernels and eager.

eager       index_select and a norm in plain PyTorch, which keeps what its backward needs; index_add for the sum
compile     torch.compile of eager
unpermuted  this package's kernel of the same traffic without a permutation: gated_residual_rms_norm's backward, the
            plain sum; and for the forward PyTorch's own norm. It computes something else, so it is not checked.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dropbp_kernels import reference
from dropbp_kernels.permutation import draw_permutation

from .baselines import backends, compiled, raw_op, right_ones
from .rows import Row, measured_rows
from .settings import Settings
from .timing import Case, Variant

NORM, ADD = "permuted_norm", "permuted_residual_add"
EPS = 1e-6
KEPT_SHARE = 4


def make_inputs(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """residual, branch, grad (R, D); weight (D,); permutation (R,); and the first quarter as the kept rows (K, D)."""
    residual, branch, grad = (torch.randn(rows, width, device=device, dtype=dtype) for _ in range(3))
    num_kept = rows // KEPT_SHARE
    permutation = draw_permutation(rows, seed=0, step=0, branch=0, device=device)
    kept_x = residual.index_select(0, permutation[:num_kept])
    return {
        "residual": residual,
        "branch": branch,
        "kept": branch[:num_kept],  # as the branch computed them, in two
        "dropped": branch[num_kept:],
        "grad": grad,
        "weight": torch.ones(width, device=device, dtype=dtype),
        "permutation": permutation,
        "kept_x": kept_x,
        "grad_kept": torch.randn(num_kept, width, device=device, dtype=dtype),
        "rstd": torch.rsqrt(kept_x.float().square().mean(-1) + EPS),
        "mean": torch.empty(0, device=device),
    }


def eager_norm(t: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """kept, dropped, and what the backward of the kept rows needs of them alone: rows and rstd."""
    rows, num_kept = t["residual"].index_select(0, t["permutation"]), len(t["kept_x"])
    x = rows.float()
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
    normed = t["weight"] * (x * rstd).to(rows.dtype)
    return normed[:num_kept], normed[num_kept:], rows[:num_kept].clone(), rstd[:num_kept].flatten()


def eager_norm_backward(t: dict[str, Tensor]) -> Tensor:
    scale = t["rstd"].unsqueeze(-1)
    normalized = t["kept_x"].float() * scale
    grad = (t["grad_kept"] * t["weight"]).float()
    grad_x = scale * (grad - normalized * (grad * normalized).mean(-1, keepdim=True))
    places = t["permutation"][: len(grad)]
    return t["grad"].index_add_(0, places, grad_x.to(t["grad"].dtype))


def eager_add(t: dict[str, Tensor]) -> Tensor:
    return t["residual"].index_add(0, t["permutation"], t["branch"])


def ours(name: str, raw: Callable[..., Any]) -> Callable[[dict[str, Tensor]], Any]:
    def norm(t: dict[str, Tensor]) -> tuple[Tensor, ...]:
        num_kept, dtype = len(t["kept_x"]), t["residual"].dtype
        found = raw(t["residual"], t["weight"], None, t["permutation"], num_kept, EPS, False, False, dtype)
        return (*found[:3], found[4])

    def norm_backward(t: dict[str, Tensor]) -> Tensor:
        saved = t["kept_x"], t["weight"], t["mean"], t["rstd"], t["permutation"]
        raw(t["grad"], t["grad_kept"], *saved, False, False, False, False)
        return t["grad"]

    def add(t: dict[str, Tensor]) -> Tensor:
        return raw(t["residual"], t["kept"], t["dropped"], t["permutation"])

    return {"norm": norm, "norm backward": norm_backward, "add": add}[name]


def unpermuted_norm_backward(t: dict[str, Tensor]) -> Any:
    kept_grad = t["grad"][: len(t["kept_x"])]
    return torch.ops.dropbp_kernels.gated_residual_rms_norm_backward(
        t["grad_kept"], kept_grad, t["kept_x"], t["weight"], t["rstd"], False, False
    )


# name -> (stem, raw op, direction, elements moved in units of N for K = N / 4, eager, unpermuted)
PROBLEMS: dict[str, tuple[str, str, str, float, Callable[..., Any], Callable[..., Any]]] = {
    # I/O: read residual + write kept + write dropped + write the kept rows once more
    "norm": (
        NORM,
        "permuted_norm",
        "fwd",
        2.25,
        eager_norm,
        lambda t: F.rms_norm(t["residual"], t["weight"].shape, t["weight"], EPS),
    ),
    # I/O, of kept rows: read grad_kept + read x + read grad_residual + write grad_residual
    "norm backward": (NORM, "permuted_norm_backward_", "bwd", 1.0, eager_norm_backward, unpermuted_norm_backward),
    # I/O: read residual + read branch + write sum
    "add": (ADD, "permuted_residual_add", "fwd", 3.0, eager_add, lambda t: t["residual"] + t["branch"]),
}


def make_case(problem: str, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Case:
    """The case in all variants that can run on `device`, each checked against the reference in float64."""
    stem, raw_name, direction, elements, eager, unpermuted = PROBLEMS[problem]
    functions = {"eager": eager, "compile": compiled(eager)}
    for backend in backends(stem, device):
        functions[backend] = ours(problem, raw_op(backend, stem, raw_name, device))
    inputs = make_inputs(rows, width, dtype, device)
    doubles = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
    exact = _results(ours(problem, getattr(reference, f"{raw_name}_reference")), doubles)
    plain = _results(eager, inputs)
    what = f"{stem}, {problem}, {dtype}, {rows} x {width}"
    functions = right_ones(what, functions, lambda function: _results(function, inputs), plain, exact)
    functions["unpermuted"] = unpermuted
    return Case(
        op=stem,
        case=f"{problem}, a quarter kept",
        direction=direction,
        dtype=dtype,
        rows=rows,
        width=width,
        moved_bytes=round(elements * rows * width * dtype.itemsize),
        make_inputs=lambda: make_inputs(rows, width, dtype, device),
        variants={name: Variant(function) for name, function in functions.items()},
    )


def run(settings: Settings) -> Iterator[list[Row]]:
    """Rows of every case, one list a case. Raises WrongResult before a wrong variant is timed."""
    return measured_rows(settings, PROBLEMS, lambda *case: [make_case(*case)])


def _results(function: Callable[..., Any], inputs: dict[str, Tensor]) -> list[Tensor]:
    """The results of one call on a copy of the gradient that some write into."""
    found = function({**inputs, "grad": inputs["grad"].clone()})
    return list(found) if isinstance(found, tuple) else [found]
