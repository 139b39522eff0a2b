"""What the interpreter cannot show of the Triton kernels: that they compile for GPUs, and how they index.

The numbers are tested with the ops (`test_gated_residual_add.py`, `test_gated_residual_rms_norm.py`).
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import forks
import pytest
import torch
from op_cases import RAW

import dropbp_kernels

pytest.importorskip("triton")
from dropbp_kernels._triton import gated_residual_rms_norm as norm_kernels
from dropbp_kernels._triton import rows

# Compiles every kernel for GPUs that need not be there; prints {architecture: {kernel: [Triton IR, bytes of machine
# code, fused multiply-adds]}}. float64 is for tests, and compiled for one of them.
COMPILE = """
import json, sys
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dropbp_kernels._triton import (
    column_update, gated_residual_add as add, gated_residual_layer_norm as layer_norm, gated_residual_rms_norm as norm,
    glu, l1_distances, partial_gather, permuted_norm, permuted_residual_add as permuted_add, rope,
)
from dropbp_kernels.tuning import Config

SCALARS = {name + rest: "fp32" for name in ("scale", "grad_scale", "eps") for rest in ("", "_rest")}

def compile(name, kernel, element, wide, num_warps=8, **constants):
    indices = {"rows_ptr": "*i64", "permutation_ptr": "*i64", "index_ptr": "*i64"}
    types = {**indices, "row_scale_ptr": "*fp32", "rstd_ptr": "*" + wide, "partial_ptr": "*" + wide}
    types |= {name: "*" + wide for name in ("mean_ptr", "weight_partial_ptr", "bias_partial_ptr")}
    if "WIDE" in kernel.arg_names:
        constants["WIDE"] = {"fp32": tl.float32, "fp64": tl.float64}[wide]
    signature = {}
    for argument in kernel.arg_names:
        default = "*" + element if argument.endswith("_ptr") else "i32"
        signature[argument] = "constexpr" if argument in constants else {**SCALARS, **types}.get(argument, default)
    places = {(kernel.arg_names.index(key),): value for key, value in constants.items()}
    source = ASTSource(kernel, signature, constexprs=places)
    options = Config(1, num_warps).options
    done = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    results[name] = [done.asm["ttir"], len(done.asm["cubin"]), done.asm["ptx"].count("fma.rn.f")]

all_results = {}
for architecture, element, wide in [*((int(a), "bf16", "fp32") for a in sys.argv[1:]), (90, "fp64", "fp64")]:
    results = all_results.setdefault(architecture, {})
    flags = dict(HAS_ROWS=True, BLOCK=1024)
    compile(f"add {element}", add._gated_residual_add_kernel, element, wide, **flags)
    flags["HAS_ROW_SCALE"] = True
    compile(f"add backward {element}", add._gated_residual_add_backward_kernel, element, wide, **flags)
    for activation in ("silu", "gelu", "gelu_tanh") if element == "bf16" else ("gelu",):
        flags = dict(ACTIVATION=activation, BLOCK=1024)
        compile(f"glu backward {activation} {element}", glu._glu_backward_kernel, element, wide, **flags)
    compile(f"glu {element}", glu._glu_kernel, element, wide, **flags)
    compile(f"gather {element}", partial_gather._partial_gather_kernel, element, wide, BLOCK=512)
    compile(f"distances {element}", l1_distances._l1_distances_kernel, element, wide, num_warps=4, TILE=32, COLUMNS=8)
    for by_column in (True, False):
        flags = dict(BY_COLUMN=by_column, BLOCK=512)
        compile(f"update {element} {by_column}", column_update._column_update_kernel, element, wide, **flags)
        compile(f"restore {element} {by_column}", column_update._column_restore_kernel, element, wide, **flags)
    compile(
        f"rope {element}", rope._rope_kernel, element, wide, HALF=24, D=64, COPIES_REST=True, TRANSPOSE=True, HEADS=16,
        BLOCK=32, REST=16,
    )
    compile(f"permuted add {element}", permuted_add._permuted_residual_add_kernel, element, wide, BLOCK=1024)
    for is_one in (True, False):
        flags = dict(D=1000 if is_one else 60000, GEMMA=False, IS_ONE_BLOCK=is_one, BLOCK=1024)
        compile(f"norm {element} {is_one}", norm._gated_residual_rms_norm_kernel, element, wide, **flags)
        compile(
            f"norm backward {element} {is_one}", norm._gated_residual_rms_norm_backward_kernel, element, wide,
            HAS_GRAD_NEW_RESIDUAL=True, WEIGHT_GRAD=is_one, **flags,
        )
        del flags["GEMMA"]
        compile(
            f"layer norm {element} {is_one}", layer_norm._gated_residual_layer_norm_kernel, element, wide,
            HAS_BIAS=True, **flags,
        )
        compile(
            f"layer norm backward {element} {is_one}", layer_norm._gated_residual_layer_norm_backward_kernel, element,
            wide, HAS_GRAD_NEW_RESIDUAL=True, WEIGHT_GRAD=is_one, BIAS_GRAD=is_one, **flags,
        )
        flags |= dict(CENTERED=True, GEMMA=False)
        compile(
            f"permuted norm {element} {is_one}", permuted_norm._permuted_norm_kernel, element, wide, HAS_BIAS=True,
            **flags,
        )
        compile(
            f"permuted norm backward {element} {is_one}", permuted_norm._permuted_norm_backward_kernel, element, wide,
            HAS_PARTIAL=is_one, **flags,
        )
    flags = dict(D=60000, BLOCK=1024)
    compile(
        f"permuted norm parameters {element}", permuted_norm._permuted_norm_parameter_grad_kernel, element, wide,
        CENTERED=True, **flags,
    )
    compile(f"norm weight {element}", norm._gated_residual_rms_norm_weight_grad_kernel, element, wide, **flags)
    compile(
        f"layer norm weight {element}", layer_norm._gated_residual_layer_norm_weight_grad_kernel, element, wide,
        WEIGHT_GRAD=True, BIAS_GRAD=True, **flags,
    )
