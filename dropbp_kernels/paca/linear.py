"""The product of a linear layer some of whose columns are trained, and its gradients.

    y = x W'^T + b,  where W' is W but for W'[:, indices] = W[:, indices] + scaling * columns

One product, no adapter beside it: the columns are written into W, and restored to the bit when the product is done. For
the backward only the chosen channels of x are kept.
"""

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autocast import product_dtype, without_autocast
from ..derivative import first_derivative
from ..ops.column_update import column_restore, column_update
from ..ops.partial_gather import partial_gather


@dataclass(frozen=True)
class Columns:
    """Which columns are trained, and how.

    indices: (r,) int64, all different, on the device. key: the same numbers on the host; equal keys, equal columns.
    replace: W'[:, indices] = scaling * columns, as published.
    """

    indices: Tensor
    key: Sequence[int]
    scaling: float
    replace: bool = False

    def of(self, original: Tensor, trained: Tensor) -> Tensor:
        """The columns of W': summed in the wider dtype of the two."""
        return trained * self.scaling if self.replace else torch.add(original, trained, alpha=self.scaling)


def column_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    trained: Tensor,
    columns: Columns,
    *,
    unpack: Callable[[], Tensor] | None = None,
) -> Tensor:
    """Return x W'^T + bias.

    Shapes: x (..., in), weight (out, in) of any strides, bias (out,), trained (out, r); result (..., out).
    Dtypes: x and weight alike, or under autocast any; trained may be wider: columns are rounded once, to the product's.
    Errors: those of torch.nn.functional.linear; the weight is what it was also when the product fails.
    Cost:   one product; reads and writes r columns of weight before it and again after it. Saves r channels of x,
        shared by calls with the same x and columns. Not for two threads at once: weight is written to.
    Source: PaCA (arXiv 2503.01905), section 3; oracle a dense linear layer with a gradient for those columns alone.

    unpack: makes the weight, where it is kept in another form; it is called again in the backward, and `weight` is
    then what that form is kept in, or anything.
    """
    dtype = product_dtype(x)
    channels = None
    if torch.is_grad_enabled() and trained.requires_grad:
        channels = _channels(x, columns, dtype)
    bias = bias if bias is None else bias.to(dtype)
    return _ColumnLinear.apply(x.to(dtype), trained, bias, weight, channels, columns, unpack)


class _Last(threading.local):
    """What was gathered last: of which tensor, in which version of it, which columns, in which dtype; and the result.

    It stands in a list, which is emptied when the tensor dies, so that no channels outlive their use.
    """

    entry: tuple[Any, int, Sequence[int], torch.dtype, list[Tensor]] | None = None


_last = _Last()


def _channels(x: Tensor, columns: Columns, dtype: torch.dtype) -> Tensor:
    """The chosen channels of x. Query, key and value ask for the same of the same tensor, one after another."""
    if x.is_inference():  # without a version
        return partial_gather(x, columns.indices).to(dtype)
    if _last.entry is not None:
        source, version, key, last_dtype, result = _last.entry
        if source() is x and version == x._version and last_dtype == dtype and key == columns.key:
            return result[0]
    result = [partial_gather(x.detach(), columns.indices).to(dtype)]
    _last.entry = weakref.ref(x, lambda _: result.clear()), x._version, columns.key, dtype, result
    return result[0]


@contextmanager
def _weight_with(
    weight: Tensor, trained: Tensor, columns: Columns, dtype: torch.dtype, unpack: Callable[[], Tensor] | None
) -> Iterator[Tensor]:
    """W' in dtype, while the block runs.

    Written into the weight itself where it has the right dtype, past its version counter: values are the same again
    before anyone else reads them, and graphs that saved this weight must not be told otherwise.
    """
    data, trained = weight.data if unpack is None else unpack(), trained.detach()
    if unpack is not None or data.dtype != dtype:  # a tensor of our own: nothing to restore
        changed = columns.of(data.index_select(1, columns.indices), trained)
        own = data.to(dtype)
        own.index_copy_(1, columns.indices, changed.to(dtype))
        yield own
        return
    if columns.replace:
        original = data.index_select(1, columns.indices)
        data.index_copy_(1, columns.indices, columns.of(original, trained).to(dtype))
    else:
        original = column_update(data, trained, columns.indices, scale=columns.scaling)
    try:
        yield data
    finally:
        column_restore(data, original, columns.indices)


class _ColumnLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        trained: Tensor,
        bias: Tensor | None,
        weight: Tensor,
        channels: Tensor | None,
        columns: Columns,
        unpack: Callable[[], Tensor] | None,
    ) -> Tensor:
        ctx.columns, ctx.unpack = columns, unpack
        # Indices are constants and no activation: past save_for_backward, so that a broadcast of buffers by DDP between
        # two forwards of one step changes nothing.
        ctx.save_for_backward(trained, weight, channels)
        with (
            without_autocast(x.device.type),
            _weight_with(weight, trained, columns, x.dtype, unpack) as own,
        ):
            return F.linear(x, own, bias)

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        trained, weight, channels = ctx.saved_tensors
        grad_x = grad_trained = grad_bias = None
        with without_autocast(grad_output.device.type):
            if ctx.needs_input_grad[0]:
                with _weight_with(weight, trained, ctx.columns, grad_output.dtype, ctx.unpack) as own:
                    grad_x = grad_output.matmul(own)
            if ctx.needs_input_grad[1]:
                rows = grad_output.reshape(-1, grad_output.shape[-1])
                grad_trained = rows.t().mm(channels.reshape(-1, channels.shape[-1])).to(trained.dtype)
                grad_trained.mul_(ctx.columns.scaling)
            if ctx.needs_input_grad[2]:
                grad_bias = grad_output.reshape(-1, grad_output.shape[-1]).sum(0)
        return grad_x, grad_trained, grad_bias, None, None, None, None
