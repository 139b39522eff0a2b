"""What the Triton kernels share that read a tensor (num_rows, D) row by row: adding two rows, and sizes of launches."""

import contextlib
import ctypes
import functools
import itertools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

# How many rows there are, and other numbers of a batch. Triton would compile a kernel anew where one of them is 1, or a
# multiple of 16, for the first time: in the midst of a run, for nothing. Of a factor it may know that it is 1.
COUNTS = ["count", "end_of_kept", "num_kept", "num_programs", "num_rows", "seq_len"]
FACTORS = ["blocks_per_row", "rows_per_index"]
jit_kernel = functools.partial(triton.jit, do_not_specialize=COUNTS, do_not_specialize_on_alignment=FACTORS)

PROGRAMS_ON_CPU = 4  # of the interpreter: more than one, so that tests see partial sums
# On a multiprocessor at a time: its 65536 registers are then 128 for each thread, which compilers use up to (sm_90).
WARPS_OF_A_BACKWARD = 16


@triton.jit
def add_chunk(
    residual_ptr,
    branch_ptr,
    new_residual_ptr,
    start,
    columns,
    D: tl.constexpr,
    WIDE: tl.constexpr,
    IS_STORED: tl.constexpr,
):
    """residual + branch, rounded to residual's dtype, as WIDE; zero beyond the row."""
    mask = columns < D
    residual = tl.load(residual_ptr + start + columns, mask=mask, other=0.0).to(WIDE)
    branch = tl.load(branch_ptr + start + columns, mask=mask, other=0.0).to(WIDE)
    x = (residual + branch).to(new_residual_ptr.dtype.element_ty)
    if IS_STORED:
        tl.store(new_residual_ptr + start + columns, x, mask=mask)
    return x.to(WIDE)


@triton.jit
def load_factor(weight_ptr, columns, D: tl.constexpr, GEMMA: tl.constexpr, WIDE: tl.constexpr):
    """What a normalised row is multiplied with: weight, or 1 + weight; zero beyond the row, or one."""
    weight = tl.load(weight_ptr + columns, mask=columns < D, other=0.0).to(WIDE)
    if GEMMA:
        weight += 1.0
    return weight


def wide_of(dtype: torch.dtype) -> tuple[torch.dtype, tl.dtype]:
    """The dtype of the arithmetic on a residual of `dtype`, for PyTorch and for Triton."""
    return (torch.float64, tl.float64) if dtype == torch.float64 else (torch.float32, tl.float32)


def device_guard(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def row_stride(tensor: Tensor) -> int | None:
    """The distance between two rows in elements; None where `tensor` cannot be seen as rows."""
    if tensor.dim() == 0 or tensor.is_contiguous():
        return tensor.shape[-1] if tensor.dim() else 1
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        return None
    leading = [(tensor.shape[d], tensor.stride(d)) for d in range(tensor.dim() - 1) if tensor.shape[d] != 1]
    if any(outer[1] != inner[0] * inner[1] for outer, inner in itertools.pairwise(leading)):
        return None
    return leading[-1][1] if leading else tensor.shape[-1]


def split_float(value: float) -> tuple[float, float]:
    """The sum of a float32 and its rest: a float argument of a kernel is float32, which float64 sees cut off."""
    head = ctypes.c_float(value).value  # a tensor would take the host 10 us
    return head, value - head if math.isfinite(head) else 0.0


@functools.cache
def max_programs(device: torch.device, per_multiprocessor: int) -> int:
    """How many programs stride over the rows in a backward; so many partial sums of a weight gradient there are."""
    if device.type != "cuda":
        return PROGRAMS_ON_CPU
    return per_multiprocessor * torch.cuda.get_device_properties(device).multi_processor_count
