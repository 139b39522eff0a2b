"""Which modules of a known block form its branches: one small entry per model family.

An entry names the block's class and rewrites its forward around two gates. The rewrite is the block's own arithmetic
with ``residual + branch`` replaced by the gate, so logits are the same bit for bit at any plan.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..flops import attention_core_flops, linear_flops
from ..layer import DropBP


def _pre_norm_forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """x + attention(norm(x)), then x + mlp(norm(x)), as in Llama and the models that inherit its decoder layer."""

    def attention(x: Tensor) -> Tensor:
        return self.self_attn(self.input_layernorm(x), *args, **kwargs)[0]

    def mlp(x: Tensor) -> Tensor:
        return self.mlp(self.post_attention_layernorm(x))

    hidden_states = self.gate_attention.residual_add(hidden_states, attention)
    return self.gate_mlp.residual_add(hidden_states, mlp)


@dataclass(frozen=True)
class Family:
    """How to gate the blocks of one model family.

    block: class name of the block. forward: its new forward, which reads `gate_attention` and `gate_mlp`.
    attention, mlp: attribute names of the modules of each branch, the norm first.
    """

    block: str
    forward: Callable[..., Tensor] = _pre_norm_forward
    attention: tuple[str, ...] = ("input_layernorm", "self_attn")
    mlp: tuple[str, ...] = ("post_attention_layernorm", "mlp")

    def gates(self, block: nn.Module) -> dict[str, DropBP]:
        """New gates for one block, knowing their modules and FLOPs."""
        attention = [getattr(block, name) for name in self.attention]
        mlp = [getattr(block, name) for name in self.mlp]
        return {
            "gate_attention": DropBP(_AttentionFlops(attention), modules=attention),
            "gate_mlp": DropBP(_LinearFlops(mlp), modules=mlp),
        }


# Classes rather than closures, so that a patched model can be deep-copied and its copy counts its own modules.
@dataclass
class _LinearFlops:
    modules: list[nn.Module]

    def __call__(self, batch_size: int, seq_len: int) -> float:
        return sum(linear_flops(module, batch_size * seq_len) for module in self.modules)


@dataclass
class _AttentionFlops(_LinearFlops):
    def __call__(self, batch_size: int, seq_len: int) -> float:
        attention: Any = self.modules[-1]
        core = attention_core_flops(batch_size, seq_len, attention.config.num_attention_heads, attention.head_dim)
        return super().__call__(batch_size, seq_len) + core


FAMILIES = {
    "llama": Family("LlamaDecoderLayer"),
    "mistral": Family("MistralDecoderLayer"),
    "qwen2": Family("Qwen2DecoderLayer"),
    "qwen3": Family("Qwen3DecoderLayer"),
}
