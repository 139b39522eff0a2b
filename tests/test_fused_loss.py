"""Deferred logits: loss and gradients of the unpatched model without its logits, whatever it does to them."""

import copy
import importlib.util

import pytest
import torch
import torch.nn.functional as F
from models import CAUSAL_LMS, gradients, tiny_batch, tiny_causal_lm, with_lora
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from dropbp_kernels import DropBP, apply_dropbp, losses, remove_dropbp
from dropbp_kernels.integrations import fused_loss
from dropbp_kernels.integrations.fused_loss import DeferredLogits, patch_head, unpatch_head
from dropbp_kernels.measure import PeakLiveBytes

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
# What a model does between its head and its loss, beside nothing: scale, soft cap, bias, no shift, another loss call.
OTHERS = {
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=0.5)),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.3)),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=7.0)),
    "phi": lambda: PhiForCausalLM(PhiConfig(**SIZES)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4, n_positions=64)),
    "bert": lambda: BertForMaskedLM(BertConfig(**SIZES)),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0)
    ),
}


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    """Seven rows at a time, so that tiny batches have several slices."""
    monkeypatch.setattr(losses, "rows_of_slice", lambda num_classes: 7)


def model_of(family):
    torch.manual_seed(0)
    return (tiny_causal_lm(family) if family in CAUSAL_LMS else OTHERS[family]()).train()


def batch_of():
    batch = tiny_batch()
    batch["labels"] = batch["labels"].clone()
    batch["labels"][0, :4] = -100
    return batch


def backward(model, **inputs):
    torch.manual_seed(5)  # dropout
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    return output, gradients(model)


