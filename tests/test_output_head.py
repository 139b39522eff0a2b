"""A head that takes the place of a patched one defers its logits too, or says that it cannot."""

import copy

import pytest
import torch
from loss_models import assert_close, backward
from models import tiny_batch, tiny_causal_lm, tiny_gpt2, with_lora
from torch import nn

from dropbp_kernels import apply_dropbp, remove_dropbp
from dropbp_kernels.integrations.fused_loss import DeferredLogits

PLANS = {"llama": [True, False, False, True, False, True], "gpt2": [True, False, False, True]}


def build(family):
    """GPT-2's head is tied to its embeddings."""
    return tiny_gpt2() if family == "gpt2" else tiny_causal_lm()


def targets():
    batch = tiny_batch()
    batch["labels"] = batch["labels"].masked_fill(torch.arange(10) < 6, -100)
    return batch


def resize(model):
    torch.manual_seed(3)  # new rows are drawn
    model.resize_token_embeddings(70, mean_resizing=False)


def assign(model):
    torch.manual_seed(3)
    model.set_output_embeddings(nn.Linear(model.config.hidden_size, 70, bias=False))
    model.config.vocab_size = model.vocab_size = 70


@pytest.mark.parametrize("options", [{}, {"context": "inference"}, {"granularity": "token"}])
@pytest.mark.parametrize(("family", "replace"), [("llama", resize), ("llama", assign), ("gpt2", resize)])
def test_after_a_replacement_it_is_as_if_the_new_head_had_been_patched(family, replace, options):
    results, batch = [], targets()
    for is_late in (False, True):
        model = build(family)
        if not is_late:
            replace(model)
        handler = apply_dropbp(model, 0.5, fused_loss="chunked", **options)
        if is_late:
            old = model.get_output_embeddings()
            replace(model)
            assert type(old) is nn.Linear or old is model.get_output_embeddings()  # a tied one may stay
        if options.get("granularity"):
            handler.step()
        else:
            handler.set_plan(PLANS[family])
        output, grads = backward(model, **batch)
        results.append((output.loss, grads))
        if not options.get("context"):  # which puts the logits in their places, and so reads them
            assert isinstance(output.logits, DeferredLogits)
            assert output.logits.value is None
        remove_dropbp(model)
        assert not [module for module in model.modules() if "dropbp" in repr(vars(type(module)))]
    torch.testing.assert_close(results[1][0], results[0][0])
    assert_close(results[1][1], results[0][1])


@pytest.mark.parametrize("order", ["before", "after"])
def test_through_adapters(order):
    model = tiny_causal_lm()
    if order == "after":
        model = with_lora(model)
    apply_dropbp(model, 0.5, fused_loss="chunked").set_plan(PLANS["llama"])
    if order == "before":
        model = with_lora(model)
    resize(model)
    assert isinstance(model(**tiny_batch()).logits, DeferredLogits)
    twin = copy.deepcopy(model)
    remove_dropbp(model)
    assert type(model(**tiny_batch()).logits) is torch.Tensor
    twin.resize_token_embeddings(80, mean_resizing=False)
    assert isinstance(twin(**tiny_batch()).logits, DeferredLogits)


def test_a_copy_that_peft_trains_defers():
    peft = pytest.importorskip("peft")
    model = tiny_causal_lm()
    handler = apply_dropbp(model, 0.5, fused_loss="chunked")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(model, config).train()
    output = model(**tiny_batch())
    assert isinstance(output.logits, DeferredLogits)
    output.loss.backward()
    assert model.get_submodule("base_model.model.lm_head.modules_to_save.default").weight.grad is not None
    handler.set_plan(PLANS["llama"])
    with model.disable_adapter():
        assert isinstance(model(**tiny_batch()).logits, DeferredLogits)


@pytest.mark.parametrize("kind", ["auto", "chunked"])
def test_a_head_that_cannot_defer_says_so_where_it_was_asked_for(kind):
    model = tiny_causal_lm()
    apply_dropbp(model, 0.5, fused_loss=kind)
    head = nn.Sequential(nn.Linear(32, 64, bias=False))
    if kind == "auto":
        model.lm_head = head
    else:
        with pytest.warns(UserWarning, match=r"in place of the head for 'chunked', got Sequential; .* as a whole"):
            model.lm_head = head
    assert type(model(**tiny_batch()).logits) is torch.Tensor
    model.lm_head = nn.Linear(32, 64, bias=False)  # and back again
    assert isinstance(model(**tiny_batch()).logits, DeferredLogits) == (kind == "chunked")  # auto: it would not pay
    assert type(model.lm_head) is not nn.Linear
