"""A few channels of a tensor, saved in place of all of them: what the gradient of a few columns of a weight needs."""

from typing import Any

import torch
from torch import Tensor

from ..derivative import Function, first_derivative
from .checks import check_channels, check_dtype
from .raw import raw as _raw


def partial_gather(input: Tensor, index: Tensor) -> Tensor:
    """Return input[..., index], contiguous: r channels of the last dimension.

    With x_r = partial_gather(x, index) the gradient of the columns index of a weight W, y = x W^T, is the product
    grad_y^T x_r of two dense matrices; q, k and v of one input need one x_r.

    Shapes: input (..., D), index (r,); result (..., r). Empty tensors are allowed, and entries may repeat.
    Dtypes: float32, float16, bfloat16, float64, copied bit for bit; index int64, or int32, converted first.
    Errors: ValueError when shape or device do not fit, TypeError when a dtype is unsupported. Entries outside
            0 ... D - 1: IndexError on a CPU; on a GPU, where the host does not wait to see them, the CUDA kernel stops
            with a message and the Triton kernel gives zeros. A second derivative raises RuntimeError.
    Cost:   reads a cache line (a sector of 32 bytes on a GPU) for each element of the result, writes the result, which
            is all that it allocates. Saves index. Backward: allocates and writes a gradient as large as input.
    Source: PaCA (arXiv 2503.01905), section 3; oracle reference.partial_gather_reference.
    """
    check_dtype("input", input.dtype)
    if input.dim() == 0:
        raise ValueError("input: expected at least one dimension, got none")
    index = check_channels(index, "input", input)
    if torch.is_grad_enabled() and input.requires_grad:
        return _PartialGather.apply(input, index)
    return _raw.partial_gather(input, index)


class _PartialGather(Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape = input.shape
        return _raw.partial_gather(input, index)

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        # PaCA never asks for it: its input's gradient comes from the whole weight. Hence PyTorch's own kernels.
        (index,) = ctx.saved_tensors
        return grad_output.new_zeros(ctx.shape).index_add_(-1, index, grad_output), None


@torch.library.register_fake("dropbp_kernels::partial_gather")
def _(input: Tensor, index: Tensor) -> Tensor:
    return input.new_empty((*input.shape[:-1], index.shape[0]))
