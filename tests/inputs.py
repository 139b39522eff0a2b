"""Random tensors of any shape, dtype and memory layout."""

import torch

LAYOUTS = ["contiguous", "permuted", "sliced", "half", "expanded"]


def make(shape, dtype, layout="contiguous", device="cpu"):
    """A random tensor of `shape` that lies in memory as `layout` says."""
    if layout == "permuted":
        return torch.randn(*reversed(shape), device=device).to(dtype).permute(*reversed(range(len(shape))))
    if layout == "sliced":
        return torch.randn(*shape[:-1], 2 * shape[-1] + 1, device=device).to(dtype)[..., 1::2]
    if layout == "half":  # of a packed projection: contiguous rows, apart
        return torch.randn(*shape[:-1], 2 * shape[-1], device=device).to(dtype)[..., shape[-1] :]
    if layout == "expanded":
        return torch.randn(1, *shape[1:], device=device).to(dtype).expand(shape)
    return torch.randn(shape, device=device).to(dtype)
