"""Run a branch that treats each token for itself without the padding of a batch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map


def run_without_padding(branch: Callable[..., Any], real: Tensor, x: Any, *args: Any, **kwargs: Any) -> Any:
    """Return branch(x, ...), computed for the tokens `real` alone; zeros for the others.

    The tokens are passed as a batch of one sample. A call that has tensors beside x, which may belong to tokens, runs
    as a whole.

    Shapes: x (batch, seq, D) or flattened (batch * seq, D); real int64 (K,), places in the flattened batch; what the
            branch returns has its tokens in the first dimension, or in the second behind a first of one. Tensors
            without them are returned as they are.
    Cost:   a copy of the real tokens and one of the output. Saves for backward what the branch saves for K tokens.
    """
    is_alone = isinstance(x, Tensor) and not any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs)))
    if not is_alone or x.dim() not in (2, 3):
        return branch(x, *args, **kwargs)
    rows = x.reshape(-1, x.shape[-1])
    num_tokens, lead = len(rows), x.shape[:-1]
    rows = rows.index_select(0, real)
    output = branch(rows if x.dim() == 2 else rows.unsqueeze(0), *args, **kwargs)

    def placed(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        is_batch = tuple(leaf.shape[:2]) == (1, len(real))
        if not is_batch and leaf.shape[:1] != (len(real),):
            return leaf
        values = leaf.squeeze(0) if is_batch else leaf
        whole = torch.zeros((num_tokens, *values.shape[1:]), dtype=values.dtype, device=values.device)
        whole = whole.index_copy(0, real, values)
        whole = whole.unflatten(0, lead) if is_batch else whole
        return whole if whole.requires_grad else whole.detach()  # a block may add to it in place: no view of no_grad

    return tree_map(placed, output)
