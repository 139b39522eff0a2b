"""granularity="sample" and "token" in blocks of one's own and through norms that read permuted rows."""

import pytest
import torch
from models import gradients, step, tiny_batch, with_lora
from models import tiny_causal_lm as tiny_llama
from row_cases import BATCH, SEQ, assert_close, detach_rows, double, draw_masks

from benchmarks.tiny_models import tiny_causal_lm, tiny_inputs
from dropbp_kernels import DropBPHandler, apply_dropbp, blocks, ownership
from dropbp_kernels.integrations import fusing
from dropbp_kernels.measure import saved_bytes


class FusedStack(torch.nn.Module):
    """Two blocks of our own, with per-sample rotary tables where those are asked for."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(blocks.LlamaBlock(32, 48, 4, 2) for _ in range(2))
        self.norm = blocks.RMSNorm(32)

    def forward(self, x, by_sample=False):
        rope = blocks.rotary_embedding(x.shape[1], 8, dtype=x.dtype)
        if by_sample:
            rope = tuple(table.expand(x.shape[0], *table.shape) for table in rope)
        stream = blocks.Stream(x)
        for layer in self.layers:
            stream = layer(stream, rope)
        return blocks.finish(stream, self.norm)


@pytest.mark.parametrize("tokens", [False, True], ids=["sample", "token"])
@pytest.mark.parametrize("checkpoint", [None, "kept"])
@pytest.mark.parametrize("attention", ["by rows", "whole"])
def test_own_blocks(tokens, checkpoint, attention):
    """Whole branches leave their output pending: what goes by rows behind them adds it."""
    torch.manual_seed(0)
    model = FusedStack().double()
    handler = DropBPHandler(model, 0.5, checkpoint=checkpoint)
    assert [gate.per_token for gate in handler.gates.values()] == [False, True] * 2
    masks = draw_masks(handler, tokens)
    if attention == "whole":
        masks[::2] = [torch.ones_like(mask) for mask in masks[::2]]
    plan = [True if mask.all() else mask for mask in masks]
    draws = torch.Generator().manual_seed(1)
    x, grad_out = torch.randn(2, BATCH, SEQ, 32, dtype=torch.float64, generator=draws)
    x.requires_grad_()

    def run():
        model.zero_grad()
        x.grad = None
        out = model(x, by_sample=not tokens)
        out.backward(grad_out)
        return out.detach(), {**gradients(model), "x": x.grad}

    handler.set_plan(plan)
    ours = run()
    handler.set_plan([True] * 4)
    for gate in handler.gates.values():
        gate.checkpoint = None
    modules = [module for layer in model.layers for module in (layer.self_attn, layer.mlp)]
    hooks = [module.register_forward_hook(detach_rows(mask)) for module, mask in zip(modules, masks, strict=True)]
    expected = run()
    for hook in hooks:
        hook.remove()
    assert_close(ours, expected, rtol=1e-4, atol=1e-4)  # norms that are not fused take statistics in float32


def test_a_branch_none_of_whose_rows_is_kept_saves_nothing():
    """As one that is dropped whole, its norm included."""
    model = FusedStack()
    handler = DropBPHandler(model, 0.5)
    x, rope = torch.randn(2, SEQ, 32, requires_grad=True), blocks.rotary_embedding(SEQ, 8)
    none = torch.tensor([False, False])
    for entry in (False, none):
        handler.set_plan([entry] * 4)
        with saved_bytes() as saved:
            stream = model.layers[1](model.layers[0](blocks.Stream(x), rope), rope)
        assert stream.residual.requires_grad
        assert saved.num_bytes == 0


@pytest.mark.parametrize("tokens", [False, True], ids=["sample", "token"])
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2", "opt", "starcoder2"])
def test_norms_that_read_permuted_rows(model_type, tokens):
    """In float32, where a compiled kernel serves them: the gradients of the norms themselves."""
    model = tiny_causal_lm(model_type).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))  # biases that matter
    handler = apply_dropbp(model, 0.5, granularity="token" if tokens else "sample", fused_loss="off")
    handler.set_plan(draw_masks(handler, tokens))
    results = []
    for has_kernel in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fusing, "has_kernel", lambda *_, has_kernel=has_kernel: has_kernel)
            results.append(step(model, tiny_inputs(BATCH, SEQ)))
    assert_close(*results, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tokens", [False, True], ids=["sample", "token"])
def test_no_branch_copies_the_gradient_of_the_stream(tokens, monkeypatch):
    """With norms that read permuted rows and with rows that are taken first: all add their rows to one gradient."""
    if ownership._counts_of_a_sole_owner() is None:
        pytest.skip("this torch does not count references")
    model = with_lora(tiny_llama(attn_implementation="sdpa"))
    handler = apply_dropbp(model, 0.5, granularity="token" if tokens else "sample", fused_loss="off")
    clone, copied = torch.Tensor.clone, []
    monkeypatch.setattr(torch.Tensor, "clone", lambda x, **options: copied.append(x.shape) or clone(x, **options))
    for has_kernel in (True, False):
        monkeypatch.setattr(fusing, "has_kernel", lambda *_, has_kernel=has_kernel: has_kernel)
        handler.step()
        loss = model(**tiny_batch(BATCH, SEQ)).loss
        copied.clear()
        loss.backward()
        assert copied == []


@pytest.mark.parametrize("context", [None, "inference"])
def test_samples_of_one_token(context):
    """A batch of them, or a target plan whose answers are one token: N tokens are N samples too."""
    model = tiny_llama()
    handler = apply_dropbp(model, 0.5, granularity="token", context=context, fused_loss="off")
    tokens = tiny_batch(4, 1 if context is None else SEQ)["input_ids"]
    labels = tokens.clone()
    labels[:, :-1] = -100
    handler.step()
    output = model(tokens, labels=labels)
    (output.logits.square().sum() if context is None else output.loss).backward()
    assert [branch["num_kept"] for branch in handler.report()["branches"]] == [2] * 6
    assert all(parameter.grad is not None for parameter in model.model.layers.parameters())


def test_an_auxiliary_loss_sees_all_tokens_in_their_order():
    """Mixtral's: by the attention mask, layer by layer. Its gradient comes through kept tokens alone."""
    model = double("mixtral", output_router_logits=True, router_aux_loss_coef=1.0)
    inputs = tiny_inputs(BATCH, SEQ)
    is_real = torch.arange(SEQ)[None] < torch.tensor([[6], [2], [4]])
    inputs = {**inputs, "attention_mask": is_real.long(), "labels": inputs["labels"].masked_fill(~is_real, -100)}
    with torch.no_grad():
        expected = model(**inputs)
    handler = apply_dropbp(model, 0.5, granularity="token", fused_loss="off")
    handler.step()
    output = model(**inputs)
    assert len(output.router_logits) == 2
    for ours, theirs in zip(output.router_logits, expected.router_logits, strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(output.aux_loss, expected.aux_loss)
    (grad,) = torch.autograd.grad(output.aux_loss, output.router_logits[1], retain_graph=True)
    assert (grad[is_real.flatten()] != 0).any()
    output.loss.backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "mlp.gate" in name)
