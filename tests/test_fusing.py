"""Adds fused with the norms behind them, in transformers models: same values, less saved, and undone."""

import copy

import pytest
import torch
from fused_models import FUSED_MODELS, MIXED, PLANS, assert_close, build, count_adds, named_classes, patched
from models import backward, encoder_decoder, tiny_batch, with_lora

from dropbp_kernels import apply_dropbp, remove_dropbp
from dropbp_kernels._backend import use_backend
from dropbp_kernels.blocks import Stream
from dropbp_kernels.integrations import fusing
from dropbp_kernels.measure import PeakLiveBytes, num_autograd_nodes, saved_bytes
from dropbp_kernels.ops import gated_residual_rms_norm


@pytest.fixture
def counts(monkeypatch):
    return count_adds(monkeypatch)


@pytest.mark.parametrize("model_type", FUSED_MODELS)
def test_logits_and_gradients_of_every_family_within_rounding(model_type, counts):
    """Every boundary is fused: two a block, the last one with the final norm."""
    batch = tiny_batch()
    for plan in PLANS[:2]:
        expected = backward(patched(plan, False, build(model_type)), batch)
        assert counts == {"fused": 0, "added": 6}
        assert_close(backward(patched(plan, True, build(model_type)), batch), expected)
        assert counts == {"fused": 6, "added": 6}
        counts.update(fused=0, added=0)
    assert all(plan)  # the last one drops nothing
    assert_close(expected, backward(build(model_type), batch))


@pytest.mark.parametrize(("name", "num_fused"), [("vit", 4), ("whisper", 4)])
def test_encoders_are_fused_up_to_their_last_norm(name, num_fused, counts):
    """Of Whisper the encoder; its decoder has a cross-attention."""
    results = []
    for fused in (False, True):
        model, inputs, num_branches = encoder_decoder(name)
        apply_dropbp(model, 0.5, fused=fused, fused_loss="off").set_plan([i % 3 == 0 for i in range(num_branches)])
        results.append(backward(model, inputs))
        assert counts["fused"] == fused * num_fused
    assert_close(*results[::-1])


def test_dropouts_behind_and_inside_branches_draw_as_unpatched():
    tokens, whisper = tiny_batch(), encoder_decoder("whisper")[1]
    rates = {"dropout": 0.3, "activation_dropout": 0.2}

    def opt():
        return build("opt", dropout=0.3), tokens

    def encoder():
        model, _, _ = encoder_decoder("whisper")
        for module in model.modules():
            vars(module).update(
                {name: rate for name, rate in rates.items() if isinstance(vars(module).get(name), float)}
            )
        return model, whisper

    for make in (opt, encoder):
        logits = []
        for fused in (None, False, True):
            model, inputs = make()
            if fused is not None:
                apply_dropbp(model, 0.5, fused=fused, fused_loss="off")
            torch.manual_seed(3)
            logits.append(model(**inputs).logits)
        assert torch.equal(logits[1], logits[0])
        torch.testing.assert_close(logits[2], logits[0], atol=1e-5, rtol=1e-5)
        torch.manual_seed(4)
        assert not torch.allclose(model(**inputs).logits, logits[0], atol=1e-3)  # it does draw


@pytest.mark.parametrize("fused", [False, True])
def test_a_block_that_keeps_half_results_finite_still_does(fused):
    model, inputs, _ = encoder_decoder("whisper")
    encoder, features = model.half().model.encoder, inputs["input_features"].half()
    with torch.no_grad():
        encoder.layers[0].fc2.bias.fill_(6e4)
        encoder.layers[0].self_attn.out_proj.bias.fill_(3e4)
        expected = encoder(features, output_hidden_states=True).hidden_states
    apply_dropbp(model, 0.5, fused=fused)
    found = encoder(features, output_hidden_states=True).hidden_states
    assert found[1].max() == expected[1].max() == torch.finfo(torch.float16).max - 1000
    assert_close((found[1], {}), (expected[1], {}))
    assert encoder(features).last_hidden_state.isfinite().all()


