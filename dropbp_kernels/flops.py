"""What a branch costs: FLOPs from module shapes and the number of tokens, without running anything.

One multiply-add counts as 2 FLOPs, as in `torch.utils.flop_counter` (hand formulas in papers often count
multiply-accumulates: half of it). Counted are the matrix products, which are all but a few percent of a transformer.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn


def _matrices(module: Any, top_k: int = 0) -> Iterator[float]:
    """in_features * out_features of every matrix a token is multiplied with.

    top_k: how many experts a token goes through, as far as the modules above said; 0 when they did not.
    """
    if hasattr(module, "base_layer") and hasattr(module, "lora_A"):
        yield from _matrices(module.base_layer, top_k)
        if not (module.disable_adapters or module.merged):
            for name in module.active_adapters:
                if name in module.lora_A:
                    for part in (module.lora_A[name], module.lora_B[name]):
                        if isinstance(part, nn.Parameter):  # AdaLoRA's
                            yield part.numel()
                        else:
                            yield from _matrices(part)
        return
    num_in, num_out = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if num_in is not None and num_out is not None:  # not the weights, for quantised linears; PEFT's norms have None
        yield num_in * num_out
        return
    if type(module).__name__ == "Conv1D":  # transformers' linear with a transposed weight
        yield module.weight.numel()
        return
    top_k = _experts_per_token(module) or top_k
    unknown = []
    for name, parameter in module.named_parameters(recurse=False):
        num_experts = getattr(module, "num_experts", None)
        if parameter.dim() == 3 and num_experts == parameter.shape[0] and top_k:  # all experts' weights in one tensor
            yield parameter.numel() * top_k / num_experts
        elif parameter.dim() == 2 and num_experts == parameter.shape[0]:  # the router
            yield parameter.numel()
        elif parameter.dim() > 1:
            unknown.append(name)
    if unknown and not isinstance(module, nn.Embedding):
        raise TypeError(
            f"module: no FLOPs formula for {type(module).__name__} (parameters {', '.join(unknown)}); "
            "expected linear layers. Give the gate your own flops function."
        )
    experts = [child for child in module.children() if isinstance(child, nn.ModuleList) and len(child) > 1]
    for child in module.children():
        share = top_k / len(child) if top_k and child in experts else 1.0
        for size in _matrices(child, top_k):
            yield size * share


def _experts_per_token(module: Any) -> int:
    """How many experts a token goes through, when `module` or one of its children (the router) says so, else 0."""
    for holder in (module, *module.children()):
        for name in ("top_k", "num_experts_per_tok"):
            if isinstance(top_k := getattr(holder, name, None), int):
                return top_k
    return 0


def linear_flops(module: nn.Module, num_tokens: int) -> float:
    """Forward FLOPs of all linear layers in `module`, each applied once to num_tokens tokens.

    Knows layers with in_features and out_features (nn.Linear, quantised ones too), transformers' Conv1D, its routers
    and experts (as many as a token goes through), and PEFT's LoRA layers (base, and A and B of the active adapters
    unless merged or disabled), anywhere in the tree. Norms, biases, activations and embeddings count as nothing.

    Errors: TypeError, naming the module, for other modules with matrix parameters: their FLOPs would be missing.
    Cost:   a walk over the modules; reads shapes only, works on the meta device.
    Source: oracle torch.utils.flop_counter.FlopCounterMode.
    """
    return 2.0 * num_tokens * sum(_matrices(module))


def attention_core_flops(batch_size: int, seq_len: int, num_heads: int, head_dim: float) -> float:
    """Forward FLOPs of queries x keys and of probabilities x values, without the projections.

    num_heads counts query heads: grouped key and value heads save projections and memory, no work here. The full square
    counts, also under a causal mask, as in `flop_counter`.

    Source: oracle torch.utils.flop_counter.FlopCounterMode.
    """
    return 4.0 * batch_size * num_heads * seq_len * seq_len * head_dim


def attention_shape(module: nn.Module) -> tuple[int, float] | None:
    """(query heads, head_dim) of a softmax attention, from its attributes and its config; None when they do not say.

    Where keys and values differ in size (multi-head latent attention) head_dim is their mean.
    """
    config = getattr(module, "config", None)

    def read(*names: str) -> Any:
        values = (getattr(holder, name, None) for holder in (module, config) for name in names)
        return next((value for value in values if isinstance(value, int) and not isinstance(value, bool)), None)

    num_heads = read("num_attention_heads", "num_heads", "n_heads", "n_head", "decoder_attention_heads")
    head_dim = read("qk_head_dim", "head_dim", "attention_head_size", "key_value_proj_dim", "d_kv", "kv_channels")
    if head_dim is None:
        width = read("hidden_size", "embed_dim", "d_model", "n_embd")
        head_dim = width // num_heads if width and num_heads else None
    if num_heads is None or head_dim is None:
        return None
    return num_heads, (head_dim + (read("v_head_dim") or head_dim)) / 2
