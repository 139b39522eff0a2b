"""checkpoint="sliced": MLPs take a slice of the tokens at a time. The same gradients, fewer bytes at once."""

import pytest
import torch
from models import gradients, tiny_batch, tiny_causal_lm, with_lora

from benchmarks import tiny_models
from dropbp_kernels import DropBP, DropBPHandler, apply_dropbp
from dropbp_kernels.measure import PeakLiveBytes
from dropbp_kernels.slicing import SLICE_TOKENS, run_in_slices

MIXED = (True, False, False, True, True, True)


def in_slices_of(handler, num_tokens):
    """The gates whose branches take at most num_tokens tokens at a time, from now on."""
    sliced = [gate for gate in handler.gates.values() if gate.slice_tokens]
    assert all(gate.slice_tokens == SLICE_TOKENS for gate in sliced)
    for gate in sliced:
        gate.slice_tokens = num_tokens
    return sliced


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("options", [{}, {"granularity": "token"}, {"context": "inference"}], ids=str)
def test_loss_and_gradients_are_those_of_whole_branches(options, fused):
    results = []
    for checkpoint in ("kept", "sliced"):
        model = with_lora(tiny_causal_lm().double())
        handler = apply_dropbp(model, 0.5, fused=fused, checkpoint=checkpoint, **options)
        assert len(in_slices_of(handler, 7)) == (3 if checkpoint == "sliced" else 0)
        handler.step() if options.get("granularity") else handler.set_plan(MIXED)
        calls = []
        model.get_base_model().model.layers[2].mlp.register_forward_pre_hook(
            lambda _, args, calls=calls: calls.append(args[0].shape[:2].numel())
        )
        batch = tiny_batch()
        if "context" in options:
            batch["labels"] = batch["labels"].clone()
            batch["labels"][:, :6] = -100
        loss = model(**batch).loss
        loss.backward()
        results.append((loss, gradients(model)))
        assert (max(calls) <= 7) == (checkpoint == "sliced")  # kept or dropped, of context or of targets
        model.eval()
        model(**batch)
        assert max(calls) > 7
    (expected, expected_grads), (ours, grads) = results
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-9, atol=1e-12)
    assert any(grad is not None for grad in grads.values())


def test_experts_record_what_they_would_of_all_tokens():
    outputs = []
    for checkpoint in ("kept", "sliced"):
        model = tiny_models.tiny_causal_lm("mixtral", output_router_logits=True, router_aux_loss_coef=1.0).train()
        handler = apply_dropbp(model, 0.5, checkpoint=checkpoint)
        in_slices_of(handler, 7)
        handler.set_plan([True, False, False, True])
        output = model(**tiny_batch())
        output.loss.backward()
        outputs.append((output.loss, output.aux_loss, output.router_logits, gradients(model)))
        assert len(output.router_logits) == 2
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-6)


def test_the_peak_is_that_of_a_slice():
    """Of a dropped MLP in passing, and of a kept one computed again."""
    peaks = {}
    for kept in (True, False):
        for checkpoint in ("kept", "sliced"):
            model = tiny_causal_lm(intermediate_size=1024, num_hidden_layers=1)
            handler = apply_dropbp(model, 0.5, checkpoint=checkpoint, fused_loss="off")
            in_slices_of(handler, 8)
            handler.set_plan([False, kept])
            model.requires_grad_(False)
            model.model.embed_tokens.weight.requires_grad_()
            with PeakLiveBytes() as live:
                model(**tiny_batch(2, 32)).loss.backward()
            peaks[kept, checkpoint] = live.peak_bytes
    hidden = 2 * 32 * 1024 * 4  # one tensor inside the MLP
    assert peaks[False, "kept"] - peaks[False, "sliced"] > 1.5 * hidden
    assert peaks[True, "kept"] - peaks[True, "sliced"] > 2.5 * hidden


def test_own_gates_slice_flat_and_batched_streams_and_save_nothing_when_dropped():
    gate = DropBP(per_token=True)
    handler = DropBPHandler(torch.nn.ModuleList([gate]), 0.0, checkpoint="sliced")
    in_slices_of(handler, 4)
    weight = torch.randn(8, 8, dtype=torch.float64, requires_grad=True)
    sizes = []

    def branch(x):
        sizes.append(tuple(x.shape[:-1]))
        return torch.tanh(x @ weight)

    for shape, pieces in (((3, 3, 8), [(1, 4), (1, 4), (1, 1)]), ((9, 8), [(4,), (4,), (1,)])):
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        handler.set_plan([True])
        sizes.clear()
        grads = torch.autograd.grad(gate.residual_add(x, branch).sum(), (x, weight))
        assert sizes == [*pieces, *reversed(pieces)]
        expected = torch.autograd.grad((x + torch.tanh(x @ weight)).sum(), (x, weight))
        torch.testing.assert_close(grads, expected)
        handler.set_plan([False])
        sizes.clear()
        output = gate.residual_add(x, branch)
        assert sizes == pieces
        torch.testing.assert_close(output, x + torch.tanh(x @ weight))
        assert torch.equal(torch.autograd.grad(output.sum(), x)[0], torch.ones_like(x))


def test_branches_of_samples_and_calls_with_other_tensors_run_whole():
    handler = DropBPHandler(torch.nn.ModuleList([DropBP()]), 0.0, checkpoint="sliced")
    assert in_slices_of(handler, 4) == []
    x = torch.ones(2, 5, 3)
    assert run_in_slices(lambda x, scale: (x * scale).shape, 4, dict, x, torch.ones(2, 5, 1)) == x.shape


def test_what_has_no_tokens_is_refused():
    with pytest.raises(ValueError, match=r"branch: expected 4 tokens returned for a slice of as many, got .*\(3,\)"):
        run_in_slices(lambda x: x.sum((0, 1)), 4, dict, torch.ones(2, 5, 3))
    with pytest.raises(ValueError, match='expected None, "kept" or "sliced"'):
        apply_dropbp(tiny_causal_lm(), 0.5, checkpoint="slices")


def test_a_block_may_add_to_a_dropped_branch_in_place():
    """As Falcon's adds its attention to its MLP."""
    results = []
    for checkpoint in ("kept", "sliced"):
        model = tiny_models.tiny_causal_lm("falcon").double()
        handler = apply_dropbp(model, 0.5, checkpoint=checkpoint)
        in_slices_of(handler, 7)
        handler.set_plan([True, False, False, True])
        torch.manual_seed(1)
        model(**tiny_models.tiny_inputs()).loss.backward()
        results.append(gradients(model))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)
