"""benchmarks.convergence: what its methods drop, whose gradient they have, which rows they choose."""

import dataclasses
import statistics

import pytest
import torch
from convergence_cases import tiny_task

from benchmarks import (
    convergence,
    convergence_gradients,
    convergence_methods,
    convergence_runs,
    convergence_simulated,
)
from benchmarks.convergence_methods import Point
from benchmarks.rows import read_rows
from dropbp_kernels import apply_dropbp
from dropbp_kernels.cli.data import IGNORED


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    with tiny_task(tmp_path, monkeypatch) as folder:
        yield folder


def test_methods_drop_the_same_share_of_the_work(tiny):
    """Rates by kind, by schedule and by sensitivity alike: their mean over the run, by FLOPs, is the drop rate."""
    task = dataclasses.replace(convergence_methods.group_of("plans", "tiny").task, steps=50)
    for method in convergence_methods.METHODS:
        if method.startswith(("undropped", "target plan", "coreset", "query rows")):
            continue
        run = convergence_runs.make_run(task, "lora", Point(method, 0.75), 2, 8e-3, 0)
        if run.settings.rates == "sensitivity":
            run._calibrate(run.data.batch(0, 2))
        flops = run.handler.flops()
        steps = [zip(run.handler.rates_at(step), flops, strict=True) for step in range(task.steps)]
        dropped = statistics.mean(sum(rate * cost for rate, cost in step) / sum(flops) for step in steps)
        is_on_a_grid = method == "published, by sensitivity"  # of tenths
        assert dropped == pytest.approx(0.75, abs=0.1 if is_on_a_grid else 1e-6), method
        if "attention" in method:
            assert len(set(run.handler.drop_rates)) == 2


def test_gradients_of_plans_are_compared_with_those_of_the_whole_batch(tiny):
    call = ["--scale", "tiny", "--batches", "1", "--plans", "3", "--steps", "2", "--rates", "0.5", "--out", str(tiny)]
    assert convergence_gradients.main(call) == 0
    rows = {row["method"]: row for row in read_rows(tiny / convergence_gradients.FILE)}
    assert list(rows) == [*convergence_gradients.PLANS, convergence_gradients.FEWER]
    assert all(-1.0 <= float(row["cosine"]) <= 1.0 for row in rows.values())
    # Halves of one batch: their mean points better than each of them.
    fewer = rows[convergence_gradients.FEWER]
    assert 0.2 < float(fewer["cosine"]) < float(fewer["cosine_of_mean"]) < 1.0
    fewer.update(cosine="0.5", cosine_of_mean="0.25", norm_over_undropped="2")  # (1 + (4 - 1) / 3)^-1/2
    line = convergence_gradients.table(list(rows.values()), "plans").splitlines()[-1]
    assert line == f"| {convergence_gradients.FEWER} 0.5 | 0.50 | 0.25 (3) | 0.71 | 2.00 |"


def test_aligned_samples_are_a_smaller_batch_to_an_adapter(tiny):
    """Nothing but branches is trained, so a sample that all of them drop leaves nothing to the gradient."""
    task = convergence_methods.group_of("plans", "tiny").task
    run = convergence_runs.make_run(task, "lora", Point("sample, aligned", 0.75), 8, 8e-3, 0)
    run.step(0)
    ids, labels = run.data.batch(1, 8)
    kept = torch.tensor([True, False, False, True, False, False, False, False])
    run.handler.set_plan([kept] * len(run.handler.gates))
    ours = convergence_gradients.gradient(run, ids, labels)
    run.handler.set_plan([True] * len(run.handler.gates))
    theirs = convergence_gradients.gradient(run, ids[kept], labels[kept])
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=0).item() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(("group", "calls"), [("parts", 1), ("parts_checkpointed", 2)])
def test_checkpointed_steps_compute_blocks_again(group, calls, tiny):
    task = convergence_methods.group_of(group, "tiny").task
    assert ("checkpointed" in task.model) is (calls == 2)  # of which the tables' heads tell
    run, seen = convergence_runs.make_run(task, "lora", Point("undropped"), 2, 8e-3, 0), []
    mlp = next(module for name, module in run.model.named_modules() if name.endswith("layers.0.mlp"))
    mlp.register_forward_pre_hook(lambda *_: seen.append(1))
    run.step(0)
    assert len(seen) == calls


def test_frozen_branches_are_the_same_in_every_step():
    """The last ones, or those of the lowest rates; the one on the edge is kept as often as the rates pay for."""
    flops = [1.0, 3.0] * 4
    for step in range(5):
        kept = convergence_methods.last_branches([0.75] * 8, flops, 0, step)
        assert kept == (False,) * 6 + (True, True)
        rates = [0.0, 0.9, 0.9, 0.0, 0.9, 0.9, 1.0, 1.0]  # 1 + 3 and, of the last that is left, 0.1 * (1 + 3 + 1 + 3)
        edge = (step + 1) * 8 // 30 > step * 8 // 30
        assert convergence_methods.lowest_rates(rates, flops, 0, step) == (
            *(True, False, False, True, False),
            edge,
            False,
            False,
        )
    shares = [convergence_methods.last_branches([0.7] * 8, flops, 0, step) for step in range(15)]
    assert statistics.mean(sum(c for c, is_kept in zip(flops, kept, strict=True) if is_kept) for kept in shares) == 4.8


@pytest.fixture
def started(tiny):
    """A run after its first step, and the next batch."""
    task = convergence_methods.group_of("plans", "tiny").task
    run = convergence_runs.make_run(task, "lora", Point("undropped"), 4, 8e-3, 0)
    run.step(0)
    return run, *run.data.batch(1, 4)