print(json.dumps(all_results))
"""


@pytest.mark.slow
def test_kernels_compile_without_a_gpu(tmp_path):
    from triton.backends import backends

    if "nvidia" not in backends:
        pytest.skip("this Triton has no NVIDIA backend")
    script = tmp_path / "compile.py"  # Triton reads the source of kernels from files
    script.write_text(COMPILE)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(dropbp_kernels.__file__).parents[1])}
    command = [sys.executable, "-W", "error::UserWarning:triton", str(script), "80", "90", "100", "120"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert {architecture: len(compiled) for architecture, compiled in results.items()} == {
        "80": 29, "90": 56, "100": 29, "120": 29
    }  # fmt: skip
    for architecture, compiled in results.items():
        for name, (source, num_bytes, num_fused) in compiled.items():
            assert num_bytes > 0, (architecture, name)
            # Those of exp and erf are written so; all other products and sums are rounded each.
            assert num_fused == 0 or "glu" in name, (architecture, name, num_fused)
            # Rows times their length is what passes 2^31: the only products of 32 bits left are of columns.
            narrow = [line for line in source.splitlines() if "arith.muli" in line and "i64" not in line]
            assert len(narrow) == (1 if "norm weight" in name else 0), (architecture, name, narrow)
            if name.startswith("distances"):  # in its loop threads would exchange more than they sum
                assert source.index("tt.reduce") > source.index("scf.yield"), (architecture, name)


# Notes what Triton would compile a kernel for, in place of compiling and launching it; prints how often for each call.
SIZES = """
import importlib, json
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature
from op_cases import RAW, Tensors
from dropbp_kernels.ops.schema import SCHEMAS

backend, kinds = make_backend(GPUTarget("cuda", 90, 32)), set()

def note(kernel, *arguments, grid, warmup, **options):
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    kinds.add((kernel.__name__, str(bind(*arguments, **options)[1])))

JITFunction.run = note
found = {}
for stem, names in SCHEMAS.items():
    launchers = importlib.import_module(f"dropbp_kernels._triton.{stem}")
    for name in names:
        for case, make in RAW[name].items():
            kinds.clear()
            for rows in (33, 48, 101, 128, 300):
                getattr(launchers, f"launch_{name}")(*make(Tensors(rows, 64)))
            found[f"{name}, {case}"] = sorted(kinds)
print(json.dumps(found))
"""


def test_row_counts_are_one_compilation():
    """Batches differ in length, and plans by rows in how many are kept: none of them may stop a step for a compiler."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    folders = Path(dropbp_kernels.__file__).parents[1], Path(__file__).parent
    environment["PYTHONPATH"] = os.pathsep.join(map(str, folders))
    done = forks.run(SIZES, environment=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == sum(map(len, RAW.values()))
    for call, kinds in found.items():
        assert len(kinds) == len({kernel for kernel, _ in kinds}), (call, kinds)


def test_weight_gradient_is_summed_in_a_bounded_buffer(monkeypatch):
    """The number of partial sums depends on the machine, not on the number of rows."""
    seen = []
    ordinary = torch.empty

    def spy(size, *arguments, **options):
        seen.append(tuple(size) if isinstance(size, tuple) else size)
        return ordinary(size, *arguments, **options)

    monkeypatch.setattr(torch, "empty", spy)
    device = "cpu" if torch.version.cuda is None else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    x = torch.randn(4000 if device == "cuda" else 50, 8, device=device)
    rstd, weight = torch.ones(len(x), device=device), torch.ones(8, device=device)
    _, grad_weight = norm_kernels.launch_gated_residual_rms_norm_backward(x, None, x, weight, rstd, False, True)
    programs = norm_kernels._BACKWARD.at(8, x.device).programs_per_multiprocessor
    assert (rows.max_programs(x.device, programs), 8) in seen
    torch.testing.assert_close(grad_weight, (x * x).sum(0))


def test_frozen_weight_allocates_no_partial_sums(monkeypatch):
    seen = []
    ordinary = torch.empty
    monkeypatch.setattr(torch, "empty", lambda size, **options: seen.append(size) or ordinary(size, **options))
    device = "cpu" if torch.version.cuda is None else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    x = torch.randn(50, 8, device=device)
    rstd, weight = torch.ones(len(x), device=device), torch.ones(8, device=device)
    norm_kernels.launch_gated_residual_rms_norm_backward(x, None, x, weight, rstd, False, False)
    assert seen == [(0, 8), 0]


def test_every_launch_is_on_the_device_of_its_tensors():
    """And so on the current stream of that device: Triton asks for those of the current one."""
    for path in sorted(Path(rows.__file__).parent.glob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        launches = [node for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)]
        blocks = [
            node for node in nodes if isinstance(node, ast.With) and "device_guard(" in ast.unparse(node.items[0])
        ]
        guarded = [node for block in blocks for node in ast.walk(block)]
        assert (len(launches) > 0) == (path.stem not in ("__init__", "rows")), path.stem
        assert all(launch in guarded for launch in launches), path.stem
