"""The loss of a transformers model without its logits: the head hands out logits that are computed when they are read.

While training, a patched head returns `DeferredLogits`, which know the head and its input. Casts, reshapes, scaling and
tanh stay deferred, so what a model's own forward and loss function do with logits arrives at `F.cross_entropy` intact:
shift, ignore_index, reduction and num_items_in_batch are the model's own. There the loss is computed from the head's
input, a slice of the rows at a time. Any other use computes the logits, with their graph, as an unpatched head would.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..autocast import is_autocast_on, product_dtype
from ..derivative import first_derivative
from ..losses import linear_cross_entropy, rows_of_slice
from ..plain_linear import is_whole


def pays(num_rows: int, weight: Tensor) -> bool:
    """Whether the loss by slices needs less memory than the whole logits.

    Counted (tests/test_fused_loss.py): unfused 12 bytes for each logit, by slices 8 for each logit of one slice, and 8
    for each element of a trained weight. On a CPU the time is the same (benchmarks/LOG.md); no GPU has measured it.
    """
    num_classes, width = weight.shape
    held = 8 * num_classes * (rows_of_slice(num_classes) + (width if weight.requires_grad else 0))
    return 12 * num_rows * num_classes > held


def deferring_forward(self: Any, hidden: Tensor) -> Tensor:
    """nn.Linear's forward, deferred where a loss may follow that pays."""
    kind, weight = type(self)._dropbp_head, self.weight
    if (
        not (self.training and torch.is_grad_enabled())
        or torch.compiler.is_compiling()
        or hidden.dim() < 2
        or not (is_whole(hidden) and is_whole(weight))
        or (kind == "auto" and not pays(hidden.shape[:-1].numel(), weight))
    ):
        return F.linear(hidden, weight, self.bias)
    tensors = [hidden, weight, self.bias]
    if is_autocast_on(hidden.device.type):
        dtype = product_dtype(hidden)
        tensors = [None if tensor is None else tensor.to(dtype) for tensor in tensors]
    elif hidden.dtype != weight.dtype:
        return F.linear(hidden, weight, self.bias)  # an error, in PyTorch's words
    head = Head(tensors[0], tensors[1], tensors[2], "chunked" if kind == "auto" else kind)
    return _defer(head, None, None, (*hidden.shape[:-1], len(weight)), head.hidden.dtype)


@dataclass
class Head:
    """One call of a head: what goes in, and by which way its loss is taken."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    kind: str

    def __post_init__(self) -> None:
        self._versions = self._versions_now()

    def _versions_now(self) -> list[int]:
        return [tensor._version for tensor in (self.hidden, self.weight, self.bias) if tensor is not None]

    def check(self) -> None:
        """Errors: RuntimeError when what goes in was changed in place since the call, as by an optimizer."""
        if self._versions_now() != self._versions:
            raise RuntimeError(
                "logits: expected to be read before the head's weight changes, since they are computed when they are "
                'read; read them before optimizer.step(), or patch with fused_loss="off"'
            )

    def logits(self) -> Tensor:
        """What the call would have returned. Errors: those of `check`."""
        self.check()
        return F.linear(self.hidden, self.weight, self.bias)


@dataclass
class Step:
    """One thing done to logits: function(logits, *args, **kwargs)."""

    function: Callable[..., Tensor]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class DeferredLogits(Tensor):
    """Logits that are not computed yet: those of `head`, or what `step` makes of `parent`.

    To autograd they are an ordinary tensor with a gradient function; to every operator below it, the computed logits.
    """

    head: Head
    parent: "DeferredLogits | None"
    step: Step | None
    value: Tensor | None  # once something has read them; from then on they are that tensor, changes in place included

    @staticmethod
    def __new__(cls, head: Head, parent: Any, step: Step | None, shape: Any, dtype: torch.dtype) -> "DeferredLogits":
        self: DeferredLogits = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=head.hidden.device)
        self.head, self.parent, self.step, self.value = head, parent, step, None
        return self

    def computed(self) -> Tensor:
        """The logits as an ordinary tensor with its graph, computed once."""
        if self.value is None:
            # Nobody's saved-tensor hooks see this: a checkpointed function that reads first would not save it again.
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(Tensor.detach, lambda saved: saved):
                if self.parent is None or self.step is None:
                    self.value = self.head.logits()
                else:
                    self.value = self.step.function(self.parent.computed(), *self.step.args, **self.step.kwargs)
        return self.value

    def steps(self) -> list[Step] | None:
        """What was done to the head's output, first to last; None when something has read it on the way."""
        steps: list[Step] = []
        logits: DeferredLogits | None = self
        while logits is not None:
            if logits.value is not None:
                return None
            steps += [logits.step] if logits.step is not None else []
            logits = logits.parent
        return steps[::-1]

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"DeferredLogits(shape={tuple(self.shape)}, dtype={self.dtype}, is_computed={self.value is not None})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        logits = args[0] if args else None
        can_wait = not torch.compiler.is_compiling()  # a function that is compiled has a graph, which reads them
        if can_wait and isinstance(logits, DeferredLogits) and logits.steps() is not None:
            if func is F.cross_entropy and (loss := _fused(logits, *args[1:], **kwargs)) is not None:
                return loss
            if (made := _made_by(logits, func, args[1:], kwargs)) is not None:
                return _defer(logits.head, logits, Step(func, args[1:], kwargs), *made)
        return func(*tree_map(_computed, args), **tree_map(_computed, kwargs))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        # Reached from C++ and from inside of other autograd functions, below autograd: values, and no graph to keep.
        return func(*tree_map(_values, args), **tree_map(_values, kwargs or {}))


