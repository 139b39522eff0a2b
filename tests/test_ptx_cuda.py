"""The CUDA extension as it was built, host code and kernels, run on a CPU (ptx/)."""

import importlib.util

import pytest
import torch
from op_cases import HUGE, RAW, Tensors, assert_as_the_reference, assert_last_rows_as_the_reference, call

from dropbp_kernels._backend import CUDA_STEMS
from dropbp_kernels.ops.schema import SCHEMAS

if importlib.util.find_spec("zstandard") is None:
    pytest.skip("needs zstandard, to read what nvcc compressed", allow_module_level=True)
from ptx import cuda_extension
from ptx.memory import Fault
from ptx.program import Instruction

pytestmark = [
    pytest.mark.skipif(not cuda_extension.objects(), reason="this checkout's CUDA extension was not built here"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="its ops have one implementation for CUDA, the real one"),
]

OPS = [op for stem, names in SCHEMAS.items() if stem in CUDA_STEMS for op in names]
CASES = [pytest.param(op, name, id=f"{op}-{name}") for op in OPS for name in RAW[op]]
BACKWARDS = [case for case in CASES if "norm_backward" in case.id]
# Not those that take single columns of rows, nor partial sums in float of packs of bfloat16, which are few.
DENSE = [op for op in OPS if not op.startswith(("column", "partial")) and "norm_backward" not in op]
FLAT = [op for op in DENSE if "norm" not in op]
FLOAT, BFLOAT16, DOUBLE = torch.float32, torch.bfloat16, torch.float64


@pytest.fixture(scope="module")
def extension(tmp_path_factory):
    return cuda_extension.Extension(cuda_extension.build(tmp_path_factory.mktemp("cuda")))


@pytest.fixture
def run(extension):
    return lambda op, arguments: call(lambda *copies: extension.call(op, *copies), arguments)


@pytest.mark.parametrize(
    ("rows", "width", "wide", "narrow"),
    [
        (5, 1032, FLOAT, BFLOAT16),
        (7, 134, BFLOAT16, BFLOAT16),  # no multiple of a pack
        (9, 64, FLOAT, FLOAT),  # four rows a block, one warp each
        (3, 70, DOUBLE, DOUBLE),
    ],
    ids=["packs", "elements", "warps", "double"],
)
@pytest.mark.parametrize(("op", "name"), CASES)
def test_computes_as_the_reference(run, op, name, rows, width, wide, narrow):
    arguments = RAW[op][name](Tensors(rows, width, wide, narrow))
    assert_as_the_reference(op, arguments, run(op, arguments))


@pytest.mark.parametrize(("op", "name"), BACKWARDS)
def test_rows_that_registers_do_not_hold(run, op, name):
    """Their sums over columns are in shared memory."""
    arguments = RAW[op][name](Tensors(3, 4128, FLOAT, FLOAT))
    assert_as_the_reference(op, arguments, run(op, arguments))


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


@pytest.mark.parametrize("op", HUGE)
def test_addresses_beyond_2_31_elements(extension, op):
    def run(*arguments):
        return extension.call(op, *arguments, num_last_blocks=4)

    assert_last_rows_as_the_reference(op, run)


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


def test_a_wrong_index_is_an_assertion(extension):
    with pytest.raises(Fault, match="assertion"):
        extension.call("partial_gather", torch.ones(4, 8), torch.tensor([8]))
