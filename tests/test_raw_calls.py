"""Wrong calls of raw ops, past the checks of public functions: compiled kernels refuse what would leave a tensor.

And what they say where memory is missing.
"""

import pytest
import torch

from dropbp_kernels import _backend

X, PARAMETER, STATISTIC = torch.ones(4, 6), torch.ones(6), torch.ones(4)
HEADS, TABLE = torch.ones(2, 3, 4, 8), torch.ones(3, 8)
FEW = torch.ones(3, 5)  # as the rest of a tensor that is too small
DEEP = torch.ones([1] * 65)
HUGE = torch.ones(1).expand(1 << 46)  # a contiguous copy takes 256 TiB
ORDER, SWAPPED, TWICE = torch.arange(4), torch.tensor([1, 0]), torch.tensor([0, 1, 1, 3])
NORM = (1e-5, False, False, torch.float32)
NOT_LONG = "expected dtype Long, got Int"

CASES = [
    ("gated_residual_add", (X, FEW, None), "branch: expected"),
    ("gated_residual_add", (X, X[:2], SWAPPED.int()), f"rows: {NOT_LONG}"),
    ("gated_residual_add", (X, FEW[:2], SWAPPED), "branch: expected size 6 in dimension 1, got 5"),
    ("gated_residual_add_", (X, X[:3], SWAPPED), "rows: expected 3 elements, got 2"),
    ("gated_residual_add_backward", (X, None, PARAMETER, 1.0, torch.float32), "row_scale: expected 4 elements, got 6"),
    (
        "gated_residual_add_backward",
        (X[0, 0], SWAPPED[1:], None, 1.0, torch.float32),
        "grad_output: expected at least one dimension, got 0",
    ),
    ("gated_residual_rms_norm", (X, FEW, PARAMETER, 1e-5, False), "branch: expected 24 elements, got 15"),
    ("gated_residual_rms_norm", (X, X, STATISTIC, 1e-5, False), "weight: expected as many elements"),
    ("gated_residual_rms_norm_backward", (FEW, None, X, PARAMETER, STATISTIC, False, True), "grad_normed: expected 24"),
    ("gated_residual_rms_norm_backward", (X, FEW, X, PARAMETER, STATISTIC, False, True), "grad_new_residual: expected"),
    ("gated_residual_rms_norm_backward", (X, X.half(), X, PARAMETER, STATISTIC, False, True), "expected dtype Float"),
    ("gated_residual_rms_norm_backward", (X, None, X, PARAMETER, PARAMETER, False, True), "rstd: expected 4 elements"),
    ("gated_residual_layer_norm", (X, FEW, PARAMETER, None, 1e-5), "branch: expected 24 elements, got 15"),
    ("gated_residual_layer_norm", (X, X, PARAMETER, STATISTIC, 1e-5), "bias: expected 6 elements, got 4"),
    ("gated_residual_layer_norm", (X, X, PARAMETER, PARAMETER.half(), 1e-5), "bias: expected dtype Float, got Half"),
    (
        "gated_residual_layer_norm_backward",
        (FEW, None, X, PARAMETER, STATISTIC, STATISTIC, False, False),
        "grad_normed: expected 24 elements, got 15",
    ),
    (
        "gated_residual_layer_norm_backward",
        (X, None, X, PARAMETER, STATISTIC[:3], STATISTIC, False, False),
        "mean: expected 4 elements, got 3",
    ),
    ("permuted_norm", (X, PARAMETER, None, ORDER.int(), 2, *NORM), f"permutation: {NOT_LONG}"),
    ("permuted_norm", (X, PARAMETER, None, ORDER[:3], 2, *NORM), "permutation: expected the size of leading"),
    ("permuted_norm", (X, PARAMETER, None, ORDER, 5, *NORM), "num_kept: expected 0 to 4, got 5"),
    ("permuted_norm", (X, PARAMETER, None, ORDER, -1, *NORM), "num_kept: expected 0 to 4, got -1"),
    ("permuted_norm", (X, STATISTIC, None, ORDER, 2, *NORM), "weight: expected 6 elements, got 4"),
    ("permuted_norm", (X, PARAMETER, STATISTIC, ORDER, 2, *NORM), "bias: expected 6 elements, got 4"),
    ("permuted_norm", (X, PARAMETER, None, TWICE, 2, *NORM), "permutation: expected each number"),
    *(
        ("permuted_norm_backward_", (grad, kept, rows, PARAMETER, mean, rstd, order, True, False, True, True), message)
        for grad, kept, rows, mean, rstd, order, message in (
            (X, FEW, X[:2], STATISTIC[:2], STATISTIC[:2], ORDER, "grad_kept: expected 12 elements, got 15"),
            (FEW, X[:2], X[:2], STATISTIC[:2], STATISTIC[:2], ORDER, "grad_residual: expected 24 elements, got 15"),
            (X, X[:2], X[:2], STATISTIC[:3], STATISTIC[:2], ORDER, "mean: expected 2 elements, got 3"),
            (X, X[:2], X[:2], STATISTIC[:2], STATISTIC[:3], ORDER, "rows: expected 18 elements, got 12"),
            (X, X[:2], X[:2], STATISTIC[:2], STATISTIC[:2].double(), ORDER, "rstd: expected dtype Float, got Double"),
            (X.double(), X[:2], X[:2], STATISTIC[:2], STATISTIC[:2], ORDER, "grad_residual: expected dtype Float"),
            (X, X, X, STATISTIC, STATISTIC, SWAPPED, "rows: expected at most 2, got 4"),
            (X, X[:2], X[:2], STATISTIC[:2], STATISTIC[:2], TWICE, "permutation: expected each number"),
        )
    ),
    ("permuted_residual_add", (X, X[:2], X[2:].half(), ORDER), "dropped: expected dtype Float, got Half"),
    ("permuted_residual_add", (X, X[:1], X[2:], ORDER), "dropped: expected 18 elements, got 12"),
    ("permuted_residual_add", (X, FEW[:2], X[2:], ORDER), "kept: expected 12 elements, got 10"),
    ("permuted_residual_add", (FEW, X[:2], X[2:], ORDER), "residual: expected 12 elements, got 15"),
    ("permuted_residual_add", (X, X[:2], X[2:], ORDER.int()), f"permutation: {NOT_LONG}"),
    (
        "permuted_residual_add",
        (X, X[:2], X[2:], ORDER + 1),
        "permutation: expected each number from 0 to 3 once, got 4",
    ),
    ("glu", (X, FEW, "silu"), "up: expected the shape of gate"),
    ("glu", (DEEP, DEEP, "silu"), "expected at most 64 dimensions, got 65"),
    ("glu", (X, X.double(), "silu"), "up: expected dtype Float, got Double"),
    ("glu_", (X, FEW, "silu"), "up: expected the shape of gate"),
    *((op, (FEW, X, X, "gelu"), "grad_output: expected the shape") for op in ("glu_backward", "glu_backward_")),
    *((op, (X, X, FEW, "gelu"), "up: expected the shape of gate") for op in ("glu_backward", "glu_backward_")),
    ("partial_gather", (X, SWAPPED.int()), f"index: {NOT_LONG}"),
    ("partial_gather", (torch.tensor(1.0), SWAPPED), "input: expected at least one dimension"),
    ("column_update_", (X, FEW, SWAPPED, 1.0), "delta: expected 8 elements, got 15"),
    ("column_update_", (X, X[:, :2], SWAPPED.int(), 1.0), f"index: {NOT_LONG}"),
    ("column_update_", (PARAMETER, X[:, :2], SWAPPED, 1.0), "weight: expected 2 dimensions, got 1"),
    ("column_restore_", (X, FEW, SWAPPED), "original: expected 8 elements, got 15"),
    ("column_restore_", (X, X[:, :2].half(), SWAPPED), "original: expected dtype Float, got Half"),
    ("l1_distances", (HEADS,), "features: expected 2 dimensions, got 4"),
    ("rope", (X, TABLE, TABLE, False), "x: expected 4 dimensions, got 2"),
    ("rope", (HEADS, PARAMETER, PARAMETER, False), "cos: expected 2 or 3 dimensions, got 1"),
    ("rope", (HEADS, TABLE[:1], TABLE[:1], False), "cos: expected shape"),
    ("rope", (HEADS, TABLE.expand(3, 3, 8), TABLE, False), "cos: expected shape"),
    ("rope", (HEADS[..., :6], TABLE, TABLE, False), "cos: expected shape"),
    ("rope", (HEADS, TABLE[:, :5], TABLE[:, :5], False), "cos: expected shape"),
    ("rope", (HEADS, TABLE.half(), TABLE.half(), False), "cos: expected dtype Float, got Half"),
    ("rope", (HEADS, TABLE, TABLE[:1], False), "sin: expected 24 elements, got 8"),
    ("rope_", (HEADS, TABLE, TABLE.half()), "sin: expected dtype Float, got Half"),
]


