"""What target plans refuse, and what they warn of."""

import warnings

import pytest
import torch
from target_cases import CLOSE, assert_same, backward, chat, tiny
from torch import nn
from transformers import (
    CLIPVisionConfig,
    DynamicCache,
    LlavaConfig,
    LlavaForConditionalGeneration,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from dropbp_kernels import DropBPHandler, apply_dropbp
from dropbp_kernels.integrations import checkpointing
from dropbp_kernels.targets import IGNORED, TargetRule


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny("bloom"), "takes no position_ids"),
        (lambda: tiny("falcon", alibi=True), "ALiBi"),
        (lambda: tiny("gpt_neo"), "windows of its local layers by the order of its keys"),
        (lambda: tiny("roberta"), "numbers its tokens by a rule of its own"),
        (lambda: tiny("whisper"), "labels are shifted by its loss for context, got WhisperForCausalLM"),
        (lambda: tiny("modernbert-decoder"), "expected a causal LM .* got ModernBertDecoderForCausalLM"),
        (lambda: tiny("opt", layerdrop=0.1), "skips layers at random"),
        (lambda: tiny_t5(), "encoder-decoder|expected a causal LM"),
        (lambda: with_attention(tiny(), "flex_attention"), "uses attention 'flex_attention'"),
        (lambda: with_batch_norm(tiny()), "normalises over the batch"),
        (lambda: tiny("gemma3_text", use_bidirectional_attention=True), "attends in both directions"),
        (lambda: tiny("lfm2", layer_types=["conv", "full_attention"]), "has layers with a state of their own"),
        (lambda: tiny().model, "expected a causal LM"),
    ],
)
def test_models_that_cannot_run_in_stages(make, message):
    model = make()
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        apply_dropbp(model, 0.0, context="inference")
    assert [type(module) for module in model.modules()] == classes


def test_a_transformers_whose_checkpointed_layers_lose_the_cache(monkeypatch):
    monkeypatch.delattr(GradientCheckpointingLayer, "_can_checkpoint_with_cache")
    with pytest.raises(ValueError, match=r"transformers: expected 5\.15 or later with context, got "):
        apply_dropbp(tiny(), 0.0, context="inference")


def tiny_t5():
    return T5ForConditionalGeneration(T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4))


def with_attention(model, name):
    model.config._attn_implementation = name
    return model


def with_batch_norm(model):
    model.model.layers[0].mlp.norm = nn.BatchNorm1d(32)
    return model


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": "drop"}, "context: expected None or \"inference\", got 'drop'"),
        ({"context": "inference", "context_gradient": "two"}, "context_gradient: expected one of none, one_hop, full"),
        ({"context": "inference", "context_keep": 1.0}, "context_keep: expected 0 <= context_keep < 1, got 1.0"),
        (
            {"context": "inference", "context_keep": 0.1, "context_gradient": "full"},
            'context_keep: expected 0 with context_gradient="full"',
        ),
        ({"context_keep": 0.1}, 'context: expected "inference" with context_keep=0.1, got None'),
        ({"context_gradient": "full"}, 'context: expected "inference" with context_gradient=full, got None'),
        ({"shared_context": True}, 'context: expected "inference" with shared_context=True, got None'),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        apply_dropbp(tiny(), 0.0, **options)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"output_hidden_states": True}, "output_hidden_states: expected False"),
        ({"output_router_logits": True}, "output_router_logits: expected False"),
        ({"attention_mask": torch.ones(3, 1, 16, 16, dtype=torch.bool)}, "attention_mask: expected shape"),
        ({"past_key_values": DynamicCache()}, "past_key_values: expected None with labels and context, got a cache"),
        ({"past_key_values": StaticCache(tiny().config, 16)}, "past_key_values: expected None with labels and context"),
        ({"position_ids": torch.arange(15).expand(4, 3, 15)}, r"position_ids: expected labels' shape \(3, 16\), got"),
        ({"shift_labels": torch.ones(3, 16)}, "shift_labels: expected None with context"),
        ({"token_type_ids": torch.ones(3, 16)}, "token_type_ids: expected no further input by token"),
        ({"labels": torch.ones(3, 15, dtype=torch.long)}, r"labels: expected the shape of input_ids, \(3, 16\), got"),
    ],
)
def test_bad_calls(extra, message):
    model = tiny()
    apply_dropbp(model, 0.0, context="inference")
    with pytest.raises(ValueError, match=message):
        model(**{**chat(), **extra})
    backward(model, chat())  # and nothing is left behind


