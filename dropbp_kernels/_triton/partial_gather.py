"""Triton kernel of partial_gather: element i of the result (num_rows, num_channels), BLOCK of them a program."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tuning import WIDEST, Config, LaunchTable, Row
from .rows import device_guard, jit_kernel, row_stride

# 4 elements a thread: each of them is a sector of 32 bytes in flight.
_GATHER = LaunchTable(
    "partial_gather",
    [Row(WIDEST, Config(block=512, num_warps=4))],
    lambda to: launch_partial_gather(to.x, to.permutation[:64] % to.x.shape[1]),
)


@jit_kernel
def _partial_gather_kernel(
    input_ptr,  # (num_rows, width), rows at `stride`
    index_ptr,  # (num_channels,) int64
    output_ptr,  # (num_rows, num_channels)
    stride,
    width,
    num_channels,
    count,
    BLOCK: tl.constexpr,
):
    # I/O: read a sector for each element + write output
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # offsets pass 2^31 elements
    mask = i < count
    channel = tl.load(index_ptr + i % num_channels, mask=mask, other=0)
    # A wrong index gives zero: it must not read outside.
    is_inside = mask & (channel >= 0) & (channel < width)
    value = tl.load(input_ptr + i // num_channels * stride + channel, mask=is_inside, other=0.0)
    tl.store(output_ptr + i, value, mask=mask)


def launch_partial_gather(input: Tensor, index: Tensor) -> Tensor:
    output = torch.empty((*input.shape[:-1], index.shape[0]), dtype=input.dtype, device=input.device)
    count = output.numel()
    if count == 0:
        return output
    if row_stride(input) is None:
        input = input.contiguous()
    config = _GATHER.at(index.shape[0], input.device)
    with device_guard(input):
        _partial_gather_kernel[(triton.cdiv(count, config.block),)](
            input,
            index.contiguous(),
            output,
            row_stride(input),
            input.shape[-1],
            index.shape[0],
            count,
            BLOCK=config.block,
            **config.options,
        )
    return output