def test_what_a_block_is_given_by_position_reaches_its_attention_by_name():
    """OPT's block takes the mask first, its attention the cache."""
    model = build("opt")
    x, mask = torch.randn(2, 10, 32), torch.full((2, 1, 10, 10), -1e9).triu(1)
    block = model.model.decoder.layers[0]
    expected = block(x, mask)
    apply_dropbp(model, 0.5, fused=True)
    torch.testing.assert_close(block(x, mask), expected)
    with pytest.raises(ValueError, match="encoder_hidden_states: OPTDecoderLayer has no cross-attention"):
        block(x, mask, encoder_hidden_states=x)


def test_a_block_that_returns_more_than_the_stream_is_gated_by_its_modules():
    model = build()
    block = model.model.layers[0]
    own = type(block)

    def forward(self, hidden_states, output_attentions=False, **kwargs):
        return own.forward(self, hidden_states, **kwargs), "weights"

    block.__class__ = type(own.__name__, (own,), {"forward": forward})
    x = torch.randn(2, 10, 32)
    rope = model.model.rotary_emb(x, torch.arange(10)[None])
    expected = block(x, position_embeddings=rope)
    apply_dropbp(model, 0.5, fused=True).set_plan((False,) * 5 + (True,))
    found, weights = block(x, position_embeddings=rope)
    assert (weights, found.requires_grad) == ("weights", False)
    torch.testing.assert_close(found, expected[0])


def test_norms_without_weights_are_called_as_they_are(counts):
    batch, options = tiny_batch(), {"layer_norm_elementwise_affine": False}
    expected = backward(patched(MIXED, False, build("opt", **options)), batch)
    assert_close(backward(patched(MIXED, True, build("opt", **options)), batch), expected)
    assert counts["fused"] == 0


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("lora", [False, True])
def test_gradients_are_those_of_the_unpatched_model_with_detached_branches(plan, lora):
    batch, wrap = tiny_batch(), with_lora if lora else (lambda model: model)
    dense = wrap(build())
    for index, layer in enumerate(dense.get_submodule("model.layers" if not lora else "base_model.model.model.layers")):
        if not plan[2 * index]:
            layer.self_attn.register_forward_hook(lambda module, args, output: (output[0].detach(), *output[1:]))
        if not plan[2 * index + 1]:
            layer.mlp.register_forward_hook(lambda module, args, output: output.detach())
    assert_close(backward(patched(plan, True, wrap(build())), batch), backward(dense, batch))


def test_values_do_not_depend_on_the_plan_bit_for_bit():
    model, batch = patched(PLANS[0], True), tiny_batch()
    logits = [backward(patched(plan, True), batch)[0] for plan in PLANS]
    with torch.no_grad():
        logits.append(model(**batch).logits)
    for other in logits[1:]:
        assert torch.equal(other, logits[0])


@pytest.mark.parametrize("model_type", ["llama", "gemma"])
def test_bfloat16_is_as_exact_as_the_unpatched_model(model_type):
    batch = tiny_batch()
    exact, _ = backward(build(model_type, torch.float64), batch)
    plain, _ = backward(build(model_type, torch.bfloat16), batch)
    ours, _ = backward(patched((True,) * 6, True, build(model_type, torch.bfloat16)), batch)
    assert (ours - exact).abs().max() <= 2 * (plain - exact).abs().max() + 1e-3


def test_norms_are_known_by_what_they_compute_bit_for_bit():
    castings = {
        **dict.fromkeys(("LlamaRMSNorm", "Qwen3RMSNorm", "Qwen2_5_VLRMSNorm", "LongcatFlashRMSNorm"), "llama"),
        **dict.fromkeys(("GemmaRMSNorm", "Gemma3RMSNorm", "Qwen3NextRMSNorm"), "gemma"),
        **dict.fromkeys(("GptOssRMSNorm", "HeliumRMSNorm"), None),  # the product is in float32
    }
    classes = named_classes(castings)
    x = torch.randn(50, 64).to(torch.bfloat16)
    for name, casting in castings.items():
        assert fusing._casting_of(classes[name]) == casting, name
        if casting is None:
            continue
        norm = classes[name](64, eps=1e-3).to(torch.bfloat16)
        with torch.no_grad(), use_backend("reference"):
            norm.weight.add_(torch.randn(64))
            assert fusing._known_casting(norm) == casting
            normed, _ = gated_residual_rms_norm(
                torch.zeros_like(x), x, norm.weight, eps=fusing._eps(norm), casting=casting
            )
            assert torch.equal(normed, norm(x)), name