def _computed(value: Any) -> Any:
    return value.computed() if isinstance(value, DeferredLogits) else value


def _values(value: Any) -> Any:
    if not isinstance(value, DeferredLogits):
        return value
    if value.value is not None:
        return value.value.detach()
    if value.parent is None or value.step is None:
        return value.head.logits()
    return value.step.function(_values(value.parent), *value.step.args, **value.step.kwargs)


def _made_by(logits: DeferredLogits, func: Any, args: Any, kwargs: Any) -> tuple[Any, torch.dtype] | None:
    """Shape and dtype of what a function makes of logits, if that can stay deferred."""
    if func in _ALIKE and not args and not kwargs:
        return logits.shape, logits.dtype
    if func is Tensor.float and not args and not kwargs:
        return logits.shape, torch.float32
    if func is Tensor.to and len(args) == 1 and not kwargs:
        if isinstance(args[0], torch.dtype) and args[0].is_floating_point:
            return logits.shape, args[0]
        if isinstance(args[0], torch.device | str) and torch.device(args[0]) == logits.device:
            return logits.shape, logits.dtype
    if func in _SCALES and len(args) == 1 and not kwargs and type(args[0]) in (int, float) and args[0] != 0:
        return logits.shape, logits.dtype
    if func in _VIEWS and not kwargs:
        shape = func(torch.empty(logits.shape, device="meta"), *args).shape
        if len(shape) > 1 and shape[-1] == logits.shape[-1]:
            return shape, logits.dtype
    return None


def _defer(head: Head, parent: Any, step: Step | None, shape: Any, dtype: torch.dtype) -> Tensor:
    logits = DeferredLogits(head, parent, step, torch.Size(shape), dtype)
    result: Tensor = _Deferred.apply(head.hidden, head.weight, head.bias, [logits])
    return result


class _Deferred(torch.autograd.Function):
    """Gives deferred logits their place in the graph, for consumers that ask autograd and not Python."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, holder: list[DeferredLogits]) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(hidden, weight, bias)
        ctx.steps = holder[0].steps()
        return holder[0]

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad_logits: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        needed = ctx.needs_input_grad[:3]
        tensors: list[Any] = [
            None if tensor is None else tensor.detach().requires_grad_(is_needed)
            for tensor, is_needed in zip(ctx.saved_tensors, needed, strict=True)
        ]
        with torch.enable_grad():
            logits = F.linear(*tensors)
            for step in ctx.steps:
                logits = step.function(logits, *step.args, **step.kwargs)
        wanted = [tensor for tensor, is_needed in zip(tensors, needed, strict=True) if is_needed]
        grads = iter(torch.autograd.grad(logits, wanted, grad_logits))
        return (*(next(grads) if is_needed else None for is_needed in needed), None)


def _fused(
    logits: DeferredLogits,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    """F.cross_entropy(logits, target, ...) without the logits, or None where that is not on offer."""
    if weight is not None or size_average is not None or reduce is not None or label_smoothing != 0.0:
        return None
    if reduction not in ("mean", "sum") or logits.dim() != 2 or target.dim() != 1 or target.dtype != torch.int64:
        return None
    shape = _scale_and_softcap(logits.steps() or [])
    if shape is None:
        return None
    head, (scale, softcap) = logits.head, shape
    head.check()
    hidden = head.hidden.flatten(0, -2)
    options: dict[str, Any] = {"ignore_index": ignore_index, "reduction": reduction}
    if head.kind == "torch" and scale == 1.0 and softcap is None:
        loss = F.linear_cross_entropy(
            hidden, head.weight, target, linear_bias=head.bias, options=nn.LinearCrossEntropyOptions(), **options
        )
    elif head.kind == "liger" and scale == 1.0:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        options |= {"softcap": softcap, "accum_dtype": torch.float32}
        loss = liger_fused_linear_cross_entropy(hidden, head.weight, target, bias=head.bias, **options)
    else:  # ours, also for what the others cannot express
        loss = linear_cross_entropy(hidden, head.weight, target, head.bias, scale=scale, softcap=softcap, **options)
    return loss.to(logits.dtype)


def _scale_and_softcap(steps: list[Step]) -> tuple[float, float | None] | None:
    """(scale, softcap) such that the steps make softcap * tanh(scale * x / softcap) of x, or scale * x."""
    before, after, has_tanh = 1.0, 1.0, False
    for step in steps:
        if step.function in _TANH:
            if has_tanh:
                return None
            has_tanh = True
        elif step.function in _SCALES:
            factor = 1.0 / step.args[0] if step.function in _DIVISIONS else step.args[0]
            before, after = (before, after * factor) if has_tanh else (before * factor, after)
    return (before * after, after) if has_tanh else (before, None)


_TANH = {torch.tanh, Tensor.tanh}
_DIVISIONS = {torch.div, torch.true_divide, Tensor.div, Tensor.true_divide, Tensor.__truediv__}
_SCALES = {torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__, *_DIVISIONS}
_ALIKE = {*_TANH, Tensor.contiguous, Tensor.clone, torch.clone}
_VIEWS = {Tensor.view, Tensor.reshape, torch.reshape, Tensor.flatten, torch.flatten, Tensor.squeeze, Tensor.unsqueeze}
_PROPERTIES = (
    "shape dtype device requires_grad grad grad_fn is_leaf ndim layout is_cuda is_cpu is_meta is_sparse is_nested"
)
_METHODS = "size dim numel nelement ndimension element_size is_floating_point is_complex register_hook __hash__ __len__"
_METADATA = {
    *(getattr(Tensor, name).__get__ for name in _PROPERTIES.split()),
    *(getattr(Tensor, name) for name in _METHODS.split()),
}
