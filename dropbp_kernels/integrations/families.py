"""Which modules of a block form its branches: one small entry per model family.

    register_family("mine", block="MyBlock", branches={"attention": ("norm1", "attn"), "mlp": ("norm2", "mlp")})

Each branch is the chain of modules between the residual stream and the add, in the order in which they run: pre-norms,
sublayer, post-norms. Two branches may name the same norm (parallel residual). A name may be

    "attn.dense"                  a module anywhere below the block, as in `get_submodule`
    "ln_mlp|input_layernorm"      the first of these that the block has
    "post_norm?"                  a module that not every block has

and a branch, "cross_attention?", one that not every block has: it exists where all its modules are.

What is applied after the add (the norms of a post-norm block: BERT) belongs to the stream and stays out.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .family import Family
from .fusing import pre_norm_forward


def _chains(attention: str, mlp: str) -> dict[str, tuple[str, ...]]:
    return {"attention": tuple(attention.split()), "mlp": tuple(mlp.split())}


def _classes(names: str, suffix: str) -> tuple[str, ...]:
    return tuple(name + suffix for name in names.split())


def _sequential(
    *blocks: str,
    attention: str = "input_layernorm self_attn",
    mlp: str = "post_attention_layernorm mlp",
    when: Callable[[Any], bool] | None = None,
    scale: str | None = None,
    clamps_half: bool = False,
) -> Family:
    """Blocks that add their branches one after the other, so that an add can wait for the norm behind it.

    attention, mlp: all that a branch calls between stream and add, in its order: beside its modules an activation
    ("activation_fn") and dropouts ("...dropout", a module or a probability). when: as in `Family`. scale, clamps_half:
    as in `pre_norm_forward`.
    """
    called = _chains(attention, mlp)
    branches = {
        branch: tuple(name for name in names if name != "activation_fn" and not name.endswith("dropout"))
        for branch, names in called.items()
    }
    return Family(blocks, branches, when, pre_norm_forward(called, scale, clamps_half))


_LLAMA = _chains("input_layernorm self_attn", "post_attention_layernorm mlp")
_PARALLEL = _chains("input_layernorm self_attn", "input_layernorm mlp")
_SANDWICH: dict[str, Any] = {
    "attention": "input_layernorm self_attn post_attention_layernorm",
    "mlp": "pre_feedforward_layernorm mlp post_feedforward_layernorm",
}
_BERT = {
    "attention": ("attention.self", "attention.output.dense"),
    "cross_attention?": ("crossattention.self", "crossattention.output.dense"),
    "mlp": ("intermediate", "output.dense"),
}
_BERT_LAYERS = """
    Bert BertGeneration BigBird Camembert Data2VecText Electra Ernie RemBert RoCBert Roberta RoFormer XLMRoberta
"""
_GPT2 = {
    "attention": ("ln_1", "attn"),
    "cross_attention?": ("ln_cross_attn", "crossattention"),
    "mlp": ("ln_2", "mlp"),
}
_WHISPER = {
    "attention": ("self_attn_layer_norm", "self_attn"),
    "cross_attention?": ("encoder_attn_layer_norm", "encoder_attn"),
    "mlp": ("final_layer_norm", "fc1", "fc2"),
}

# Blocks whose forward is Llama's to the letter.
_LIKE_LLAMA = """
    Llama AXK1 Arcee AriaText BitNet Cwm DeepseekV32 DiffLlama Dots1 Dots3NoteText Ernie4_5 Ernie4_5_Moe ExaoneMoe Glm
    Glm4Moe Glm4MoeLite HYV3 HunYuanDenseV1 HunYuanMoEV1 Jais2 Laguna Mellum MiMoV2Flash MiniMaxM2 MiniMaxM3VL Ministral
    Ministral3 Olmoe Phimoe SeedOss SmolLM3 SolarOpen Youtu
