"""A row whose grad_scale is zero is skipped: its incoming gradient is not read, whatever stands there."""

import sys

import forks
import pytest
import torch
from traffic import counted_traffic, needs_the_interpreter

from dropbp_kernels import _backend
from dropbp_kernels.ops import gated_residual_add

raw = torch.ops.dropbp_kernels
SCALES = [0.0, 2.0, -0.0, 0.5]

# Three pages, one a row; the second, whose scale is zero, may not be read: a read ends the process.
UNREADABLE = """
import ctypes, mmap, torch
from dropbp_kernels import ops
page = mmap.PAGESIZE
memory = mmap.mmap(-1, 3 * page)
grad = torch.frombuffer(memory, dtype=torch.float32).reshape(3, -1)
grad.fill_(1.0)
address, libc = grad.data_ptr(), ctypes.CDLL(None, use_errno=True)
assert libc.mprotect(ctypes.c_void_p(address + page), page, 0) == 0
raw = torch.ops.dropbp_kernels.gated_residual_add_backward
scale = torch.tensor([2.0, 0.0, 3.0])
found = raw(grad, None, scale, 1.0, torch.bfloat16)
assert found[:, 0].tolist() == [2.0, 0.0, 3.0] and found[1].abs().max() == 0
found = raw(grad, torch.tensor([2, 1, 0]), scale, 1.0, torch.float32)
assert found[:, -1].tolist() == [2.0, 0.0, 3.0]
print("read nothing", flush=True)
if READ:
    grad[1].sum()
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_nan_and_infinity_give_exact_zeros(backend, device, poisoned, dtype, scale_dtype):
    scale = torch.tensor(SCALES, dtype=scale_dtype, device=device)
    for width in (1, 7, 64, 1031):
        grad = torch.ones(4, 3, width, dtype=dtype, device=device)
        grad[0], grad[2] = float("nan"), float("inf")
        for rows in (None, torch.arange(4, device=device)):
            found = raw.gated_residual_add_backward(grad, rows, scale, 4.0, dtype)
            assert torch.equal(found[::2], torch.zeros_like(found[::2]))
            assert torch.equal(found[1], torch.full_like(found[1], 8.0))


def test_through_autograd(backend, device):
    residual = torch.zeros(4, 5, device=device, requires_grad=True)
    branch = torch.zeros(4, 5, device=device, requires_grad=True)
    grad = torch.full((4, 5), float("nan"), device=device)
    grad[1], grad[3] = 1.0, 1.0
    output = gated_residual_add(residual, branch, grad_scale=torch.tensor(SCALES, device=device))
    output.backward(grad)
    assert branch.grad[:, 0].tolist() == [0.0, 2.0, 0.0, 0.5]
    assert residual.grad.isnan()[::2].all()  # the stream's own gradient is not the branch's


@needs_the_interpreter
def test_triton_reads_the_other_rows_alone():
    from dropbp_kernels._triton.gated_residual_add import launch_gated_residual_add_backward

    grad, scale = torch.ones(4, 40, dtype=torch.bfloat16), torch.tensor(SCALES)
    with counted_traffic() as traffic:
        launch_gated_residual_add_backward(grad, None, scale, 1.0, torch.float32)
    assert traffic.read == grad.nbytes // 2 + scale.nbytes
    assert traffic.written == 2 * grad.nbytes


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect as Linux has it")
def test_cpp_reads_the_other_rows_alone():
    if (reason := _backend.why_not("cpp", "gated_residual_add")) is not None:
        pytest.skip(f"cpp: {reason}")
    for is_read in (False, True):
        done = forks.run(f"READ = {is_read}\n{UNREADABLE}")
        assert "read nothing" in done.stdout, done.stderr
        assert (done.returncode == 0) != is_read  # the test itself sees a read
