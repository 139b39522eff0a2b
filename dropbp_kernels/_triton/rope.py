"""Triton kernel of rope: all heads of one token in one program, also in place and turned back.

cos and sin of the token are read once for its heads. x is read where it lies, if its channels are contiguous.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tuning import WIDEST, Config, LaunchTable, Row
from .rows import device_guard, jit_kernel, wide_of


def _tune(to):
    heads = to.x.unflatten(-1, (4, -1)).unsqueeze(0)
    channels = heads.shape[-1] // 2 * 2
    return launch_rope(heads, to.y[:, :channels], to.z[:, :channels], False)


# 1024 pairs of channels a program at a time: 8 values a thread of each half.
_ROPE = LaunchTable("rope", [Row(WIDEST, Config(block=1024, num_warps=4))], _tune)


@jit_kernel
def _rope_kernel(
    x_ptr,  # (B, S, H, D)
    cos_ptr,  # (1 or B, S, 2 * HALF)
    sin_ptr,
    output_ptr,  # (B, S, H, D), may be x
    x_batch_stride,
    x_seq_stride,
    x_head_stride,
    output_batch_stride,
    output_seq_stride,
    output_head_stride,
    table_batch_stride,
    seq_len,
    num_heads,
    HALF: tl.constexpr,
    D: tl.constexpr,
    COPIES_REST: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    WIDE: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
):
    # I/O: read x + read cos + read sin + write output
    token = tl.program_id(0).to(tl.int64)  # offsets pass 2^31 elements
    sample, position = token // seq_len, token % seq_len
    columns = tl.arange(0, BLOCK)
    in_half = columns < HALF
    table = sample * table_batch_stride + position * (2 * HALF) + columns
    cos_a = tl.load(cos_ptr + table, mask=in_half, other=0.0).to(WIDE)[None, :]
    cos_b = tl.load(cos_ptr + table + HALF, mask=in_half, other=0.0).to(WIDE)[None, :]
    sin_a = tl.load(sin_ptr + table, mask=in_half, other=0.0).to(WIDE)[None, :]
    sin_b = tl.load(sin_ptr + table + HALF, mask=in_half, other=0.0).to(WIDE)[None, :]
    x_ptr += sample * x_batch_stride + position * x_seq_stride
    output_ptr += sample * output_batch_stride + position * output_seq_stride
    for start in range(0, num_heads, HEADS):
        heads = (start + tl.arange(0, HEADS)).to(tl.int64)[:, None]
        mask = (heads < num_heads) & in_half[None, :]
        x_at = x_ptr + heads * x_head_stride + columns[None, :]
        output_at = output_ptr + heads * output_head_stride + columns[None, :]
        a = tl.load(x_at, mask=mask, other=0.0).to(WIDE)
        b = tl.load(x_at + HALF, mask=mask, other=0.0).to(WIDE)
        if TRANSPOSE:
            first, second = a * cos_a + b * sin_b, b * cos_b - a * sin_a
        else:
            first, second = a * cos_a - b * sin_a, b * cos_b + a * sin_b
        tl.store(output_at, first.to(output_ptr.dtype.element_ty), mask=mask)
        tl.store(output_at + HALF, second.to(output_ptr.dtype.element_ty), mask=mask)
        if COPIES_REST:
            rest = 2 * HALF + tl.arange(0, REST)[None, :]
            mask = (heads < num_heads) & (rest < D)
            value = tl.load(x_ptr + heads * x_head_stride + rest, mask=mask)
            tl.store(output_ptr + heads * output_head_stride + rest, value, mask=mask)


def _launch(output: Tensor, x: Tensor, cos: Tensor, sin: Tensor, transpose: bool) -> None:
    batch_size, seq_len, num_heads, width = x.shape
    half = cos.shape[-1] // 2
    if x.numel() == 0:
        return
    cos, sin = cos.contiguous(), sin.contiguous()
    config = _ROPE.at(num_heads * width, x.device)
    block = triton.next_power_of_2(max(half, 1))
    heads = min(max(config.block // block, 1), triton.next_power_of_2(num_heads))
    is_shared = cos.dim() == 2 or cos.shape[0] == 1
    with device_guard(x):
        _rope_kernel[(batch_size * seq_len,)](
            x,
            cos,
            sin,
            output,
            *x.stride()[:3],
            *output.stride()[:3],
            0 if is_shared else seq_len * 2 * half,
            seq_len,
            num_heads,
            HALF=half,
            D=width,
            COPIES_REST=output is not x and width > 2 * half,
            TRANSPOSE=transpose,
            WIDE=wide_of(x.dtype)[1],
            HEADS=heads,
            BLOCK=block,
            REST=triton.next_power_of_2(max(width - 2 * half, 1)),
            **config.options,
        )


def launch_rope(x: Tensor, cos: Tensor, sin: Tensor, transpose: bool) -> Tensor:
    output = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch(output, x if x.stride(-1) == 1 else x.contiguous(), cos, sin, transpose)
    return output


def launch_rope_(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    target = x if x.stride(-1) == 1 else x.contiguous()
    _launch(target, target, cos, sin, False)
    if target is not x:
        x.copy_(target)
