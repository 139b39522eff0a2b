"""Fused DropBP transformer blocks, to build models from.

A block does not add its last branch to the residual: it hands (residual, pending branch) on, and where the next norm
reads the sum, one kernel adds and normalises (`ops.gated_residual_rms_norm`). Between two dropped branches nothing is
saved.

    stream = Stream(embedding(tokens))
    rope = rotary_embedding(seq_len, head_dim, device=tokens.device)
    for block in blocks:                       # LlamaBlock
        stream = block(stream, rope)
    hidden = finish(stream, final_norm)        # RMSNorm

Parameter names are those of transformers' Llama layer, so ``block.load_state_dict(layer.state_dict())`` just works.

Compiled one by one, blocks share 12 graphs: nothing, a kept or a dropped branch may be pending, times both gates.
PyTorch gives up after eight and runs the others as they are: set ``torch._dynamo.config.recompile_limit`` to 16.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .flops import attention_core_flops, linear_flops
from .glu_linear import glu_linear
from .layer import DropBP, add_branch
from .ops.gated_residual_rms_norm import gated_residual_rms_norm
from .ops.glu import swiglu
from .ops.permuted_norm import permuted_rms_norm
from .ops.rope import rope as apply_rope
from .plain_linear import weight_and_bias


class Stream(NamedTuple):
    """What flows between blocks: the residual (batch, seq, D) and a branch output (batch, seq, D) still to be added.

    grad_scale is the factor on the gradient entering that branch.
    """

    residual: Tensor
    branch: Tensor | None = None
    grad_scale: float = 1.0

    def added(self) -> Tensor:
        """The residual with the branch, where one is pending."""
        return self.residual if self.branch is None else add_branch(self.residual, self.branch, self.grad_scale)


class SeenKeys:
    """Keys and values of one block in one stage of a target plan: those that its rows see beside their own.

    Args:
        before: keys and values (batch, kv heads, rows, head_dim) of the stages before.
        mask: bool (batch, 1, rows, all keys), which keys a row sees; None: plainly causal, in the first stage.
        has_gradient: whether the stage's own keys and values get a gradient where its other tensors get none.
    """

    def __init__(self, before: Sequence[tuple[Tensor, Tensor]], mask: Tensor | None, has_gradient: bool = False):
        self.before = tuple(before)  # as it is now: the list goes on
        self.mask = mask
        self.has_gradient = has_gradient
        self.samples: Tensor | None = None  # those that it is about, int64 (K,); None: all
        self._own: tuple[Tensor, Tensor] | None = None  # once the block has run; a recompute does not change it
        self._parts: list[SeenKeys] = []

    @property
    def own(self) -> tuple[Tensor, Tensor] | None:
        """The stage's own keys and values, of all samples; None before the block has run."""
        if not self._parts:
            return self._own
        samples = torch.cat([part.samples for part in self._parts if part.samples is not None]).argsort()
        keys, values = zip(*(part._own for part in self._parts if part._own is not None), strict=True)
        return torch.cat(keys)[samples], torch.cat(values)[samples]

    def of_samples(self, samples: Tensor) -> "SeenKeys":
        """What some samples of the batch see, int64 (K,), for a call that goes by rows."""
        part = SeenKeys(self.before, None if self.mask is None else self.mask[samples], self.has_gradient)
        part.samples = samples
        self._parts.append(part)
        return part

    def leave(self, key: Tensor, value: Tensor) -> None:
        """Keep the rows' own key and value for later stages; a recompute changes nothing."""
        if self._own is None:
            self._own = key, value

    def join(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """All that the stage's rows see: what came before, then their own key and value."""
        self.leave(key, value)
        before = self.before
        if self.samples is not None:
            before = tuple((keys[self.samples], values[self.samples]) for keys, values in before)
        keys, values = zip(*before, (key, value), strict=True)
        return torch.cat(keys, dim=-2), torch.cat(values, dim=-2)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, with Llama's casting: normalise in float32, round, then scale.

    Of float64 in float64, as the fused norm does: a value must not depend on the plan.
    """

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = F.rms_norm(wide, (x.shape[-1],), eps=self.eps)
        return self.weight * normed.to(x.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions, through scaled_dot_product_attention."""

    def __init__(self, width: int, num_heads: int, num_kv_heads: int, head_dim: int):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.q_proj = nn.Linear(width, num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(width, num_kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(width, num_kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, width, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], seen: SeenKeys | None = None) -> Tensor:
        batch_size, seq_len, _ = x.shape
        heads = (batch_size, seq_len, -1, self.head_dim)
        query = rotate(self.q_proj(x).view(heads), rope).transpose(1, 2)
        key, value = self.keys_and_values(x, rope, seen)
        mask = None
        if seen is not None:
            key, value = seen.join(key, value)
            mask = seen.mask
        output = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        return self.o_proj(output.transpose(1, 2).reshape(batch_size, seq_len, -1))

    def keys_and_values(self, x: Tensor, rope: tuple[Tensor, Tensor], seen: SeenKeys | None) -> tuple[Tensor, Tensor]:
        """Of rows x (batch, seq, width): two tensors (batch, kv heads, seq, head_dim)."""
        heads = (*x.shape[:2], -1, self.head_dim)
        with torch.set_grad_enabled(torch.is_grad_enabled() or (seen is not None and seen.has_gradient)):
            key = rotate(self.k_proj(x).view(heads), rope).transpose(1, 2)
            value = self.v_proj(x).view(heads).transpose(1, 2)
        return key, value

    def flops(self, batch_size: int, seq_len: int) -> float:
        """Forward FLOPs (two per multiply-add) for a batch of this shape."""
        core = attention_core_flops(batch_size, seq_len, self.num_heads, self.head_dim)
        return linear_flops(self, batch_size * seq_len) + core


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)).

    Kept, the product is made from gate and up, which are saved, and its backward writes their gradients into them where
    nobody else holds them; down_proj, unless somebody watches it, saves nothing (`glu_linear`). Without autograd it is
    written over gate(x): a forward hook of gate_proj that keeps its output finds the product in it.
    """

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if not (gate.requires_grad or up.requires_grad):
            return self.down_proj(swiglu(gate, up, inplace=True))
        down = None if torch.compiler.is_compiling() else weight_and_bias(self.down_proj)
        if down is not None and down[0].requires_grad and down[0].dtype is gate.dtype:
            return glu_linear(gate, up, *down, donate=True)
        return self.down_proj(swiglu(gate, up, donate=True))

    def flops(self, batch_size: int, seq_len: int) -> float:
        """Forward FLOPs (two per multiply-add) for a batch of this shape."""
        return linear_flops(self, batch_size * seq_len)


class LlamaBlock(nn.Module):
    """A Llama block whose residual adds are fused with the norms that follow them, also across blocks.

    Args:
        width: D, size of the residual stream. hidden: size of the MLP's inner layer.
        num_heads, num_kv_heads: query heads and key/value heads (a divisor of num_heads; default num_heads).
        head_dim: size of a head; default width / num_heads. eps: of both norms.

    Shapes: stream.residual and stream.branch (batch, seq, D); rope two tensors (seq, head_dim), or (batch, seq,
            head_dim) where samples have positions of their own. seen: what a stage of a target plan sees beside its
            own rows (`staged_blocks`); None: the rows are whole sequences.
    Errors: ValueError when num_heads is no multiple of num_kv_heads, or width of num_heads while head_dim is not given.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        eps: float = 1e-6,
    ):
        super().__init__()
        num_kv_heads = num_kv_heads or num_heads
        if num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads: expected a divisor of num_heads={num_heads}, got {num_kv_heads}")
        if head_dim is None and width % num_heads:
            raise ValueError(f"width: expected a multiple of num_heads={num_heads}, got {width}; or give head_dim")
        self.input_layernorm = RMSNorm(width, eps)
        self.self_attn = Attention(width, num_heads, num_kv_heads, head_dim or width // num_heads)
        self.post_attention_layernorm = RMSNorm(width, eps)
        self.mlp = SwiGLU(width, hidden)
        self.gate_attention = DropBP(self.self_attn.flops, modules=(self.input_layernorm, self.self_attn))
        self.gate_mlp = DropBP(self.mlp.flops, modules=(self.post_attention_layernorm, self.mlp), per_token=True)

    def forward(self, stream: Stream, rope: tuple[Tensor, Tensor], seen: SeenKeys | None = None) -> Stream:
        stream = extend(
            stream,
            self.input_layernorm,
            self.gate_attention,
            lambda x, *args: self.self_attn(x, args[:2], args[2]),
            *rope,
            seen,
        )
        return extend(stream, self.post_attention_layernorm, self.gate_mlp, self.mlp)

    def leave_keys(self, stream: Stream, rope: tuple[Tensor, Tensor], seen: SeenKeys) -> None:
        """Only what later stages see of the stream's rows: all that a last block has to make of context."""
        normed, _ = enter(stream, self.input_layernorm, self.gate_attention)
        seen.leave(*self.self_attn.keys_and_values(normed, rope, seen))


def extend(stream: Stream, norm: RMSNorm, gate: DropBP, branch: Callable[..., Tensor], *args: Any) -> Stream:
    """branch(norm(stream), *args) behind `gate`, pending; under a plan by rows it is added already.

    By rows the norm reads through the permutation, and holds the kept rows instead of the sum.
    """
    if torch.is_grad_enabled() and not isinstance(gate.kept, bool):
        residual = stream.added()
        split = gate.split(residual)
        if split is None or gate.checkpoint is not None:  # the norm is then dropped, or computed again, with its branch
            return Stream(gate.residual_add(residual, lambda x, *args: branch(norm(x), *args), *args))
        rows = permuted_rms_norm(residual, norm.weight, *split.rows[:2], eps=norm.eps)
        return Stream(gate.add_rows(split, rows, branch, *args))
    normed, residual = enter(stream, norm, gate)
    return Stream(residual, gate.run(normed, branch, *args), gate.grad_scale)


def enter(stream: Stream, norm: RMSNorm, gate: DropBP) -> tuple[Tensor, Tensor]:
    """Add the pending branch and normalise for the branch behind `gate`: (normed, residual), each (batch, seq, D).

    When that branch is dropped, normed is a constant and nothing is saved for it.
    Cost: one kernel; in the very first block, where nothing is pending, the plain norm.
    """
    if stream.branch is None:
        with torch.set_grad_enabled(gate.records_graph):
            return norm(stream.residual), stream.residual
    return gated_residual_rms_norm(
        stream.residual,
        stream.branch,
        norm.weight,
        eps=norm.eps,
        next_kept=gate.records_graph,
        grad_scale=stream.grad_scale,
    )


def finish(stream: Stream, norm: RMSNorm) -> Tensor:
    """Add the last pending branch and apply the model's final norm: (batch, seq, D)."""
    if stream.branch is None:
        return norm(stream.residual)
    normed, _ = gated_residual_rms_norm(
        stream.residual, stream.branch, norm.weight, eps=norm.eps, grad_scale=stream.grad_scale
    )
    return normed


def rotary_embedding(
    seq_len: int,
    head_dim: int,
    base: float = 10_000.0,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary positions 0 ... seq_len - 1, each (seq_len, head_dim) in dtype.

    Source: RoFormer (arXiv 2104.09864), in the half-split layout of Llama.
    """
    inverse_wavelength = base ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(seq_len, device=device, dtype=torch.float32), inverse_wavelength)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions on x (batch, seq, heads, head_dim), the output of a projection: over it, without autograd."""
    return apply_rope(x, *rope, inplace=not x.requires_grad)
