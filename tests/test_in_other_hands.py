"""A patched model is pickled whole, and read again by a process that has patched nothing."""

import subprocess
import sys

import pytest
import torch
from models import encoder_decoder, gradients, tiny_batch, tiny_causal_lm, with_lora

from dropbp_kernels import apply_dropbp

READ = """
import sys, torch
given = torch.load(sys.argv[1], weights_only=False)
from dropbp_kernels import remove_dropbp
for name, (model, batch) in given.items():
    model(**batch).loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    remove_dropbp(model)
    classes = [type(module).__name__ for module in model.modules()]
    given[name] = grads, classes, model.eval()(**batch).loss.item()
torch.save(given, sys.argv[1])
"""


def ways():
    """Models and options that patch in different ways: name -> model, batch, options."""
    batch = tiny_batch()
    batch["labels"] = batch["labels"].masked_fill(torch.arange(10) < 4, -100)
    yield "modules", *encoder_decoder("vit")[:2], {}
    yield "fused", tiny_causal_lm(), batch, {"fused": True}
    yield "targets", tiny_causal_lm("qwen2"), batch, {"context": "inference", "fused_loss": "chunked"}
    yield "rows", tiny_causal_lm("mistral"), batch, {"granularity": "token"}
    yield "checkpointed", tiny_causal_lm("qwen3"), batch, {"checkpoint": "sliced"}
    yield "lora", with_lora(tiny_causal_lm()), batch, {"fused": True}


def test_another_process_reads_it_and_goes_on(tmp_path):
    given, expected = {}, {}
    for name, model, batch, options in ways():
        classes = [type(module).__name__ for module in model.modules()]
        loss = model.eval()(**batch).loss.item()
        apply_dropbp(model.train(), 0.5, **options).step()
        given[name] = model, batch
        expected[name] = classes, loss
    torch.save(given, tmp_path / "models.pt")
    subprocess.run([sys.executable, "-c", READ, str(tmp_path / "models.pt")], check=True, timeout=120)
    found = torch.load(tmp_path / "models.pt", weights_only=False)
    for name, (model, batch) in given.items():
        model(**batch).loss.backward()
        grads, classes, loss = found[name]
        for parameter, grad in gradients(model).items():
            assert (grad is None) == (grads[parameter] is None), (name, parameter)
            if grad is not None:  # the other process may have another number of threads
                torch.testing.assert_close(grads[parameter], grad, atol=1e-6, rtol=1e-4)
        assert (classes, loss) == (expected[name][0], pytest.approx(expected[name][1])), name
