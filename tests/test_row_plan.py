"""Row plans: how many rows and which, as pure functions of (seed, step), and the handler's books about them."""

import json
import random
import warnings

import pytest
import torch
from models import ToyBlock, tiny_batch, toy_model, with_lora
from models import tiny_causal_lm as tiny_llama

from dropbp_kernels import DropBP, DropBPHandler, apply_dropbp, row_plan
from dropbp_kernels.plan import as_entry
from dropbp_kernels.row_draws import cover
from dropbp_kernels.row_plan import Batch, ChosenRows, RowPlan
from dropbp_kernels.samplers import balanced
from dropbp_kernels.targets import IGNORED, plan_targets

CPU = torch.device("cpu")


def make_plan(rates, *, step=0, seed=0, by_token=None, runs=None, covering=True):
    number = len(rates)
    return RowPlan(
        rates,
        by_token=by_token or [False] * number,
        run_of=runs or list(range(number)),
        covering=[covering] * number,
        round_up=lambda up: balanced(up, [1.0] * number, seed, step),
        seed=seed,
        step=step,
    )


def kept_rows(plan, batch):
    rows = [plan.rows(branch, batch) for branch in range(len(plan.drop_rates))]
    return [set(r.permutation[: r.num_kept].tolist()) for r in rows]


def test_each_branch_keeps_its_share_and_every_sample_is_in_one():
    for step in range(20):
        plan = make_plan([0.5, 0.75, 0.875, 0.875], step=step)
        kept = kept_rows(plan, Batch(8, 5, CPU))
        assert [len(rows) for rows in kept] == [4, 2, 1, 1]
        assert set.union(*kept) == set(range(8))  # 8 places for 8 samples: each is in exactly one
        for branch, rows in enumerate(kept):
            assert sorted(plan.rows(branch, Batch(8, 5, CPU)).permutation.tolist()) == list(range(8))
            assert plan.kept_share(branch) == len(rows) / 8


def test_a_row_is_kept_with_its_probability_cover_or_not():
    """1 - drop_rate for every sample in every branch, within 4 standard deviations of 2000 draws."""
    rates, num_draws = [0.5, 0.8, 0.7], 2000
    for covering in (True, False):
        times = torch.zeros(3, 5)
        for step in range(num_draws):
            kept = kept_rows(make_plan(rates, step=step, covering=covering), Batch(5, 1, CPU))
            assert not covering or len(set.union(*kept)) >= min(5, sum(map(len, kept)))
            for branch, rows in enumerate(kept):
                times[branch, list(rows)] += 1
        share = 1.0 - torch.tensor(rates)[:, None]
        deviation = (share * (1.0 - share) / num_draws).sqrt()
        assert ((times / num_draws - share).abs() < 4 * deviation).all()


def test_work_is_equal_in_every_step_though_shares_are_not_whole():
    for num_samples in (1, 2, 3, 7):
        totals = set()
        for step in range(30):
            plan = make_plan([0.75] * 16, step=step)
            totals.add(sum(plan.num_kept(num_samples, num_samples)))
        assert totals == {4 * num_samples}


def test_one_sample_is_the_branch_plan_of_the_sampler_and_said_once():
    row_plan._say_that_one_sample_is_no_share.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_plan([0.5], by_token=[True]).rows(0, Batch(1, 5, CPU))  # tokens have shares
    with pytest.warns(UserWarning, match="a batch of one sample has no share"):
        make_plan([0.5]).rows(0, Batch(1, 5, CPU))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(10):
            rates = [0.75] * 8
            kept = kept_rows(make_plan(rates, step=step), Batch(1, 5, CPU))
            assert tuple(map(bool, kept)) == balanced(rates, [1.0] * 8, 0, step)


@pytest.mark.filterwarnings("ignore:granularity. a batch of one sample")  # said once a process, by whoever comes first
def test_something_is_always_kept():
    for step in range(20):
        kept = kept_rows(make_plan([0.9, 0.9], step=step), Batch(1, 5, CPU))
        assert any(kept)
    assert not all(any(kept_rows(make_plan([0.9, 0.9], step=s, covering=False), Batch(1, 5, CPU))) for s in range(20))


def test_plans_differ_by_step_seed_and_branch_and_nothing_else():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    batch = Batch(16, 4, CPU)
    base = kept_rows(make_plan([0.5, 0.5]), batch)
    assert base == kept_rows(make_plan([0.5, 0.5]), batch)
    assert base[0] != base[1]
    assert base != kept_rows(make_plan([0.5, 0.5], step=1), batch)
    assert base != kept_rows(make_plan([0.5, 0.5], seed=1), batch)
    assert torch.equal(state, torch.get_rng_state())


