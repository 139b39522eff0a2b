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

from collections.abc import Iterable, Mapping, Sequence

from .family import Family
from .fusing import pre_norm_forward


def _layout(attention: str, mlp: str) -> dict[str, tuple[str, ...]]:
    return {"attention": tuple(attention.split()), "mlp": tuple(mlp.split())}


_LLAMA = _layout("input_layernorm self_attn", "post_attention_layernorm mlp")
_SANDWICH = _layout(
    "input_layernorm self_attn post_attention_layernorm",
    "pre_feedforward_layernorm mlp post_feedforward_layernorm",
)
_PARALLEL = _layout("input_layernorm self_attn", "input_layernorm mlp")
_GLM4 = _layout("input_layernorm self_attn post_self_attn_layernorm", "post_attention_layernorm mlp post_mlp_layernorm")
_BERT = {
    "attention": ("attention.self", "attention.output.dense"),
    "cross_attention?": ("crossattention.self", "crossattention.output.dense"),
    "mlp": ("intermediate", "output.dense"),
}
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


def _sequential(*blocks: str, layout: dict[str, tuple[str, ...]] = _LLAMA, scale: str | None = None) -> Family:
    """Blocks that add their branches one after the other, with nothing between modules and add but `scale`."""
    forward = pre_norm_forward(" ".join(layout["attention"]), " ".join(layout["mlp"]), scale)
    return Family(blocks, layout, forward=forward)


