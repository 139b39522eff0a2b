"""The CUDA extension as it was built, host code and kernels, run on a CPU (ptx/)."""

import pytest
import torch
import torch.nn.functional as F
from inputs import make
from op_cases import HUGE, RAW, ROUNDING, Tensors, assert_as_the_reference, assert_last_rows_as_the_reference, call
from ptx import cuda_extension
from ptx.memory import Fault
from ptx.program import Instruction

from dropbp_kernels import reference
from dropbp_kernels._backend import CUDA_STEMS
from dropbp_kernels.ops.schema import SCHEMAS

pytestmark = [
    pytest.mark.skipif(not cuda_extension.objects(), reason="this checkout's CUDA extension was not built here"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="its ops have one implementation for CUDA, the real one"),
]

OPS = [op for stem, names in SCHEMAS.items() if stem in CUDA_STEMS for op in names]
CASES = [pytest.param(op, name, id=f"{op}-{name}") for op in OPS for name in RAW[op]]
NORMS = tuple(f"{op}-" for op in OPS if op.endswith("norm"))
BACKWARDS = [case for case in CASES if "norm_backward" in case.id]
# Not those that take single columns of rows, nor partial sums in float of packs of bfloat16, which are few.
DENSE = [op for op in OPS if not op.startswith(("column", "partial")) and "norm_backward" not in op]
FLAT = [op for op in DENSE if "norm" not in op]
FLOAT, HALF, BFLOAT16, DOUBLE = torch.float32, torch.float16, torch.bfloat16, torch.float64


