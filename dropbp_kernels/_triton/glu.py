"""Triton kernels of glu: activation(gate) * up and both gradients, in one pass each, also in place.

A tensor (..., D) is seen as rows whose first elements lie a stride apart, so that the halves of a packed projection are
read where they are; where all of them are contiguous, as one row of all elements. The grid is one-dimensional, since
the other grid axes end at 65535 programs: program -> (row, block of BLOCK columns).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tuning import WIDEST, Config, LaunchTable, Row
from .rows import device_guard, jit_kernel, row_stride, wide_of

# 8 elements a thread: one 16-byte access of bfloat16, two of float32.
_ROWS = [Row(WIDEST, Config(block=1024, num_warps=4))]
_GLU = LaunchTable("glu", _ROWS, lambda to: launch_glu(to.x, to.y, "silu"))
_GLU_BACKWARD = LaunchTable("glu_backward", _ROWS, lambda to: launch_glu_backward(to.x, to.y, to.z, "silu"))


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    """(activation(x), its derivative)."""
    if ACTIVATION == "gelu":
        below = 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476))
        return x * below, below + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif ACTIVATION == "gelu_tanh":
        # With s = sigmoid(u), u = 2 sqrt(2 / pi) (x + 0.044715 x^3): 1 + tanh(u / 2) = 2 s.
        s = 1.0 / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
        bent = tl.where(tl.abs(x) > 20.0, 0.0, x)  # the curve is straight beyond, where x * x may overflow
        return x * s, s + bent * (s * (1.0 - s)) * 1.5957691216057308 * (1.0 + 0.134145 * bent * bent)
    else:
        s = 1.0 / (1.0 + tl.exp(-x))
        return x * s, s + x * s * (1.0 - s)


@jit_kernel
def _glu_kernel(
    gate_ptr,  # (num_rows, row_size)
    up_ptr,  # (num_rows, row_size)
    output_ptr,  # (num_rows, row_size), may be gate
    gate_stride,
    up_stride,
    output_stride,
    row_size,
    blocks_per_row,
    ACTIVATION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # I/O: read gate + read up + write output
    program = tl.program_id(0).to(tl.int64)  # offsets pass 2^31 elements
    row = program // blocks_per_row
    columns = (program % blocks_per_row) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < row_size
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=mask, other=0.0).to(WIDE)
    up = tl.load(up_ptr + row * up_stride + columns, mask=mask, other=0.0).to(WIDE)
    value, _ = _activate(gate, ACTIVATION)
    tl.store(output_ptr + row * output_stride + columns, (value * up).to(output_ptr.dtype.element_ty), mask=mask)


@jit_kernel
def _glu_backward_kernel(
    grad_ptr,  # (num_rows, row_size), as all of these
    gate_ptr,
    up_ptr,
    grad_gate_ptr,  # may be gate
    grad_up_ptr,  # may be up
    grad_stride,
    gate_stride,
    up_stride,
    grad_gate_stride,
    grad_up_stride,
    row_size,
    blocks_per_row,
    ACTIVATION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # I/O: read grad_output + read gate + read up + write grad_gate + write grad_up
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks_per_row
    columns = (program % blocks_per_row) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < row_size
    grad = tl.load(grad_ptr + row * grad_stride + columns, mask=mask, other=0.0).to(WIDE)
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=mask, other=0.0).to(WIDE)
    up = tl.load(up_ptr + row * up_stride + columns, mask=mask, other=0.0).to(WIDE)
    value, slope = _activate(gate, ACTIVATION)
    element = grad_gate_ptr.dtype.element_ty
    tl.store(grad_gate_ptr + row * grad_gate_stride + columns, (grad * up * slope).to(element), mask=mask)
    tl.store(grad_up_ptr + row * grad_up_stride + columns, (grad * value).to(element), mask=mask)


def _as_rows(tensor: Tensor, *, is_written: bool = False) -> Tensor:
    """`tensor` where it can be seen as rows (that share no element, if it is written), else a contiguous copy."""
    stride = row_stride(tensor)
    if stride is None or (is_written and tensor.dim() > 1 and stride < tensor.shape[-1]):
        return tensor.contiguous()
    return tensor


def _launch(kernel: triton.JITFunction, table: LaunchTable, activation: str, *operands: Tensor) -> None:
    """Run `kernel` over operands of one shape, each seen as rows."""
    gate = operands[0]
    if gate.numel() == 0:
        return
    width = gate.shape[-1] if gate.dim() else 1
    strides = [row_stride(operand) for operand in operands]
    is_dense = all(stride == width for stride in strides)
    row_size = gate.numel() if is_dense else width
    config = table.at(width, gate.device)
    block = min(config.block, triton.next_power_of_2(row_size))
    blocks_per_row = triton.cdiv(row_size, block)
    with device_guard(gate):
        kernel[(gate.numel() // row_size * blocks_per_row,)](
            *operands,
            *strides,
            row_size,
            blocks_per_row,
            ACTIVATION=activation,
            WIDE=wide_of(gate.dtype)[1],
            BLOCK=block,
            **config.options,
        )


def launch_glu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    output = torch.empty_like(gate, memory_format=torch.contiguous_format)
    _launch(_glu_kernel, _GLU, activation, _as_rows(gate), _as_rows(up), output)
    return output


def launch_glu_(gate: Tensor, up: Tensor, activation: str) -> None:
    target = _as_rows(gate, is_written=True)
    _launch(_glu_kernel, _GLU, activation, target, _as_rows(up), target)
    if target is not gate:
        gate.copy_(target)


def launch_glu_backward(grad_output: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    grad_gate = torch.empty_like(gate, memory_format=torch.contiguous_format)
    grad_up = torch.empty_like(grad_gate)
    inputs = (_as_rows(tensor) for tensor in (grad_output, gate, up))
    _launch(_glu_backward_kernel, _GLU_BACKWARD, activation, *inputs, grad_gate, grad_up)
    return grad_gate, grad_up


def launch_glu_backward_(grad_output: Tensor, gate: Tensor, up: Tensor, activation: str) -> None:
    targets = _as_rows(gate, is_written=True), _as_rows(up, is_written=True)
    _launch(_glu_backward_kernel, _GLU_BACKWARD, activation, _as_rows(grad_output), *targets, *targets)
    for tensor, target in zip((gate, up), targets, strict=True):
        if target is not tensor:
            tensor.copy_(target)
