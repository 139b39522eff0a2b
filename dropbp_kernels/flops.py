"""What a branch costs: FLOPs from module shapes and the number of tokens, without running anything.

One multiply-add counts as 2 FLOPs, as in `torch.utils.flop_counter` (hand formulas in papers often count
multiply-accumulates: half of it). Counted are the matrix products, which are all but a few percent of a transformer.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn


def _matrices(module: Any) -> Iterator[tuple[int, bool]]:
    """(in_features * out_features, whether its weight is trained) of every matrix a token is multiplied with."""
    if hasattr(module, "base_layer") and hasattr(module, "lora_A"):
        yield from _matrices(module.base_layer)
        if not (module.disable_adapters or module.merged):
            for name in module.active_adapters:
                if name in module.lora_A:
                    yield from _matrices(module.lora_A[name])
                    yield from _matrices(module.lora_B[name])
        return
    weight = getattr(module, "weight", None)
    is_trained = bool(weight is not None and weight.requires_grad)
    if hasattr(module, "in_features") and hasattr(
        module, "out_features"
    ):  # also quantised linears: shapes, not weights
        yield module.in_features * module.out_features, is_trained
    elif type(module).__name__ == "Conv1D":  # transformers' linear with a transposed weight
        yield module.weight.numel(), is_trained
    else:
        unknown = [name for name, p in module.named_parameters(recurse=False) if p.dim() > 1]
        if unknown and not isinstance(module, nn.Embedding):
            raise TypeError(
                f"module: no FLOPs formula for {type(module).__name__} (parameters {', '.join(unknown)}); "
                "expected linear layers. Give the gate your own flops function."
            )
        for child in module.children():
            yield from _matrices(child)


def linear_flops(module: nn.Module, num_tokens: int) -> float:
    """Forward FLOPs of all linear layers in `module`, each applied once to num_tokens tokens.

    Knows layers with in_features and out_features (nn.Linear, quantised ones too), transformers' Conv1D and PEFT's LoRA
    layers (base, and A and B of the active adapters unless merged or disabled), anywhere in the tree. Norms, biases,
    activations and embeddings count as nothing.

    Errors: TypeError, naming the module, for other modules with matrix parameters: their FLOPs would be missing.
    Cost:   a walk over the modules; reads shapes only, works on the meta device.
    Source: oracle torch.utils.flop_counter.FlopCounterMode.
    """
    return 2.0 * num_tokens * sum(size for size, _ in _matrices(module))


def attention_core_flops(
    batch_size: int, seq_len: int, num_heads: int, head_dim: int, *, causal: bool = False
) -> float:
    """Forward FLOPs of queries x keys and of probabilities x values, without the projections.

    num_heads counts query heads: grouped key and value heads save projections and memory, no work here.
    causal=False counts the full square even under a causal mask, as `flop_counter` does; causal=True counts half of it,
    which is what a kernel that skips masked tiles does.

    Source: oracle torch.utils.flop_counter.FlopCounterMode.
    """
    full = 4.0 * batch_size * num_heads * seq_len * seq_len * head_dim
    return full / 2.0 if causal else full


def backward_flops(
    module: nn.Module, num_tokens: int, *, attention_core: float = 0.0, fused_attention: bool = False
) -> float:
    """FLOPs that the backward of a kept branch costs, given that its input needs a gradient.

    A frozen weight costs its forward once more (the gradient of its input), a trained one twice (and the gradient of
    the weight). The attention core (pass its forward FLOPs) costs twice its forward, or 2.5 times in a fused kernel,
    which computes the scores again.

    Errors: those of `linear_flops`.
    Cost:   a walk over the modules.
    Source: oracle torch.utils.flop_counter.FlopCounterMode.
    """
    linears = 2.0 * num_tokens * sum(size * (2 if is_trained else 1) for size, is_trained in _matrices(module))
    return linears + attention_core * (2.5 if fused_attention else 2.0)


def kept_share(flops: Sequence[float], kept: Iterable[bool]) -> float:
    """Share of the branches' FLOPs that a plan keeps, between 0 and 1.

    Errors: ValueError when the lengths differ or all FLOPs are zero.
    """
    plan = list(kept)
    if len(plan) != len(flops):
        raise ValueError(f"kept: expected one entry for each of the {len(flops)} branches, got {len(plan)}")
    total = math.fsum(flops)
    if total <= 0.0:
        raise ValueError(f"flops: expected a positive sum, got {total}")
    return math.fsum(cost for cost, is_kept in zip(flops, plan, strict=True) if is_kept) / total