def of_samples(t):
    """Arguments of rope for two samples with angles of their own; the heads of x lie one after another."""
    x = make((2, 2, t.rows, t.width), t.wide).transpose(1, 2)
    return x, *(make((2, t.rows, t.width // 4 * 2), t.wide) for _ in range(2))


def half(t):
    return t.branch()[..., : t.width // 2]


def transposed(t):
    return make((t.width, t.rows), t.narrow).t()


# What only CUDA's kernels tell apart, by its name: the raw op, and what it is called with.
STRIDES = {
    "glu of halves": ("glu_", lambda t: (*t.branch().chunk(2, dim=-1), "gelu_tanh")),
    "gradients of halves": ("glu_backward", lambda t: (half(t), *t.branch().chunk(2, dim=-1), "silu")),
    "gradients in halves": ("glu_backward_", lambda t: (half(t), *t.branch().chunk(2, dim=-1), "gelu")),
    "angles of samples": ("rope", lambda t: (*of_samples(t), False)),
    "angles of samples, back": ("rope", lambda t: (*of_samples(t), True)),
    "angles of samples, in place": ("rope_", of_samples),
    "columns that are contiguous": (
        "column_update_", lambda t: (transposed(t), t.stream()[:, 0, :2], torch.tensor([3, 0]), 0.5)
    ),
    "columns that are contiguous, restored": (
        "column_restore_", lambda t: (transposed(t), t.branch()[:, 0, :2], torch.tensor([3, 0]))
    ),
}  # fmt: skip
# What takes rows or columns by number.
INDEXED = {
    "gated_residual_add_": "rows", "gated_residual_add_backward": "rows", "permuted_residual_add": "some",
    "permuted_norm": "layer", "permuted_norm_backward_": "layer", "partial_gather": "twice the same",
    "column_update_": "two", "column_restore_": "two",
}  # fmt: skip


@pytest.fixture(scope="module")
def extension(tmp_path_factory):
    try:
        library = cuda_extension.build(tmp_path_factory.mktemp("cuda"))
    except ValueError as reason:
        pytest.skip(f"cannot read what nvcc wrote: {reason}")
    return cuda_extension.Extension(library)


@pytest.fixture
def run(extension):
    return lambda op, arguments, **gpu: call(lambda *copies: extension.call(op, *copies, **gpu), arguments)


@pytest.mark.parametrize(
    ("rows", "width", "wide", "narrow"),
    [
        (5, 1032, FLOAT, BFLOAT16),
        (7, 134, BFLOAT16, BFLOAT16),  # no multiple of a pack
        (9, 64, FLOAT, FLOAT),  # four rows a block, one warp each
        (3, 70, DOUBLE, DOUBLE),
        (3, 72, HALF, HALF),
    ],
    ids=["packs", "elements", "warps", "double", "half"],
)
@pytest.mark.parametrize(("op", "name"), CASES)
def test_computes_as_the_reference(run, op, name, rows, width, wide, narrow):
    arguments = RAW[op][name](Tensors(rows, width, wide, narrow))
    assert_as_the_reference(op, arguments, run(op, arguments))


@pytest.mark.parametrize(("wide", "narrow", "width"), [(FLOAT, BFLOAT16, 70), (HALF, HALF, 64)], ids=["float", "half"])
@pytest.mark.parametrize(("op", "make_arguments"), STRIDES.values(), ids=STRIDES)
def test_strides(run, op, make_arguments, wide, narrow, width):
    arguments = make_arguments(Tensors(3, width, wide, narrow))
    assert_as_the_reference(op, arguments, run(op, arguments))


@pytest.mark.parametrize("op", OPS)
def test_tensors_that_start_at_no_boundary_of_16_bytes(run, op):
    arguments = [
        value.new_zeros(value.numel() + 1)[1:].view(value.shape).copy_(value)
        if isinstance(value, torch.Tensor)
        else value
        for value in next(iter(RAW[op].values()))(Tensors(3, 64, FLOAT, FLOAT))
    ]
    assert_as_the_reference(op, arguments, run(op, arguments))


@pytest.mark.parametrize(("op", "name"), [case for case in CASES if case.id.startswith(NORMS)])
def test_rows_that_are_read_again(run, op, name):
    """Since registers do not hold them; a thread has several elements."""
    arguments = RAW[op][name](Tensors(1, 1031, FLOAT, FLOAT))
    assert_as_the_reference(op, arguments, run(op, arguments))


@pytest.mark.parametrize("shared_bytes", [227 << 10, 4096], ids=["in shared memory", "in global memory"])
@pytest.mark.parametrize(("op", "name"), BACKWARDS)
def test_sums_over_columns_of_rows_that_registers_do_not_hold(run, op, name, shared_bytes):
    arguments = RAW[op][name](Tensors(2, 4128, FLOAT, FLOAT))
    assert_as_the_reference(op, arguments, run(op, arguments, shared_bytes=shared_bytes))


def test_more_partial_sums_than_threads_that_add_them(run):
    op = "gated_residual_layer_norm_backward"
    arguments = RAW[op]["trained"](Tensors(35, 33, FLOAT, FLOAT))
    assert_as_the_reference(op, arguments, run(op, arguments, num_multiprocessors=70))


@pytest.mark.parametrize("op", ["gated_residual_layer_norm", "permuted_norm"])
def test_a_large_mean(extension, op):
    """Which squares that are not taken around it would lose in their rounding."""
    tensors = Tensors(3, 64, FLOAT, FLOAT)
    x, rest = 4000 + tensors.stream(), RAW[op]["bias" if op.startswith("gated") else "layer"](tensors)[1:]
    result = extension.call(op, x, *rest)
    expected = getattr(reference, f"{op}_reference")(x, *rest)
    for ours, theirs in zip(result, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_gates_of_any_size(extension, activation):
    """Whose squares and exponentials are infinite."""
    function = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}[activation]
    for dtype, large in ((FLOAT, 1e25), (HALF, 1e4), (BFLOAT16, 1e25)):
        gate = torch.tensor([large, -large, 104.0, -104.0, 89.0, -89.0, 21.0, -0.0], dtype=dtype)
        one, exact = torch.ones_like(gate), gate.double().requires_grad_()
        value = function(exact)
        (slope,) = torch.autograd.grad(value.sum(), exact)
        actual = (
            extension.call("glu", gate, one, activation),
            *extension.call("glu_backward", one, gate, one, activation),
        )
        for ours, theirs in zip(actual, (value, slope, value), strict=True):
            torch.testing.assert_close(ours, theirs.detach().to(dtype), rtol=ROUNDING[dtype], atol=1e-6)


@pytest.mark.parametrize(("of_weight", "of_delta"), [(BFLOAT16, FLOAT), (FLOAT, DOUBLE), (DOUBLE, DOUBLE)])
def test_changed_columns_are_rounded_once(extension, of_weight, of_delta):
    weight, delta, index = torch.randn(3, 8, dtype=of_weight), torch.randn(3, 2, dtype=of_delta), torch.tensor([3, 0])
    expected = weight.clone()
    expected[:, index] = (weight[:, index].to(of_delta) + 0.5 * delta).to(of_weight)
    extension.call("column_update_", weight, delta, index, 0.5)
    assert weight.equal(expected)


def test_rows_of_factor_zero_are_not_read(extension):
    grad, factor = torch.full((3, 64), float("nan")), torch.tensor([0.0, 2.0])
    grad[2] = 3
    result = extension.call("gated_residual_add_backward", grad, torch.tensor([1, 2]), factor, 0.5, FLOAT)
    assert result.tolist() == [[0.0] * 64, [3.0] * 64]


@pytest.mark.parametrize(("op", "name"), [case for case in CASES if case.values[0] in DENSE])
def test_moves_no_sector_twice(extension, op, name):
    """Neighbouring threads touch neighbouring bytes: an instruction moves what its threads asked for.

    Also of a stream in float and branches in bfloat16, where a kernel holds nothing between its packs.
    """
    for wide in (BFLOAT16, FLOAT) if op in FLAT else (BFLOAT16,):
        extension.call(op, *RAW[op][name](Tensors(6, 1024, wide, BFLOAT16)))
        for traffic in extension.traffic.values():
            assert traffic.sectors_read * 32 <= 1.02 * traffic.bytes_read
            # A statistic of a row, one element, takes a sector of its own.
            assert traffic.sectors_written * 32 <= 1.02 * traffic.bytes_written + 24 * 32


@pytest.mark.parametrize(("op", "name"), HUGE)
def test_addresses_beyond_2_32_elements(extension, op, name):
    def run(*arguments):
        return extension.call(op, *arguments, num_last_blocks=4)

    try:
        assert_last_rows_as_the_reference(op, name, run)
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        pytest.skip("the system gives no 9 GB of memory at a time, which nobody touches")


def test_every_barrier_is_needed(extension, monkeypatch):
    """Without any one of them threads would race, and this machine would see it."""
    op = "gated_residual_layer_norm_backward"
    arguments, programs, parse = RAW[op]["trained"](Tensors(3, 4128, FLOAT, FLOAT)), [], cuda_extension.parse
    monkeypatch.setattr(cuda_extension, "parse", lambda *module: programs.append(parse(*module)) or programs[-1])
    cuda_extension._kernel.cache_clear()
    extension.call(op, *arguments)
    barriers = [(program.code, at) for program in programs for at, i in enumerate(program.code) if i.opcode == "bar"]
    assert len(programs) == 2
    assert len(barriers) == 3
    for code, at in barriers:
        instruction, code[at] = code[at], Instruction("nothing", "mov", ["b32"], ["_", "0"])
        with pytest.raises(Fault, match="race in shared memory"):
            extension.call(op, *arguments)
        code[at] = instruction
    extension.call(op, *arguments)


@pytest.mark.parametrize(("op", "name"), INDEXED.items())
def test_a_wrong_index_is_an_assertion(extension, op, name):
    tensors = Tensors(3, 8, FLOAT, FLOAT)
    for wrong in (-1, tensors.width if op.startswith(("partial", "column")) else tensors.rows):
        arguments = RAW[op][name](tensors)
        (index,) = [value for value in arguments if isinstance(value, torch.Tensor) and value.dtype == torch.int64]
        index[0] = wrong
        with pytest.raises(Fault, match="assertion"):
            extension.call(op, *arguments)
