"""Which columns of a linear layer are trained."""

import hashlib

import torch
from torch import Tensor

NOT_CHOSEN = -1


def random_columns(r: int, in_features: int, seed: int, group: str) -> Tensor:
    """r of in_features columns, ascending, as a pure function of the arguments; no generator but its own is touched."""
    digest = hashlib.sha256(f"{seed} {group} {in_features}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randperm(in_features, generator=generator, device="cpu")[:r].sort().values


def largest_columns(r: int, scores: Tensor) -> Tensor:
    """The r columns with the largest scores, ascending; of equal ones the first."""
    order = torch.sort(scores.detach().double().cpu(), descending=True, stable=True).indices
    return order[:r].sort().values


def norms(weight: Tensor) -> Tensor:
    """The norm of each column of a weight (out, in), in float32, a slice of the rows at a time."""
    squares = torch.zeros(weight.shape[1], dtype=torch.float32, device=weight.device)
    for rows in weight.split(1024):
        squares += rows.float().square().sum(0)
    return squares.sqrt()


def check_indices(name: str, indices: Tensor, r: int, in_features: int) -> None:
    """Errors: ValueError when these are not r different columns of in_features."""
    if indices.dtype != torch.int64 or indices.shape != (r,):
        raise ValueError(f"{name}: expected {r} int64 numbers, got {tuple(indices.shape)} of {indices.dtype}")
    numbers = indices.tolist()
    if len(set(numbers)) != r or min(numbers) < 0 or max(numbers) >= in_features:
        raise ValueError(f"{name}: expected {r} different columns of {in_features}, got {numbers}")
