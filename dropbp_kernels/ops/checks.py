"""What ops check alike: dtypes of values, a bias, a factor on a gradient, places in the last dimension."""

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
CASTINGS = ("llama", "gemma")


def check_dtype(name: str, dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        raise TypeError(f"{name}: expected dtype float32, float16, bfloat16 or float64, got {dtype}")


def check_holds(residual: torch.dtype, name: str, dtype: torch.dtype) -> None:
    """Raise TypeError unless a residual of the first dtype can take its sum with `name`, of the second."""
    if torch.promote_types(residual, dtype) != residual:
        raise TypeError(f"residual: expected a dtype that holds {name}'s {dtype}, got {residual}")


def check_bias(bias: Tensor, weight: Tensor) -> None:
    if bias.shape != weight.shape:
        raise ValueError(f"bias: expected weight's shape {tuple(weight.shape)}, got {tuple(bias.shape)}")
    if bias.dtype != weight.dtype:
        raise TypeError(f"bias: expected weight's dtype {weight.dtype}, got {bias.dtype}")
    if bias.device != weight.device:
        raise ValueError(f"bias: expected on weight's device {weight.device}, got {bias.device}")


def is_gemma(casting: str) -> bool:
    """Whether an RMS norm rounds once, after the product with 1 + weight."""
    if casting not in CASTINGS:
        raise ValueError(f"casting: expected one of {', '.join(CASTINGS)}, got {casting!r}")
    return casting == "gemma"


def split_grad_scale(grad_scale: float | Tensor, branch: Tensor) -> tuple[float, Tensor | None]:
    """grad_scale as (number, None) or, where it is a factor for each index of branch's dim 0, as (1, tensor)."""
    if isinstance(grad_scale, (float, int)):
        return grad_scale, None
    if not isinstance(grad_scale, Tensor):
        raise TypeError(f"grad_scale: expected a number or a tensor, got {type(grad_scale).__name__}")
    if not grad_scale.dtype.is_floating_point:
        raise TypeError(f"grad_scale: expected a float dtype, got {grad_scale.dtype}")
    if branch.dim() == 0 or grad_scale.dim() != 1 or grad_scale.shape[0] != branch.shape[0]:
        expected = tuple(branch.shape[:1])
        raise ValueError(f"grad_scale: expected a number or shape {expected}, got shape {tuple(grad_scale.shape)}")
    if grad_scale.device != branch.device:
        raise ValueError(f"grad_scale: expected on branch's device {branch.device}, got {grad_scale.device}")
    return 1.0, grad_scale


def check_channels(index: Tensor, name: str, tensor: Tensor) -> Tensor:
    """index, of places in tensor's last dimension, as int64.

    Its entries are looked at by who serves the op: here that would wait for a GPU.
    """
    if index.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"index: expected dtype int64 or int32, got {index.dtype}")
    if index.dim() != 1:
        raise ValueError(f"index: expected shape (r,), got {tuple(index.shape)}")
    if index.device != tensor.device:
        raise ValueError(f"index: expected on {name}'s device {tensor.device}, got {index.device}")
    return index.long()