def test_aligned_branches_keep_the_same_rows_and_fewer_of_them_the_first():
    plan = make_plan([0.5, 0.75, 0.5, 0.75], runs=[0, 0, 1, 1])
    first, second, third, fourth = kept_rows(plan, Batch(16, 4, CPU))
    assert second < first
    assert fourth < third
    assert first != third
    tokens = make_plan([0.5, 0.75], runs=[0, 0], by_token=[True, True])
    first, second = kept_rows(tokens, Batch(2, 8, CPU))
    assert second < first


def test_padding_is_never_kept_and_shares_are_those_of_real_tokens():
    is_real = torch.arange(10)[None, :] < torch.tensor([[10], [3], [7], [0]])
    for step in range(5):
        plan = make_plan([0.5, 0.5], by_token=[False, True], step=step)
        rows = plan.rows(1, Batch(4, 10, CPU, is_real))
        assert (rows.num_kept, rows.num_rows) == (10, 20)
        assert is_real.flatten()[rows.permutation[:20]].all()
        assert sorted(rows.permutation.tolist()) == list(range(40))
        assert plan.rows(0, Batch(4, 10, CPU, is_real)).num_kept == 2
        others = plan.rows(1, Batch(4, 10, CPU, ~is_real)).permutation  # of another micro-batch
        assert not is_real.flatten()[others[:20]].any()


def test_cover_moves_only_samples_that_have_none():
    orders = {0: [0, 1, 2, 3], 1: [0, 1, 3, 2]}
    cover(orders, {0: 2, 1: 2}, random.Random(0))
    assert set(orders[0][:2]) | set(orders[1][:2]) == {0, 1, 2, 3}
    untouched = {0: [0, 1, 2, 3], 1: [2, 3, 0, 1]}
    cover(untouched, {0: 2, 1: 2}, random.Random(0))
    assert untouched == {0: [0, 1, 2, 3], 1: [2, 3, 0, 1]}
    short = {0: [0, 1, 2, 3]}  # one place for four samples
    cover(short, {0: 1}, random.Random(0))
    assert short == {0: [0, 1, 2, 3]}


def test_bad_batches_and_rows():
    with pytest.raises(ValueError, match="batch: expected at least one row, got 0 samples of 5 tokens"):
        make_plan([0.5]).rows(0, Batch(0, 5, CPU))
    with pytest.raises(ValueError, match=r"is_real: expected shape \(2, 5\).*got \(2, 4\)"):
        make_plan([0.5], by_token=[True]).rows(0, Batch(2, 5, CPU, torch.ones(2, 4, dtype=torch.bool)))
    chosen = ChosenRows(torch.tensor([True, False, True]))
    with pytest.raises(ValueError, match="expected as many rows as the batch has, 4 samples, got 3"):
        chosen.rows(Batch(4, 5, CPU), per_token=False)
    with pytest.raises(ValueError, match="4 samples or 20 tokens, got 3"):
        chosen.rows(Batch(4, 5, CPU), per_token=True)
    with pytest.raises(TypeError, match="rows of dtype bool"):
        ChosenRows(torch.tensor([1, 0]))
    with pytest.raises(ValueError, match=r"shape \(N,\), N at least 1, got \(0,\)"):
        ChosenRows(torch.zeros(0, dtype=torch.bool))


# ---- the handler


def run_step(model, handler):
    handler.step()
    model.zero_grad()
    x = torch.randn(8, 3, 8, generator=torch.Generator().manual_seed(8))
    model(x).square().sum().backward()


def test_report_counts_rows():
    model = toy_model(4)
    handler = DropBPHandler(model, 0.75, granularity="sample")
    assert handler.report()["realised_drop_rate"] is None
    for _ in range(3):
        run_step(model, handler)
    report = handler.report()
    assert [(branch["num_kept"], branch["num_dropped"]) for branch in report["branches"]] == [(6, 18)] * 4
    assert (report["realised_drop_rate"], report["flops_kept"]) == (0.75, 0.25)
    assert handler.report() == report  # asking counts nothing
    assert handler.plan.drop_rate == 0.75
    assert "realised 0.750" in str(report)


