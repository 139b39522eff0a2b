"""Checkpointing follows the plan: what is saved, what is computed again, and that gradients do not change."""

import warnings
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from models import CAUSAL_LMS, gradients, step, tiny_batch, tiny_causal_lm, tiny_gpt2, toy_model, with_lora
from transformers import CpmAntConfig, CpmAntForCausalLM

from dropbp_kernels import DropBPHandler, apply_dropbp, remove_dropbp
from dropbp_kernels.integrations import checkpointing
from dropbp_kernels.measure import saved_bytes

# Blocks: half kept, half kept (the other half), dropped.
MIXED = (True, False, False, True, False, False)
PLANS = [MIXED, (True,) * 6, (False,) * 5 + (True,), (True, True, False, False, True, False)]
WAYS = ["transformers", "kept", "both"]


def build(plan, way=None, use_reentrant=False, wrap=lambda model: model, **overrides):
    """A patched tiny model under `plan`, checkpointed in one `way`, and its handler."""
    model = wrap(tiny_causal_lm(**overrides))
    # Fused norms round otherwise and are left out under checkpointing: here all is as written, to the bit.
    handler = apply_dropbp(model, 0.5, fused=False, checkpoint="kept" if way in ("kept", "both") else None)
    if way in ("transformers", "both"):
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    handler.set_plan(plan)
    return model, handler


def assert_same(ours, expected):
    assert torch.equal(ours[0], expected[0])
    assert set(ours[1]) == set(expected[1])
    for name, grad in expected[1].items():
        assert (ours[1][name] is None) == (grad is None), name
        assert grad is None or torch.equal(ours[1][name], grad), name


def count_calls(model):
    """Calls of each branch's module since now, as a Counter of (block, "self_attn" or "mlp")."""
    calls = Counter()
    for index, layer in enumerate(model.get_submodule("model.layers")):
        for name in ("self_attn", "mlp"):
            key = (index, name)
            getattr(layer, name).register_forward_pre_hook(lambda *_, key=key: calls.update([key]))
    return calls


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("way", WAYS)
def test_gradients_and_dropout_are_those_without_checkpointing_bit_for_bit(way, plan):
    batch = tiny_batch()
    expected = step(build(plan, attention_dropout=0.3)[0], batch)
    model, handler = build(plan, way, attention_dropout=0.3)
    assert_same(step(model, batch), expected)
    assert handler.plan.kept == plan


@pytest.mark.parametrize("family", CAUSAL_LMS)
@pytest.mark.parametrize("way", WAYS)
def test_lora_of_every_family(family, way):
    batch = tiny_batch()
    expected = step(build(MIXED, family=family, wrap=with_lora)[0], batch)
    assert_same(step(build(MIXED, way, family=family, wrap=with_lora)[0], batch), expected)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("way", WAYS)
def test_only_kept_branches_are_computed_again(way, plan):
    model, _ = build(plan, way)
    calls = count_calls(model)
    loss = model(**tiny_batch()).loss
    branches = [(block, name) for block in range(3) for name in ("self_attn", "mlp")]
    assert calls == Counter(branches)
    loss.backward()
    assert calls == Counter(branches) + Counter(b for b, is_kept in zip(branches, plan, strict=True) if is_kept)


@pytest.mark.parametrize("way", WAYS)
def test_what_is_saved_is_one_residual_for_each_kept_branch_or_whole_block(way):
    residual_bytes = 2 * 10 * 32 * 4

    def stack_bytes(plan):
        model, _ = build(plan, way)
        embedded = model.model.embed_tokens(tiny_batch()["input_ids"]).detach().requires_grad_()
        rope = model.model.rotary_emb(embedded, torch.arange(10)[None])
        with saved_bytes() as saved:
            x = embedded
            for layer in model.model.layers:
                x = layer(x, position_embeddings=rope)
        return saved.num_bytes

    assert stack_bytes((False,) * 6) == 0
    assert stack_bytes(MIXED) == 2 * residual_bytes
    assert stack_bytes((True,) * 6) == (3 if way == "transformers" else 6) * residual_bytes