def test_a_norm_of_a_known_name_that_computes_otherwise_is_called(counts):
    class LlamaRMSNorm(torch.nn.RMSNorm):
        def forward(self, x):
            return 2 * super().forward(x)

    batch, models = tiny_batch(), [build(), build()]
    for model in models:
        for block in model.model.layers:
            block.post_attention_layernorm = LlamaRMSNorm(32)
    expected = backward(patched(MIXED, False, models[0]), batch)
    assert_close(backward(patched(MIXED, True, models[1]), batch), expected)
    assert counts["fused"] == 3  # those before attentions and the final norm


def test_dropped_boundaries_save_nothing_and_kept_ones_less_than_unfused():
    embedded = torch.randn(2, 10, 32, requires_grad=True)

    def stack(plan, fused):
        model = patched(plan, fused)
        rope = model.model.rotary_emb(embedded, torch.arange(10)[None])
        with saved_bytes() as saved:
            x = embedded
            for layer in model.model.layers:
                x = layer(x, position_embeddings=rope, **({fusing._HANDS_ON: True} if fused else {}))
            if fused:
                assert isinstance(x, fusing.Pending)
                x = x.take().added()
        return saved.num_bytes, num_autograd_nodes(x)

    assert stack((False,) * 6, True) == (0, 6)
    assert stack((True,) * 6, True)[0] < stack((True,) * 6, False)[0]


def test_what_is_handed_on_is_not_held_by_the_one_who_passes_it():
    batch = tiny_batch(2, 40)

    def peak(fused):
        model = patched((False,) * 5 + (True,), fused, with_lora(build()))
        with PeakLiveBytes() as live:
            model(**batch).loss.backward()
        return live.peak_bytes

    assert peak(True) <= peak(False)
    pending = fusing.Pending(Stream(torch.zeros(1)))
    pending.take()
    with pytest.raises(RuntimeError, match="taken twice"):
        pending.take()


@pytest.mark.parametrize("name", ["llama", "opt", "vit", "whisper"])
def test_everything_is_put_back(name):
    model = build(name) if name in FUSED_MODELS else encoder_decoder(name)[0]
    before = [(name, type(module), sorted(vars(module))) for name, module in model.named_modules()]
    keys = list(model.state_dict())
    apply_dropbp(model, 0.5, fused=True)
    assert list(model.state_dict()) == keys
    assert {type(module).__name__ for module in model.modules()} >= {cls.__name__ for _, cls, _ in before}
    assert any(module._forward_pre_hooks for module in model.modules())
    remove_dropbp(model)
    assert [(name, type(module), sorted(vars(module))) for name, module in model.named_modules()] == before
    assert not any(module._forward_pre_hooks for module in model.modules())
    apply_dropbp(model, 0.5, fused=True)  # and again


def test_a_deep_copy_is_fused_and_removed_by_itself(counts):
    batch, model = tiny_batch(), patched(MIXED, True)
    twin = copy.deepcopy(model)
    expected = backward(model, batch)
    remove_dropbp(model)
    counts.update(fused=0)
    assert torch.equal(backward(twin, batch)[0], expected[0])
    assert counts["fused"] == 6
    remove_dropbp(twin)
    assert not twin.model._forward_pre_hooks


def test_unknown_settings_are_refused():
    model = build()
    with pytest.raises(ValueError, match=r"fused: expected True, False or \"auto\", got 'always'"):
        apply_dropbp(model, 0.5, fused="always")
    with pytest.raises(ValueError, match="patched by apply_dropbp"):
        remove_dropbp(model)
