"""Run a branch that treats each token for itself a slice of the tokens at a time, so that less of it lives at once."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

# Products of this many rows still fill a GPU.
SLICE_TOKENS = 1024

Records = Callable[[], dict[str, list[Any]]]


def run_in_slices(
    branch: Callable[..., Any], num_tokens: int, records: Records, x: Any, *args: Any, **kwargs: Any
) -> Any:
    """Return branch(x, ...), computed for at most num_tokens tokens at a time.

    A slice is passed as a batch of one sample. A call that has tensors beside x, which may belong to tokens, runs as a
    whole. records: as in `DropBP`; what a slice adds there is put together.

    Shapes: x (batch, seq, D) or flattened (batch * seq, D); what the branch returns has its tokens in the first
            dimension, or in the second behind a first of one.
    Errors: ValueError when the branch returns a tensor in which a slice's tokens are not to be found.
    Cost:   one copy of the output. The live peak of what is inside is that of one slice.
    """
    is_alone = isinstance(x, Tensor) and not any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs)))
    if not is_alone or x.dim() not in (2, 3):
        return branch(x, *args, **kwargs)
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] <= num_tokens:
        return branch(x, *args, **kwargs)
    recorded = records()
    begin = {name: len(values) for name, values in recorded.items()}
    slices = rows.split(num_tokens)
    sizes = [len(piece) for piece in slices]
    outputs = [branch(piece if x.dim() == 2 else piece.unsqueeze(0), *args, **kwargs) for piece in slices]
    for name, values in recorded.items():
        added = values[begin[name] :]
        each = len(added) // len(slices)
        values[begin[name] :] = [_join(added[i::each], sizes, x.shape[:-1]) for i in range(each)]
    return _join(outputs, sizes, x.shape[:-1])


def _join(outputs: list[Any], sizes: list[int], lead: torch.Size) -> Any:
    """What a whole call would have returned, of what it returned for slices of so many tokens."""
    leaves, specs = zip(*(tree_flatten(output) for output in outputs), strict=True)
    columns = zip(*leaves, strict=True)
    joined = [_cat(pieces, sizes, lead) if isinstance(pieces[0], Tensor) else pieces[0] for pieces in columns]
    return tree_unflatten(joined, specs[0])


def _cat(pieces: tuple[Tensor, ...], sizes: list[int], lead: torch.Size) -> Tensor:
    if all(tuple(piece.shape[:2]) == (1, size) for piece, size in zip(pieces, sizes, strict=True)):
        joined = torch.cat([piece.squeeze(0) for piece in pieces]).unflatten(0, lead)
        return joined if joined.requires_grad else joined.detach()  # a block may add to it in place: no view of no_grad
    if all(piece.shape[:1] == (size,) for piece, size in zip(pieces, sizes, strict=True)):
        return torch.cat(pieces)
    raise ValueError(
        f"branch: expected {sizes[0]} tokens returned for a slice of as many, got a tensor of shape "
        f"{tuple(pieces[0].shape)}; what does not treat each token for itself is not to be called per_token"
    )
