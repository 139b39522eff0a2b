"""Target plans on models of transformers: what comes back, what is saved, and what they compose with."""

import copy
import functools
from contextlib import nullcontext

import pytest
import torch
from target_cases import CLOSE, assert_same, backward, chat, is_target, tiny
from torch import nn
from transformers.integrations.neftune import activate_neftune, deactivate_neftune

from dropbp_kernels import apply_dropbp, remove_dropbp
from dropbp_kernels.integrations import staged_decoder
from dropbp_kernels.measure import PeakLiveBytes, saved_bytes
from dropbp_kernels.targets import IGNORED


def own_loss(logits, labels):
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def test_what_is_made_of_each_label_comes_back_at_its_place():
    """As TRL's log-probabilities, beside the labels without the first."""
    model, batch = tiny(), chat()
    forward = model.forward

    @functools.wraps(forward)
    def with_values(*args, labels, **kwargs):
        output = forward(*args, labels=labels, **kwargs)
        output["of_each_label"] = labels[:, 1:]
        return output

    model.forward = with_values
    apply_dropbp(model, 0.0, context="inference").step()
    assert torch.equal(model(**batch).of_each_label, batch["labels"][:, 1:].clamp(min=0))


@pytest.mark.parametrize("model_type", ["cohere", "llama"])  # the first scales its logits behind the head
def test_labels_given_to_step_serve_a_loss_of_the_callers(model_type, cut_attention):
    model, batch = tiny(model_type, attn_implementation="sdpa"), chat()
    labels = batch.pop("labels")
    targets = is_target(labels)
    exact = cut_attention(copy.deepcopy(model), targets)
    exact_logits = exact(**batch).logits
    own_loss(exact_logits, labels).backward()
    handler = apply_dropbp(model, 0.0, context="inference")
    handler.step(labels=labels)
    logits = model(**batch).logits
    torch.testing.assert_close(logits, torch.where(targets[..., None], exact_logits, 0.0))  # at their places
    own_loss(logits, labels).backward()
    for ours, dense in zip(model.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, dense.grad, **CLOSE)
    assert torch.equal(model(**batch, logits_to_keep=6).logits, logits[:, -6:])
    assert torch.equal(model(**batch, logits_to_keep=torch.tensor([3, 9])).logits, logits[:, [3, 9]])
    assert torch.equal(model(**batch, return_dict=False)[0], logits)
    handler.step()  # they held for one step
    torch.testing.assert_close(model(**batch).logits, exact_logits)


def test_noise_of_neftune_is_as_strong_as_without_a_plan():
    model, batch, alpha = tiny(), chat(), 5.0
    strongest = alpha / (16 * model.config.hidden_size) ** 0.5  # of 16 tokens
    nn.init.zeros_(model.get_input_embeddings().weight)
    noises = []
    apply_dropbp(model, 0.0, context="inference")
    hook = activate_neftune(model, alpha)
    model.model.layers[0].register_forward_pre_hook(lambda module, args: noises.append(args[0].abs().max().item()))
    backward(model, batch)
    assert len(noises) > 1
    assert all(0.95 * strongest < noise <= strongest for noise in noises)
    assert model.get_input_embeddings().neftune_noise_alpha == alpha
    deactivate_neftune(model, hook)


def test_hidden_states_of_target_rows_come_back_at_their_places():
    model, batch = tiny(), chat()
    labels = batch.pop("labels")
    exact = model.model(**batch).last_hidden_state
    handler = apply_dropbp(model, 0.0, context="inference")
    handler.step(labels=labels)
    hidden = model.model(**batch).last_hidden_state
    torch.testing.assert_close(hidden, torch.where(is_target(labels)[..., None], exact, 0.0))


def test_saved_bytes_are_those_of_the_target_rows():
    model = tiny(dtype=torch.float32, num_hidden_layers=4)
    tokens = torch.randint(3, 96, (2, 64))
    labels = tokens.clone()
    labels[:, :49] = IGNORED  # 16 of 64 rows are targets
    batch = {"input_ids": tokens, "labels": labels}
    with saved_bytes() as dense:
        model(**batch, use_cache=False)
    apply_dropbp(model, 0.0, context="inference")
    with saved_bytes() as ours:
        model(**batch)
    num_blocks, batch_size, num_heads, head_dim = 4, 2, 4, 8
    context_keys = 2 * batch_size * num_heads * 48 * head_dim * 4  # and values; float32, for every query head
    mask = batch_size * 16 * 64 * 4
    assert ours.num_bytes <= 0.26 * dense.num_bytes + num_blocks * (context_keys + mask)


def test_logits_are_those_of_target_rows():
    model, batch = tiny(), chat()
    exact = model(**batch).logits.detach()
    apply_dropbp(model, 0.0, context="inference")
    logits = model(**batch).logits.detach()
    targets = is_target(batch["labels"])
    torch.testing.assert_close(logits[0, :8], exact[0][targets[0]])
    torch.testing.assert_close(logits[1, :3], exact[1][targets[1]])


def test_evaluation_and_calls_without_labels_are_untouched():
    model, batch = tiny(), chat()
    exact = model(**batch).logits.detach()
    apply_dropbp(model, 0.0, context="inference")
    assert torch.equal(model(input_ids=batch["input_ids"], use_cache=False).logits, exact)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, exact)
    assert torch.equal(model.eval()(**batch).logits, exact)


