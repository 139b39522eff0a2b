"""What ops on channels share: places in the last dimension of an input, which are columns of a weight."""

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_float(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name}: expected dtype float32, float16, bfloat16 or float64, got {tensor.dtype}")


def check_channels(index: Tensor, name: str, tensor: Tensor) -> Tensor:
    """index as int64. Its entries are looked at by who serves the op: here that would wait for a GPU."""
    if index.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"index: expected dtype int64 or int32, got {index.dtype}")
    if index.dim() != 1:
        raise ValueError(f"index: expected shape (r,), got {tuple(index.shape)}")
    if index.device != tensor.device:
        raise ValueError(f"index: expected on {name}'s device {tensor.device}, got {index.device}")
    return index.long()