def test_resume_goes_on_exactly():
    def gradients_of(handler, model):
        run_step(model, handler)
        return [parameter.grad.clone() for parameter in model.parameters()]

    model = toy_model(4)
    handler = DropBPHandler(model, 0.5, granularity="sample", aligned=2)
    for _ in range(2):
        run_step(model, handler)
    state = json.loads(json.dumps(handler.state_dict()))
    expected, report = gradients_of(handler, model), handler.report()
    model = toy_model(4)
    resumed = DropBPHandler(model, 0.5, granularity="sample", aligned=2)
    resumed.load_state_dict(state)
    assert resumed.plan.step == 1
    for ours, theirs in zip(gradients_of(resumed, model), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert resumed.report() == report
    with pytest.raises(ValueError, match="state: expected granularity 'branch', as this handler has, got 'sample'"):
        DropBPHandler(toy_model(4), 0.5).load_state_dict(state)
    with pytest.raises(ValueError, match="state: expected aligned False, as this handler has, got 2"):
        DropBPHandler(toy_model(4), 0.5, granularity="sample").load_state_dict(state)


def test_rows_by_hand_are_put_back_by_a_state():
    model = toy_model(2)
    handler = DropBPHandler(model, 0.5, granularity="sample")
    handler.set_plan([torch.tensor([True, False]), False])
    assert handler.plan.drop_rate == 0.75
    other = DropBPHandler(toy_model(2), 0.5, granularity="sample")
    other.load_state_dict(json.loads(json.dumps(handler.state_dict())))
    assert other.plan.kept_shares == [0.5, 0.0]


@pytest.mark.parametrize(
    "change",
    [
        lambda handler: handler.set_plan(handler.plan.kept),
        lambda handler: handler.set_plan([*handler.plan.kept[:2], False, torch.arange(8) < 3]),
        lambda handler: handler.set_drop_rates([0.25] * 4),  # of which the step that runs knows nothing
    ],
    ids=["put back", "put back in part", "rates of the next step"],
)
def test_a_state_restores_the_rows_of_the_step_that_runs(change):
    def fresh():
        model = toy_model(4)
        return model, DropBPHandler(model, 0.5, granularity="sample", grad_scale="unbiased", strict=False)

    def gradients_of(model):
        model(torch.randn(8, 3, 8, generator=torch.Generator().manual_seed(0))).square().sum().backward()
        return [parameter.grad for parameter in model.parameters()]

    model, handler = fresh()
    handler.step()
    handler.step()
    change(handler)
    resumed_model, resumed = fresh()
    resumed.load_state_dict(json.loads(json.dumps(handler.state_dict())))
    assert resumed.state_dict() == handler.state_dict()
    for ours, theirs in zip(gradients_of(resumed_model), gradients_of(model), strict=True):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("aligned", "runs"),
    [(False, [0, 1, 2, 3, 4, 5]), (True, [0] * 6), (1, [0, 0, 1, 1, 2, 2]), (2, [0, 0, 0, 0, 1, 1])],
)
def test_aligned_counts_blocks(aligned, runs):
    handler = apply_dropbp(tiny_llama(), 0.5, granularity="sample", aligned=aligned)
    assert handler.draw(0).kept[0].plan.run_of == tuple(runs)


def test_only_branches_that_train_cover_samples():
    model = with_lora(tiny_llama())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1" in name and "lora" in name)
    handler = apply_dropbp(model, 0.5, granularity="sample")
    for step in range(5):
        entry = handler.draw(step).kept[0]
        kept = kept_rows(entry.plan, Batch(4, 10, CPU))
        assert kept[2] | kept[3] == {0, 1, 2, 3}


@pytest.mark.filterwarnings("ignore:granularity. a batch of one sample")  # said once a process, by whoever comes first
def test_keep_one_is_asked_of_rows_too():
    for keep_one in (True, False):
        handler = DropBPHandler(toy_model(1), 0.9, granularity="sample", keep_one=keep_one)
        plans = [handler.draw(step).kept[0].plan for step in range(10)]
        assert all(kept_rows(plan, Batch(1, 5, CPU)) == [{0}] for plan in plans) == keep_one


def test_a_plan_of_other_rows_than_the_batch_is_refused():
    model = toy_model(2)
    handler = DropBPHandler(model, 0.5)
    handler.set_plan([torch.tensor([True, False, True])] * 2)
    with pytest.raises(ValueError, match="expected as many rows as the batch has, 4 samples, got 3"):
        model(torch.randn(4, 3, 8))
    handler = DropBPHandler(model, 0.5, granularity="sample")
    handler.step()
    with pytest.raises(ValueError, match="at least one row, got 0 samples of 3 tokens"):
        model(torch.randn(0, 3, 8))


def test_one_whole_graph_is_refused_with_the_reason():
    model = toy_model(1)
    DropBPHandler(model, 0.5, granularity="sample").step()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="compile without fullgraph=True"):
        compiled(torch.randn(4, 3, 8))


