"""DeepSpeed's ZeRO on two processes (gloo): what is trained is what one process trains. Skipped without DeepSpeed."""

import importlib.util

import pytest
import ranks
import torch
from deepspeed_ranks import OPTIONS, batches, patched, sgd

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed: pip install deepspeed"),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each rank of tests/deepspeed_ranks.py left."""
    folder = tmp_path_factory.mktemp("ranks")
    with ranks.started("deepspeed_ranks.py", folder):
        pass
    return ranks.results_in(folder)


@pytest.mark.parametrize("name", OPTIONS)
def test_two_ranks_train_like_one(results, name):
    model, handler = patched(name)
    optimizer = sgd(model)
    for tokens in batches(None):
        handler.step()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for stage in OPTIONS[name][-1]:
        for result in results:
            for key, value in model.named_parameters():
                torch.testing.assert_close(
                    result[name, stage][key], value.detach(), rtol=1e-4, atol=1e-5, msg=f"stage {stage}: {key}"
                )


def test_dropped_branches_are_refused_under_zero_3(results):
    """Their parameters would be moved by the gradients of an earlier step."""
    assert all(
        "expected a gradient for every parameter under DeepSpeed's ZeRO-3" in each["refused"] for each in results
    )
