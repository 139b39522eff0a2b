"""What a branch costs, against the FLOP counter of torch and numbers worked out by hand."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dropbp_kernels.flops import attention_core_flops, attention_shape, linear_flops

BATCH, SEQ = 2, 48
TOLERANCE = 0.01


def llama_layer(attention="eager"):
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=160,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=16,
        num_hidden_layers=1,
        vocab_size=32,
        attn_implementation=attention,
    )
    torch.manual_seed(0)
    return config, LlamaDecoderLayer(config, layer_idx=0), LlamaRotaryEmbedding(config)


def with_lora(layer):
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=4, target_modules=targets, lora_dropout=0.0)
    return peft.inject_adapter_in_model(config, layer)


def run_attention(layer, rope, x):
    positions = torch.arange(SEQ)[None]
    # no mask: the full square is computed, and counted
    return layer.self_attn(x, position_embeddings=rope(x, positions), attention_mask=None)[0]


def run_mlp(layer, rope, x):
    return layer.mlp(x)


def counted(run, layer, rope):
    """Forward FLOPs as torch counts them."""
    # torch has no formula for the fused kernel of the CPU
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        run(layer, rope, torch.randn(BATCH, SEQ, 64))
    return forward.get_total_flops()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("adapter", ["full", "lora"])
@pytest.mark.parametrize("branch", ["attention", "mlp"])
def test_equals_the_flop_counter_of_torch(attention, adapter, branch):
    config, layer, rope = llama_layer(attention)
    if adapter == "lora":
        layer = with_lora(layer)
        assert not layer.mlp.gate_proj.base_layer.weight.requires_grad
    run, module = (run_attention, layer.self_attn) if branch == "attention" else (run_mlp, layer.mlp)
    heads = config.num_attention_heads if branch == "attention" else 0
    core = attention_core_flops(BATCH, SEQ, heads, config.head_dim)
    assert linear_flops(module, BATCH * SEQ) + core == pytest.approx(counted(run, layer, rope), rel=TOLERANCE)


def test_merged_and_disabled_adapters_cost_nothing():
    _, layer, _ = llama_layer()
    base = linear_flops(layer.mlp, 10)
    layer = with_lora(layer)
    adapters = 2.0 * 10 * 3 * 4 * (64 + 160)  # three linears, rank 4
    assert linear_flops(layer.mlp, 10) == base + adapters
    for linear in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
        linear.merge()
    assert linear_flops(layer.mlp, 10) == base
    for linear in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
        linear.unmerge()
        linear.enable_adapters(False)
    assert linear_flops(layer.mlp, 10) == base


def test_only_active_adapters_count():
    peft = pytest.importorskip("peft")
    _, layer, _ = llama_layer()
    layer = with_lora(layer)
    up_proj = layer.mlp.up_proj
    first = linear_flops(up_proj, 10)
    second = 2.0 * 10 * 32 * (64 + 160)
    peft.inject_adapter_in_model(peft.LoraConfig(r=32, target_modules=["up_proj"]), layer.mlp, adapter_name="second")
    up_proj.set_adapter("default")
    assert linear_flops(up_proj, 10) == first
    up_proj.set_adapter(["default", "second"])
    assert linear_flops(up_proj, 10) == first + second
    layer.mlp.gate_proj.set_adapter("second")  # active, but this layer has none of that name
    assert linear_flops(layer.mlp.gate_proj, 10) == linear_flops(layer.mlp.gate_proj.base_layer, 10)


def test_adapters_whose_matrices_are_parameters():
    peft = pytest.importorskip("peft")
    _, layer, _ = llama_layer()
    base = linear_flops(layer.mlp, 10)
    config = peft.AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=["up_proj"])
    peft.inject_adapter_in_model(config, layer.mlp)
    assert linear_flops(layer.mlp, 10) == base + 2.0 * 10 * 4 * (64 + 160)


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
def test_a_norm_that_an_adapter_wraps_counts_as_nothing():
    """It has names for sizes, and no sizes."""
    peft = pytest.importorskip("peft")
    _, layer, _ = llama_layer()
    config = peft.LNTuningConfig(target_modules=["input_layernorm"])
    peft.inject_adapter_in_model(config, layer)
    assert type(layer.input_layernorm).__name__ == "LNTuningLayer"
    assert linear_flops(layer.input_layernorm, 10) == 0.0


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({"num_attention_heads": 4, "hidden_size": 32}, (4, 8)),
        ({"n_head": 4, "head_dim": 12, "n_embd": 32}, (4, 12)),
        ({"num_heads": 4, "qk_head_dim": 16, "v_head_dim": 8}, (4, 12)),  # their mean
        ({"hidden_size": 32}, None),
        ({"num_heads": 4}, None),
    ],
)
def test_shape_of_an_attention(attributes, expected):
    assert attention_shape(SimpleNamespace(config=SimpleNamespace(**attributes))) == expected
    assert attention_shape(SimpleNamespace(**attributes)) == expected


def test_llama3_8b_hand_numbers():
    """Multiply-accumulates per token at sequence 512, not causal, computed by hand from the published shapes.

    attention: 4096 * 4096 (q) + 2 * 4096 * 1024 (k, v) + 4096 * 4096 (o) + 2 * 512 * 4096 (core) = 46.1 M
    mlp: 3 * 4096 * 14336 = 176.2 M
    """
    with torch.device("meta"):
        attention = nn.ModuleDict(
            {
                "q": nn.Linear(4096, 32 * 128, bias=False),
                "k": nn.Linear(4096, 8 * 128, bias=False),
                "v": nn.Linear(4096, 8 * 128, bias=False),
                "o": nn.Linear(32 * 128, 4096, bias=False),
            }
        )
        mlp = nn.ModuleList([nn.Linear(4096, 14336), nn.Linear(4096, 14336), nn.Linear(14336, 4096), nn.RMSNorm(4096)])
    seq_len = 512
    core = attention_core_flops(1, seq_len, 32, 128)
    assert (linear_flops(attention, seq_len) + core) / 2 / seq_len == 46_137_344
    assert linear_flops(mlp, seq_len) / 2 / seq_len == 176_160_768


def test_layers_that_are_no_nn_linear():
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    class Quantised(nn.Module):
        in_features, out_features = 6, 4

        def __init__(self):
            super().__init__()
            self.register_buffer("packed", torch.zeros(12, dtype=torch.uint8))

    assert linear_flops(Conv1D(nf=12, nx=5), 10) == 2 * 10 * 60
    assert linear_flops(Quantised(), 10) == 2 * 10 * 24
    assert linear_flops(nn.Embedding(100, 8), 10) == 0


def test_a_module_of_unknown_cost_is_refused():
    tree = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 3))
    with pytest.raises(TypeError, match=r"no FLOPs formula for Conv1d \(parameters weight\)"):
        linear_flops(tree, 10)