def test_labels_given_to_step_need_a_model_that_can_use_them():
    handler = apply_dropbp(tiny(), 0.0)
    with pytest.raises(ValueError, match="labels: expected None, since the model was not patched with context"):
        handler.step(labels=chat()["labels"])
    assert handler.num_steps == 0
    model, batch = tiny(), chat()
    handler = apply_dropbp(model, 0.0, context="inference")
    handler.step(labels=batch["labels"])
    with pytest.raises(ValueError, match=r"labels: expected the shape of input_ids, \(2, 16\), got \(3, 16\); labels"):
        model(input_ids=batch["input_ids"][:2])


def test_prompts_that_an_adapter_learns_are_refused():
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = peft.get_peft_model(tiny(dtype=torch.float32), config)
    apply_dropbp(model, 0.0, context="inference")
    with pytest.raises(ValueError, match=r"expected the shape of labels, \(3, 16\), got \(3, 18\); prompts that"):
        model(**chat())


def test_a_batch_without_a_target_has_no_gradient_and_says_so():
    model, batch = tiny(), chat()
    batch["labels"][:] = IGNORED
    apply_dropbp(model, 0.0, context="inference")
    with pytest.warns(UserWarning, match="no target in a batch"):
        assert not model(**batch).loss.requires_grad
    assert not model(**batch).loss.requires_grad  # and once
    labels = batch.pop("labels")
    handler = DropBPHandler(model, 0.0)
    handler.step(labels=labels)
    assert not model(**batch).logits.requires_grad
    assert not model.model(**batch).last_hidden_state.requires_grad
    handler.step()  # strict: that no gate was called is no mistake
    with pytest.raises(RuntimeError, match="gates were not called"):
        handler.step()  # now it is: there was no batch


def test_a_step_that_saw_no_labels_is_warned_of_once():
    model = tiny()
    handler = apply_dropbp(model, 0.0, context="inference")
    batch = {name: value for name, value in chat().items() if name != "labels"}
    handler.step()
    model(**batch).logits.sum().backward()
    with pytest.warns(UserWarning, match="with a backward, since no labels were seen in a training step"):
        handler.step()
    model(**batch).logits.sum().backward()
    handler.step()  # said once
    model(**chat()).loss.backward()
    handler.step()


def test_labels_on_every_token_are_warned_of_once():
    model = tiny()
    handler = apply_dropbp(model, 0.0, context="inference")
    batch = chat()
    batch["labels"] = batch["input_ids"]
    handler.step()
    model(**batch).loss.backward()
    with pytest.warns(UserWarning, match="with a backward, since every token of the first step has a label"):
        handler.step()
    model(**batch).loss.backward()
    handler.step()  # said once


def test_outputs_that_the_configuration_asks_for_are_refused():
    model = tiny("mixtral", torch.float32, output_router_logits=True)
    apply_dropbp(model, 0.0, context="inference")
    with pytest.raises(ValueError, match="output_router_logits: expected False"):
        model(**chat())


def test_an_attention_that_was_set_later_is_refused():
    model = tiny(dtype=torch.float32)
    apply_dropbp(model, 0.0, context="inference")
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="got 'flex_attention', set after apply_dropbp"):
        model(**chat())


def test_positions_of_several_axes_have_the_shape_of_the_batch():
    model, batch = tiny(), chat()
    handler = apply_dropbp(model, 0.0, context="inference")
    handler.step(labels=batch.pop("labels"))
    inputs = {"inputs_embeds": model.get_input_embeddings()(batch["input_ids"])}
    message = r"position_ids: expected the shape of labels, \(3, 16\), or \(axes, 3, 16\), got \(3, 2, 16\)"
    with pytest.raises(ValueError, match=message):
        model.model(**inputs, position_ids=torch.arange(16).expand(3, 2, 16))


