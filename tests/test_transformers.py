"""apply_dropbp on transformers models, and the invariants of the design, on real decoder layers."""

import copy
import itertools

import pytest
import torch
from models import CAUSAL_LMS, backward, tiny_batch, tiny_causal_lm, with_lora

from dropbp_kernels import DropBP, apply_dropbp, remove_dropbp
from dropbp_kernels.measure import num_autograd_nodes, saved_bytes


def assert_same_gradients(ours, expected):
    assert set(ours) == set(expected)
    for name, grad in expected.items():
        assert (ours[name] is None) == (grad is None), name
        assert grad is None or torch.equal(ours[name], grad), name


def detached_reference(model, kept):
    """The same model with forward hooks that detach the dropped branches: an implementation that shares nothing."""
    layers = [module for module in model.modules() if type(module).__name__.endswith("DecoderLayer")]
    for index, layer in enumerate(layers):
        if not kept[2 * index]:
            layer.self_attn.register_forward_hook(lambda module, args, output: (output[0].detach(), *output[1:]))
        if not kept[2 * index + 1]:
            layer.mlp.register_forward_hook(lambda module, args, output: output.detach())
    return model


@pytest.mark.parametrize("family", CAUSAL_LMS)
def test_rate_zero_equals_the_unpatched_model_bit_for_bit(family):
    batch = tiny_batch()
    logits, grads = backward(tiny_causal_lm(family), batch)
    model = tiny_causal_lm(family)
    handler = apply_dropbp(model, 0.0, fused=False)
    assert handler.step().kept == (True,) * 6
    patched_logits, patched_grads = backward(model, batch)
    assert torch.equal(logits, patched_logits)
    assert_same_gradients(patched_grads, grads)


@pytest.mark.parametrize("family", CAUSAL_LMS)
@pytest.mark.parametrize("lora", [False, True])
def test_gradients_equal_detach_after_bit_for_bit(family, lora):
    """Invariants 2 and 3: same logits at any plan, gradients of the dense model with detach() on dropped branches."""
    batch, wrap = tiny_batch(), with_lora if lora else (lambda model: model)
    dense_logits, _ = backward(wrap(tiny_causal_lm(family)), batch)
    for kept in [(True, False, False, True, False, True), (False,) * 5 + (True,), (True,) + (False,) * 5]:
        logits, expected = backward(detached_reference(wrap(tiny_causal_lm(family)), kept), batch)
        model = wrap(tiny_causal_lm(family))
        apply_dropbp(model, 0.5, fused=False).set_plan(kept)
        patched_logits, grads = backward(model, batch)
        assert torch.equal(patched_logits, dense_logits)
        assert torch.equal(patched_logits, logits)
        assert_same_gradients(grads, expected)


def test_detach_control_has_the_same_gradients():
    batch, kept = tiny_batch(), (True, False, False, True, False, True)
    results = {}
    for dropped_runs in ("inference", "detach"):
        model = tiny_causal_lm()
        apply_dropbp(model, 0.5, dropped_runs=dropped_runs).set_plan(kept)
        with saved_bytes() as saved:
            results[dropped_runs] = (*backward(model, batch), saved.num_bytes)
    assert torch.equal(results["inference"][0], results["detach"][0])
    assert_same_gradients(results["inference"][1], results["detach"][1])
    assert results["inference"][2] < 0.7 * results["detach"][2]


def test_dropped_branches_save_nothing_and_add_no_nodes():
    """Invariant 4, counted on the decoder stack: only the residual's adds are left when everything is dropped."""
    model = tiny_causal_lm()
    handler = apply_dropbp(model, 0.5)
    embedded = model.model.embed_tokens(tiny_batch()["input_ids"]).detach().requires_grad_()
    rope = model.model.rotary_emb(embedded, torch.arange(10)[None])

    def stack(kept):
        handler.set_plan(kept)
        with saved_bytes() as saved:
            x = embedded
            for layer in model.model.layers:
                x = layer(x, position_embeddings=rope)
        return num_autograd_nodes(x), saved.num_bytes

    nodes, num_bytes = stack([False] * 6)
    assert (nodes, num_bytes) == (6, 0)
    nodes_all, bytes_all = stack([True] * 6)
    assert nodes_all > 100
    # What several kept branches save is what each saves alone, but for the residuals they share.
    alone = [stack([index == kept for index in range(6)])[1] for kept in range(6)]
    assert all(alone)
    assert bytes_all <= sum(alone)


@pytest.mark.parametrize("order", ["before", "after"])
def test_lora_before_or_after(order):
    if order == "before":
        model = tiny_causal_lm()
        handler = apply_dropbp(model, 0.5)
        model = with_lora(model)
    else:
        model = with_lora(tiny_causal_lm())
        handler = apply_dropbp(model, 0.5)
    handler.set_plan([False, False, True, False, False, False])
    _, grads = backward(model, tiny_batch())
    with_grad = {name for name, grad in grads.items() if grad is not None}
    assert with_grad
    assert all("layers.1.self_attn" in name and "lora" in name for name in with_grad)
    for gate in handler.gates.values():
        assert gate.is_trainable()