FAMILIES: dict[str, Family] = {
    "llama": _sequential(*(f"{name}DecoderLayer" for name in _LIKE_LLAMA.split())),
    "mistral": _sequential("MistralDecoderLayer"),
    "qwen2": _sequential("Qwen2DecoderLayer"),
    "qwen3": _sequential("Qwen3DecoderLayer"),
    "mixtral": _sequential("MixtralDecoderLayer"),
    "qwen2_moe": _sequential("Qwen2MoeDecoderLayer"),
    "qwen3_moe": _sequential("Qwen3MoeDecoderLayer"),
    "gemma": _sequential("GemmaDecoderLayer"),
    "gemma2": _sequential("Gemma2DecoderLayer", layout=_SANDWICH),
    "gemma3": _sequential("Gemma3DecoderLayer", layout=_SANDWICH),
    "vaultgemma": _sequential(
        "VaultGemmaDecoderLayer", layout=_layout("input_layernorm self_attn", "pre_feedforward_layernorm mlp")
    ),
    "phi": Family(("PhiDecoderLayer",), _PARALLEL),
    "phi3": Family(
        ("Phi3DecoderLayer", "Phi4MultimodalDecoderLayer"),
        _LLAMA,
        forward=pre_norm_forward(
            "input_layernorm self_attn resid_attn_dropout", "post_attention_layernorm mlp resid_mlp_dropout"
        ),
    ),
    "gpt2": Family(
        ("GPT2Block",),
        _layout("ln_1 attn", "ln_2 mlp"),
        when=lambda block: not hasattr(block, "crossattention"),
        forward=pre_norm_forward("ln_1 attn", "ln_2 mlp"),
    ),
    "gpt2_cross": Family(("GPT2Block",), _GPT2, when=lambda block: hasattr(block, "crossattention")),
    "gpt_bigcode": Family(("GPTBigCodeBlock",), _GPT2),
    "gpt_neox_sequential": Family(
        ("GPTNeoXLayer",),
        _layout("input_layernorm attention", "post_attention_layernorm mlp"),
        when=lambda block: not block.use_parallel_residual,
        forward=pre_norm_forward(
            "input_layernorm attention post_attention_dropout", "post_attention_layernorm mlp post_mlp_dropout"
        ),
    ),
    "gpt_neox": Family(
        ("GPTNeoXLayer",),
        _layout("input_layernorm attention", "post_attention_layernorm mlp"),
        when=lambda block: block.use_parallel_residual,
    ),
    "gptj": Family(("GPTJBlock",), _layout("ln_1 attn", "ln_1 mlp")),
    "falcon": Family(
        ("FalconDecoderLayer",),
        _layout("ln_attn|input_layernorm self_attention", "ln_mlp|post_attention_layernorm|input_layernorm mlp"),
    ),
    "opt": Family(
        ("OPTDecoderLayer",),
        _layout("self_attn_layer_norm self_attn", "final_layer_norm fc1 fc2"),
        when=lambda block: block.do_layer_norm_before,
        forward=pre_norm_forward(
            "self_attn_layer_norm self_attn dropout", "final_layer_norm fc1 activation_fn fc2 dropout"
        ),
    ),
    "opt_post_norm": Family(
        ("OPTDecoderLayer",), _layout("self_attn", "fc1 fc2"), when=lambda block: not block.do_layer_norm_before
    ),
    # Bloom adds inside its attention and its MLP; the scores between the linears are constants when those are.
    "bloom": Family(
        ("BloomBlock",),
        _layout(
            "input_layernorm self_attention.query_key_value self_attention.dense",
            "post_attention_layernorm mlp.dense_h_to_4h mlp.dense_4h_to_h",
        ),
        when=lambda block: not block.apply_residual_connection_post_layernorm,
    ),
    "bloom_post_norm": Family(
        ("BloomBlock",),
        _layout("self_attention.query_key_value self_attention.dense", "mlp.dense_h_to_4h mlp.dense_4h_to_h"),
        when=lambda block: block.apply_residual_connection_post_layernorm,
    ),
    "starcoder2": _sequential("Starcoder2DecoderLayer"),
    "olmo2": Family(
        ("Olmo2DecoderLayer",), _layout("self_attn post_attention_layernorm", "mlp post_feedforward_layernorm")
    ),
    "cohere": Family(("CohereDecoderLayer",), _PARALLEL),
    "stablelm": Family(
        ("StableLmDecoderLayer",),
        _LLAMA,
        when=lambda block: not block.use_parallel_residual,
        forward=pre_norm_forward(mlp="post_attention_layernorm mlp dropout"),
    ),
    "stablelm_parallel": Family(("StableLmDecoderLayer",), _PARALLEL, when=lambda block: block.use_parallel_residual),
    "granite": _sequential("GraniteDecoderLayer", "GraniteSWADecoderLayer", scale="residual_multiplier"),
    "granitemoe": _sequential(
        "GraniteMoeDecoderLayer",
        layout=_layout("input_layernorm self_attn", "post_attention_layernorm block_sparse_moe"),
        scale="residual_multiplier",
    ),
    "hyperclovax": _sequential(
        "HyperCLOVAXDecoderLayer",
        layout=_layout("input_layernorm self_attn post_norm1", "post_attention_layernorm mlp post_norm2"),
        scale="residual_multiplier",
    ),
    "minicpm3": _sequential("MiniCPM3DecoderLayer", scale="residual_scale"),
    "apertus": _sequential(
        "ApertusDecoderLayer", layout=_layout("attention_layernorm self_attn", "feedforward_layernorm mlp")
    ),
    "glm4": _sequential("Glm4DecoderLayer", "Kolibri1DecoderLayer", layout=_GLM4),
    "jetmoe": _sequential(
        "JetMoeDecoderLayer", layout=_layout("input_layernorm self_attention", "post_attention_layernorm mlp")
    ),
    "emu3": Family(
        ("Emu3DecoderLayer",),
        _LLAMA,
        forward=pre_norm_forward("input_layernorm self_attn dropout", "post_attention_layernorm mlp dropout"),
    ),
    "biogpt": Family(
        ("BioGptDecoderLayer",),
        _layout("self_attn_layer_norm self_attn", "final_layer_norm fc1 fc2"),
        forward=pre_norm_forward(
            "self_attn_layer_norm self_attn dropout",
            "final_layer_norm fc1 activation_fn activation_dropout fc2 dropout",
        ),
    ),
    "persimmon": Family(
        ("PersimmonDecoderLayer",),
        _LLAMA,
        forward=pre_norm_forward(mlp="post_attention_layernorm mlp dropout"),
    ),
    "deepseek_v2": _sequential("DeepseekV2DecoderLayer"),
    "deepseek_v3": _sequential("DeepseekV3DecoderLayer"),
    "bert": Family(
        (
            *(
                "BertLayer",
                "BertGenerationLayer",
                "BigBirdLayer",
                "CamembertLayer",
                "Data2VecTextLayer",
                "ElectraLayer",
            ),
            *("ErnieLayer", "RemBertLayer", "RoCBertLayer", "RobertaLayer", "RoFormerLayer", "XLMRobertaLayer"),
        ),
        _BERT,
    ),
    "bart": Family(
        (
            *("BartDecoderLayer", "BlenderbotSmallDecoderLayer", "MarianDecoderLayer", "MvpDecoderLayer"),
            *("PLBartDecoderLayer", "TrOCRDecoderLayer"),
            *("BartEncoderLayer", "BlenderbotSmallEncoderLayer", "MarianEncoderLayer", "MvpEncoderLayer"),
            *("PLBartEncoderLayer",),
        ),
        {"attention": ("self_attn",), "cross_attention?": ("encoder_attn",), "mlp": ("fc1", "fc2")},
    ),
    "doge": Family(("DogeDecoderLayer",), _LLAMA),  # scales the stream by parameters, which stay with the stream
    "minimax": Family(("MiniMaxDecoderLayer",), _layout("self_attn", "mlp")),  # its norms are in the stream
    "rwkv": Family(("RwkvBlock",), _layout("ln1 attention", "ln2 feed_forward"), per_token=()),  # shifts tokens
    "vit": Family(
        ("ViTLayer",),
        _layout("layernorm_before attention", "layernorm_after mlp"),
        forward=pre_norm_forward("layernorm_before attention dropout", "layernorm_after mlp dropout"),
    ),
    "whisper_encoder": Family(
        ("WhisperEncoderLayer",),
        _layout("self_attn_layer_norm self_attn", "final_layer_norm fc1 fc2"),
        forward=pre_norm_forward(
            "self_attn_layer_norm self_attn dropout",
            "final_layer_norm fc1 activation_fn activation_dropout fc2 dropout",
            clamps_half=True,
        ),
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


def register_family(
    name: str,
    block: str | Iterable[str],
    branches: Mapping[str, Sequence[str]],
    *,
    per_token: Iterable[str] = ("mlp",),
) -> Family:
    """Make `apply_dropbp` know the blocks of your model; return the entry, which `families=[...]` takes too.

    block: class name (or names) of the blocks. branches: by branch name, its modules in the order in which they run,
    written as this module's docstring says. An entry of the same name is replaced. per_token: the branches that treat
    each token for itself, which granularity="token" may keep tokens of.

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
