"""Deferred logits: loss and gradients of the unpatched model without its logits, whatever it does to them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from loss_models import OTHERS, assert_close, backward, batch_of, model_of
from models import CAUSAL_LMS, gradients, tiny_batch, tiny_causal_lm, with_lora
from torch import nn

from dropbp_kernels import apply_dropbp, losses, remove_dropbp
from dropbp_kernels.integrations import fused_loss
from dropbp_kernels.integrations.fused_loss import DeferredLogits
from dropbp_kernels.integrations.output_head import patch_head, unpatch_head


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    """Seven rows at a time, so that tiny batches have several slices."""
    monkeypatch.setattr(losses, "rows_of_slice", lambda num_classes: 7)


@pytest.mark.parametrize("family", [*CAUSAL_LMS, *OTHERS])
@pytest.mark.parametrize("num_items", [None, 5])
def test_loss_gradients_and_logits_of_the_unpatched_model(family, num_items, monkeypatch):
    model, inputs = model_of(family), batch_of()
    if num_items is not None and family not in ("bert", "t5"):
        inputs["num_items_in_batch"] = torch.tensor(num_items)
    expected, grads = backward(model, **inputs)
    calls = []
    monkeypatch.setattr(
        fused_loss,
        "linear_cross_entropy",
        lambda *args, **options: calls.append(options) or losses.linear_cross_entropy(*args, **options),
    )
    assert patch_head(model, "chunked")
    output, ours = backward(model, **inputs)
    assert len(calls) == 1
    assert isinstance(output.logits, DeferredLogits)
    assert output.logits.value is None
    assert output.loss.dtype == expected.loss.dtype
    torch.testing.assert_close(output.loss, expected.loss)
    assert_close(ours, grads)
    assert torch.equal(output.logits + 0, expected.logits)  # computed when they are read
    unpatch_head(model)
    assert torch.equal(backward(model, **inputs)[0].loss, expected.loss)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model, inputs = model_of("llama").to(dtype), batch_of()
    expected, grads = backward(model, **inputs)
    patch_head(model, "chunked")
    output, ours = backward(model, **inputs)
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, expected.loss, atol=1e-5, rtol=1e-5)
    assert_close(ours, grads, atol=2e-3, rtol=3e-2)


def test_autocast():
    model, inputs = model_of("llama"), batch_of()
    results = []
    for patched in (False, True):
        if patched:
            patch_head(model, "chunked")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(**inputs)
        assert output.logits.dtype == torch.bfloat16
        model.zero_grad()
        output.loss.backward()
        results.append((output.loss, gradients(model)))
    torch.testing.assert_close(results[1][0], results[0][0], atol=1e-5, rtol=1e-5)
    assert_close(results[1][1], results[0][1], atol=2e-3, rtol=3e-2)


def test_shift_labels_and_another_ignore_index():
    model, tokens = model_of("llama"), tiny_batch()["input_ids"]
    inputs = {"input_ids": tokens, "labels": tokens, "shift_labels": tokens.roll(-2, 1), "ignore_index": 3}
    inputs["shift_labels"][0, 2] = 3
    expected, grads = backward(model, **inputs)
    patch_head(model, "chunked")
    output, ours = backward(model, **inputs)
    torch.testing.assert_close(output.loss, expected.loss)
    assert_close(ours, grads)


@pytest.mark.parametrize("lora", ["none", "inside", "around"])
def test_with_lora(lora):
    def build(patch):
        model = tiny_causal_lm()
        if lora == "inside":
            assert not patch or patch_head(model, "chunked")
            return with_lora(model)
        model = with_lora(model) if lora == "around" else model
        assert not patch or patch_head(model, "chunked")
        return model

    expected, grads = backward(build(False), **batch_of())
    output, ours = backward(build(True), **batch_of())
    torch.testing.assert_close(output.loss, expected.loss)
    assert_close(ours, grads)


def test_tied_embeddings():
    model = tiny_causal_lm(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    expected, grads = backward(model, **batch_of())
    patch_head(model, "chunked")
    output, ours = backward(model, **batch_of())
    torch.testing.assert_close(output.loss, expected.loss)
    assert_close(ours, grads)


class Consumer(torch.autograd.Function):
    """Someone's own loss function: sees the deferred logits below Python's dispatch."""

    @staticmethod
    def forward(ctx, logits):
        ctx.save_for_backward(logits)
        return logits.square().sum()

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad * ctx.saved_tensors[0]


def changed_in_place(logits, labels):
    """What follows sees it, through views that were taken before too."""
    logits, labels = logits.float(), labels.flatten() % 60
    flat = logits.view(-1, 64)
    logits[..., 60:] = -50.0  # words that only pad the vocabulary
    return F.cross_entropy(flat, labels) + F.cross_entropy(logits.view(-1, 64), labels)


def scaled_by_what_is_trained(logits, labels):
    scale = torch.tensor(2.0, requires_grad=True)
    loss = F.cross_entropy((logits * scale).flatten(0, 1), labels.flatten())
    return loss + torch.autograd.grad(loss, scale, retain_graph=True)[0]


def read_below_python(logits, labels):
    """As C++ does, and all that no __torch_function__ sees."""
    capped = (logits * 2).tanh().float()
    with torch._C.DisableTorchFunctionSubclass():
        before = logits.square().mean() + capped.square().mean()
        assert type(before) is torch.Tensor
    assert capped.sum().isfinite()  # from here on they are computed
    with torch._C.DisableTorchFunctionSubclass():
        return before + capped.exp().mean()


@pytest.mark.parametrize(
    "use",
    [
        changed_in_place,
        scaled_by_what_is_trained,
        read_below_python,
        lambda logits, labels: logits.unsqueeze(dim=0).square().mean(),
        lambda logits, labels: logits.square().mean(),
        lambda logits, labels: Consumer.apply(logits.float()),
        lambda logits, labels: Consumer.apply((logits * 2).tanh().float()),
        lambda logits, labels: F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1),
        lambda logits, labels: F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").max(),
        lambda logits, labels: F.cross_entropy(logits.flatten(0, 1), labels.flatten(), weight=torch.arange(64.0)),
        lambda logits, labels: F.cross_entropy(logits.transpose(1, 2), labels),
        lambda logits, labels: F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()),
        lambda logits, labels: F.cross_entropy((logits + 1).flatten(0, 1), labels.flatten()),
        lambda logits, labels: F.cross_entropy(logits.tanh().tanh().flatten(0, 1), labels.flatten()),
        lambda logits, labels: F.cross_entropy(logits.flatten(0, 1), labels.flatten()) + logits.logsumexp(-1).mean(),
        lambda logits, labels: F.nll_loss(F.log_softmax(logits, -1).flatten(0, 1), labels.flatten()),
        lambda logits, labels: torch.utils.checkpoint.checkpoint(lambda x: x.exp().mean(), logits, use_reentrant=False),
        lambda logits, labels: torch.stack([logits, 2 * logits]).var(),
        lambda logits, labels: logits.masked_fill(labels[..., None] > 5, 0.0).sum() / logits.shape[0] + logits.max(),
    ],
)
def test_any_other_use_is_as_with_ordinary_logits(use):
    model, tokens = model_of("llama"), tiny_batch()["input_ids"]
    labels = tokens.roll(1, 1)

    def result():
        model.zero_grad()
        loss = use(model(input_ids=tokens).logits, labels)
        loss.backward()
        return loss, gradients(model)

    expected, grads = result()
    patch_head(model, "chunked")
    ours, our_grads = result()
    torch.testing.assert_close(ours, expected)
    assert_close(our_grads, grads)


def test_read_without_gradients():
    model, tokens = model_of("llama"), tiny_batch()["input_ids"]
    patch_head(model, "chunked")
    logits = model(input_ids=tokens).logits
    with torch.no_grad():
        accuracy = (logits.argmax(-1) == tokens).float().mean()
        values = logits.numpy(force=True)
    assert accuracy.item() == pytest.approx((values.argmax(-1) == tokens.numpy()).mean())
    assert logits.dtype == torch.float32
    assert (logits.shape, len(logits), logits.dim()) == ((2, 10, 64), 2, 3)
    assert logits.requires_grad
    assert {logits: 1}[logits] == 1
    assert "is_computed=True" in repr(logits)
    logits.sum().backward()  # with a graph all the same
    assert model.lm_head.weight.grad is not None


def test_read_after_the_optimizer():
    """Logits of other weights than the loss was taken with would be wrong, and nothing would show it."""
    model = model_of("llama")
    patch_head(model, "chunked")
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    early, late = model(**tiny_batch()), model(**tiny_batch())
    expected = early.logits + 0
    (early.loss + late.loss).backward()
    optimizer.step()
    assert torch.equal(early.logits + 0, expected)
    for use in (torch.sin, torch.Tensor.tolist, lambda logits: F.cross_entropy(logits[0], torch.zeros(10).long())):
        with pytest.raises(RuntimeError, match=r"read them before optimizer\.step\(\)"):
            use(late.logits)


def test_copies_and_state_dicts():
    model = model_of("llama")
    keys = list(model.state_dict())
    classes = [type(module) for module in model.modules()]
    patch_head(model, "chunked")
    assert list(model.state_dict()) == keys
    assert isinstance(model.lm_head, nn.Linear)
    assert type(model.lm_head).__name__ == "Linear"
    twin = copy.deepcopy(model)
    unpatch_head(model)
    assert [type(module) for module in model.modules()] == classes
    assert isinstance(twin(**batch_of()).logits, DeferredLogits)


def test_through_apply_dropbp():
    batch, kept = batch_of(), [True, False, False, True, False, True]
    results = {}
    for kind in ("off", "chunked"):
        model = with_lora(tiny_causal_lm())
        classes = [type(module) for module in model.modules()]
        apply_dropbp(model, 0.5, fused_loss=kind).set_plan(kept)
        results[kind] = backward(model, **batch)
        assert isinstance(results[kind][0].logits, DeferredLogits) == (kind == "chunked")
        remove_dropbp(model)
        assert [type(module) for module in model.modules()] == classes
    torch.testing.assert_close(results["chunked"][0].loss, results["off"][0].loss)
    assert_close(results["chunked"][1], results["off"][1])
    model = tiny_causal_lm()
    classes = [type(module) for module in model.modules()]
    model.lm_head = nn.Sequential(model.lm_head)
    for options, message in [
        ({"fused_loss": "chunked"}, "plain nn.Linear"),
        ({"fused_loss": "x"}, "one of auto"),
        ({"fused_loss": "auto", "sampler": "fair"}, "sampler"),
    ]:
        with pytest.raises(ValueError, match=message):
            apply_dropbp(model, 0.5, **options)
        assert [type(module) for module in model.modules() if type(module) is not nn.Sequential] == classes
