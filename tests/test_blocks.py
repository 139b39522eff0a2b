"""The fused block against transformers' Llama layer with the same weights, at every kind of boundary."""

import itertools

import pytest
import torch
from models import gradients, tiny_causal_lm

from dropbp_kernels import DropBPHandler, apply_dropbp, blocks
from dropbp_kernels.measure import PeakLiveBytes, num_autograd_nodes, saved_bytes
from dropbp_kernels.ops import gated_residual_rms_norm


class FusedStack(torch.nn.Module):
    def __init__(self, layers, norm):
        super().__init__()
        self.layers = torch.nn.ModuleList(blocks.LlamaBlock(32, 48, 4, 2) for _ in layers)
        self.norm = blocks.RMSNorm(32)
        for ours, theirs in zip(self.layers, layers, strict=True):
            ours.load_state_dict(theirs.state_dict())
        self.norm.load_state_dict(norm.state_dict())

    def forward(self, x):
        rope = blocks.rotary_embedding(x.shape[1], 8, dtype=x.dtype)
        stream = blocks.Stream(x)
        for layer in self.layers:
            stream = layer(stream, rope)
        return blocks.finish(stream, self.norm)


class PlainStack(torch.nn.Module):
    def __init__(self, layers, norm, rotary):
        super().__init__()
        self.layers, self.norm = layers, norm
        self.rotary = [rotary]  # kept out of the parameters

    def forward(self, x):
        rope = self.rotary[0](x, torch.arange(x.shape[1])[None])
        for layer in self.layers:
            x = layer(x, position_embeddings=rope)
        return self.norm(x)


def stacks(dtype):
    decoder = tiny_causal_lm(num_hidden_layers=2, attn_implementation="sdpa").model.to(dtype)
    fused = FusedStack(decoder.layers, decoder.norm).to(dtype)
    apply_dropbp(decoder, 0.5)
    return fused, PlainStack(decoder.layers, decoder.norm, decoder.rotary_emb)


def run(stack, kept, dtype):
    x, grad_out = torch.randn(2, 2, 9, 32, generator=torch.Generator().manual_seed(2)).to(dtype)
    x.requires_grad_()
    DropBPHandler(stack, 0.5).set_plan(kept)
    stack.zero_grad()
    out = stack(x)
    out.backward(grad_out)  # not of its squares, whose sum is the same whatever the final norm normalises
    return out.detach(), x.grad, gradients(stack)


def test_the_plain_norm_of_float64_is_the_fused_one():
    norm = blocks.RMSNorm(8).double()
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    fused = gated_residual_rms_norm(x, torch.zeros_like(x), norm.weight, eps=norm.eps)[0]
    torch.testing.assert_close(norm(x), fused, rtol=1e-14, atol=0)