def assert_close(ours, expected, **tolerance):
    assert set(ours) == set(expected)
    for name, grad in expected.items():
        assert (ours[name] is None) == (grad is None), name
        if grad is not None:
            torch.testing.assert_close(ours[name], grad, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


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


@pytest.mark.parametrize(
    "use",
    [
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


def test_changes_in_place_are_seen_by_what_follows():
    model, tokens = model_of("llama"), tiny_batch()["input_ids"]

    def result():
        model.zero_grad()
        logits = model(input_ids=tokens).logits.float()
        flat = logits.view(-1, 64)
        logits[..., 60:] = -50.0  # words that only pad the vocabulary
        loss = F.cross_entropy(flat, tokens.flatten() % 60) + F.cross_entropy(
            logits.view(-1, 64), tokens.flatten() % 60
        )
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


def test_evaluation_generation_and_frozen_models_are_left_alone():
    model, batch = model_of("llama"), batch_of()
    patch_head(model, "chunked")
    with torch.no_grad():
        assert type(model(**batch).logits) is torch.Tensor
    model.eval()
    assert type(model(**batch).logits) is torch.Tensor
    model.generation_config.pad_token_id = 0
    assert model.generate(batch["input_ids"], max_new_tokens=2).shape == (2, 12)
    model.train().requires_grad_(False)
    assert not model(**batch).loss.requires_grad


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


def test_auto_defers_where_that_saves_memory(monkeypatch):
    monkeypatch.undo()
    model = tiny_causal_lm(vocab_size=40_000, hidden_size=16)  # slices of 838 rows
    assert patch_head(model, "auto")
    model.requires_grad_(False).model.norm.weight.requires_grad_(True)

    def logits(num_rows):
        return model.lm_head(torch.zeros(1, num_rows, 16, requires_grad=True))

    assert [type(logits(n)) is DeferredLogits for n in (500, 600)] == [False, True]
    model.lm_head.weight.requires_grad_(True)
    assert [type(logits(n)) is DeferredLogits for n in (565, 575)] == [False, True]


@pytest.mark.parametrize("train_head", [False, True])
def test_auto_knows_what_each_way_needs(train_head, monkeypatch):
    """`pays` against counted bytes, on both sides of where it says that the scale tips."""
    monkeypatch.setattr(losses, "rows_of_slice", lambda num_classes: 32)
    monkeypatch.setattr(fused_loss, "rows_of_slice", lambda num_classes: 32)
    width, num_classes = 48, 500
    weight = nn.Parameter(torch.randn(num_classes, width), requires_grad=train_head)

    def peak(fused, num_rows):
        hidden = torch.randn(num_rows, width, requires_grad=True)
        target = torch.zeros(num_rows, dtype=torch.int64)
        weight.grad = None
        with PeakLiveBytes() as live:
            if fused:
                losses.linear_cross_entropy(hidden, weight, target).backward()
            else:
                F.cross_entropy(F.linear(hidden, weight).float(), target).backward()
        return live.peak_bytes

    for num_rows in (8, 256):
        assert fused_loss.pays(num_rows, weight) == (num_rows == 256)
        assert (peak(True, num_rows) < peak(False, num_rows)) == (num_rows == 256 or not train_head)


def test_memory_of_a_step():
    """The peak of a whole step, logits included, counted: what the loss adds is gone, not moved elsewhere."""
    tokens = torch.arange(2 * 32).reshape(2, 32)
    peaks = {}
    for kind in ("off", "chunked"):
        model = with_lora(tiny_causal_lm(vocab_size=4000))
        patch_head(model, kind)
        with PeakLiveBytes() as live:
            model(input_ids=tokens, labels=tokens).loss.backward()
        peaks[kind] = live.peak_bytes
    logits = 64 * 4000 * 4
    assert peaks["chunked"] < peaks["off"] - 1.9 * logits


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch >= 2.13")
@pytest.mark.parametrize("family", ["llama", "phi", "gemma2"])  # gemma2's soft cap it cannot express: ours
def test_by_torch(family):
    model, inputs = model_of(family), batch_of()
    expected, grads = backward(model, **inputs)
    patch_head(model, "torch")
    output, ours = backward(model, **inputs)
    torch.testing.assert_close(output.loss, expected.loss)
    assert_close(ours, grads)


@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="liger-kernel is not installed")
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_by_liger(family, monkeypatch):
    """What Liger is asked for; its kernels need a GPU, so that here a stand-in of the same signature answers."""
    functional = pytest.importorskip("liger_kernel.transformers.functional")
    calls = []

    def stand_in(input, weight, target, bias=None, *, ignore_index, reduction, softcap, accum_dtype):
        calls.append((softcap, accum_dtype))
        return losses.linear_cross_entropy(
            input, weight, target, bias, ignore_index=ignore_index, reduction=reduction, softcap=softcap
        )

    monkeypatch.setattr(functional, "liger_fused_linear_cross_entropy", stand_in)
    model, inputs = model_of(family), batch_of()
    expected, grads = backward(model, **inputs)
    patch_head(model, "liger")
    output, ours = backward(model, **inputs)
    assert calls == [(0.5 if family == "gemma2" else None, torch.float32)]
    torch.testing.assert_close(output.loss, expected.loss)
    assert_close(ours, grads)


def test_in_a_simulation():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        model = model_of("llama")
        patch_head(model, "chunked")
        tokens = torch.zeros(2, 10, dtype=torch.int64)
        output = model(input_ids=tokens, labels=tokens)
        assert isinstance(output.logits, DeferredLogits)
        assert output.logits.value is None
        output.loss.backward()


def test_a_compiled_model_computes_its_logits():
    model, inputs = model_of("llama"), batch_of()
    patch_head(model, "chunked")
    output = torch.compile(model, backend="eager")(**inputs)
    assert type(output.logits) is torch.Tensor
    unpatch_head(model)
    torch.testing.assert_close(output.loss, model(**inputs).loss)


def test_heads_that_cannot_defer():
    model = tiny_causal_lm()
    model.lm_head = nn.Sequential(model.lm_head)
    assert not patch_head(model, "auto")
    with pytest.raises(ValueError, match=r"fused_loss: expected a model with a plain nn\.Linear .* got Sequential"):
        patch_head(model, "chunked")
    with pytest.raises(ValueError, match="for 'torch', got none"):
        patch_head(nn.Linear(2, 2), "torch")
    model = tiny_causal_lm()
    patch_head(model, "chunked")
    with pytest.raises(ValueError, match="got one that is patched already"):
        patch_head(model, "chunked")
    with pytest.raises(ValueError, match="fused_loss: expected one of auto, off, chunked, torch, liger, got 'best'"):
        patch_head(model, "best")


def test_what_is_not_installed(monkeypatch):
    monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    with pytest.raises(RuntimeError, match=r"'torch' needs torch >= 2\.13"):
        patch_head(tiny_causal_lm(), "torch")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="'liger' needs liger-kernel, which is not installed"):
        patch_head(tiny_causal_lm(), "liger")


def test_on_the_meta_device():
    """Which has no autocast to ask about."""
    with torch.device("meta"):
        model, hidden = model_of("llama"), torch.zeros(1, 4, 32)
    patch_head(model, "chunked")
    assert isinstance(model.lm_head(hidden), DeferredLogits)
    gate = DropBP()
    gate.kept = False
    assert gate.run(hidden, torch.neg).is_meta


def test_under_ddp(tmp_path):
    """DDP clones outputs inside a function of its own; accelerate casts them: they stay deferred."""
    from accelerate.utils import convert_outputs_to_fp32

    model, inputs = model_of("llama"), batch_of()
    expected, grads = backward(model, **inputs)
    patch_head(model, "chunked")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        model.zero_grad()
        output = convert_outputs_to_fp32(wrapped)(**inputs)
        assert isinstance(output.logits, DeferredLogits)
        assert output.logits.value is None
        output.loss.backward()
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(output.loss, expected.loss)
    assert_close(gradients(model), grads)
    assert torch.equal(output.logits + 0, expected.logits)
