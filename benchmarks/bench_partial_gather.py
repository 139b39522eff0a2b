"""Channels: gathering a few of an input, changing and restoring those columns of a weight, and their gradient.

eager     index_select, index_copy_ and a plain product in PyTorch
compile   torch.compile of eager
dense     the gradient of the whole weight, of which the columns are taken: what is not done
swapped   the same product the other way round, (r, N) times (N, out), and its result transposed
bound     the norm without the gather behind it: what a norm that saves the channels itself could at best take
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .baselines import backends, compiled, raw_op, right_ones
from .rows import Row, measured_rows
from .settings import Settings
from .timing import Case, Variant

GATHER, UPDATE = "partial_gather", "column_update"
EPS, SCALE = 1e-6, 4.0
NUM_CHANNELS = 16
Inputs = dict[str, Tensor]


def make_inputs(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    """x, branch (R, D), weight (D,), index (r,), and columns (R, r): a delta, or what is put back."""
    x, branch = (torch.randn(rows, width, device=device, dtype=dtype) for _ in range(2))
    return {
        "x": x,
        "branch": branch,
        "weight": torch.ones(width, device=device, dtype=dtype),
        "index": torch.randperm(width, device=device)[:NUM_CHANNELS],
        "columns": torch.randn(rows, NUM_CHANNELS, device=device, dtype=dtype),
    }


def eager_gather(t: Inputs) -> Tensor:
    return t["x"].index_select(-1, t["index"])


def eager_update(t: Inputs) -> tuple[Tensor, Tensor]:
    original = t["x"].index_select(1, t["index"])
    t["x"].index_copy_(1, t["index"], torch.add(original, t["columns"], alpha=SCALE))
    return t["x"], original


def eager_restore(t: Inputs) -> Tensor:
    return t["x"].index_copy_(1, t["index"], t["columns"])


def eager_norm(t: Inputs) -> tuple[Tensor, Tensor]:
    residual = t["x"] + t["branch"]
    x = residual.float()
    normed = t["weight"] * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)).to(residual.dtype)
    return normed, normed.index_select(-1, t["index"])


def product(t: Inputs) -> Tensor:
    return t["x"].t().mm(t["columns"])


def swapped_product(t: Inputs) -> Tensor:
    return t["columns"].t().mm(t["x"]).t()


def dense_gradient(t: Inputs) -> Tensor:
    return t["x"].t().mm(t["branch"]).index_select(1, t["index"])


def ours(problem: str, backend: str, device: torch.device) -> Callable[[Inputs], Any]:
    gather = raw_op(backend, GATHER, "partial_gather", device)
    if problem == "gather":
        return lambda t: gather(t["x"], t["index"])
    if problem == "norm, then gather":
        norm = raw_op(backend, "gated_residual_rms_norm", "gated_residual_rms_norm", device)

        def norm_and_gather(t: Inputs) -> tuple[Tensor, Tensor]:
            normed = norm(t["x"], t["branch"], t["weight"], EPS, False)[0]
            return normed, gather(normed, t["index"])

        return norm_and_gather
    if problem == "update":
        update = raw_op(backend, UPDATE, "column_update_", device)
        return lambda t: (t["x"], update(t["x"], t["columns"], t["index"], SCALE))
    restore = raw_op(backend, UPDATE, "column_restore_", device)

    def put_back(t: Inputs) -> Tensor:
        restore(t["x"], t["columns"], t["index"])
        return t["x"]

    return put_back


def bound(t: Inputs) -> Any:
    return torch.ops.dropbp_kernels.gated_residual_rms_norm(t["x"], t["branch"], t["weight"], EPS, False)


# problem -> (stem, direction, elements moved: whole tensors (R, D), columns (R, r), columns (D, r); eager)
PROBLEMS: dict[str, tuple[str, str, tuple[int, int, int], Callable[[Inputs], Any]]] = {
    "gather": (GATHER, "fwd", (0, 2, 0), eager_gather),  # I/O: read + write channels
    "update": (UPDATE, "fwd", (0, 4, 0), eager_update),  # I/O: read + write columns, read delta, write original
    "restore": (UPDATE, "fwd", (0, 2, 0), eager_restore),  # I/O: read original, write columns
    "norm, then gather": (GATHER, "fwd", (4, 1, 0), eager_norm),  # I/O: read 2, write 2, write channels
    "gradient of columns": (GATHER, "bwd", (1, 1, 1), product),  # I/O: read grad + read channels, write gradient
}


def make_case(problem: str, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Case:
    """The case in all variants that can run on `device`, each checked against the reference in float64."""
    stem, direction, moved, eager = PROBLEMS[problem]
    functions: dict[str, Callable[[Inputs], Any]] = {"eager": eager, "compile": compiled(eager)}
    if problem == "gradient of columns":
        functions["swapped"] = swapped_product
    else:
        functions |= {backend: ours(problem, backend, device) for backend in backends(stem, device)}
    inputs = make_inputs(rows, width, dtype, device)
    doubles = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
    exact, plain = _results(eager, doubles), _results(eager, inputs)
    what = f"{problem}, {dtype}, {rows} x {width}"
    functions = right_ones(what, functions, lambda function: _results(function, inputs), plain, exact)
    if problem == "gradient of columns":
        functions["dense"] = dense_gradient
    if problem == "norm, then gather":
        functions["bound"] = bound
    elements = moved[0] * rows * width + (moved[1] * rows + moved[2] * width) * NUM_CHANNELS
    return Case(
        op=stem,
        case=f"{problem}, r = {NUM_CHANNELS}",
        direction=direction,
        dtype=dtype,
        rows=rows,
        width=width,
        moved_bytes=elements * dtype.itemsize,
        make_inputs=lambda: make_inputs(rows, width, dtype, device),
        variants={name: Variant(function) for name, function in functions.items()},
    )


def run(settings: Settings) -> Iterator[list[Row]]:
    """Rows of every case, one list a case. Raises WrongResult before a wrong variant is timed."""
    return measured_rows(settings, PROBLEMS, lambda *case: [make_case(*case)])


def _results(function: Callable[[Inputs], Any], inputs: Inputs) -> list[Tensor]:
    """The results of one call on a copy of what some write into."""
    found = function({**inputs, "x": inputs["x"].clone()})
    return list(found) if isinstance(found, tuple) else [found]
