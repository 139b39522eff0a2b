"""Who may hold a tensor, so that nobody may write into it."""

import pytest
import torch

from dropbp_kernels.ops import permuted_rms_norm

NEEDS_COUNTS = pytest.mark.skipif(
    not hasattr(torch._C, "_storage_Use_Count") or not hasattr(torch.Tensor, "_use_count"),
    reason="this PyTorch has no reference counts to tell owners by",
)

# What a test does with a tensor, and keeps.
HOLDERS = {
    "name": lambda tensor: tensor,
    "container": lambda tensor: {"activations": [tensor]},
    "closure": lambda tensor: lambda: tensor,
    "view": lambda tensor: tensor[1:],
    "detached alias": lambda tensor: tensor.detach(),
    "array": lambda tensor: tensor.detach().numpy(),
    "capsule": lambda tensor: torch.utils.dlpack.to_dlpack(tensor.detach()),
    "storage": lambda tensor: tensor.untyped_storage(),
    "another graph": lambda tensor: tensor * tensor.detach(),
}


def leaf():
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(3)).requires_grad_()


def norm_overwrites(prepare=lambda stream: None, follow=lambda stream, earlier: stream * 2):
    """Whether the norm's backward writes into the gradient that `follow` gives to the stream."""
    x = torch.randn(4, 3, 6, requires_grad=True)
    inner, earlier = x * 1, x * 5
    kept, _, stream = permuted_rms_norm(inner, torch.ones(6), torch.tensor([2, 0, 3, 1]), 2)
    arrived, left = [], []
    stream.grad_fn.register_prehook(lambda grads: arrived.append(grads[2].data_ptr()))
    inner.grad_fn.register_prehook(lambda grads: left.append(grads[0].data_ptr()))
    prepare(stream)
    root = follow(stream, earlier)
    torch.autograd.backward((root, kept.sum()), (torch.ones_like(root), None))
    return arrived == left
