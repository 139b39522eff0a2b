"""One call of a branch taken apart by rows: what a plan that differs from row to row needs.

The kept rows get a graph, the others run like inference. Which rows says the plan (`row_plan`), how the branch runs its
gate (`layer.DropBP`); here the tensors are split and put together.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .derivative import first_derivative
from .ops.permuted_residual_add import permuted_residual_add
from .ownership import owns_gradient
from .permutation import row_shape
from .row_plan import Batch, Rows


class RowSplit:
    """How one call of a branch is taken apart by rows, and put together.

    A branch that works on samples is called with tensors of fewer samples; one that works on tokens with a batch of one
    sample that consists of the chosen tokens. Where the stream (B, S, D) comes flattened, (B * S, D), so do the parts.
    """

    def __init__(self, rows: Rows, batch: Batch, stream: Tensor):
        self.rows = rows
        self.batch = batch
        lead = (batch.num_samples, batch.seq_len)
        self.is_flat = tuple(stream.shape[:2]) != lead and stream.shape[0] == lead[0] * lead[1]
        self.stream_shape = stream.shape
        self.kept = rows.permutation[: rows.num_kept]
        # Padding of a target plan's stage, which stands last, does not run at all: nobody reads it.
        leaves_padding = rows.by_token and batch.staged is not None
        self.dropped = rows.permutation[rows.num_kept : rows.num_rows if leaves_padding else None]
        self.num_padding = len(rows.permutation) - len(self.kept) - len(self.dropped)

    def row_shape(self, x: Tensor) -> tuple[int, ...]:
        """The shape of x with a dimension of all rows in front."""
        num_samples, seq_len = self.batch[:2]
        if self.rows.by_token:
            return (num_samples * seq_len, *x.shape[1 if self.is_flat else 2 :])
        return (num_samples, seq_len, *x.shape[1:]) if self.is_flat else tuple(x.shape)

    def shaped(self, rows: Tensor) -> Tensor:
        """Some rows of the stream as the branch takes them."""
        if self.is_flat:
            return rows if self.rows.by_token else rows.flatten(0, 1)
        return rows.unsqueeze(0) if self.rows.by_token else rows

    def rows_of_output(self, output: Tensor, num_rows: int) -> tuple[Tensor, tuple[int, ...]] | None:
        """An output for num_rows rows, as (num_rows, ...), and the leading dimensions that one for all rows would have.

        None for a tensor that has no such rows. Flattened tokens (a router's logits) are rows too.
        """
        num_samples, seq_len = self.batch[:2]
        shape = tuple(output.shape)
        if self.rows.by_token:
            if shape[:2] == (1, num_rows) and not self.is_flat:
                return output.squeeze(0), (num_samples, seq_len)
            return (output, (num_samples * seq_len,)) if shape[:1] == (num_rows,) else None
        if shape[:1] == (num_rows,) and not self.is_flat:
            return output, (num_samples,)
        if shape[:1] == (num_rows * seq_len,):
            return output.unflatten(0, (num_rows, seq_len)), (num_samples * seq_len,)
        return None

    def take(self, stream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(kept, dropped, stream): rows (K, ..., D) and (N - K, ..., D) of the stream, and the stream to go on with.

        The backward adds the gradient of the kept rows into that of the stream and touches no other row.
        """
        kept, stream = _TakeRows.apply(stream, self.kept, self.row_shape(stream))
        return kept, self._select(stream.detach(), self.dropped), stream

    def arguments(self, tree: Any, which: Tensor) -> Any:
        """What else the branch is called with, for the rows `which`: see the rules of `_has_rows`.

        Key/value caches that can be taken apart say so by `of_samples`; others are left out. Block masks of
        FlexAttention are taken apart by samples.
        """
        # What blocks are called with, by hand: pytree takes a hundred microseconds for each half of a branch.
        if type(tree) in (tuple, list):
            return type(tree)(self.arguments(item, which) for item in tree)
        if type(tree) is dict:
            return {name: self.arguments(item, which) for name, item in tree.items()}
        if tree is None or isinstance(tree, Tensor | bool | int | float | str):
            return self._argument(tree, which)
        return tree_map(lambda leaf: self._argument(leaf, which), tree)

    def _argument(self, leaf: Any, which: Tensor) -> Any:
        if hasattr(leaf, "of_samples"):
            return None if self.rows.by_token else leaf.of_samples(which)
        if not isinstance(leaf, Tensor):
            if hasattr(leaf, "mask_mod"):
                is_shared = self.rows.by_token or len(leaf.kv_num_blocks) != self.batch.num_samples
                return leaf if is_shared else _block_mask_of(leaf, which)
            return None if hasattr(leaf, "get_seq_length") and hasattr(leaf, "update") else leaf  # a key/value cache
        if not self._has_rows(leaf):
            return leaf
        return self.shaped(self._select(leaf, which)) if self.rows.by_token or self.is_flat else leaf[which]

    def _has_rows(self, x: Tensor) -> bool:
        """Whether x belongs to the rows, by its shape: a mask or a table of positions of batch 1 is shared.

        A sample's tensors have three dimensions or more (masks, states, rotary tables) or two of whole numbers (ids,
        masks). A table of (seq_len, width) is not taken for one, even if seq_len is the batch size.
        """
        if x.shape == self.stream_shape:
            return True
        lead = tuple(x.shape[:2])
        if self.rows.by_token or self.is_flat:
            whole = (self.batch.num_samples, self.batch.seq_len)
            return lead[:1] == (whole[0] * whole[1],) if self.is_flat else lead == whole
        return lead[:1] == (self.batch.num_samples,) and (x.dim() > 2 or (x.dim() == 2 and not x.is_floating_point()))

    def _select(self, x: Tensor, which: Tensor) -> Tensor:
        return x.reshape(self.row_shape(x)).index_select(0, which)

    def merge(self, kept: Any, dropped: Any, grad_scale: float = 1.0) -> Any:
        """What the branch returned for kept and for dropped rows, as it would have returned it for all.

        Tensors that have no rows (a table that all samples share) are those of the kept rows.
        """
        return tree_map(lambda one, other: self._merge(one, other, grad_scale), kept, dropped)

    def _merge(self, kept: Any, dropped: Any, grad_scale: float) -> Any:
        if not isinstance(kept, Tensor) or not isinstance(dropped, Tensor):
            return kept
        kept_rows = self.rows_of_output(kept, len(self.kept))
        dropped_rows = self.rows_of_output(dropped, len(self.dropped))
        if kept_rows is None or dropped_rows is None or kept_rows[1] != dropped_rows[1]:
            return kept
        rows, lead = kept_rows
        # Of flattened samples a row has seq_len of the leading dimension: it is in `lead` already.
        is_flat_sample = not self.rows.by_token and lead != (self.batch.num_samples,)
        shape = (*lead, *rows.shape[2 if is_flat_sample else 1 :])
        return _MergeRows.apply(
            rows, dropped_rows[0].detach(), self.kept, self.dropped, self.num_padding, shape, grad_scale
        )

    def add(self, residual: Tensor, kept: Tensor, dropped: Tensor, grad_scale: float) -> Tensor:
        """residual + the output of the branch, which is given by rows."""
        shape = self.row_shape(residual)
        dropped = dropped.detach()
        parts = []
        for name, part, count in (("kept", kept, len(self.kept)), ("dropped", dropped, len(self.dropped))):
            rows = self.rows_of_output(part, count)
            if rows is None or tuple(rows[0].shape[1:]) != shape[1:]:
                lead = f"{self.batch.num_samples}, {self.batch.seq_len if self.rows.by_token else 1}"
                raise ValueError(
                    f"branch: expected {count} {name} rows of the residual's shape {tuple(residual.shape)}, got "
                    f"{tuple(part.shape)}; what it needs of each sample (a mask) is to be passed through the gate, as "
                    f"a tensor of shape ({lead}, ...)"
                )
            parts.append(rows[0])
        if self.num_padding:
            parts[1] = torch.cat((parts[1], parts[1].new_zeros(self.num_padding, *shape[1:])))
        stream = residual.to(torch.promote_types(residual.dtype, parts[0].dtype))
        # A view would have a gradient that is a view too, into which the norm's backward may not write.
        if row_shape(stream.shape, len(self.rows.permutation)) != shape:
            stream = stream.reshape(shape)
        output = permuted_residual_add(stream, parts[0], parts[1], self.rows.permutation, grad_scale=grad_scale)
        return output if output.shape == residual.shape else output.view(residual.shape)


def _block_mask_of(mask: Any, samples: Tensor) -> Any:
    """The `BlockMask` of some samples of its batch."""
    of_batch = mask.mask_mod

    def mask_mod(sample: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Any:
        return of_batch(samples[sample], head, query, key)

    part = mask[samples]  # which blocks there are; what is masked inside of one PyTorch leaves to us
    part.mask_mod = mask_mod
    return part


class _TakeRows(torch.autograd.Function):
    """(rows of the stream, the stream): so the stream's gradient arrives here and the rows' is added into it."""

    @staticmethod
    def forward(ctx: Any, stream: Tensor, which: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(which)
        ctx.shape = shape
        ctx.stream_shape = stream.shape
        return stream.reshape(shape).index_select(0, which), stream

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad_rows: Tensor | None, grad_stream: Tensor | None) -> tuple[Tensor | None, None, None]:
        if grad_rows is None:
            return grad_stream, None, None
        (which,) = ctx.saved_tensors
        if grad_stream is None:
            grad_stream = grad_rows.new_zeros(ctx.stream_shape)
        elif not owns_gradient(grad_stream):
            grad_stream = grad_stream.clone(memory_format=torch.contiguous_format)
        grad_stream.view(ctx.shape).index_add_(0, which, grad_rows)
        return grad_stream, None, None


class _MergeRows(torch.autograd.Function):
    """Kept and dropped rows in the places of one tensor; the backward reads the places of the kept ones."""

    @staticmethod
    def forward(
        ctx: Any,
        kept: Tensor,
        dropped: Tensor,
        kept_places: Tensor,
        dropped_places: Tensor,
        num_padding: int,
        shape: tuple[int, ...],
        grad_scale: float,
    ) -> Tensor:
        ctx.save_for_backward(kept_places)
        ctx.row_shape = (len(kept) + len(dropped) + num_padding, *kept.shape[1:])
        ctx.grad_scale = grad_scale
        # Whole and not a view, so that a block may add to it in place.
        make = kept.new_zeros if num_padding else kept.new_empty
        merged = make(shape, dtype=torch.promote_types(kept.dtype, dropped.dtype))
        rows = merged.view(ctx.row_shape)
        rows[kept_places] = kept.to(merged.dtype)
        rows[dropped_places] = dropped.to(merged.dtype)
        return merged

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (kept_places,) = ctx.saved_tensors
        grad_kept = grad.reshape(ctx.row_shape).index_select(0, kept_places)
        if ctx.grad_scale != 1.0:
            grad_kept *= ctx.grad_scale
        return grad_kept, None, None, None, None, None, None