def test_blocks_of_ones_own_save_only_the_inputs_of_kept_branches():
    x = torch.randn(2, 5, 8, requires_grad=True)
    results = []
    for checkpoint in (None, "kept"):
        model = toy_model(num_blocks=4, dropout=0.5)
        DropBPHandler(model, 0.5, checkpoint=checkpoint).set_plan([True, False, False, True])
        torch.manual_seed(3)
        with saved_bytes() as saved:
            out = model(x)
        x.grad = None
        out.square().sum().backward()
        results.append((out.detach(), {**gradients(model), "x": x.grad}, saved.num_bytes))
    assert_same(results[1], results[0])
    assert results[1][2] == 2 * x.nbytes < results[0][2]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_plan_drawn_before_the_backward_does_not_change_it(use_reentrant, monkeypatch):
    monkeypatch.setattr(checkpointing, "_warn_of_reentrant", lambda: None)
    batch = tiny_batch()
    for plan in PLANS:
        expected = step(build(plan)[0], batch)
        for way in WAYS[: 1 if use_reentrant else 3]:
            model, handler = build(plan, way, use_reentrant)
            loss = model(**batch).loss
            handler.grad_scale = 2.0  # as grad_scale="unbiased" has it in a step of other rates
            handler.set_plan([not is_kept for is_kept in plan])
            loss.backward()
            assert_same((loss.detach(), gradients(model)), expected)
            assert {gate.grad_scale for gate in handler.gates.values()} == {2.0}
            assert handler.plan.kept == tuple(gate.kept for gate in handler.gates.values())
            assert handler.plan.kept == tuple(not is_kept for is_kept in plan)


@pytest.mark.parametrize("plan", [*PLANS, (False,) * 6])
def test_reentrant_has_the_same_gradients_and_a_warning_says_what_it_costs(plan):
    checkpointing._warn_of_reentrant.cache_clear()
    batch = tiny_batch()
    expected = step(build(plan)[0], batch)
    model, _ = build(plan, "transformers", use_reentrant=True)
    if any(plan):
        with pytest.warns(UserWarning, match=r"reentrant.*computes its dropped branches again.*use_reentrant"):
            assert_same(step(model, batch), expected)
    assert_same(step(model, batch), expected)  # once: a second warning would be an error here


def test_reentrant_blocks_without_a_kept_branch_are_not_computed_again(monkeypatch):
    monkeypatch.setattr(checkpointing, "_warn_of_reentrant", lambda: None)
    model, _ = build(MIXED, "transformers", use_reentrant=True)
    calls = count_calls(model)
    model(**tiny_batch()).loss.backward()
    assert [calls[block, "mlp"] for block in range(3)] == [2, 2, 1]


def test_kept_wins_over_transformers_reentrant_switch():
    model, _ = build(MIXED, "both", use_reentrant=True)
    calls = count_calls(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**tiny_batch()).loss.backward()
    assert sum(calls.values()) == 6 + 2


@pytest.mark.parametrize("way", WAYS)
def test_a_cache_left_on_does_not_see_keys_twice(way):
    batch = tiny_batch()
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][0, :3] = 0
    expected = step(build(MIXED)[0], batch)
    model, _ = build(MIXED, way, use_cache=True)
    assert_same(step(model, batch), expected)
    cache = model(**batch).past_key_values
    assert cache is None or cache.get_seq_length() == 0
    with torch.no_grad():  # and generation has its cache
        assert model.eval()(**batch).past_key_values.get_seq_length() == 10
        if way == "kept":  # in training mode too, as TRL generates
            assert model.train()(**batch).past_key_values.get_seq_length() == 10


@pytest.mark.parametrize("checkpoint", ["kept", "sliced"])
def test_a_cache_given_by_its_place_does_not_see_keys_twice(checkpoint):
    """GPT-2's blocks take it so, and its config asks for one."""
    batch, seen = tiny_batch(), []
    for use_cache in (False, True):
        model = tiny_gpt2()
        model.config.use_cache = use_cache
        apply_dropbp(model, 0.5, checkpoint=checkpoint).step()
        seen.append(step(model, batch))
    assert_same(seen[1], seen[0])
    assert model(**batch).past_key_values.get_seq_length() == 0


