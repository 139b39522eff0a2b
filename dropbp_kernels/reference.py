"""Every op in plain PyTorch, slow and obvious: the specification that all other backends are tested against.

A function takes exactly the arguments of its schema (``ops/schema.py``) and returns fresh contiguous tensors. All of
them run on any device, on meta tensors too.

Arithmetic: sums and norms are computed in float32, in float64 where the residual is float64, and rounded once when
they are written. Below, "wide" names that dtype.
"""

import math

import torch
from torch import Tensor


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def gated_residual_add_reference(residual: Tensor, branch: Tensor, rows: Tensor | None) -> Tensor:
    """residual (R, ..., D) + branch (K, ..., D) at the rows (K,) of dim 0, in residual's dtype. rows are unique."""
    output = residual.clone(memory_format=torch.contiguous_format)
    gated_residual_add__reference(output, branch, rows)
    return output


def gated_residual_add__reference(residual: Tensor, branch: Tensor, rows: Tensor | None) -> None:
    """The same sum, written into residual."""
    wide = _wide(residual.dtype)
    if rows is None:
        residual.copy_(residual.to(wide) + branch.to(wide))
    else:
        total = residual.index_select(0, rows).to(wide) + branch.to(wide)
        residual.index_copy_(0, rows, total.to(residual.dtype))


def gated_residual_add_backward_reference(
    grad_output: Tensor, rows: Tensor | None, row_scale: Tensor | None, grad_scale: float, dtype: torch.dtype
) -> Tensor:
    """grad_output at rows, times grad_scale, times row_scale (K,) along dim 0; rows of scale zero are zeros."""
    grad = grad_output if rows is None else grad_output.index_select(0, rows)
    wide = torch.promote_types(_wide(grad.dtype), _wide(dtype))
    grad_branch = grad.to(wide) * grad_scale
    if row_scale is not None:
        scale = row_scale.to(wide).reshape(-1, *[1] * (grad.dim() - 1))  # (K, 1, ..., 1)
        # where, and not the product alone: an infinite gradient in a dropped row must not become NaN.
        grad_branch = torch.where(scale == 0, torch.zeros((), dtype=wide, device=grad.device), grad_branch * scale)
    return grad_branch.to(dtype, memory_format=torch.contiguous_format, copy=True)