def test_a_lora_step_always_has_something_to_train():
    model = with_lora(tiny_causal_lm())
    handler = apply_dropbp(model, 0.95)
    for _ in range(30):
        plan = handler.step()
        loss = model(**tiny_batch()).loss
        assert any(plan.kept)
        assert loss.requires_grad


def test_patching_is_reversible_and_keeps_state_dict_keys():
    model = tiny_causal_lm()
    keys, classes = list(model.state_dict()), [type(module) for module in model.modules()]
    modules = [name for name, _ in model.named_modules()]
    apply_dropbp(model, 0.5)
    assert list(model.state_dict()) == keys
    layer = model.model.layers[0]
    assert isinstance(layer, classes[[c.__name__ for c in classes].index("LlamaDecoderLayer")])
    assert type(layer).__name__ == "LlamaDecoderLayer"
    assert isinstance(layer.gate_mlp, DropBP)
    remove_dropbp(model)
    assert [type(module) for module in model.modules()] == classes
    assert [name for name, _ in model.named_modules()] == modules
    assert "forward" not in vars(model.model.layers[0])
    apply_dropbp(model, 0.5)  # and again


def test_deepcopy_of_a_patched_model_is_independent():
    model = tiny_causal_lm()
    apply_dropbp(model, 0.5)
    twin = copy.deepcopy(model)
    remove_dropbp(model)
    gate = twin.model.layers[0].gate_mlp
    assert gate.modules_of_branch[1] is twin.model.layers[0].mlp
    assert gate.flops.block is twin.model.layers[0]


def test_flops_follow_the_shape_of_the_last_training_call():
    model = tiny_causal_lm()
    handler = apply_dropbp(model, 0.5)
    handler.step()
    model(**tiny_batch(2, 10)).loss.backward()
    attention, mlp = handler.flops()[:2]
    tokens, d, kv, hidden = 20, 32, 16, 48
    assert attention == 2 * tokens * (2 * d * d + 2 * d * kv) + 2 * 2 * 2 * 10 * 10 * d
    assert mlp == 2 * tokens * 3 * d * hidden


def test_twice_is_an_error_and_changes_nothing():
    model = tiny_causal_lm()
    handler = apply_dropbp(model, 0.5)
    gates = list(handler.gates.values())
    with pytest.raises(ValueError, match=r"without DropBP gates.*call remove_dropbp first"):
        apply_dropbp(model, 0.25)
    assert list(handler.gates.values()) == gates
    assert model.model.layers[0].gate_attention is gates[0]


def test_unknown_model_names_the_module_types():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
    with pytest.raises(ValueError, match=r"known family \(docs/models.md\).*types found: Linear, ReLU, Sequential"):
        apply_dropbp(model, 0.5)
    with pytest.raises(ValueError, match=r"known family \(LlamaDecoderLayer.*\), got none; module types found: Linear"):
        apply_dropbp(model, 0.5, families=["llama"])
    with pytest.raises(ValueError, match="patched by apply_dropbp"):
        remove_dropbp(model)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"drop_rate": 1.0}, ValueError),
        ({"drop_rate": "high"}, TypeError),
        ({"drop_rate": 0.5, "sampler": "fair"}, (ValueError, TypeError)),
        ({"drop_rate": 0.5, "grad_scale": "big"}, ValueError),
        ({"drop_rate": 0.5, "no_such_option": 1}, TypeError),
    ],
)
def test_bad_options_leave_the_model_unpatched(options, error):
    model = tiny_causal_lm()
    classes = [type(module) for module in model.modules()]
    with pytest.raises(error):
        apply_dropbp(model, **options)
    assert [type(module) for module in model.modules()] == classes


def test_generation_and_evaluation_ignore_the_plan():
    batch = tiny_batch()
    expected = tiny_causal_lm().eval()(**batch).logits
    model = tiny_causal_lm().eval()
    apply_dropbp(model, 0.5, fused=False).set_plan([False] * 6)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, expected)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo's own asking
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_compiled_block_by_block_there_is_a_graph_for_each_plan_of_a_block(fused, lora):
    """Twice as many behind frozen embeddings: the stream has a gradient once a branch below was kept."""
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    model = tiny_causal_lm(num_hidden_layers=2)
    blocks = model.model.layers
    model = with_lora(model) if lora else model
    handler = apply_dropbp(model, 0.5, fused=fused)
    for block in blocks:
        block.compile(backend=backend)
    for kept in itertools.product([True, False], repeat=4):
        handler.set_plan(kept)
        loss = model(**tiny_batch()).loss
        if any(kept):
            loss.backward()
    assert len(graphs) == (8 if lora else 4)
