"""Triton's kernels as they are compiled for an H200, run on a CPU (ptx/).

The interpreter, in which the tests of the ops run them, knows neither threads nor what the compiler makes of a kernel.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import dropbp_kernels

pytest.importorskip("triton")

# Runs all raw calls of some stems; an exception names the first that is wrong.
RUN = """
import importlib, sys
import torch
sys.path.insert(0, sys.argv[1])
from op_cases import HUGE, RAW, Tensors, assert_as_the_reference, assert_last_rows_as_the_reference, call
from ptx.triton_kernels import compiled_launches
from dropbp_kernels.ops.schema import SCHEMAS

FLOAT, BFLOAT16 = torch.float32, torch.bfloat16
for stem in sys.argv[2:]:
    launchers = importlib.import_module(f"dropbp_kernels._triton.{stem}")
    # Packs of 16 bytes; single elements, and two dtypes; rows that a program reads in parts.
    settings = [(6, 1024, BFLOAT16, BFLOAT16), (7, 134, FLOAT, BFLOAT16)] + [(2, 9000, FLOAT, FLOAT)] * ("norm" in stem)
    for op in SCHEMAS[stem]:
        for name in [name for of, name in HUGE if of == op]:
            with compiled_launches(num_last_blocks=4):
                assert_last_rows_as_the_reference(op, name, getattr(launchers, f"launch_{op}"))
        for name, make in RAW[op].items():
            for rows, width, wide, narrow in settings:
                torch.manual_seed(0)
                arguments = make(Tensors(rows, width, wide, narrow))
                try:
                    with compiled_launches() as seen:
                        results = call(getattr(launchers, f"launch_{op}"), arguments)
                    assert_as_the_reference(op, arguments, results)
                    # Neighbouring threads touch neighbouring bytes: an instruction moves what its threads asked for.
                    if width == 1024 and stem not in ("column_update", "partial_gather", "l1_distances"):
                        for traffic in seen.values():
                            assert traffic.sectors_read * 32 <= 1.02 * traffic.bytes_read, traffic
                            # A statistic of a row, one element, takes a sector of its own.
                            assert traffic.sectors_written * 32 <= 1.02 * traffic.bytes_written + 24 * 32, traffic
                except Exception as error:
                    raise AssertionError(f"{op}, {name}, {rows} x {width}, {wide}, {narrow}") from error
print("checked")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "stems",
    [
        ["gated_residual_rms_norm", "permuted_norm"],
        ["gated_residual_layer_norm", "permuted_residual_add", "gated_residual_add"],
        ["glu", "rope", "partial_gather", "column_update", "l1_distances"],
    ],
    ids=lambda stems: stems[0],
)
def test_compiled_kernels_compute_as_the_reference(tmp_path, stems):
    script = tmp_path / "run.py"
    script.write_text(RUN)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(dropbp_kernels.__file__).parents[1])}
    command = [sys.executable, str(script), str(Path(__file__).parent), *stems]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "checked\n"
