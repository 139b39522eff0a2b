"""Cross entropy of a linear head whose logits never exist as a whole: a slice of the rows at a time.

At high drop rates the logits are the largest tensor of a step: with 128,000 words and 8,192 tokens 2 GiB in bfloat16,
and the loss and its gradient make tensors of twice that size from them.
"""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .autocast import is_autocast_on, product_dtype
from .choices import check_choice

REDUCTIONS = ("mean", "sum")
# Float32 logits of one slice: matrix products of hundreds of rows, large enough for a CPU (benchmarks/LOG.md) and, by
# the count of their FLOPs, for a GPU, where nobody has measured them. A GPU takes a product in tiles of up to 256 rows:
# of the 261 rows that 128,256 classes leave room for it would compute 384 or 512.
SLICE_BYTES = 2**27
ROWS_OF_A_TILE = 256


def rows_of_slice(num_classes: int) -> int:
    """How many rows of logits `linear_cross_entropy` holds at a time."""
    return max(SLICE_BYTES // (4 * num_classes * ROWS_OF_A_TILE), 1) * ROWS_OF_A_TILE


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Return F.cross_entropy(logits, target) of logits = scale * (hidden @ weight.T + bias), in float32.

    With softcap, logits = softcap * tanh(that / softcap). The gradients are computed in the forward, slice by slice,
    and scaled in the backward. Rows whose target is ignore_index are not computed at all.

    Shapes: hidden (..., D), weight (C, D), target (...) of int64 in [0, C) or ignore_index, bias (C,); result (). With
            no row left, "mean" is NaN, as in F.cross_entropy, and "sum" is 0.
    Dtypes: float32, float64, float16, bfloat16, hidden, weight and bias alike, or under autocast any, which are cast as
            for a linear layer; the products in that dtype, softmax and loss in float32 (float64 for float64), gradients
            of weight and bias summed in that too. Result: the latter.
    Errors: ValueError when shapes do not fit, dtypes differ or reduction is unknown; TypeError for a target that is not
            int64; RuntimeError in a backward with create_graph=True, since there is no second derivative. A target out
            of range fails as in torch.gather.
    Cost:   the products of the unfused loss, for the rows that count; memory: one slice of logits (in float32 at most
            128 MiB or 256 rows), hidden's gradient, and where the weight is trained twice its float32 gradient.
            Waits for the GPU once, to count the rows.
    Source: oracle torch.nn.functional.cross_entropy; the idea of taking gradients in the forward: Liger Kernel
            (arXiv 2410.10989). torch.nn.functional.linear_cross_entropy rounds the loss to the dtype of hidden.
    """
    if is_autocast_on(hidden.device.type):
        dtype = product_dtype(hidden)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), bias if bias is None else bias.to(dtype)
    _check(hidden, weight, target, bias, reduction)
    hidden, target = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1)
    if not isinstance(target, FakeTensor):  # in a simulation nobody knows which rows count: all do
        rows = (target != ignore_index).nonzero().squeeze(1)
        if len(rows) < len(target):
            hidden, target = hidden[rows], target[rows]
    if not torch.is_grad_enabled():  # which the function below would not see, and compute gradients that nobody wants
        hidden, weight, bias = hidden.detach(), weight.detach(), bias if bias is None else bias.detach()
    total: Tensor = _LinearCrossEntropy.apply(hidden, weight, bias, target, float(scale), softcap)
    return total / len(target) if reduction == "mean" else total


def _check(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, reduction: str) -> None:
    check_choice("reduction", reduction, REDUCTIONS)
    if target.dtype != torch.int64:
        raise TypeError(f"target: expected int64 class indices, got {target.dtype}")
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"weight: expected (classes, {hidden.shape[-1] if hidden.dim() else '?'}) to fit hidden, got "
            f"{tuple(weight.shape)} with hidden {tuple(hidden.shape)}"
        )
    if target.shape != hidden.shape[:-1]:
        raise ValueError(f"target: expected the shape {tuple(hidden.shape[:-1])} of hidden, got {tuple(target.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected shape {tuple(weight.shape[:1])}, got {tuple(bias.shape)}")
    for name, tensor in [("weight", weight), ("bias", bias)]:
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise ValueError(f"{name}: expected {hidden.dtype}, the dtype of hidden, got {tensor.dtype}")


class _LinearCrossEntropy(torch.autograd.Function):
    """The sum of the losses of all rows."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        grad_bias = torch.zeros_like(weight[:, 0], dtype=wide) if needs_bias else None
        total = torch.zeros((), dtype=wide, device=hidden.device)
        num_rows = rows_of_slice(len(weight))
        for start in range(0, len(hidden), num_rows):
            rows = slice(start, start + num_rows)
            logits = torch.nn.functional.linear(hidden[rows], weight, bias).to(wide)
            slope = _transform(logits, scale, softcap)
            total += _loss_and_gradient(logits, target[rows])
            if slope is not None:
                logits *= slope
            elif scale != 1.0:
                logits *= scale
            grad = logits.to(hidden.dtype)  # rounded as the gradient of a linear layer's output is
            del logits, slope
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[rows])
            if grad_weight is not None and grad.dtype == wide:
                grad_weight.addmm_(grad.T, hidden[rows])
            elif grad_weight is not None:
                grad_weight += grad.T @ hidden[rows]
            if grad_bias is not None:
                grad_bias += grad.sum(0, dtype=wide)
            del grad  # before the next slice is made
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtype = hidden.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        # At once, and not where the second derivative is taken: nothing that is saved leads to hidden or weight.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "linear_cross_entropy: no second derivative (create_graph=True); torch.nn.functional.cross_entropy of "
                'logits has one: fused_loss="off" in a model that apply_dropbp patched'
            )
        grads = (None if grad is None else (grad * grad_total).to(ctx.dtype) for grad in ctx.saved_tensors)
        return (*grads, None, None, None)


def _transform(logits: Tensor, scale: float, softcap: float | None) -> Tensor | None:
    """Scale and cap the logits in place; the slope of the cap, None without one."""
    if softcap is None:
        if scale != 1.0:
            logits *= scale
        return None
    logits.mul_(scale / softcap).tanh_()
    slope = logits.square().neg_().add_(1.0).mul_(scale)
    logits *= softcap
    return slope


def _loss_and_gradient(logits: Tensor, target: Tensor) -> Tensor:
    """The sum of the rows' losses; the logits become its gradient, softmax(logits) - one_hot(target)."""
    target = target.unsqueeze(1)
    logits -= logits.amax(1, keepdim=True)
    of_target = logits.gather(1, target).sum()
    sums = logits.exp_().sum(1, keepdim=True)
    loss = sums.log().sum() - of_target
    logits /= sums
    logits.scatter_add_(1, target, torch.full_like(target, -1, dtype=logits.dtype))
    return loss
