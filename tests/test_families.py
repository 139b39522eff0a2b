"""The families table: each family's branches against detach-after, bit for bit, on tiny models of transformers."""

import warnings

import pytest
import torch
from models import encoder_decoder
from torch import nn

from benchmarks.models_check import check_gradients, run_backward
from benchmarks.tiny_models import tiny_causal_lm, tiny_inputs
from dropbp_kernels import apply_dropbp, register_family, remove_dropbp
from dropbp_kernels.integrations import families
from dropbp_kernels.integrations.families import FAMILIES
from dropbp_kernels.integrations.family import Family
from dropbp_kernels.measure import saved_bytes

CAUSAL_LMS = [
    "bert",
    "bloom",
    "cohere",
    "deepseek_v3",
    "falcon",
    "gemma2",
    "gpt2",
    "gpt_neox",
    "gptj",
    "granite",
    "llama",
    "mixtral",
    "olmo2",
    "opt",
    "phi",
    "stablelm",
]
VARIANTS = {
    "bloom": {"apply_residual_connection_post_layernorm": True},
    "falcon": {"parallel_attn": False},
    "falcon-40b": {"new_decoder_architecture": True},
    "gpt_neox": {"use_parallel_residual": False},
    "opt": {"do_layer_norm_before": False},
    "stablelm": {"use_parallel_residual": True},
}


def check_branches(model, inputs, num_branches):
    problems, (missed, gates) = check_gradients(model, inputs)
    assert not problems
    assert not missed
    assert len(gates) == num_branches


@pytest.mark.parametrize("model_type", CAUSAL_LMS)
def test_gradients_equal_detach_after_bit_for_bit(model_type):
    check_branches(tiny_causal_lm(model_type), tiny_inputs(), 4)


@pytest.mark.parametrize("name", VARIANTS)
def test_layouts_that_a_configuration_chooses(name):
    check_branches(tiny_causal_lm(name.split("-")[0], **VARIANTS[name]), tiny_inputs(), 4)


@pytest.mark.parametrize("name", ["t5", "whisper", "vit", "roberta"])
def test_encoders_and_cross_attention(name):
    check_branches(*encoder_decoder(name))


class MyBlock(nn.Module):
    """Somebody's block: a parallel residual, a norm that both branches read, one sublayer made of two modules."""

    def __init__(self, width=8):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attn = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 16), nn.Linear(16, width)

    def forward(self, x):
        normed = self.norm(x)
        return x + self.attn(normed) + 0.5 * self.down(torch.relu(self.up(normed)))


@pytest.fixture
def mine():
    branches = {"attention": ("norm", "attn"), "mlp": ("norm", "up", "down")}
    yield register_family("mine", block="MyBlock", branches=branches)
    del FAMILIES["mine"]


def test_a_registered_family_is_found(mine):
    model = nn.Sequential(MyBlock(), MyBlock())
    with pytest.warns(UserWarning, match="FLOPs unknown.*equally expensive"):
        handler = apply_dropbp(model, 0.5)
    x = torch.randn(2, 3, 8, requires_grad=True)
    handler.set_plan([False, True, True, False])
    model(x).square().sum().backward()
    grads = [parameter.grad is not None for parameter in model[0].parameters()]
    assert grads == [True, True, False, False, True, True, True, True]  # the norm still serves the MLP
    handler.set_plan([False] * 4)
    model.zero_grad()
    y = model(x)
    y.sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())


class AfterTheAdd(nn.Module):
    """The norm runs on the stream. Its own argument comes first, and the stream is added to in place."""

    def __init__(self, width=8):
        super().__init__()
        self.attn, self.norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.mlp = nn.Linear(width, width)

    def forward(self, scale, x):
        x += scale * self.attn(x)
        return self.norm(x) + self.mlp(x)


