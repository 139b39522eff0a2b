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

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..flops import attention_core_flops, attention_shape, linear_flops
from ..layer import DropBP
from .fusing import pre_norm_forward
from .gating import ModuleGate
from .swapping import class_as_built


@dataclass(frozen=True)
class Family:
    """How to gate the blocks of one model family.

    block: class names of its blocks. branches: by branch name, the names of its modules, first to last.
    when: tells blocks of one class apart that their configuration lays out differently; None: all are alike.
    forward: a forward of the block that does the adds itself, through `gate_<branch>.run`, so that they can wait for
        the next norm (`fusing`, "fused"). None: the branches are gated by their modules (`gating`, "generic").
    per_token: the branches that treat each token for itself, of which granularity "token" keeps a share of the tokens.
    """

    block: tuple[str, ...]
    branches: Mapping[str, tuple[str, ...]]
    when: Callable[[Any], bool] | None = None
    forward: Callable[..., Tensor] | None = None
    per_token: tuple[str, ...] = ("mlp",)

    def fits(self, block: nn.Module) -> bool:
        """Whether `block` is one of this family's."""
        return class_as_built(block).__name__ in self.block and (self.when is None or self.when(block))

    def paths(self, block: nn.Module) -> dict[str, tuple[str, ...]]:
        """The names of the modules of each branch that `block` has.

        Errors: ValueError, naming the block's modules, when the block lacks one that it has to have.
        """
        paths = {branch.rstrip("?"): _find(block, branch, names) for branch, names in self.branches.items()}
        return {branch: found for branch, found in paths.items() if found}

    def forward_of(self, block: nn.Module) -> Callable[..., Tensor] | None:
        """`forward`; None where `block`, as some versions of transformers have it, returns more than the stream.

        That is told by output_attentions: who takes it returns attention weights too, in a tuple.
        """
        is_stream_alone = "output_attentions" not in inspect.signature(class_as_built(block).forward).parameters
        return self.forward if is_stream_alone else None

    def gates(self, block: nn.Module) -> dict[str, DropBP]:
        """New gates for one block, by branch name, knowing their modules and FLOPs.

        Errors: those of `paths`.
        """
        gates: dict[str, DropBP] = {}
        calls_its_branches = self.forward_of(block) is not None
        for branch, paths in self.paths(block).items():
            flops = BranchFlops(block, paths, is_attention="attention" in branch)
            per_token = branch in self.per_token
            kind = _BlockGate if calls_its_branches else ModuleGate
            gates[branch] = kind(block, paths, flops, per_token=per_token)
        return gates


class _BlockGate(DropBP):
    """The gate of a branch that its block calls; finds the branch's modules again where PEFT replaced them."""

    def __init__(self, block: nn.Module, paths: tuple[str, ...], flops: Callable[[int, int], float], per_token: bool):
        super().__init__(flops, per_token=per_token)
        self.paths = paths
        self._block = (block,)  # in a tuple, so that nn.Module does not register its own parent

    def refresh(self) -> None:
        (block,) = self._block
        self.modules_of_branch = tuple(block.get_submodule(path) for path in self.paths)


# A class rather than a closure, so that a patched model can be deep-copied and its copy counts its own modules.
@dataclass
class BranchFlops:
    """Forward FLOPs of a branch from the shapes of the modules that bear its names now, and from its attention's heads.

    Keys of a cross-attention are taken to be as many as its queries.
    """

    block: nn.Module
    paths: tuple[str, ...]
    is_attention: bool

    def __call__(self, batch_size: int, seq_len: int) -> float:
        modules = [self.block.get_submodule(path) for path in self.paths]
        flops = sum(linear_flops(module, batch_size * seq_len) for module in modules)
        if self.is_attention:
            parents = [self.block.get_submodule(path.rpartition(".")[0]) for path in self.paths if "." in path]
            shape = next((shape for module in (*modules, *parents) if (shape := attention_shape(module))), None)
            if shape is None:
                raise TypeError(f"module: no head count found in the attention of {type(self.block).__name__}")
            flops += attention_core_flops(batch_size, seq_len, *shape)
        return flops


def _find(block: nn.Module, branch: str, names: Sequence[str]) -> tuple[str, ...]:
    found, missing = [], []
    for name in names:
        path = next((path for path in name.rstrip("?").split("|") if _has(block, path)), None)
        if path is not None:
            found.append(path)
        elif not name.endswith("?"):
            missing.append(name)
    if missing and branch.endswith("?"):
        return ()
    if missing:
        children = ", ".join(name for name, _ in block.named_children())
        raise ValueError(
            f"family: expected branch {branch!r} of {type(block).__name__} to have {', '.join(names)}, but there is no "
            f"{', '.join(missing)}; the block's modules are {children}"
        )
    return tuple(found)


def _has(block: nn.Module, path: str) -> bool:
    try:
        return isinstance(block.get_submodule(path), nn.Module)
    except AttributeError:
        return False


def _layout(attention: str, mlp: str) -> dict[str, tuple[str, ...]]:
    return {"attention": tuple(attention.split()), "mlp": tuple(mlp.split())}


_LLAMA = _layout("input_layernorm self_attn", "post_attention_layernorm mlp")
_SANDWICH = _layout(
    "input_layernorm self_attn post_attention_layernorm",
    "pre_feedforward_layernorm mlp post_feedforward_layernorm",
)
_PARALLEL = _layout("input_layernorm self_attn", "input_layernorm mlp")
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

_PRE_NORM = pre_norm_forward()
_PRE_NORM_SANDWICH = pre_norm_forward(" ".join(_SANDWICH["attention"]), " ".join(_SANDWICH["mlp"]))

FAMILIES: dict[str, Family] = {
    "llama": Family(("LlamaDecoderLayer",), _LLAMA, forward=_PRE_NORM),
    "mistral": Family(("MistralDecoderLayer",), _LLAMA, forward=_PRE_NORM),
    "qwen2": Family(("Qwen2DecoderLayer",), _LLAMA, forward=_PRE_NORM),
    "qwen3": Family(("Qwen3DecoderLayer",), _LLAMA, forward=_PRE_NORM),
    "mixtral": Family(("MixtralDecoderLayer",), _LLAMA, forward=_PRE_NORM),
    "qwen2_moe": Family(("Qwen2MoeDecoderLayer",), _LLAMA, forward=_PRE_NORM),
    "qwen3_moe": Family(("Qwen3MoeDecoderLayer",), _LLAMA, forward=_PRE_NORM),
    "gemma": Family(("GemmaDecoderLayer",), _LLAMA, forward=_PRE_NORM),
    "gemma2": Family(("Gemma2DecoderLayer",), _SANDWICH, forward=_PRE_NORM_SANDWICH),
    "gemma3": Family(("Gemma3DecoderLayer",), _SANDWICH, forward=_PRE_NORM_SANDWICH),
    "phi": Family(("PhiDecoderLayer",), _PARALLEL),
    "phi3": Family(
        ("Phi3DecoderLayer",),
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
    "starcoder2": Family(("Starcoder2DecoderLayer",), _LLAMA, forward=_PRE_NORM),
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
    "granite": Family(("GraniteDecoderLayer",), _LLAMA, forward=pre_norm_forward(scale="residual_multiplier")),
    "deepseek_v2": Family(("DeepseekV2DecoderLayer",), _LLAMA, forward=_PRE_NORM),
    "deepseek_v3": Family(("DeepseekV3DecoderLayer",), _LLAMA, forward=_PRE_NORM),
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