def gated_residual_rms_norm_reference(
    residual: Tensor, branch: Tensor, weight: Tensor, eps: float, gemma: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(normed, new_residual, rstd) of new_residual = residual + branch; the norm reads the *rounded* sum."""
    wide = _wide(residual.dtype)
    new_residual = gated_residual_add_reference(residual, branch, None)
    x = new_residual.to(wide)
    rstd = torch.rsqrt(x.pow(2).sum(-1) / max(x.shape[-1], 1) + eps)
    normalized = x * rstd.unsqueeze(-1)
    if gemma:
        normed = (normalized * (1 + weight.to(wide))).to(branch.dtype)
    else:
        normed = (weight.to(wide) * normalized.to(branch.dtype).to(wide)).to(branch.dtype)
    return normed, new_residual, rstd


def gated_residual_rms_norm_backward_reference(
    grad_normed: Tensor,
    grad_new_residual: Tensor | None,
    new_residual: Tensor,
    weight: Tensor,
    rstd: Tensor,
    gemma: bool,
    weight_grad: bool,
) -> tuple[Tensor, Tensor]:
    """(gradient of new_residual through the norm plus grad_new_residual, gradient of weight).

    With n = x * rstd and g = grad_normed * weight (Gemma: 1 + weight), grad_x = rstd * (g - n * mean(g * n)). The
    roundings of the forward count as the identity.
    """
    wide = _wide(new_residual.dtype)
    scale = rstd.to(wide).unsqueeze(-1)
    normalized = new_residual.to(wide) * scale
    grad = grad_normed.to(wide) * (1 + weight.to(wide) if gemma else weight.to(wide))
    mean = (grad * normalized).sum(-1, keepdim=True) / max(grad.shape[-1], 1)
    grad_x = scale * (grad - normalized * mean)
    if grad_new_residual is not None:
        grad_x = grad_x + grad_new_residual.to(wide)
    grad_residual = grad_x.to(new_residual.dtype, memory_format=torch.contiguous_format, copy=True)
    if not weight_grad:
        return grad_residual, weight.new_empty(0)
    rows = (grad_normed.to(wide) * normalized).reshape(rstd.numel(), weight.shape[0])
    return grad_residual, rows.sum(0).to(weight.dtype)


def _check_is_permutation(permutation: Tensor) -> None:
    """The reference looks, where there is something to look at: a device without memory of its own, not meta."""
    ordered = torch.arange(len(permutation), device=permutation.device)
    if permutation.device.type == "cpu" and not torch.equal(permutation.sort().values, ordered):
        raise IndexError(f"permutation: expected each number from 0 to {len(permutation) - 1} once")


def permuted_residual_add_reference(residual: Tensor, kept: Tensor, dropped: Tensor, permutation: Tensor) -> Tensor:
    """residual + branch in residual's shape and dtype, where (kept, dropped) is the branch in permuted order."""
    _check_is_permutation(permutation)
    wide = _wide(residual.dtype)
    rows = residual.reshape(len(permutation), -1) if residual.numel() else residual.new_empty(len(permutation), 0)
    branch = torch.cat((kept, dropped)).reshape(rows.shape)
    total = rows.index_select(0, permutation).to(wide) + branch.to(wide)
    output = torch.empty_like(rows, memory_format=torch.contiguous_format)
    return output.index_copy_(0, permutation, total.to(residual.dtype)).reshape(residual.shape)


def gated_residual_layer_norm_reference(
    residual: Tensor, branch: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(normed, new_residual, mean, rstd) of new_residual = residual + branch; the norm reads the *rounded* sum."""
    wide = _wide(residual.dtype)
    new_residual = gated_residual_add_reference(residual, branch, None)
    x = new_residual.to(wide)
    width = max(x.shape[-1], 1)
    mean = x.sum(-1) / width
    centred = x - mean.unsqueeze(-1)
    rstd = torch.rsqrt(centred.pow(2).sum(-1) / width + eps)
    normed = centred * rstd.unsqueeze(-1) * weight.to(wide)
    if bias is not None:
        normed = normed + bias.to(wide)
    return normed.to(branch.dtype), new_residual, mean, rstd


def gated_residual_layer_norm_backward_reference(
    grad_normed: Tensor,
    grad_new_residual: Tensor | None,
    new_residual: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(gradient of new_residual through the norm plus grad_new_residual, gradients of weight and bias).

    With n = (x - mean) * rstd and g = grad_normed * weight, grad_x = rstd * (g - mean(g) - n * mean(g * n)). The
    roundings of the forward count as the identity.
    """
    wide = _wide(new_residual.dtype)
    width = weight.shape[0]
    scale = rstd.to(wide).unsqueeze(-1)
    normalized = (new_residual.to(wide) - mean.to(wide).unsqueeze(-1)) * scale
    grad = grad_normed.to(wide) * weight.to(wide)
    mean_grad = grad.sum(-1, keepdim=True) / max(width, 1)
    mean_product = (grad * normalized).sum(-1, keepdim=True) / max(width, 1)
    grad_x = scale * (grad - mean_grad - normalized * mean_product)
    if grad_new_residual is not None:
        grad_x = grad_x + grad_new_residual.to(wide)
    grad_residual = grad_x.to(new_residual.dtype, memory_format=torch.contiguous_format, copy=True)
    grads = grad_normed.to(wide).reshape(rstd.numel(), width)
    grad_weight = (grads * normalized.reshape(grads.shape)).sum(0) if weight_grad else weight.new_empty(0)
    grad_bias = grads.sum(0) if bias_grad else weight.new_empty(0)
    return grad_residual, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)


def _row_shape(shape: torch.Size, num_rows: int) -> tuple[int, ...]:
    """shape (..., D) as (num_rows, ..., D): the fewest leading dimensions that have num_rows elements are one."""
    place = next(place for place in range(1, len(shape)) if shape[:place].numel() == num_rows)
    return num_rows, *shape[place:]


def permuted_norm_reference(
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    permutation: Tensor,
    num_kept: int,
    eps: float,
    centered: bool,
    gemma: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(kept, dropped, rows, mean, rstd): the norm of the permuted rows, and what the kept ones need for backward."""
    _check_is_permutation(permutation)
    wide = _wide(residual.dtype)
    rows = residual.reshape(_row_shape(residual.shape, len(permutation))).index_select(0, permutation)
    x = rows.to(wide)
    width = max(x.shape[-1], 1)
    mean = x.sum(-1) / width if centered else x.new_zeros(x.shape[:-1])
    x = x - mean.unsqueeze(-1)
    rstd = torch.rsqrt(x.pow(2).sum(-1) / width + eps)
    normalized = x * rstd.unsqueeze(-1)
    if not (centered or gemma):
        normalized = normalized.to(dtype).to(wide)
    normed = normalized * (1 + weight.to(wide) if gemma else weight.to(wide))
    if bias is not None:
        normed = normed + bias.to(wide)
    normed = normed.to(dtype)
    kept_mean = mean[:num_kept].clone() if centered else mean.new_empty(0)
    kept, dropped = normed[:num_kept].clone(), normed[num_kept:].clone()
    return kept, dropped, rows[:num_kept].clone(), kept_mean, rstd[:num_kept].clone()


def permuted_norm_backward__reference(
    grad_residual: Tensor,
    grad_kept: Tensor,
    rows: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    permutation: Tensor,
    centered: bool,
    gemma: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor]:
    """(grad_weight, grad_bias); the kept rows of grad_residual gain the gradient through the norm.

    With n = (x - mean) * rstd and g = grad_kept * weight (Gemma: 1 + weight), it is
    rstd * (g - n * mean(g * n) - mean(g)), without the last term if not centered.
    """
    wide = _wide(rows.dtype)
    scale = rstd.to(wide).unsqueeze(-1)
    x = rows.to(wide)
    normalized = (x - mean.to(wide).unsqueeze(-1) if centered else x) * scale
    grad = grad_kept.to(wide) * (1 + weight.to(wide) if gemma else weight.to(wide))
    width = max(grad.shape[-1], 1)
    inner = grad - normalized * ((grad * normalized).sum(-1, keepdim=True) / width)
    if centered:
        inner = inner - grad.sum(-1, keepdim=True) / width
    chosen = permutation[: len(rows)]
    target = grad_residual.reshape(len(permutation), *rows.shape[1:])
    total = target.index_select(0, chosen).to(wide) + scale * inner
    target = target.index_copy(0, chosen, total.to(grad_residual.dtype))
    grad_residual.copy_(target.reshape(grad_residual.shape))
    grads = grad_kept.to(wide).reshape(rstd.numel(), weight.shape[0])
    grad_weight = (grads * normalized.reshape(grads.shape)).sum(0) if weight_grad else weight.new_empty(0)
    grad_bias = grads.sum(0) if bias_grad else weight.new_empty(0)
    return grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)


def _activate(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """(activation(x), its derivative at x)."""
    if activation == "silu":
        sigmoid = torch.sigmoid(x)
        return x * sigmoid, sigmoid + x * sigmoid * (1 - sigmoid)
    if activation == "gelu":
        below = 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))
        return x * below, below + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    if activation == "gelu_tanh":
        scale = 2 * math.sqrt(2 / math.pi)
        sigmoid = torch.sigmoid(scale * (x + 0.044715 * x**3))  # 1 + tanh(u) = 2 sigmoid(2 u)
        bent = x.clamp(-20, 20)  # the curve is straight beyond, where x * x may overflow
        slope = sigmoid + bent * sigmoid * (1 - sigmoid) * scale * (1 + 3 * 0.044715 * bent * bent)
        return x * sigmoid, slope
    raise ValueError(f"activation: expected silu, gelu or gelu_tanh, got {activation}")


def glu_reference(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up, rounded once."""
    wide = _wide(gate.dtype)
    value, _ = _activate(gate.to(wide), activation)
    return (value * up.to(wide)).to(gate.dtype).contiguous()


def glu__reference(gate: Tensor, up: Tensor, activation: str) -> None:
    """The same, written into gate."""
    gate.copy_(glu_reference(gate, up, activation))


def glu_backward_reference(grad_output: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """(gradient of gate, gradient of up)."""
    wide = _wide(gate.dtype)
    value, slope = _activate(gate.to(wide), activation)
    grad = grad_output.to(wide)
    grad_gate, grad_up = grad * up.to(wide) * slope, grad * value
    return grad_gate.to(gate.dtype).contiguous(), grad_up.to(up.dtype).contiguous()


def glu_backward__reference(grad_output: Tensor, gate: Tensor, up: Tensor, activation: str) -> None:
    """The same, written into gate and up."""
    grad_gate, grad_up = glu_backward_reference(grad_output, gate, up, activation)
    gate.copy_(grad_gate)
    up.copy_(grad_up)


def _check_channels(index: Tensor, width: int, are_different: bool) -> None:
    """The reference looks, where there is something to look at: a device without memory of its own, not meta."""
    if index.device.type != "cpu":
        return
    if ((index < 0) | (index >= width)).any():
        raise IndexError(f"index: expected numbers from 0 to {width - 1}")
    if are_different and index.unique().numel() != index.numel():
        raise IndexError("index: expected different numbers")


def partial_gather_reference(input: Tensor, index: Tensor) -> Tensor:
    """The channels index (r,) of input (..., D), as (..., r)."""
    _check_channels(index, input.shape[-1], are_different=False)
    return input.index_select(-1, index).contiguous()


def column_update__reference(weight: Tensor, delta: Tensor, index: Tensor, scale: float) -> Tensor:
    """weight[:, index] += scale * delta, rounded once; what those columns were, bit for bit."""
    _check_channels(index, weight.shape[1], are_different=True)
    wide = torch.promote_types(_wide(weight.dtype), _wide(delta.dtype))
    original = weight.index_select(1, index).contiguous()
    columns = original.to(wide) + delta.to(wide) * scale
    weight.index_copy_(1, index, columns.to(weight.dtype))
    return original


def column_restore__reference(weight: Tensor, original: Tensor, index: Tensor) -> None:
    """weight[:, index] = original."""
    _check_channels(index, weight.shape[1], are_different=True)
    weight.index_copy_(1, index, original)


def l1_distances_reference(features: Tensor) -> Tensor:
    """The sums of absolute differences of all pairs of rows of features (B, h)."""
    wide = features.to(_wide(features.dtype))
    return torch.cdist(wide, wide, p=1.0)


def rope_reference(x: Tensor, cos: Tensor, sin: Tensor, transpose: bool) -> Tensor:
    """Each pair of channels (i, i + R/2) turned by its position's angle, or (transpose) turned back; rounded once."""
    wide = _wide(x.dtype)
    cosines, sines = (table.to(wide).unsqueeze(-2).chunk(2, dim=-1) for table in (cos, sin))  # (..., seq, 1, R/2) each
    half = cosines[0].shape[-1]
    first, second, rest = x.to(wide).tensor_split((half, 2 * half), dim=-1)
    if transpose:
        turned = first * cosines[0] + second * sines[1], second * cosines[1] - first * sines[0]
    else:
        turned = first * cosines[0] - second * sines[0], second * cosines[1] + first * sines[1]
    return torch.cat((*turned, rest), dim=-1).to(x.dtype)


def rope__reference(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """The same, written into x."""
    x.copy_(rope_reference(x, cos, sin, False))
