"""Run a branch so that only some of its rows send a gradient: what a plan that differs from row to row needs.

permutation = draw_permutation(num_rows, seed=seed, step=step, branch=index, device=x.device)
num_kept = draw_num_kept(num_rows, drop_rate, seed=seed, step=step, branch=index)
norm = lambda x, permutation, num_kept: permuted_rms_norm(x, self.norm.weight, permutation, num_kept)
x = add_by_rows(x, permutation, num_kept, norm, lambda rows, places: self.mlp(rows))
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .ops.permuted_residual_add import permuted_residual_add

Norm = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]]
Branch = Callable[[Tensor, Tensor], Tensor]


def add_by_rows(
    residual: Tensor,
    permutation: Tensor,
    num_kept: int,
    norm: Norm,
    branch: Branch,
    *,
    grad_scale: float | Tensor = 1.0,
) -> Tensor:
    """Return residual + branch(norm(residual)), where the branch gets a gradient for rows permutation[:num_kept] alone.

    The dropped rows run first, under no_grad: what they need in passing is freed before the kept rows save anything.

    norm(residual, permutation, num_kept) -> (kept, dropped, residual), as permuted_rms_norm and permuted_layer_norm do.
    branch(rows, places) -> rows of the same shape. places are the rows' numbers, for what belongs to a row, such as the
    mask or the positions of a sample. It is called once for kept and once for dropped rows, if there are any, and must
    treat each row for itself.

    Shapes: residual (..., D); permutation (N,) of its rows: N = B of (B, S, D) samples, N = B * S tokens. rows
            (K, ..., D), places (K,). grad_scale as in permuted_residual_add. Result like residual.
    Dtypes: those of norm and of permuted_residual_add.
    Errors: those of norm and of permuted_residual_add.
    Cost:   norm, branch on N rows in two calls, one add. Saves what norm and branch save for num_kept rows.
    Source: DropBP (arXiv 2402.17812), x + D(f(norm(x))), with D by rows.
    """
    kept, dropped, residual = norm(residual, permutation, num_kept)
    num_dropped = dropped.shape[0]
    with torch.no_grad():
        dropped = branch(dropped, permutation[num_kept:]) if num_dropped else dropped
    kept = branch(kept, permutation[:num_kept]) if num_kept else kept
    if not num_dropped:
        dropped = dropped.to(kept.dtype)  # of no rows: only to agree with a branch that returns another dtype
    if not num_kept:
        kept = kept.to(dropped.dtype)
    return permuted_residual_add(residual, kept, dropped, permutation, grad_scale=grad_scale)