@pytest.mark.parametrize(("op", "arguments", "message"), CASES)
def test_compiled_kernel_refuses(op, arguments, message):
    if (reason := _backend.why_not("cpp", "gated_residual_add")) is not None:
        pytest.skip(f"cpp: {reason}")
    arguments = [value.clone() if isinstance(value, torch.Tensor) else value for value in arguments]
    of_arguments = RuntimeError if torch.__version__ >= "2.15" else ValueError
    with _backend.use_backend("cpp"), pytest.raises((of_arguments, IndexError), match=message):
        getattr(torch.ops.dropbp_kernels, op)(*arguments)


@pytest.mark.parametrize(
    ("op", "arguments", "message"),
    [
        ("glu", (ORDER, ORDER, "silu"), "gate: expected dtype Float, Half, BFloat16 or Double, got Long"),
        ("gated_residual_add", (X.half(), X, None), "residual: expected a dtype that holds branch's Float, got Half"),
    ],
)
def test_compiled_kernel_refuses_a_dtype(op, arguments, message):
    if (reason := _backend.why_not("cpp", "gated_residual_add")) is not None:
        pytest.skip(f"cpp: {reason}")
    with _backend.use_backend("cpp"), pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.dropbp_kernels, op)(*arguments)


@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        ("glu", (HUGE, HUGE, "silu")),  # memory for a result
        ("gated_residual_add_backward", (HUGE, None, None, 1.0, torch.float32)),  # for a contiguous copy
    ],
)
def test_missing_memory_is_said_in_the_words_of_pytorch(op, arguments):
    """For which accelerate and Lightning look, to try a smaller batch."""
    if (reason := _backend.why_not("cpp", "gated_residual_add")) is not None:
        pytest.skip(f"cpp: {reason}")
    with _backend.use_backend("cpp"), pytest.raises(RuntimeError, match="DefaultCPUAllocator: can't allocate memory"):
        getattr(torch.ops.dropbp_kernels, op)(*arguments)
