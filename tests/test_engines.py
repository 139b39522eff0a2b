"""DDP, FSDP, tensor parallel, a pipeline on two processes (gloo): plans and weights are those of one process."""

import itertools

import pytest
import ranks
import torch
import torch.distributed as dist
from engine_ranks import (
    LLAMA_OPTIONS,
    WHOLE_BATCH_OPTIONS,
    batches,
    chats,
    llama,
    train,
    train_policy,
    train_targets,
    with_paca,
)
from models import tiny_causal_lm, toy_model

from dropbp_kernels import DropBPHandler, apply_dropbp

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each rank of tests/engine_ranks.py left."""
    folder = tmp_path_factory.mktemp("ranks")
    with ranks.started("engine_ranks.py", folder):
        pass
    return ranks.results_in(folder)


@pytest.mark.parametrize("missing_grad", ["skip", "zero"])
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_two_ranks_train_like_one(results, engine, missing_grad):
    model = toy_model(4)
    expected = train(model, DropBPHandler(model, 0.5), batches(None), missing_grad)
    first, second = (result[f"{engine} {missing_grad}"] for result in results)
    assert set(first) == set(expected)
    for name, value in expected.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=1e-5, atol=1e-6)


def test_two_ranks_train_columns_like_one(results):
    pytest.importorskip("peft")  # an optional extra
    model = with_paca()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    expected = train(model, DropBPHandler(model, 0.5), batches(None))
    changed = [name for name, value in expected.items() if not torch.equal(value, start[name])]
    assert len(changed) == 8, changed  # two linears a block
    first, second = (result["paca"] for result in results)
    for name, value in expected.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=1e-5, atol=1e-6)


def test_two_stages_of_a_pipeline_train_like_one(results):
    model = toy_model(4)
    halves = model[:2], model[2:]
    handlers = [DropBPHandler(half, 0.5, seed=seed) for seed, half in enumerate(halves)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plans = []
    for x in batches(None):
        plans.append([handler.step().kept for handler in handlers])
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for half, handler, result in zip(halves, handlers, results, strict=True):
        weights, num_kept = result["pipeline"]
        for name, value in half.state_dict().items():
            torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-6)
        assert num_kept == [branch["num_kept"] for branch in handler.report()["branches"]]
    assert any(first != second for first, second in plans)


def test_missing_gradients_make_a_difference(results):
    skip, zero = results[0]["ddp skip"], results[0]["ddp zero"]
    assert any((skip[name] - zero[name]).abs().max() > 1e-3 for name in skip)


def test_a_static_graph_is_refused_by_ddp(results):
    assert all("graph has changed in this iteration" in result["static"] for result in results)


@pytest.mark.parametrize("name", LLAMA_OPTIONS | WHOLE_BATCH_OPTIONS)
def test_llamas_on_two_ranks_train_like_one(results, name):
    """Patched before or after they were sharded, and whole again after `remove_dropbp`."""
    expected = llama((LLAMA_OPTIONS | WHOLE_BATCH_OPTIONS)[name])
    engines = ["tensor parallel", *(("fsdp1", "fsdp2", "fsdp2 first") if name in LLAMA_OPTIONS else ())]
    for engine, result in itertools.product(engines, results):
        weights = result[f"{engine} {name}"]
        for key, value in expected.items():
            torch.testing.assert_close(weights[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["one_hop", "full"])
def test_gradients_of_contexts_are_refused_under_fsdp(results, name):
    assert all('expected "none" under FSDP' in result[f"refused {name}"] for result in results)


@pytest.mark.filterwarnings("ignore:labels. no target in a batch")
def test_two_ranks_train_targets_like_one(results):
    """Also in a step in which one rank has no target and the other waits for its gradients."""
    model = tiny_causal_lm(num_hidden_layers=2)
    expected = train_targets(model, apply_dropbp(model, 0.0, context="inference"), chats(None))
    first, second = (result["targets branch"] for result in results)
    for name, value in expected.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-5)
    first, second = (result["targets sample"] for result in results)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], expected[name]) for name in first)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_ranks_with_other_samples_without_gradient_train_like_one(results, engine):
    """In the second step one rank has none with a gradient, in the third no rank has."""
    model = tiny_causal_lm(num_hidden_layers=2)
    expected = train_policy(model, apply_dropbp(model, 0.0, context="inference"), [0, 1])
    for result in results:
        for name, value in expected.items():
            torch.testing.assert_close(result["policies"][engine][name], value, rtol=1e-4, atol=1e-5)


def test_turns_that_differ_between_ranks_run_together_under_fsdp(results):
    model = tiny_causal_lm(num_hidden_layers=2)
    expected = train_targets(model, apply_dropbp(model, 0.0, context="inference"), chats(None)[:1])
    for result in results:
        weights, _ = result["sharded targets"]
        for name, value in expected.items():
            torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-5)


def test_ranks_that_would_gather_in_other_numbers_of_passes_are_refused(results):
    """One has no target."""
    for result, passes in zip(results, (2, 0), strict=True):
        _, error = result["sharded targets"]
        assert f"expected as many passes on every rank under FSDP, got {passes}" in error
