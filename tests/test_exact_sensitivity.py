"""Sensitivities from one forward: equal to the published procedure on every kind of gate, for a third of the work."""

import random

import pytest
import torch
from models import gradients, tiny_batch, tiny_causal_lm, toy_model, with_lora
from torch import nn

from dropbp_kernels import DropBP, DropBPHandler, apply_dropbp
from dropbp_kernels.blocks import LlamaBlock, RMSNorm, Stream, finish, rotary_embedding
from dropbp_kernels.exact_sensitivity import estimate_sensitivity, exact_sensitivity, measure_sensitivity
from dropbp_kernels.integrations.families import FAMILIES
from dropbp_kernels.integrations.family import Family
from dropbp_kernels.sensitivity import compute_sensitivity

DEFINITIONS = ("norm", "element")


def published(handler, losses, definition):
    return measure_sensitivity(handler, losses, definition, "published")


def assert_equal(handler, losses, rel=2e-3, **options):
    """Both definitions; "norm" is a difference of lengths nearly alike, so float32 leaves it fewer digits."""
    for definition in DEFINITIONS:
        exact = exact_sensitivity(handler, losses, definition, **options)
        expected = published(handler, losses, definition)
        assert exact == pytest.approx(expected, rel=rel, abs=1e-6 * max(expected)), definition
        assert max(expected) > 0


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("options", [{}, {"fused": True}, {"generic": True}, {"checkpoint": "kept"}], ids=str)
def test_equals_the_published_procedure(lora, options):
    options = dict(options)
    if options.pop("generic", False):
        options["families"] = [Family(FAMILIES["llama"].block, FAMILIES["llama"].branches)]
    model = tiny_causal_lm(attention_dropout=0.1)  # both see the same noise
    model = with_lora(model) if lora else model
    handler = apply_dropbp(model, 0.5, grad_scale=2.0, **options)
    batch = tiny_batch()
    assert_equal(handler, [lambda: model(**batch).loss])


def test_gradient_checkpointing():
    model = tiny_causal_lm()
    handler = apply_dropbp(model, 0.5)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = tiny_batch()
    assert_equal(handler, [lambda: model(**batch).loss])


def test_blocks_whose_adds_are_fused_with_norms():
    torch.manual_seed(0)
    blocks = nn.ModuleList([LlamaBlock(16, 32, 2) for _ in range(3)])
    norm = RMSNorm(16)
    model = nn.ModuleDict({"blocks": blocks, "norm": norm})
    x, rope = torch.randn(2, 5, 16), rotary_embedding(5, 8)

    def loss():
        stream = Stream(x)
        for block in blocks:
            stream = block(stream, rope)
        return finish(stream, norm).mean()

    assert_equal(DropBPHandler(model, 0.5), [loss])


@pytest.mark.parametrize("family", ["gptj", "falcon", "t5", "mixtral"])
def test_parallel_in_place_several_outputs_and_experts(family):
    """Falcon adds in place to what a gate let through; T5's attention returns its position bias, too."""
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    if family == "gptj":
        config = transformers.GPTJConfig(vocab_size=64, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=32)
        model = transformers.GPTJForCausalLM(config)
    elif family == "falcon":
        model = transformers.FalconForCausalLM(transformers.FalconConfig(**sizes))
    elif family == "mixtral":
        moe = {"intermediate_size": 32, "num_key_value_heads": 2, "num_local_experts": 3, "output_router_logits": True}
        model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **moe))
    else:
        config = transformers.T5Config(
            vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4, decoder_start_token_id=0
        )
        model = transformers.T5ForConditionalGeneration(config)
    dtype = torch.float32 if family == "mixtral" else torch.float64  # the product of its experts knows no float64
    model.to(dtype).train()
    handler = apply_dropbp(model, 0.5)
    batch = tiny_batch()
    assert_equal(handler, [lambda: model(**batch).loss], rel=1e-2 if family == "mixtral" else 1e-5)


