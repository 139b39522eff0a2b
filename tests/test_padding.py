"""Branches per token without the padding of a batch."""

import pytest
import torch
from target_cases import CLOSE, assert_same, backward, chat, tiny
from torch import nn

from dropbp_kernels import apply_dropbp
from dropbp_kernels.padding import run_without_padding
from dropbp_kernels.targets import IGNORED, plan_targets

REAL = torch.tensor([0, 1, 2, 5, 6])  # of two samples of four tokens


@pytest.mark.parametrize("is_flat", [False, True])
def test_values_and_gradients_are_those_of_the_real_tokens(is_flat):
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 3)).double()
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.zeros(8, 1, dtype=torch.float64).index_fill(0, REAL, 1.0).view(2, 4, 1)
    expected = mlp(x) * mask
    seen = []

    def branch(rows):
        seen.append(tuple(rows.shape))
        return mlp(rows), rows.sum(-1).flatten(), "kept"

    ours, logits, other = run_without_padding(branch, REAL, x.flatten(0, 1) if is_flat else x)
    assert seen == [(5, 3) if is_flat else (1, 5, 3)]
    assert other == "kept"
    torch.testing.assert_close(ours.view(2, 4, 3), expected)
    torch.testing.assert_close(logits, (x * mask).sum(-1).flatten())  # a router's, flattened
    weight = torch.randn(2, 4, 3, dtype=torch.float64)
    parameters = [x, *mlp.parameters()]
    grads = torch.autograd.grad((ours.view(2, 4, 3) * weight).sum(), parameters)
    for grad, exact in zip(grads, torch.autograd.grad((expected * weight).sum(), parameters), strict=True):
        torch.testing.assert_close(grad, exact)


def test_a_branch_with_more_tensors_runs_as_a_whole():
    x = torch.randn(2, 4, 3)
    seen = []
    run_without_padding(lambda x, bias: seen.append(tuple(x.shape)), REAL, x, torch.zeros(2, 4, 3))
    assert seen == [(2, 4, 3)]


def ragged():
    """Prompts of 3, 5, 7 and 9 tokens and completions of 9, 7, 5 and 3."""
    batch = chat(4)
    labels = batch["input_ids"].clone()
    for sample in range(4):
        labels[sample, : 3 + 2 * sample] = labels[sample, 12:] = IGNORED
    return {**batch, "labels": labels}


@pytest.mark.parametrize("granularity", ["branch", "token"])
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "mixtral"])
def test_mlps_of_ragged_stages_see_no_padding(model_type, granularity):
    batch, tokens = ragged(), []
    plan = plan_targets(batch["labels"])
    context, targets = (int(stage.is_row.sum()) for stage in plan.stages)
    assert (context, targets) == (2 + 4 + 6 + 8, 9 + 7 + 5 + 3)
    model = tiny(model_type, torch.float32)
    handler = apply_dropbp(model, 0.5 if granularity == "token" else 0.0, context="inference", granularity=granularity)
    handler.step()
    gate = list(handler.gates.values())[1]
    gate.modules_of_branch[-1].register_forward_pre_hook(lambda module, args: tokens.append(args[0].shape[:-1].numel()))
    model(**batch)
    assert tokens == ([context, targets] if granularity == "branch" else [context, targets // 2, targets // 2])
    assert gate.real_rows is None
    few = {**batch, "labels": batch["input_ids"].masked_fill(torch.arange(16) < 6, IGNORED)}
    few["labels"][0, 6] = IGNORED  # of 4 x 6 context rows 3 are padding, of 4 x 10 target rows 1: not worth a copy
    tokens.clear()
    model(**few)
    assert sum(tokens) == 21 + (40 if granularity == "branch" else 39)


def test_a_block_may_add_to_a_dropped_branch_in_place(monkeypatch):
    """As Falcon's adds its attention to its MLP."""
    batch, results = chat(), []
    for least_padding in (0.1, 1.0):
        monkeypatch.setattr("dropbp_kernels.plan.LEAST_PADDING", least_padding)
        model = tiny("falcon")
        apply_dropbp(model, 0.5, context="inference").set_plan([True, False, False, True])
        results.append(backward(model, batch))
    assert_same(*results, **CLOSE)
