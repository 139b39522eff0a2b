"""A patched model in other hands: pickled, saved, loaded, merged, prepared. It stays patched, and can be released."""

import forks
import pytest
import torch
from models import encoder_decoder, gradients, tiny_batch, tiny_causal_lm, with_lora
from transformers import AutoModelForCausalLM

from dropbp_kernels import apply_dropbp, remove_dropbp

READ = """
import torch
given = torch.load(PATH, weights_only=False)
from dropbp_kernels import remove_dropbp
for name, (model, batch) in given.items():
    model(**batch).loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    remove_dropbp(model)
    classes = [type(module).__name__ for module in model.modules()]
    given[name] = grads, classes, model.eval()(**batch).loss.item()
torch.save(given, PATH)
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
    done = forks.run(f"PATH = {str(tmp_path / 'models.pt')!r}\n{READ}")
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "models.pt", weights_only=False)
    for name, (model, batch) in given.items():
        model(**batch).loss.backward()
        grads, classes, loss = found[name]
        for parameter, grad in gradients(model).items():
            assert (grad is None) == (grads[parameter] is None), (name, parameter)
            if grad is not None:  # the other process may have another number of threads
                torch.testing.assert_close(grads[parameter], grad, atol=1e-6, rtol=1e-4)
        assert (classes, loss) == (expected[name][0], pytest.approx(expected[name][1])), name


ONE_KEPT = [False, False, True, False, False, False]
EVERYTHING = {"fused": True, "context": "inference", "fused_loss": "chunked"}


def test_weights_are_saved_and_loaded_as_if_it_were_not_patched(tmp_path):
    model = tiny_causal_lm()
    apply_dropbp(model, 0.5, **EVERYTHING)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(tiny_causal_lm())
    assert model.load_state_dict(loaded.state_dict()).missing_keys == []
    for name, value in tiny_causal_lm().state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


@pytest.mark.parametrize("options", [{}, EVERYTHING])
def test_adapters_are_merged_into_it(options):
    batch = tiny_batch()
    expected = with_lora(tiny_causal_lm()).merge_and_unload().eval()(**batch).logits
    model = with_lora(tiny_causal_lm())
    handler = apply_dropbp(model, 0.5, **options)
    merged = model.merge_and_unload().requires_grad_(True)
    handler.set_plan(ONE_KEPT)
    merged(**batch).loss.backward()
    in_blocks = {name for name, grad in gradients(merged).items() if grad is not None and "layers." in name}
    assert {name.split(".")[2] for name in in_blocks} == {"1"}
    assert not any("mlp" in name for name in in_blocks)
    remove_dropbp(merged)
    assert torch.equal(merged.eval()(**batch).logits, expected)


@pytest.fixture
def accelerator():
    """One in bfloat16, whatever a Trainer in this process has asked for."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("order", ["before", "after"])
def test_accelerate_prepares_it(accelerator, order):
    model = tiny_causal_lm()
    handler = apply_dropbp(model, 0.5) if order == "before" else None
    prepared = accelerator.prepare(model)
    handler = handler or apply_dropbp(prepared, 0.5)
    handler.set_plan(ONE_KEPT)
    accelerator.backward(prepared(**tiny_batch()).loss)
    assert all(
        "layers.1.self_attn" in name or "layers.1.input" in name
        for name, grad in gradients(model).items()
        if grad is not None and "layers." in name
    )
    remove_dropbp(accelerator.unwrap_model(prepared))
    assert all("dropbp" not in name for module in model.modules() for name in vars(module))


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("options", [{}, {"checkpoint": "kept"}, {"fused": True}])
def test_accelerate_spreads_it_over_devices(options, order):
    """Its hooks replace the forwards of instances, and call those that they found."""
    accelerate = pytest.importorskip("accelerate")
    model = tiny_causal_lm(use_cache=True)  # which checkpointed branches must not be given
    expected = gradients(detached_backward(tiny_causal_lm(use_cache=True)))
    if order == "before":
        accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    handler = apply_dropbp(model, 0.5, fused_loss="off", **options)
    if order == "after":
        accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    handler.set_plan(ONE_KEPT)
    model(**tiny_batch()).loss.backward()
    for name, grad in gradients(model).items():
        assert (grad is None) == (expected[name] is None), name
        if grad is not None:
            torch.testing.assert_close(grad, expected[name])
    remove_dropbp(model)
    model.zero_grad()
    model(**tiny_batch()).loss.backward()
    assert all(grad is not None for grad in gradients(model).values())


def detached_backward(model):
    """`model` with the gradients of detaching all branches but one."""
    handler = apply_dropbp(model, 0.5, dropped_runs="detach", fused_loss="off")
    handler.set_plan(ONE_KEPT)
    model(**tiny_batch()).loss.backward()
    return model