@pytest.mark.parametrize("granularity", ["sample", "token"])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # by dynamo
@pytest.mark.parametrize("is_patched", [False, True])
def test_a_new_step_compiles_nothing(is_patched, granularity):
    """Which rows are drawn, and how many were counted, differs in every step: in a graph it would be one a step."""
    num_graphs = 0

    def count(graph, inputs):
        nonlocal num_graphs
        num_graphs += 1
        return graph.forward

    torch._dynamo.reset()
    model = tiny_llama() if is_patched else toy_model(2)
    make = apply_dropbp if is_patched else DropBPHandler
    handler = make(model, 0.7, granularity=granularity)  # 1.5 samples of five: one or two
    for block in model.model.layers if is_patched else model:
        block.compile(backend=count)
    graphs = []
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):  # else a graph a step would end there too
        for _ in range(6):
            handler.step()
            for _ in range(2):  # micro-batches
                if is_patched:
                    tokens = torch.randint(64, (5, 6))
                    model(input_ids=tokens, labels=tokens).loss.backward()
                else:
                    model(torch.randn(5, 3, 8, requires_grad=True)).sum().backward()
            graphs.append(num_graphs)
    assert graphs[2] == graphs[-1] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"granularity": "row"}, "granularity: expected one of branch, sample, token, got 'row'"),
        ({"aligned": -1}, "aligned: expected True, False or a number of blocks, got -1"),
        ({"aligned": 2}, 'aligned: expected False with granularity "branch", which keeps all rows, got 2'),
        ({"aligned": "yes"}, "aligned: expected True, False or a number of blocks, got 'yes'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        DropBPHandler(toy_model(2), 0.5, **options)


def test_a_branch_that_returns_other_rows_is_an_error():
    class Wrong(ToyBlock):
        def forward(self, x):
            return self.gate.residual_add(x, lambda rows: rows.new_zeros(x.shape))  # of the whole batch

    model = torch.nn.Sequential(Wrong())
    DropBPHandler(model, 0.5, granularity="sample").step()
    with pytest.raises(ValueError, match=r"expected 2 kept.*\(4, 3, 8\), got \(4, 3, 8\).*through the gate.*\(4, 1, "):
        model(torch.randn(4, 3, 8, requires_grad=True))


def test_a_tensor_of_samples_has_to_be_one_of_tokens_for_a_branch_by_tokens():
    gate, shift = DropBP(per_token=True), torch.randn(4, 1, 8)
    gate.kept = as_entry(torch.arange(12) % 2 == 0)
    x = torch.randn(4, 3, 8, requires_grad=True)
    with pytest.raises(ValueError, match=r"through the gate, as a tensor of shape \(4, 3, \.\.\.\)"):
        gate(x, lambda rows, shift: rows * shift, shift)
    whole = gate(x, lambda rows, shift: rows * shift, shift.expand(4, 3, 8))
    torch.testing.assert_close(whole, x + x * shift)


def staged_rows():
    """Three samples of 8: one turn, two turns, no target; rows of the stages 3 + 0, 2 + 3, 0 + 0."""
    labels = torch.full((3, 8), IGNORED)
    labels[0, 2:5] = labels[1, 1:3] = labels[1, 5:8] = 7
    return plan_targets(labels, turns="apart").staged_rows(with_context=False)


def test_rows_of_a_target_plan_are_one_share_of_all_its_stages():
    staged, seen = staged_rows(), set()
    batches = [Batch(3, stage.rows.shape[1], CPU, None, staged, number) for number, stage in enumerate(staged.stages)]
    for step in range(30):
        plan = make_plan([0.5, 0.5, 0.0], by_token=[True, False, True], step=step)
        tokens, samples, whole = [[plan.rows(branch, batch) for batch in batches] for branch in range(3)]
        assert [rows.num_rows for rows in tokens] == [5, 3]
        assert sum(rows.num_kept for rows in tokens) == 4  # of 8
        assert [rows.num_kept for rows in whole] == [5, 3]
        for rows, stage in zip(tokens, staged.stages, strict=True):
            assert sorted(rows.permutation.tolist()) == list(range(stage.rows.numel()))
            assert stage.is_row.flatten()[rows.permutation[: rows.num_rows]].all()  # padding stands last
        # One of the two samples that have targets; the second turn is that of sample 1.
        first, second = ({*rows.permutation[: rows.num_kept].tolist()} for rows in samples)
        assert [rows.num_rows for rows in samples] == [2, 1]
        assert (first, second) in (({0}, set()), ({1}, {1}))
        seen.add((tuple(first), tokens[0].num_kept))
        assert plan.counts(0) == (4, 8)
        assert plan.counts(1) == (1, 2)
        assert plan.rows(0, Batch(3, 3, CPU)).num_rows == 9  # another micro-batch, as large as the first stage
    assert {kept for kept, _ in seen} == {(0,), (1,)}
    assert {count for _, count in seen} >= {2, 3}


def test_a_step_of_tokens_gives_every_parameter_a_gradient():
    model = tiny_llama()
    handler = apply_dropbp(model, 0.75, granularity="token")
    handler.step()
    model(**tiny_batch(4)).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    units = [branch["num_kept"] + branch["num_dropped"] for branch in handler.report()["branches"]]
    assert units == [4, 40] * 3
