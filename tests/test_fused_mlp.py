"""Gated MLPs of transformers models in one kernel: same values, fewer bytes, watched ones untouched, undone."""

import copy

import pytest
import torch
from fused_models import FUSED_MODELS, build
from models import step, tiny_batch, tiny_causal_lm, with_lora
from torch import nn
from transformers.activations import ACT2FN

from dropbp_kernels import apply_dropbp, remove_dropbp
from dropbp_kernels.integrations import fused_mlp
from dropbp_kernels.measure import PeakLiveBytes, saved_bytes
from dropbp_kernels.ops.glu import glu

WITHOUT = {
    "mixtral",
    "qwen3_moe",
    "starcoder2",
    "gpt2",
    "gpt_neox",
    "opt",
    "apertus",
    "biogpt",
    "granitemoe",
    "jetmoe",
    "persimmon",
}  # have experts alone, or no gate


@pytest.fixture
def calls(monkeypatch):
    """Calls of the ops with (inplace, donate), since now."""
    found = []

    def counted(name):
        op = getattr(fused_mlp, name)

        def call(*args, inplace=False, donate=False, **options):
            found.append((inplace, donate))
            return op(*args, **({"inplace": inplace} if name == "glu" else {}), donate=donate, **options)

        monkeypatch.setattr(fused_mlp, name, call)

    counted("glu"), counted("glu_linear")
    return found


@pytest.mark.parametrize("model_type", sorted(set(FUSED_MODELS) - WITHOUT))
def test_loss_and_gradients_are_the_unfused_ones(model_type, calls):
    model = build(model_type)
    apply_dropbp(model, 0.5, fused=False).set_plan((True, False, False, True, True, True))
    expected = step(model, tiny_batch())
    remove_dropbp(model)
    assert not calls
    apply_dropbp(model, 0.5, fused=True).set_plan((True, False, False, True, True, True))
    torch.testing.assert_close(step(model, tiny_batch()), expected, rtol=1e-4, atol=1e-5)
    # A dropped MLP writes over its gate, kept ones give their buffers to the gradients.
    assert {(True, False), (False, True)} == set(calls)


def test_mlps_are_known_by_what_they_compute_and_not_by_their_names():
    from transformers.models.gemma4.modeling_gemma4 import Gemma4TextMLP
    from transformers.models.glm.modeling_glm import GlmMLP
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLMLP
    from transformers.models.seed_oss.modeling_seed_oss import SeedOssMLP  # has a dropout behind the product

    class LlamaMLP(nn.Module):
        def forward(self, x):
            down_proj = self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))
            return down_proj

    class Mine(nn.Module):
        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            """Names of variables and annotations are mine too."""
            result = self.down_proj(self.act_fn(self.gate_proj(rows)) * self.up_proj(rows))
            return result

    class Decorated(Mine):
        forward = torch.no_grad()(Mine.forward)

    separate = ("gate_proj", "up_proj"), "act_fn"
    known = {Gemma4TextMLP: separate, Qwen2_5_VLMLP: separate, Mine: separate}
    known |= {GlmMLP: (("gate_up_proj",), "activation_fn"), LlamaMLP: None, SeedOssMLP: None, Decorated: None}
    assert {each: fused_mlp._parts(each) for each in known} == known


def test_an_mlp_of_ones_own(calls):
    class Mine(nn.Module):
        def __init__(self, act_fn):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)
            self.act_fn = act_fn

        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    class Rounded(nn.Linear):
        def forward(self, x):
            return super().forward(x).bfloat16()

    x = torch.randn(3, 8)
    mixed = Mine(nn.SiLU())
    mixed.gate_proj = Rounded(8, 16)  # `glu` takes tensors of one dtype
    for mlp in (Mine(nn.SiLU()), Mine(nn.functional.silu), mixed):  # what is no module may be anything
        with torch.no_grad():
            expected = mlp(x)
            fused_mlp.install(mlp, True)
            torch.testing.assert_close(mlp(x), expected)
    assert len(calls) == 1


def test_saved_bytes_and_the_peak_of_a_dropped_mlp_shrink_by_the_activation():
    hidden = 2 * 10 * 512 * 4
    counts = {}
    for fused in (False, True):
        model = tiny_causal_lm(intermediate_size=512, num_hidden_layers=1)
        model.requires_grad_(False)
        model.model.embed_tokens.weight.requires_grad_()
        handler = apply_dropbp(model, 0.5, fused=fused, fused_loss="off")
        handler.set_plan((False, True))
        with saved_bytes() as saved:
            model(**tiny_batch())
        handler.set_plan((False, False))
        with PeakLiveBytes() as live:
            model(**tiny_batch())
        counts[fused] = saved.num_bytes, live.peak_bytes
    assert counts[False][0] - counts[True][0] >= hidden  # silu(gate); norms save less too
    assert counts[False][1] - counts[True][1] >= hidden  # the product, which lies over the gate