"""

FAMILIES: dict[str, Family] = {
    "llama": _sequential(*_classes(_LIKE_LLAMA, "DecoderLayer")),
    "mistral": _sequential("MistralDecoderLayer"),
    "qwen2": _sequential("Qwen2DecoderLayer"),
    "qwen3": _sequential("Qwen3DecoderLayer"),
    "mixtral": _sequential("MixtralDecoderLayer"),
    "qwen2_moe": _sequential("Qwen2MoeDecoderLayer"),
    "qwen3_moe": _sequential("Qwen3MoeDecoderLayer"),
    "gemma": _sequential("GemmaDecoderLayer"),
    "gemma2": _sequential("Gemma2DecoderLayer", **_SANDWICH),
    "gemma3": _sequential("Gemma3DecoderLayer", **_SANDWICH),
    "vaultgemma": _sequential("VaultGemmaDecoderLayer", mlp="pre_feedforward_layernorm mlp"),
    "phi": Family(("PhiDecoderLayer",), _PARALLEL),
    "phi3": _sequential(
        "Phi3DecoderLayer",
        "Phi4MultimodalDecoderLayer",
        attention="input_layernorm self_attn resid_attn_dropout",
        mlp="post_attention_layernorm mlp resid_mlp_dropout",
    ),
    "gpt2": _sequential(
        "GPT2Block", attention="ln_1 attn", mlp="ln_2 mlp", when=lambda block: not hasattr(block, "crossattention")
    ),
    "gpt2_cross": Family(("GPT2Block",), _GPT2, when=lambda block: hasattr(block, "crossattention")),
    "gpt_bigcode": Family(("GPTBigCodeBlock",), _GPT2),
    "gpt_neox_sequential": _sequential(
        "GPTNeoXLayer",
        attention="input_layernorm attention post_attention_dropout",
        mlp="post_attention_layernorm mlp post_mlp_dropout",
        when=lambda block: not block.use_parallel_residual,
    ),
    "gpt_neox": Family(
        ("GPTNeoXLayer",),
        _chains("input_layernorm attention", "post_attention_layernorm mlp"),
        when=lambda block: block.use_parallel_residual,
    ),
    "gptj": Family(("GPTJBlock",), _chains("ln_1 attn", "ln_1 mlp")),
    "falcon": Family(
        ("FalconDecoderLayer",),
        _chains("ln_attn|input_layernorm self_attention", "ln_mlp|post_attention_layernorm|input_layernorm mlp"),
    ),
    "opt": _sequential(
        "OPTDecoderLayer",
        attention="self_attn_layer_norm self_attn dropout",
        mlp="final_layer_norm fc1 activation_fn fc2 dropout",
        when=lambda block: block.do_layer_norm_before,
    ),
    "opt_post_norm": Family(
        ("OPTDecoderLayer",), _chains("self_attn", "fc1 fc2"), when=lambda block: not block.do_layer_norm_before
    ),
    # Bloom adds inside its attention and its MLP; the scores between the linears are constants when those are.
    "bloom": Family(
        ("BloomBlock",),
        _chains(
            "input_layernorm self_attention.query_key_value self_attention.dense",
            "post_attention_layernorm mlp.dense_h_to_4h mlp.dense_4h_to_h",
        ),
        when=lambda block: not block.apply_residual_connection_post_layernorm,
    ),
    "bloom_post_norm": Family(
        ("BloomBlock",),
        _chains("self_attention.query_key_value self_attention.dense", "mlp.dense_h_to_4h mlp.dense_4h_to_h"),
        when=lambda block: block.apply_residual_connection_post_layernorm,
    ),
    "starcoder2": _sequential("Starcoder2DecoderLayer"),
    "olmo2": Family(
        ("Olmo2DecoderLayer",), _chains("self_attn post_attention_layernorm", "mlp post_feedforward_layernorm")
    ),
    "cohere": Family(("CohereDecoderLayer",), _PARALLEL),
    "stablelm": _sequential(
        "StableLmDecoderLayer",
        mlp="post_attention_layernorm mlp dropout",
        when=lambda block: not block.use_parallel_residual,
    ),
    "stablelm_parallel": Family(("StableLmDecoderLayer",), _PARALLEL, when=lambda block: block.use_parallel_residual),
    "granite": _sequential("GraniteDecoderLayer", "GraniteSWADecoderLayer", scale="residual_multiplier"),
    "granitemoe": _sequential(
        "GraniteMoeDecoderLayer", mlp="post_attention_layernorm block_sparse_moe", scale="residual_multiplier"
    ),
    "hyperclovax": _sequential(
        "HyperCLOVAXDecoderLayer",
        attention="input_layernorm self_attn post_norm1",
        mlp="post_attention_layernorm mlp post_norm2",
        scale="residual_multiplier",
    ),
    "minicpm3": _sequential("MiniCPM3DecoderLayer", scale="residual_scale"),
    "apertus": _sequential(
        "ApertusDecoderLayer", attention="attention_layernorm self_attn", mlp="feedforward_layernorm mlp"
    ),
    "glm4": _sequential(
        "Glm4DecoderLayer",
        "Kolibri1DecoderLayer",
        attention="input_layernorm self_attn post_self_attn_layernorm",
        mlp="post_attention_layernorm mlp post_mlp_layernorm",
    ),
    "jetmoe": _sequential("JetMoeDecoderLayer", attention="input_layernorm self_attention"),
    "emu3": _sequential(
        "Emu3DecoderLayer",
        attention="input_layernorm self_attn dropout",
        mlp="post_attention_layernorm mlp dropout",
    ),
    "biogpt": _sequential(
        "BioGptDecoderLayer",
        attention="self_attn_layer_norm self_attn dropout",
        mlp="final_layer_norm fc1 activation_fn activation_dropout fc2 dropout",
    ),
    "persimmon": _sequential("PersimmonDecoderLayer", mlp="post_attention_layernorm mlp dropout"),
    "deepseek_v2": _sequential("DeepseekV2DecoderLayer"),
    "deepseek_v3": _sequential("DeepseekV3DecoderLayer"),
    "bert": Family(_classes(_BERT_LAYERS, "Layer"), _BERT),
    "bart": Family(
        (
            *_classes("Bart BlenderbotSmall Marian Mvp PLBart TrOCR", "DecoderLayer"),
            *_classes("Bart BlenderbotSmall Marian Mvp PLBart", "EncoderLayer"),
        ),
        {"attention": ("self_attn",), "cross_attention?": ("encoder_attn",), "mlp": ("fc1", "fc2")},
    ),
    "doge": Family(("DogeDecoderLayer",), _LLAMA),  # scales the stream by parameters, which stay with the stream
    "minimax": Family(("MiniMaxDecoderLayer",), _chains("self_attn", "mlp")),  # its norms are in the stream
    "rwkv": Family(("RwkvBlock",), _chains("ln1 attention", "ln2 feed_forward"), per_token=()),  # shifts tokens
    "vit": _sequential("ViTLayer", attention="layernorm_before attention dropout", mlp="layernorm_after mlp dropout"),
    "whisper_encoder": _sequential(
        "WhisperEncoderLayer",
        attention="self_attn_layer_norm self_attn dropout",
        mlp="final_layer_norm fc1 activation_fn activation_dropout fc2 dropout",
        clamps_half=True,
    ),
    "whisper": Family(("WhisperDecoderLayer",), _WHISPER),
    "t5": Family(
        ("T5LayerSelfAttention", "T5LayerCrossAttention", "T5LayerFF"),
        {
            "attention?": ("layer_norm", "SelfAttention"),
            "cross_attention?": ("layer_norm", "EncDecAttention"),
            "mlp?": ("layer_norm", "DenseReluDense"),
        },
    ),
}

# The others are somebody's own, and `apply_dropbp` checks them.
SHIPPED = tuple(FAMILIES.values())


def register_family(
    name: str,
    block: str | Iterable[str],
    branches: Mapping[str, Sequence[str]],
    *,
    per_token: Iterable[str] = ("mlp",),
) -> Family:
    """Make `apply_dropbp` know the blocks of your model; return the entry, which `families=[...]` takes too.

    block: class name (or names) of the blocks. branches: by branch name, its modules in the order in which they run,
    written as this module's docstring says; a norm behind the add is none of them, which `apply_dropbp` checks if it is
    given `inputs`. An entry of the same name is replaced. per_token: the branches that process tokens independently, so
    that granularity="token" may keep a share of these.

    Errors: TypeError for a string in place of a sequence of module names; ValueError for a branch without modules, a
            branch name that is no identifier, or a block class that another entry has already.
    """
    blocks = (block,) if isinstance(block, str) else tuple(block)
    if not branches:
        raise ValueError("branches: expected at least one branch, got none")
    for branch, names in branches.items():
        if isinstance(names, str):
            raise TypeError(f"branches: expected a sequence of module names for {branch!r}, got the string {names!r}")
        if not branch.rstrip("?").isidentifier() or not names:
            raise ValueError(f"branches: expected an identifier and its module names, got {branch!r}: {names!r}")
    for other, entry in FAMILIES.items():
        if other != name and (common := set(blocks) & set(entry.block)):
            raise ValueError(f"block: expected one that no family has, but {other!r} has {', '.join(sorted(common))}")
    modules = {branch: tuple(names) for branch, names in branches.items()}
    FAMILIES[name] = Family(blocks, modules, per_token=tuple(per_token))
    return FAMILIES[name]