@pytest.mark.parametrize("is_applied_first", [False, True])
def test_lora(is_applied_first):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "down_proj"], init_lora_weights=False)
    batch, model = chat(), tiny()
    torch.manual_seed(1)
    expected = backward(peft.get_peft_model(copy.deepcopy(model), config), batch)
    if is_applied_first:
        apply_dropbp(model, 0.0, context="inference", context_gradient="full")
    torch.manual_seed(1)
    model = peft.get_peft_model(model, config)
    if not is_applied_first:
        apply_dropbp(model, 0.0, context="inference", context_gradient="full")
    assert_same(backward(model, batch), expected, **CLOSE)
    assert model(**batch).logits.shape[1] < 16  # it did run in stages


@pytest.mark.parametrize("context_gradient", ["none", "one_hop"])
@pytest.mark.parametrize(
    ("model_type", "checkpoint"), [("llama", "transformers"), ("gpt2", "transformers"), ("llama", "kept")]
)
def test_checkpointing(model_type, checkpoint, context_gradient):
    batch = chat()
    model = tiny(model_type)
    plain = copy.deepcopy(model)
    apply_dropbp(plain, 0.0, context="inference", context_gradient=context_gradient)
    expected = backward(plain, batch)
    if checkpoint == "transformers":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        apply_dropbp(model, 0.0, context="inference", context_gradient=context_gradient)
    else:
        apply_dropbp(model, 0.0, context="inference", context_gradient=context_gradient, checkpoint="kept")
    with saved_bytes() as checkpointed:
        model(**batch)
    with saved_bytes() as whole:
        plain(**batch)
    assert checkpointed.num_bytes < 0.7 * whole.num_bytes
    assert_same(backward(model, batch), expected, rtol=0, atol=0)


def test_dropped_branches_too():
    batch, model = chat(), tiny(num_hidden_layers=3)
    expected = copy.deepcopy(model)
    handler = apply_dropbp(expected, 0.5, dropped_runs="detach", context="inference", seed=3)
    handler.step()
    expected = backward(expected, batch)
    handler = apply_dropbp(model, 0.5, context="inference", seed=3)
    handler.step()
    assert_same(backward(model, batch), expected, rtol=0, atol=0)
    handler.step()  # strict: every gate has been called


def test_what_a_hook_saw_can_be_called_again():
    model, batch = tiny(), chat()
    apply_dropbp(model, 0.0, context="inference")
    seen = []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    first = backward(model, batch)
    assert_same(backward(model, seen[0]), first, rtol=0, atol=0)


def test_fused_norms_too():
    batch, model = chat(), tiny()
    expected = copy.deepcopy(model)
    apply_dropbp(expected, 0.0, context="inference")
    expected = backward(expected, batch)
    apply_dropbp(model, 0.0, context="inference", fused=True)
    assert_same(backward(model, batch), expected, **CLOSE)


def test_removed_without_a_trace():
    model, batch = tiny(), chat()
    classes = [type(module) for module in model.modules()]
    keys = list(model.state_dict())
    apply_dropbp(model, 0.0, context="inference")
    assert list(model.state_dict()) == keys
    copy.deepcopy(model)
    backward(model, batch)
    remove_dropbp(model)
    assert [type(module) for module in model.modules()] == classes
    assert not any(name.startswith("_dropbp") for module in model.modules() for name in vars(module))


def test_labels_by_place():
    model, batch = tiny(), chat()
    apply_dropbp(model, 0.0, context="inference")
    expected = model(**batch)
    ours = model(batch["input_ids"], None, None, None, None, batch["labels"])
    assert torch.equal(ours.loss, expected.loss)
    assert ours.logits.shape == expected.logits.shape


def test_the_last_layer_is_not_computed_again_and_needs_no_more_memory(monkeypatch):
    batch, results = chat(), []
    batch["labels"] = batch["input_ids"].masked_fill(torch.arange(16) < 8, IGNORED)
    for is_whole in (True, False):
        if not is_whole:
            monkeypatch.setattr(staged_decoder, "_last_layer_whole", lambda decoder: nullcontext())
        model, calls = tiny(num_hidden_layers=3), []
        model.gradient_checkpointing_enable({"use_reentrant": False})
        apply_dropbp(model, 0.0, context="inference")
        for number, layer in enumerate(model.model.layers):
            layer.mlp.register_forward_pre_hook(lambda *_, calls=calls, number=number: calls.append(number))
        with PeakLiveBytes() as live:
            model(**batch).loss.backward()
        results.append(([calls.count(number) for number in range(3)], live.peak_bytes))
    assert results[0][0] == [3, 3, 1]  # context, targets, and again; the last layer needs only the keys of context
    assert results[1][0] == [3, 3, 2]
    assert results[0][1] <= results[1][1]


def test_arguments_by_their_places_of_a_peft_model_without_a_task_type():
    """Its forward names none: left padding, which the mask tells, was seen by targets."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny(), peft.LoraConfig(target_modules=["q_proj"])).double()
    batch = chat()
    mask = (torch.arange(16) >= torch.tensor([[2], [5], [0]])).long()
    dense = model(**batch, attention_mask=mask).loss
    apply_dropbp(model, 0.0, context="inference")
    loss = model(batch["input_ids"], mask, labels=batch["labels"], use_cache=False).loss
    torch.testing.assert_close(loss, dense, **CLOSE)