def test_a_cache_of_blocks_that_transformers_does_not_checkpoint_does_not_see_keys_twice():
    config = CpmAntConfig(
        vocab_size=64, hidden_size=32, num_attention_heads=4, dim_head=8, dim_ff=48, num_hidden_layers=2,
        prompt_length=4, use_cache=True,
    )  # fmt: skip
    seen = []
    for checkpoint in (None, "kept"):
        torch.manual_seed(0)
        model = CpmAntForCausalLM(config).train()
        with pytest.warns(UserWarning, match="FLOPs unknown"):
            apply_dropbp(model, 0.5, checkpoint=checkpoint).step()
        seen.append(step(model, tiny_batch()))
    # To rounding: joined with an empty cache, keys lie in memory otherwise.
    torch.testing.assert_close(seen[1], seen[0])
    assert model(**tiny_batch()).past_key_values.get_seq_length() == 0


def test_gradient_checkpointing_switched_on_before_patching_and_left_after():
    batch = tiny_batch()
    expected = step(build(MIXED)[0], batch)
    model = tiny_causal_lm()
    model.gradient_checkpointing_enable()
    before = model.model.layers[0]._gradient_checkpointing_func
    apply_dropbp(model, 0.5).set_plan(MIXED)
    calls = count_calls(model)
    assert_same(step(model, batch), expected)
    assert sum(calls.values()) == 6 + 2
    remove_dropbp(model)
    assert model.model.layers[0]._gradient_checkpointing_func is before
    calls.clear()
    step(model, batch)
    assert sum(calls.values()) == 12


@pytest.fixture
def moved(monkeypatch):
    """One entry for each move of inputs to the host: here that is where everything is, its memory not pinned."""
    moves = []

    def offload(pin_memory, device_type):
        moves.append(device_type)
        return torch.autograd.graph.save_on_cpu(pin_memory=False, device_type=device_type)

    monkeypatch.setattr("transformers.modeling_utils.save_on_cpu", offload)
    return moves


def checkpoint_some(model, option):
    if not hasattr(model, "activation_checkpointing_enable"):
        pytest.skip("transformers: no activation_checkpointing_enable, which came with 5.23")
    model.activation_checkpointing_enable(**option)


@pytest.mark.parametrize(("option", "num_again"), [({"every_n_layers": 2}, 1), ({"offload": True}, 2)])
def test_every_second_block_and_inputs_on_the_host(option, num_again, moved):
    expected = step(build(MIXED, attention_dropout=0.3)[0], tiny_batch())
    model, _ = build(MIXED, attention_dropout=0.3)
    checkpoint_some(model, option)
    calls = count_calls(model)
    assert_same(step(model, tiny_batch()), expected)
    assert sum(calls.values()) == 6 + num_again
    assert len(moved) == (2 if "offload" in option else 0)  # once for each kept branch, none for dropped ones


@pytest.mark.parametrize("granularity", ["sample", "token"])
@pytest.mark.parametrize("option", [{"every_n_layers": 2}, {"offload": True}])
def test_every_second_block_and_inputs_on_the_host_under_a_row_plan(option, granularity, moved):
    seen = []
    for checkpointed in (False, True):
        model = tiny_causal_lm()
        apply_dropbp(model, 0.5, granularity=granularity).step()
        if checkpointed:
            checkpoint_some(model, option)
        seen.append(step(model, tiny_batch()))
    assert seen[1][0] == seen[0][0]
    torch.testing.assert_close(seen[1], seen[0])  # rows of a block are added up in another order
    assert bool(moved) == ("offload" in option)


@pytest.mark.parametrize("kind", ["activation", "gradient"])
def test_transformers_is_told_by_the_names_that_its_release_has(kind):
    told, options = [], {"use_reentrant": False}
    methods = {"enable": told.append, "disable": lambda: told.append(None)}
    model = SimpleNamespace(**{f"{kind}_checkpointing_{name}": method for name, method in methods.items()})
    checkpointing.set_checkpointing(model, options)
    checkpointing.set_checkpointing(model, None)
    assert told == [options, None]