class Conditioned(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([AfterTheAdd(), AfterTheAdd()])

    def forward(self, x):
        x = x + 0.0
        for block in self.blocks:
            x = block(torch.ones(1, 1, 8), x)
        return x


@pytest.mark.filterwarnings("ignore:.*FLOPs unknown")
@pytest.mark.parametrize("attention", [("norm", "attn"), ("attn", "norm")])
def test_a_norm_behind_the_add_is_not_taken_for_a_part_of_the_branch(attention):
    """With the branch dropped, nothing below the block had a gradient."""
    model, inputs = Conditioned(), {"x": torch.randn(2, 3, 8)}
    wrong = Family(("AfterTheAdd",), {"attention": attention, "mlp": ("mlp",)})
    with pytest.raises(ValueError, match=r"norm.*; mlp\), no gradient passes through AfterTheAdd"):
        apply_dropbp(model, 0.5, families=[wrong], inputs=inputs)
    assert not left_of_dropbp(model)
    right = Family(("AfterTheAdd",), {"attention": ("attn",), "mlp": ("mlp",)})
    handler = apply_dropbp(model, 0.5, families=[right], inputs=inputs)
    assert handler.plan.kept == (True,) * 4
    assert all(gate.kept is True for gate in handler.gates.values())


def test_registered_branches_of_a_language_model_are_checked_on_four_tokens():
    """BERT's `attention` holds the norm behind its add. A model that does not take tokens is not checked."""
    wrong = Family(("BertLayer",), {"attention": ("attention",), "mlp": ("intermediate", "output.dense")})
    with pytest.raises(ValueError, match="no gradient passes through BertLayer"):
        apply_dropbp(tiny_causal_lm("bert"), 0.5, families=[wrong])
    images = Family(("ViTLayer",), {"attention": ("layernorm_before", "attention"), "mlp": ("layernorm_after", "mlp")})
    assert len(apply_dropbp(encoder_decoder("vit")[0], 0.5, families=[images]).gates) == 4


def test_a_branch_pruned_to_an_identity_is_dropped_too(mine):
    model = nn.Sequential(MyBlock())
    model[0].norm = model[0].attn = nn.Identity()
    with pytest.warns(UserWarning, match="FLOPs unknown"):
        handler = apply_dropbp(model, 0.5)
    handler.set_plan([False, False])
    x = torch.randn(2, 3, 8, requires_grad=True)
    model(x).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_grad_scale_scales_each_kept_branch_once(mine):
    """One block has one branch between its parameters and the loss, so all gradients scale by the factor."""
    grads = {}
    for grad_scale in (1.0, 3.0):
        torch.manual_seed(0)
        model = nn.Sequential(MyBlock())
        with pytest.warns(UserWarning, match="FLOPs unknown"):
            apply_dropbp(model, 0.5, grad_scale=grad_scale)
        model(torch.ones(2, 3, 8)).sum().backward()
        grads[grad_scale] = [parameter.grad for parameter in model.parameters()]
    for plain, scaled in zip(grads[1.0], grads[3.0], strict=True):
        torch.testing.assert_close(scaled, 3 * plain)


def test_families_argument_restricts(mine):
    model, _, _ = encoder_decoder("whisper")
    handler = apply_dropbp(model, 0.5, families=[Family(("WhisperDecoderLayer",), FAMILIES["whisper"].branches)])
    assert len(handler.gates) == 6
    remove_dropbp(model)
    with pytest.raises(ValueError, match="expected names among llama"):
        apply_dropbp(model, 0.5, families=["wisper"])
    with pytest.raises(ValueError, match=r"expected blocks of a known family \(MyBlock\)"):
        apply_dropbp(model, 0.5, families=["mine"])
    with pytest.raises(ValueError, match=r"expected blocks of a known family \(docs/models\.md\), got none"):
        apply_dropbp(nn.Linear(2, 2), 0.5)
    with pytest.raises(TypeError, match="inputs: expected a dict of the model's arguments by name, got Tensor"):
        apply_dropbp(nn.Linear(2, 2), 0.5, inputs=torch.ones(2))


def test_a_name_that_the_block_lacks_is_refused_and_nothing_is_patched(mine):
    model = nn.Sequential(MyBlock(), MyBlock())
    entry = Family(("MyBlock",), {"attention": ("norm", "attn"), "mlp": ("norm2", "up", "down")})
    with pytest.raises(ValueError, match=r"'mlp' of MyBlock to have norm2, up, down, but there is no norm2"):
        apply_dropbp(model, 0.5, families=[entry])
    assert not left_of_dropbp(model)


def test_a_module_that_ends_two_branches_is_refused_and_nothing_is_patched():
    model = tiny_causal_lm("bloom")
    blocks = model.transformer.h
    blocks[1].mlp.dense_4h_to_h = blocks[0].mlp.dense_4h_to_h
    with pytest.raises(ValueError, match=r"mlp\.dense_4h_to_h of BloomBlock ends two"):
        apply_dropbp(model, 0.5)
    assert not left_of_dropbp(model)


def test_a_warning_made_an_error_leaves_nothing_patched(mine):
    model = nn.Sequential(MyBlock(), MyBlock())
    with pytest.raises(UserWarning, match="FLOPs unknown"):  # as the test-suite makes them
        apply_dropbp(model, 0.5)
    assert not left_of_dropbp(model)


def test_a_handler_of_a_patch_that_was_removed_gates_nothing():
    model = tiny_causal_lm("opt")
    handler = apply_dropbp(model, 0.5)
    remove_dropbp(model)
    handler.set_plan([False] * 4)
    assert not left_of_dropbp(model)


def left_of_dropbp(model):
    return [name for module in model.modules() for name in (*vars(module), *vars(type(module))) if "dropbp" in name]


def test_a_registration_may_be_replaced(mine):
    again = register_family("mine", "MyBlock", {"attention?": ("attn",)}, per_token=["attention"])
    assert FAMILIES["mine"] is again
    assert (again.branches, again.per_token) == ({"attention?": ("attn",)}, ("attention",))


def test_names_that_not_every_block_has():
    branches = {"attention": ("first|norm", "attn", "post_norm?"), "cross?": ("norm", "cross.dense"), "mlp": ("up",)}
    family, block = Family(("MyBlock",), branches), MyBlock()
    assert family.paths(block) == {"attention": ("norm", "attn"), "mlp": ("up",)}
    block.first, block.post_norm = nn.LayerNorm(8), nn.LayerNorm(8)
    block.cross = nn.ModuleDict({"dense": nn.Linear(8, 8)})
    paths = {"attention": ("first", "attn", "post_norm"), "cross": ("norm", "cross.dense"), "mlp": ("up",)}
    assert family.paths(block) == paths
    block.up = None
    with pytest.raises(ValueError, match="expected branch 'mlp' of MyBlock to have up, but there is no up"):
        family.paths(block)


def test_an_attention_costs_more_than_its_linears(mine):
    block = encoder_decoder("whisper")[0].model.decoder.layers[0]
    gates = FAMILIES["whisper"].gates(block)
    assert gates["cross_attention"].flops(2, 5) == gates["attention"].flops(2, 5) > 4 * 2 * 10 * 32 * 32
    with pytest.raises(TypeError, match="no head count found in the attention of MyBlock"):
        mine.gates(MyBlock())["attention"].flops(2, 5)


def test_bad_registrations(mine):
    with pytest.raises(TypeError, match="got the string 'attn'"):
        register_family("other", "OtherBlock", {"attention": "attn"})
    with pytest.raises(ValueError, match="at least one branch"):
        register_family("other", "OtherBlock", {})
    with pytest.raises(ValueError, match="'mine' has MyBlock"):
        register_family("other", "MyBlock", {"attention": ("attn",)})
    with pytest.raises(ValueError, match="an identifier"):
        register_family("other", "OtherBlock", {"the mlp": ("attn",)})
    with pytest.raises(ValueError, match="an identifier and its module names, got 'mlp'"):
        register_family("other", "OtherBlock", {"mlp": ()})
    assert "other" not in families.FAMILIES


@pytest.mark.parametrize("way", ["transformers", "reentrant", "kept"])
@pytest.mark.parametrize("name", ["gemma2", "mixtral", "bloom", "bert", "t5"])
def test_checkpointing_follows_the_plan_in_any_layout(name, way):
    """Same gradients, dropout included, and less saved."""
    if (name, way) == ("t5", "reentrant"):
        pytest.skip("unpatched T5 has other gradients (by rounding) under reentrant checkpointing")
    results = []
    for checkpointing in (False, True):
        if name == "t5":
            model, inputs, _ = encoder_decoder(name)
        else:
            model = tiny_causal_lm(name)
            inputs = tiny_inputs()
        kept = checkpointing and way == "kept"
        handler = apply_dropbp(model, 0.5, fused=False, checkpoint="kept" if kept else None, fused_loss="off")
        if checkpointing and not kept:
            model.gradient_checkpointing_enable({"use_reentrant": way == "reentrant"})
        handler.set_plan([index % 3 == 0 for index in range(len(handler.gates))])
        with warnings.catch_warnings(), saved_bytes() as saved:
            warnings.filterwarnings("ignore", "gradient checkpointing: it is reentrant")
            results.append((*run_backward(model, inputs), saved.num_bytes))
        remove_dropbp(model)
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1].keys() == results[1][1].keys()
    for parameter, grad in results[0][1].items():
        ours = results[1][1][parameter]
        assert (ours is None) == (grad is None), parameter
        assert grad is None or torch.equal(ours, grad), parameter
    if way != "reentrant":  # there the graph of the recompute counts too
        assert results[1][2] < results[0][2]


def test_what_no_family_knows_is_named_once():
    class Unknown(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.mix = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x):
            return x + self.mix(self.norm(x))

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = tiny_causal_lm("llama")
            self.adapters = nn.ModuleList(Unknown() for _ in range(3))
            self.heads = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))  # no block: nothing is added to a stream

    model = Whole()
    with pytest.warns(UserWarning, match="only part of its blocks is of a known family") as caught:
        apply_dropbp(model, 0.5)
    (message,) = [str(warning.message) for warning in caught]
    assert "left ungated, with their full backward: Unknown (adapters.0 and 2 more). Name their branches" in message
    remove_dropbp(model)
    apply_dropbp(model, 0.5, families=["llama"])  # meant: no warning, which would be an error here