def llava():
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
    )
    config = LlavaConfig(vision_config=vision, text_config=tiny().config, image_token_index=2, vision_feature_layer=-1)
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config).double().train()


def chat_with_image():
    tokens = chat()["input_ids"]
    tokens[:, :4], tokens[:, 4:8] = 2, tokens[0, 4:8]  # an image and a question to it
    labels = tokens.masked_fill(torch.arange(16) < 8, -100)
    pixels = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    return {"input_ids": tokens, "labels": labels, "use_cache": False, "pixel_values": pixels}


def test_prompts_of_other_images_are_not_shared():
    model, batch = llava(), chat_with_image()
    del batch["pixel_values"]
    one = torch.randn(1, 3, 16, 16, dtype=torch.float64).expand(3, -1, -1, -1)
    dense = backward(model, {**batch, "pixel_values": one})
    options = {"context": "inference", "context_gradient": "full", "families": ["llama"]}
    apply_dropbp(model, 0.0, shared_context=True, **options)
    assert_same(backward(model, {**batch, "pixel_values": one}), dense, **CLOSE)

    def round_otherwise(module, inputs, output):  # as a CPU may, at another place of the batch
        return output * (1 + 5 * torch.finfo(output.dtype).eps * torch.arange(3)[:, None, None] / 2)

    with model.model.multi_modal_projector.register_forward_hook(round_otherwise):
        assert_same(backward(model, {**batch, "pixel_values": one}), dense, **CLOSE)
    with pytest.raises(ValueError, match=r"inputs_embeds: expected the same .* \(another image\?\)"):
        model(**batch, pixel_values=torch.cat([one[:2], -one[2:]]))


@pytest.mark.parametrize(
    ("trained", "options", "warns"),
    [
        ("model.multi_modal_projector", {}, True),
        ("model.multi_modal_projector", {"context_gradient": "one_hop"}, True),
        ("model.multi_modal_projector", {"context_gradient": "full"}, False),
        ("model.multi_modal_projector", {"context_keep": 0.5}, False),
        ("model.language_model", {}, False),
    ],
)
def test_what_makes_the_embeddings_of_context_alone_is_told_that_it_learns_nothing(trained, options, warns):
    model, batch = llava(), chat_with_image()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(trained))
    model.enable_input_require_grads()  # as under checkpointing: a leaf that is no parameter
    apply_dropbp(model, 0.0, context="inference", families=["llama"], **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        grads = [backward(model, batch)[1] for _ in range(2)][-1]
    messages = [str(warning.message).split("; ")[0] for warning in caught]
    assert messages == warns * [
        "inputs_embeds: expected to depend on no trained parameter outside of LlamaModel (a vision tower, a projector, "
        "learned prompts?), got 4, to which context gives no gradient"
    ]
    assert warns != any(grad.any() for name, grad in grads.items() if name.startswith(trained))


def test_reentrant_checkpointing_serves_one_stage_of_targets_alone(request):
    """Keys of a turn that other turns attend to would have no graph: the gradient through them would be lost."""
    turns = chat()
    batch = {name: value[:2] if isinstance(value, torch.Tensor) else value for name, value in turns.items()}
    expected = tiny()
    apply_dropbp(expected, 0.0, context="inference")
    model = tiny()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    apply_dropbp(model, 0.0, context="inference")
    checkpointing._warn_of_reentrant.cache_clear()
    with pytest.warns(UserWarning, match="reentrant"):
        assert_same(backward(model, batch), backward(expected, batch), **CLOSE)
    assert_same(backward(model, turns), backward(expected, turns), **CLOSE)
    request.getfixturevalue("turns_apart")
    with pytest.raises(ValueError, match=r"use_reentrant: expected False .* with 2 turns"):
        model(**turns)
    TargetRule.of(model).context_gradient = "one_hop"
    with pytest.raises(ValueError, match=r"use_reentrant: expected False .* context_gradient='one_hop'"):
        model(**batch)