def test_switched_off_again_nothing_is_computed_again():
    model, _ = build((True,) * 6, "transformers")
    model.gradient_checkpointing_disable()
    calls = count_calls(model)
    model(**tiny_batch()).loss.backward()
    assert sum(calls.values()) == 6


def test_an_unpatched_model_has_no_checkpointing_function_of_ours():
    model = tiny_causal_lm()
    had = hasattr(model.model.layers[0], "_gradient_checkpointing_func")
    apply_dropbp(model, 0.5)
    assert hasattr(model.model.layers[0], "_gradient_checkpointing_func") == had


def test_unknown_checkpoint_is_refused_and_leaves_the_model_unpatched():
    model = tiny_causal_lm()
    with pytest.raises(ValueError, match=r"checkpoint: expected None, \"kept\" or \"sliced\", got 'all'"):
        apply_dropbp(model, 0.5, checkpoint="all")
    with pytest.raises(ValueError, match="patched by apply_dropbp"):
        remove_dropbp(model)


@pytest.mark.parametrize("way", [None, *WAYS])
def test_backward_twice(way):
    """With retain_graph gradients double; without, torch's own error names the cause, and nothing is left half-done."""
    batch = tiny_batch()
    _, expected = step(build(MIXED)[0], batch)
    model, _ = build(MIXED, way)
    loss = model(**batch).loss
    loss.backward(retain_graph=True)
    loss.backward()
    for name, grad in gradients(model).items():
        assert grad is None or torch.equal(grad, 2 * expected[name]), name
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    assert_same(step(model, batch), (loss.detach(), expected))


@pytest.mark.parametrize("way", [None, *WAYS])
def test_an_evaluation_between_two_micro_batches_changes_nothing(way):
    batches = [tiny_batch(), tiny_batch(2, 7)]

    def accumulate(evaluates):
        model, handler = build(MIXED, way, attention_dropout=0.3)
        torch.manual_seed(3)
        for batch in batches:
            model(**batch).loss.backward()
            if evaluates:
                model.eval()
                with torch.no_grad():
                    model(**batch)
                model.train()
        assert handler.plan.kept == MIXED
        return torch.zeros(()), gradients(model)

    assert_same(accumulate(True), accumulate(False))


@pytest.mark.parametrize("way", WAYS)
def test_evaluation_mode_between_forward_and_backward(way):
    batch = tiny_batch()
    expected = step(build(MIXED)[0], batch)
    model, _ = build(MIXED, way)
    loss = model(**batch).loss
    model.eval()
    loss.backward()
    assert_same((loss.detach(), gradients(model)), expected)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo, on a block's own input
@pytest.mark.parametrize("is_whole_model", [True, False])
def test_patching_a_compiled_model_compiles_it_again(is_whole_model):
    torch.compiler.reset()
    batch, plan = tiny_batch(), (True, False)
    _, expected = step(build(plan, num_hidden_layers=1)[0], batch)
    model = tiny_causal_lm(num_hidden_layers=1)
    for module in [model] if is_whole_model else model.model.layers:
        module.compile(backend="aot_eager")
    step(model, batch)  # compiled unpatched
    apply_dropbp(model, 0.5).set_plan(plan)
    _, grads = step(model, batch)
    assert {n for n, grad in grads.items() if grad is None} == {n for n, grad in expected.items() if grad is None}
    remove_dropbp(model)
    assert all(grad is not None for grad in step(model, batch)[1].values())


@pytest.mark.parametrize("way", ["transformers", "kept"])
def test_compiles_with_equal_gradients(way):
    if way == "transformers" and torch.__version__ < "2.13":
        pytest.skip("torch 2.11 compiles vars(block)[name] as block.name, which is the descriptor that asked: no end")
    torch.compiler.reset()
    batch, plan = tiny_batch(), (True, True, False, False, False, True)  # a block kept whole, dropped whole, by half
    _, expected = step(build(plan)[0], batch)
    model, _ = build(plan, way)
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, backend="aot_eager")
    compiled(**batch).loss.backward()
    assert not torch._dynamo.utils.counters["graph_break"]
    for name, grad in gradients(model).items():
        assert (grad is None) == (expected[name] is None), name
        if grad is not None:
            torch.testing.assert_close(grad, expected[name])
