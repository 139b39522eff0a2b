"""The device code of the CUDA kernels, run on a CPU: what a machine without a GPU can know of it.

cuda_rows.cpp       norms: every thread of a block is a fibre that waits at barriers and shuffles
cuda_elements.cpp   kernels of flat arrays: threads one after another, watched by sanitizers where there are any

Both compare with plain loops; test_addresses.py looks at addresses beyond 2^31 elements.
"""

import subprocess

import cuda_host
import pytest
import sanitize

pytestmark = pytest.mark.skipif(not cuda_host.can_build(), reason="needs g++ and CUDA's headers")


def sanitizers():
    try:
        sanitize.gcc()
    except sanitize.CannotRun:
        return []
    return sanitize.PROGRAM_FLAGS


@pytest.mark.parametrize(("source", "flags"), [("cuda_rows.cpp", []), ("cuda_elements.cpp", sanitizers())])
def test_device_code_computes_right(source, flags, tmp_path):
    done = subprocess.run([cuda_host.build(source, tmp_path, flags)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "checked\n"