def test_a_gate_that_is_called_twice():
    """Weights shared in depth: the path through both calls is lost once, not twice."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"linear": nn.Linear(4, 4), "other": nn.Linear(4, 4)})
    model.gate, model.gate_other = DropBP(), DropBP()
    x = torch.randn(3, 4)

    def loss():
        stream = x
        for _ in range(2):
            stream = model.gate.residual_add(stream, lambda x: torch.tanh(model["linear"](x)))
            stream = model.gate_other.residual_add(stream, lambda x: torch.tanh(model["other"](x)))
        return stream.square().sum()

    assert_equal(DropBPHandler(model, 0.5), [loss], rel=1e-4)


def test_branches_that_share_weights_or_read_something_else():
    """There more than its own parameters lies between output and input, so the backward starts at the output."""
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("shared", "own", "encoder")})
    model.gates = nn.ModuleList([DropBP() for _ in range(4)])
    x = torch.randn(3, 4)

    def loss():
        encoded = torch.tanh(model["encoder"](x))
        stream = x
        branches = [model["shared"], model["own"], lambda x: x * encoded, model["shared"]]
        for gate, branch in zip(model.gates, branches, strict=True):
            stream = gate.residual_add(stream, lambda x, branch=branch: torch.tanh(branch(x)))
        return stream.square().sum()

    assert_equal(DropBPHandler(model, 0.5), [loss], rel=1e-4)


def test_compiled_blocks_run_uncompiled():
    model = toy_model(3)
    handler = DropBPHandler(model, 0.5)
    x = torch.randn(2, 3, 8)
    expected = exact_sensitivity(handler, [lambda: model(x).square().sum()])
    compiled = torch.compile(model, backend="eager")
    assert exact_sensitivity(handler, [lambda: compiled(x).square().sum()]) == expected


@pytest.mark.parametrize("sums_bytes", [1, 1 << 30])
def test_several_micro_batches(sums_bytes):
    """The same sums whether they are held for all branches at once or, in several passes, for one at a time."""
    model = toy_model(4, dropout=0.2)
    handler = DropBPHandler(model, 0.5)
    batches = [torch.randn(2, 3, 8) for _ in range(3)]
    losses = [lambda x=x: model(x).square().mean() for x in batches]
    assert_equal(handler, losses, sums_bytes=sums_bytes)


def test_sums_of_half_precision_gradients_are_float32():
    model = toy_model(2).to(torch.bfloat16)
    handler = DropBPHandler(model, 0.5)
    x = torch.randn(4, 3, 8, dtype=torch.bfloat16)
    (once,) = (
        [s * 64**2 for s in exact_sensitivity(handler, losses, "element")] for losses in [[lambda: model(x).sum()]]
    )
    assert exact_sensitivity(handler, [lambda: model(x).sum()] * 64, "element") == pytest.approx(once, rel=1e-5)


def test_everything_is_left_as_found():
    model = toy_model(4, dropout=0.1)
    handler = DropBPHandler(model, 0.5, grad_scale=3.0)
    handler.step()
    model(torch.ones(1, 1, 8)).sum().backward()
    before = gradients(model), random.getstate(), torch.get_rng_state()
    state = [(gate.kept, gate.watch, gate.grad_scale, gate.was_called) for gate in handler.gates.values()]
    kept_grads = {name: parameter.grad for name, parameter in model.named_parameters()}

    def fails():
        model(torch.randn(2, 3, 8)).sum()
        raise KeyError("batch")

    exact_sensitivity(handler, [lambda: model(torch.randn(2, 3, 8)).sum()])
    with pytest.raises(KeyError, match="batch"):
        exact_sensitivity(handler, [fails])
    assert [(gate.kept, gate.watch, gate.grad_scale, gate.was_called) for gate in handler.gates.values()] == state
    assert random.getstate() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    for name, parameter in model.named_parameters():
        assert parameter.grad is kept_grads[name]
        assert parameter.grad is None or torch.equal(parameter.grad, before[0][name])


class Counted(torch.autograd.Function):
    """tanh(x w), which counts."""

    num_forwards = num_backwards = 0

    @staticmethod
    def forward(ctx, x, w):
        Counted.num_forwards += 1
        y = torch.tanh(x @ w)
        ctx.save_for_backward(x, w, y)
        return y

    @staticmethod
    def backward(ctx, grad):
        Counted.num_backwards += 1
        x, w, y = ctx.saved_tensors
        grad = grad * (1 - y * y)
        return grad @ w.T, x.T @ grad


def test_what_is_computed_for_16_branches():
    """Forwards and backwards of branches, counted: 136 backwards and 16 forwards in place of 256 and 272."""
    model = nn.ModuleList([DropBP() for _ in range(16)])
    model.weights = nn.ParameterList([torch.randn(4, 4) for _ in range(16)])
    handler = DropBPHandler(model, 0.5)
    x = torch.randn(3, 4, requires_grad=True)

    def loss():
        stream = x
        for gate, weight in zip(model, model.weights, strict=False):
            stream = gate.residual_add(stream, lambda x, weight=weight: Counted.apply(x, weight))
        return stream.sum()

    counts = {}
    for method in ("exact", "estimate", "published"):
        Counted.num_forwards = Counted.num_backwards = 0
        measure_sensitivity(handler, loss, method=method)
        counts[method] = (Counted.num_forwards, Counted.num_backwards)
    below = sum(range(16))  # of branch i: the backwards of the branches below it
    assert counts == {"exact": (16, 16 + below), "estimate": (16, 16), "published": (17 * 16, 16 + 16 * 15)}


def ranks(values):
    order = sorted(range(len(values)), key=values.__getitem__)
    return torch.tensor([order.index(index) for index in range(len(values))], dtype=torch.float64)


def test_the_estimate_ranks_like_the_exact_ones():
    """Spearman's correlation on a net after some steps; the first branch, below which is nothing, is exact."""
    model = tiny_causal_lm(num_hidden_layers=4)
    batch = tiny_batch(4, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(5):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.model.embed_tokens.requires_grad_(False)
    handler = apply_dropbp(model, 0.5)
    losses = [lambda: model(**batch).loss]
    for definition in DEFINITIONS:
        exact = exact_sensitivity(handler, losses, definition)
        estimate = estimate_sensitivity(handler, losses, definition)
        assert estimate[0] == pytest.approx(exact[0], rel=1e-4)
        correlation = torch.corrcoef(torch.stack([ranks(exact), ranks(estimate)]))[0, 1]
        assert correlation > 0.7, definition


def test_bad_input():
    model = toy_model()
    handler = DropBPHandler(model, 0.5)
    x = torch.randn(1, 2, 8)
    with pytest.raises(
        TypeError, match=r"loss: expected a function that .* returns the loss, .* got NoneType; .*publish"
    ):
        handler.calibrate(lambda: model(x).sum().backward())
    with pytest.raises(TypeError, match=r"loss: expected .* got shape \(1, 2, 8\)"):
        handler.calibrate(lambda: model(x))
    with pytest.raises(TypeError, match=r"loss: expected .* got shape \(\)"):
        handler.calibrate(lambda: torch.zeros(()))
    with pytest.raises(ValueError, match="loss: expected a function, or one for each micro-batch, got none"):
        handler.calibrate([])
    with pytest.raises(ValueError, match="method: expected one of exact, estimate, published, got 'fast'"):
        handler.calibrate(lambda: model(x).sum(), method="fast")
    with pytest.raises(ValueError, match="definition: expected one of norm, element, got 'max'"):
        exact_sensitivity(handler, [lambda: model(x).sum()], "max")
    with pytest.raises(RuntimeError, match=r"finite gradients, but the sensitivity of branch '0\.gate' is nan"):
        exact_sensitivity(handler, [lambda: (model(x) * float("nan")).sum()])
    assert handler.calibration is None
    assert handler.calibrate(lambda: model(x).square().sum().backward(), method="published") == handler.drop_rates
    assert compute_sensitivity(handler, lambda: model(x).square().sum().backward()) == list(
        handler.calibration.sensitivities
    )


def test_progress_bar(capsys):
    pytest.importorskip("tqdm")
    model = toy_model()
    handler = DropBPHandler(model, 0.5)
    exact_sensitivity(handler, [lambda: model(torch.ones(1, 2, 8)).sum()] * 2, progress=True)
    assert "8/8" in capsys.readouterr().err