@pytest.mark.parametrize("adapter", [False, True])
def test_a_trained_layer_behind_saves_no_product(adapter):
    """Unfused: silu(gate) and the product, besides gate and up."""
    hidden = 2 * 10 * 512 * 4
    saved = {}
    for fused in (False, True):
        model = build(intermediate_size=512, num_hidden_layers=1)
        model = with_lora(model) if adapter else model
        apply_dropbp(model, 0.0, strict=False, fused=fused, fused_loss="off")
        with saved_bytes() as counted:
            model(**tiny_batch())
        saved[fused] = counted.num_bytes
    assert saved[False] - saved[True] >= 2 * hidden


def test_frozen_and_watched_layers_behind_are_called():
    model = build()
    model.requires_grad_(False)
    model.model.embed_tokens.weight.requires_grad_()
    model.model.layers[1].mlp.down_proj.weight.requires_grad_()
    seen = []
    for layer in model.model.layers[:2]:
        layer.mlp.down_proj.register_forward_hook(lambda *_: seen.append(None))
    expected = step(copy.deepcopy(model), tiny_batch())
    seen.clear()
    apply_dropbp(model, 0.0, strict=False, fused=True)
    torch.testing.assert_close(step(model, tiny_batch()), expected, rtol=1e-4, atol=1e-5)
    assert len(seen) == 2


@pytest.mark.parametrize("adapter", [False, True])
def test_a_layer_behind_of_another_dtype_raises_as_before(adapter):
    model = build(dtype=torch.bfloat16)
    model.model.layers[0].mlp.down_proj.float()
    model = with_lora(model) if adapter else model
    apply_dropbp(model, 0.0, strict=False, fused=True)
    with pytest.raises(RuntimeError, match="dtype"):
        model(**tiny_batch())


@pytest.mark.parametrize("checkpoint", ["kept", "sliced"])
def test_lora_under_checkpointing(checkpoint):
    results = []
    for fused in (False, True):
        model = with_lora(build())
        apply_dropbp(model, 0.5, fused=fused, checkpoint=checkpoint).set_plan((True, False, False, True, True, True))
        results.append(step(model, tiny_batch()))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def test_watched_projections_keep_their_outputs_and_watched_activations_are_called(calls):
    model = build()
    apply_dropbp(model, 0.5, fused=True).set_plan((False,) * 5 + (True,))
    mlps = [layer.mlp for layer in model.model.layers]
    seen = []
    mlps[0].gate_proj.register_forward_hook(lambda module, args, output: seen.append((output, output.clone())))
    mlps[1].act_fn.register_forward_hook(lambda *_: seen.append(None))
    model(**tiny_batch()).loss.backward()
    assert calls == [(False, False), (False, True)]  # of blocks 0 and 2
    assert len(seen) == 2
    assert torch.equal(*seen[0])


@pytest.mark.parametrize(
    ("activation", "known"),
    [
        (ACT2FN["silu"], True),
        (ACT2FN["gelu"], True),
        (ACT2FN["gelu_pytorch_tanh"], True),
        (ACT2FN["gelu_new"], False),
        (nn.GELU(), True),
        (nn.GELU("tanh"), True),
    ],
)
def test_activations(activation, known):
    activation = copy.deepcopy(activation)
    op = fused_mlp._known(activation)
    assert (op is not None) is known
    if op is not None:
        gate, up = torch.randn(2, 3, 5)
        torch.testing.assert_close(glu(gate, up, op), activation(gate) * up)
    assert fused_mlp._known(type("Other", (nn.Module,), {})()) is None


def test_undone_and_not_asked_for():
    model = build()
    classes = [type(module) for module in model.modules()]
    state = list(model.state_dict())
    apply_dropbp(model, 0.5, fused=True)
    assert type(model.model.layers[0].mlp) not in classes
    torch.testing.assert_close(step(copy.deepcopy(model), tiny_batch()), step(model, tiny_batch()))
    assert list(model.state_dict()) == state
    remove_dropbp(model)
    assert [type(module) for module in model.modules()] == classes
    apply_dropbp(model, 0.5)
    assert type(model.model.layers[0].mlp) in classes