def cosine(one, other):
    return torch.nn.functional.cosine_similarity(one, other, dim=0).item()


@pytest.mark.parametrize("context", ["none", "one_hop"])
def test_aligned_query_rows_have_the_gradient_of_a_target_plan(context, started):
    """A simulated plan that keeps the same tokens everywhere is a target plan of these tokens, which saves the work."""
    run, ids, labels = started
    labels = ids.long()
    is_target = torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < 0.3
    is_target[:, -1] = False
    whole = convergence_gradients.gradient(run, ids, labels)
    plan = convergence_simulated.QueryRows(run.model, 0.75, context=context, aligned=True)
    plan.kept = is_target.expand(4, -1, -1)
    ours = convergence_gradients.gradient(run, ids, labels)
    plan.clear()
    assert torch.equal(convergence_gradients.gradient(run, ids, labels), whole)
    plan.remove()
    shifted = torch.full_like(labels, IGNORED)
    shifted[:, 1:] = torch.where(is_target[:, :-1], labels[:, 1:], IGNORED)
    apply_dropbp(run.model, 0.0, context="inference", context_gradient=context)
    theirs = convergence_gradients.gradient(run, ids, shifted)
    assert cosine(ours, theirs) == pytest.approx(1.0, abs=1e-5)
    assert cosine(ours, whole) < 0.99


def test_query_rows_of_mlps_are_those_of_a_token_plan(started):
    run, ids, labels = started
    plan = convergence_simulated.QueryRows(run.model, 0.75)
    plan.draw(tuple(ids.shape), seed=0, step=0)
    assert plan.kept.sum(dim=(1, 2)).tolist() == [ids.numel() // 4] * 4
    assert not torch.equal(plan.kept[1], plan.kept[3])
    half = convergence_simulated.QueryRows(run.model, 0.75, last=0.5)
    half.remove()
    assert half.drop_rates == [1.0, 1.0, 0.5, 0.5]
    plan.kept[0::2] = True
    kept = plan.kept[1::2].flatten(1)
    ours = convergence_gradients.gradient(run, ids, labels)
    plan.clear()
    apply_dropbp(run.model, 0.0).set_plan([True, kept[0], True, kept[1]])
    torch.testing.assert_close(ours, convergence_gradients.gradient(run, ids, labels), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("context", ["none", "one_hop"])
def test_attention_sends_no_gradient_to_the_input_of_a_dropped_query(context, started):
    run, ids, labels = started
    block = [module for module in run.model.modules() if type(module).__name__ == "LlamaDecoderLayer"][1]
    inputs = []

    def keep(module, args, output):
        output.retain_grad()
        inputs.append(output)

    block.input_layernorm.register_forward_hook(keep)
    plan = convergence_simulated.QueryRows(run.model, 0.75, context=context)
    plan.draw(tuple(ids.shape), seed=0, step=0)
    run.loss(ids, labels).backward()
    reached = inputs[0].grad.abs().sum(dim=-1) > 0
    assert torch.equal(reached, reached & plan.kept[2])
    assert reached.sum() > ids.numel() // 8  # not those of the last columns, which have no loss


def test_query_rows_are_chosen_by_output_or_by_loss(started):
    run, ids, labels = started
    scores = []
    for block in [m for m in run.model.modules() if type(m).__name__ == "LlamaDecoderLayer"]:
        block.post_attention_layernorm.register_forward_pre_hook(
            lambda module, args: scores.append(args[0].norm(dim=-1))
        )
        block.mlp.register_forward_hook(lambda module, args, output: scores.append(output.norm(dim=-1) / scores.pop()))
    plan = convergence_simulated.QueryRows(run.model, 0.75, chosen="output")
    plan.draw(tuple(ids.shape), seed=0, step=0)
    run.loss(ids, labels)
    for kept, score in zip(plan.kept[1::2], scores, strict=True):
        assert kept.sum() == kept.numel() // 4
        assert score[kept].min() >= score[~kept].max()
    plan.clear()

    logits = run.model(input_ids=ids).logits.detach().requires_grad_()
    targets = labels[:, 1:].flatten().long()
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction="sum")
    (expected,) = torch.autograd.grad(loss, logits)
    norms = convergence_simulated.loss_gradient_norms(logits.detach(), labels)
    torch.testing.assert_close(norms, expected.norm(dim=-1))
    plan.draw(tuple(ids.shape), seed=0, step=0, scores=norms)
    assert norms[plan.kept[0]].min() >= norms[~plan.kept[0]].max()
    with pytest.raises(ValueError, match="chosen: expected one of random, loss, output, got 'luck'"):
        convergence_simulated.QueryRows(run.model, 0.75, chosen="luck")


def test_windows_share_the_labels_among_them():
    labels = torch.tensor([[IGNORED, 1, 2, 3, 4, 5], [IGNORED, 1, IGNORED, 3, 4, 5]])
    windows = [convergence_runs.in_window(labels, 2, number) for number in range(2)]
    assert windows[0].tolist() == [[IGNORED, 1, 2, 3, IGNORED, IGNORED], [IGNORED, 1, IGNORED, 3, IGNORED, IGNORED]]
    assert windows[1].tolist() == [[IGNORED] * 4 + [4, 5]] * 2


def test_windows_cover_all_values_once():
    assert convergence.window_means([1.0, 2.0, 3.0, 4.0, 5.0], 2) == [1.5, 4.0]
    assert convergence.window_means([1.0, 2.0], 20) == [1.0, 2.0]
