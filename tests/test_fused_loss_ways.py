"""Which way a loss is taken: where logits are deferred, where not, and by whose operator."""

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from loss_models import assert_close, backward, batch_of, model_of
from models import gradients, tiny_causal_lm, with_lora
from torch import nn

from dropbp_kernels import DropBP, losses
from dropbp_kernels.integrations import fused_loss
from dropbp_kernels.integrations.fused_loss import DeferredLogits
from dropbp_kernels.integrations.output_head import patch_head, unpatch_head
from dropbp_kernels.measure import PeakLiveBytes


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    """Seven rows at a time, so that tiny batches have several slices."""
    monkeypatch.setattr(losses, "rows_of_slice", lambda num_classes: 7)


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


def test_auto_defers_where_that_saves_memory(monkeypatch):
    monkeypatch.undo()
    model = tiny_causal_lm(vocab_size=40_000, hidden_size=16)  # slices of 768 rows
    assert patch_head(model, "auto")
    model.requires_grad_(False).model.norm.weight.requires_grad_(True)

    def logits(num_rows):
        return model.lm_head(torch.zeros(1, num_rows, 16, requires_grad=True))

    assert [type(logits(n)) is DeferredLogits for n in (510, 515)] == [False, True]
    model.lm_head.weight.requires_grad_(True)
    assert [type(logits(n)) is DeferredLogits for n in (520, 525)] == [False, True]


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


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # that dynamo asks for
def test_a_compiled_loss_reads_its_logits():
    """The first thing that it does to them could wait in Python, and cannot in a graph."""
    model, batch = model_of("llama"), batch_of()
    tokens = batch["input_ids"]

    def loss(logits):
        return F.cross_entropy(logits.float().view(-1, logits.shape[-1]), tokens.flatten())

    grads = []
    for kind, function in (("off", loss), ("chunked", torch.compile(loss, backend="eager"))):
        patch_head(model, kind)
        model.zero_grad()
        function(model(input_ids=tokens).logits).backward()
        grads.append(gradients(model))
    for name, grad in grads[0].items():
        assert torch.equal(grads[1][name], grad), name


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
    with pytest.raises(ValueError, match="for 'chunked', got none"):
        patch_head(nn.Linear(2, 2), "chunked")
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