@pytest.mark.parametrize("kept", list(itertools.product([True, False], repeat=4)))
def test_equals_the_transformers_layer_at_every_plan(kept):
    fused, plain = stacks(torch.float32)
    out, grad_x, grads = run(fused, kept, torch.float32)
    expected_out, expected_grad_x, expected = run(plain, kept, torch.float32)
    torch.testing.assert_close(out, expected_out, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(grad_x, expected_grad_x, atol=1e-5, rtol=1e-4)
    assert set(grads) == set(expected)
    for name, grad in expected.items():
        assert (grads[name] is None) == (grad is None), name
        if grad is not None:
            torch.testing.assert_close(grads[name], grad, atol=2e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_bfloat16_is_as_close_to_float32_as_the_plain_layer():
    kept = (True, True, False, True)
    fused, plain = stacks(torch.float32)
    exact, _, _ = run(plain, kept, torch.float32)
    fused, plain = stacks(torch.bfloat16)
    ours, _, our_grads = run(fused, kept, torch.bfloat16)
    theirs, _, their_grads = run(plain, kept, torch.bfloat16)
    assert ours.dtype == torch.bfloat16
    error, plain_error = (ours - exact).abs().mean(), (theirs - exact).abs().mean()
    assert error <= 2 * plain_error
    for name, grad in their_grads.items():
        assert (our_grads[name] is None) == (grad is None), name


def test_forward_does_not_depend_on_the_plan():
    fused, _ = stacks(torch.float32)
    values = [run(fused, kept, torch.float32)[0] for kept in [(True,) * 4, (False,) * 4, (True, False, False, True)]]
    assert all(torch.equal(value, values[0]) for value in values)


def test_dropped_boundaries_save_nothing():
    """State table of docs/architecture.md: between dropped branches only the residual's alias node is left."""
    fused, _ = stacks(torch.float32)
    handler = DropBPHandler(fused, 0.5)
    handler.set_plan([False] * 4)
    x = torch.randn(2, 9, 32, requires_grad=True)
    rope = blocks.rotary_embedding(9, 8)
    with saved_bytes() as saved:
        stream = blocks.Stream(x)
        for layer in fused.layers:
            stream = layer(stream, rope)
    assert saved.num_bytes == 0
    assert not stream.branch.requires_grad
    assert num_autograd_nodes(stream.residual) <= 3  # three adds done, the last one pending


def test_fused_saves_less_than_unfused():
    fused, plain = stacks(torch.float32)
    sizes = {}
    for name, stack in (("fused", fused), ("plain", plain)):
        DropBPHandler(stack, 0.0)
        with saved_bytes() as saved:
            stack(torch.randn(2, 9, 32, requires_grad=True))
        sizes[name] = saved.num_bytes
    assert sizes["fused"] < sizes["plain"]


def test_bad_sizes():
    with pytest.raises(ValueError, match="num_kv_heads: expected a divisor of num_heads=4, got 3"):
        blocks.LlamaBlock(32, 48, 4, 3)
    with pytest.raises(ValueError, match="width: expected a multiple of num_heads=5, got 32"):
        blocks.LlamaBlock(32, 48, 5)


def test_kept_mlp_saves_the_two_inputs_of_its_product():
    """With frozen weights, as under LoRA, nothing else: neither silu(gate) nor the product."""
    mlp = blocks.SwiGLU(32, 48).requires_grad_(False)
    x = torch.randn(2, 9, 32, requires_grad=True)
    with saved_bytes() as saved:
        mlp(x)
    assert saved.num_bytes == 2 * (2 * 9 * 48) * x.element_size()
    mlp.requires_grad_(True)  # then x too, for the gradients of the weights
    with saved_bytes() as saved:
        mlp(x)
    assert saved.num_bytes == (2 * 48 + 32) * 2 * 9 * x.element_size()
    seen = []
    mlp.down_proj.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    with saved_bytes() as saved:
        mlp(x)
    assert len(seen) == 1
    assert saved.num_bytes == (3 * 48 + 32) * 2 * 9 * x.element_size()  # what the hook sees is saved


def test_kept_mlp_gives_its_buffers_to_the_gradients_and_leaves_other_dtypes_to_their_layer(monkeypatch):
    mlp = blocks.SwiGLU(32, 48)
    op, donated = blocks.glu_linear, []
    monkeypatch.setattr(blocks, "glu_linear", lambda *args, donate: donated.append(donate) or op(*args, donate=donate))
    mlp(torch.randn(2, 9, 32))
    assert donated == [True]
    mlp.down_proj.double()
    with pytest.raises(RuntimeError, match="dtype"):
        mlp(torch.randn(2, 9, 32))


def test_dropped_mlp_runs_in_place_and_saves_nothing():
    mlp = blocks.SwiGLU(32, 48)
    x = torch.randn(2, 9, 32)
    expected = mlp.down_proj(torch.nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
    peaks = {}
    for name, function in (
        ("ours", mlp),
        ("plain", lambda x: mlp.down_proj(torch.nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x))),
    ):
        with torch.no_grad(), saved_bytes() as saved, PeakLiveBytes() as live:
            output = function(x)
        torch.testing.assert_close(output, expected)
        assert saved.num_tensors == 0
        peaks[name] = live.peak_bytes
    hidden = 2 * 9 * 48 * x.element_size()
    assert peaks["ours"] == 2 * hidden + x.nbytes  # gate and up, then the branch's output
    assert peaks["plain"] >= 3 * hidden
