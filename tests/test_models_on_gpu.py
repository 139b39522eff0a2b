"""Whole models on a GPU beside the same on the CPU: what stays behind on the host, or computes otherwise there, shows.

Written without a GPU and run nowhere yet. What a plan has to compute is tested on the CPU, in the other files.
"""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from models import gradients, with_lora
from target_cases import chat, tiny

from dropbp_kernels import apply_dropbp
from dropbp_kernels.coreset import CoresetSelector

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
GPU = torch.device("cuda")
# Sums in another order, through two blocks.
CLOSE = {"rtol": 1e-3, "atol": 1e-5}

WAYS = {
    "undropped": {"drop_rate": 0.0},
    **{f"by {name}": {"granularity": name} for name in ("branch", "sample", "token")},
    **{f"by {name}, fused": {"granularity": name, "fused": True} for name in ("branch", "sample", "token")},
    **{f"checkpoint {name}": {"checkpoint": name} for name in ("kept", "sliced")},
    "detached": {"dropped_runs": "detach"},
    **{
        f"target plan, {gradient}{', fused' * fused}": {
            "drop_rate": 0.0,
            "context": "inference",
            "context_gradient": gradient,
            "fused": fused,
        }
        for gradient in ("none", "one_hop", "full")
        for fused in (False, True)
    },
    "target plan by samples": {"context": "inference", "granularity": "sample"},
    "target plan by tokens": {"context": "inference", "granularity": "token", "context_keep": 0.25},
    "targets drawn": {"drop_rate": 0.0, "context": "inference", "context_gradient": "one_hop", "target_keep": 0.5},
    "chunked loss": {"fused_loss": "chunked"},
    "published": {"sampler": "published", "keep_one": False, "grad_scale": 2.0},
}


def patched(device, adapter, drop_rate=0.5, **options):
    model = tiny(dtype=torch.float32)
    if adapter == "lora":
        model = with_lora(model)
    elif adapter == "paca":
        from peft import get_peft_model

        from dropbp_kernels.paca import PacaConfig

        model = get_peft_model(model, PacaConfig(r=4, target_modules="all-linear")).train()
    model = model.to(device)
    return model, apply_dropbp(model, drop_rate, **options)


def batch_on(device):
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in chat().items()}


def two_steps(device, adapter, options):
    """Losses and gradients of two steps, each under a plan of its own."""
    model, handler = patched(device, adapter, **options)
    found = []
    for _ in range(2):
        handler.step()
        model.zero_grad()
        loss = model(**batch_on(device)).loss
        if loss.requires_grad:
            loss.backward()
        grads = {name: None if grad is None else grad.cpu() for name, grad in gradients(model).items()}
        found.append((loss.detach().cpu(), grads))
    return found


@pytest.mark.parametrize("adapter", ["lora", "paca", "full"])
@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_steps_are_those_of_the_cpu(adapter, options):
    on_cpu = two_steps("cpu", adapter, options)
    for (loss, grads), (expected_loss, expected) in zip(two_steps(GPU, adapter, options), on_cpu, strict=True):
        torch.testing.assert_close(loss, expected_loss, **CLOSE)
        assert {name: grad is None for name, grad in grads.items()} == {n: grad is None for n, grad in expected.items()}
        for name, grad in grads.items():
            if grad is not None:
                torch.testing.assert_close(grad, expected[name], **CLOSE, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("name", ["by branch, fused", "by token, fused", "target plan, none, fused"])
def test_bfloat16_is_near_float32(name):
    model, handler = patched(GPU, "lora", **WAYS[name])
    model.bfloat16()
    handler.step()
    loss = model(**batch_on(GPU)).loss
    loss.backward()
    (expected, expected_grads), _ = two_steps("cpu", "lora", WAYS[name])
    torch.testing.assert_close(loss.detach().float().cpu(), expected, rtol=0.02, atol=0.02)
    ours, exact = (
        torch.cat([grad.float().cpu().flatten() for grad in grads.values() if grad is not None])
        for grads in (gradients(model), expected_grads)
    )
    assert torch.cosine_similarity(ours, exact, dim=0) > 0.98


@pytest.mark.parametrize("method", ["exact", "estimate", "published"])
def test_calibration_is_that_of_the_cpu(method):
    def rates(device):
        model, handler = patched(device, "lora", fused=True)
        handler.step()
        batch = batch_on(device)
        model(**batch)  # the gates learn their shapes
        handler.calibrate(lambda: model(**batch).loss, method=method)
        return handler.calibration.sensitivities

    assert rates(GPU) == pytest.approx(rates("cpu"), rel=1e-2)


@pytest.mark.parametrize("features", ["exact", "spsa"])
def test_coreset_of_a_batch_on_the_gpu(features):
    model, _ = patched(GPU, "lora")
    batch = {name: value.repeat(4, 1) for name, value in batch_on(GPU).items() if isinstance(value, torch.Tensor)}
    selector = CoresetSelector(model, 0.5, features=features)
    subset, weights = selector.subset(batch, torch.arange(12) % 2)
    assert subset["input_ids"].shape == (6, 16)
    assert {value.device.type for value in (*subset.values(), weights)} == {"cuda"}
    assert selector.score(batch)[1].isfinite().all()
