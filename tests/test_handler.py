"""The handler: plans as a function of (seed, step), guarantees, books, state, and its errors."""

import json
import random
from dataclasses import replace

import pytest
import torch
from models import gradients, toy_model

from dropbp_kernels import DropBP, DropBPHandler, DropPlan
from dropbp_kernels.allocation import allocate


def train_step(model, handler):
    handler.step()
    loss = model(torch.ones(2, 3, 8)).square().sum()
    loss.backward()
    return loss


def test_step_sets_the_plan_it_returns():
    model = toy_model()
    handler = DropBPHandler(model, 0.5)
    for step in range(4):
        plan = handler.step()
        assert plan.step == step
        assert [gate.kept for gate in handler.gates.values()] == list(plan.kept)
        assert plan is handler.plan
        model(torch.ones(1, 1, 8))


def test_plan_is_a_pure_function_of_seed_and_step():
    first = DropBPHandler(toy_model(8), 0.5, seed=3)
    second = DropBPHandler(toy_model(8), 0.5, seed=3, strict=False)
    other = DropBPHandler(toy_model(8), 0.5, seed=4)
    plans = [first.draw(step) for step in range(50)]
    for step in reversed(range(50)):
        assert second.draw(step) == plans[step]
    assert plans != [other.draw(step) for step in range(50)]
    assert len({plan.kept for plan in plans}) > 10


def test_global_generators_are_not_touched():
    np = pytest.importorskip("numpy")
    handler = DropBPHandler(toy_model(), 0.5)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    handler.draw(0)
    handler.step()
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_one_trainable_branch_is_kept():
    model = toy_model(4)
    gates = [block.gate for block in model]
    for block in model:
        block.gate.modules_of_branch = (block.up,)
    for block in model[:3]:
        block.requires_grad_(False)
    never = lambda rates, flops, seed, step: (False,) * len(rates)  # noqa: E731
    handler = DropBPHandler(model, 0.9, sampler=never)
    assert handler.draw(0).kept == (False, False, False, True)
    assert gates[3].is_trainable()
    only_frozen = lambda rates, flops, seed, step: (True, False, False, False)  # noqa: E731
    assert DropBPHandler(model, 0.9, sampler=only_frozen).draw(0).kept == (True, False, False, True)
    assert DropBPHandler(model, 0.9, sampler=never, keep_one=False).draw(0).kept == (False,) * 4
    model.requires_grad_(False)
    assert handler.draw(0).kept == (False,) * 4  # nothing to keep one for


def test_kept_one_is_spread_over_the_branches():
    never = lambda rates, flops, seed, step: (False,) * len(rates)  # noqa: E731
    handler = DropBPHandler(toy_model(4), 0.5, sampler=never)
    chosen = [handler.draw(step).kept.index(True) for step in range(400)]
    assert all(60 < chosen.count(index) < 140 for index in range(4))  # expected 100, standard error 8.7
    handler.set_drop_rates([0.8, 0.4, 0.4, 0.4])
    chosen = [handler.draw(step).kept.index(True) for step in range(400)]
    assert 16 < chosen.count(0) < 64  # expected 40, in proportion to 1 - rate; standard error 6


def test_nothing_to_back_propagate_is_seen_from_the_loss():
    model = toy_model()
    handler = DropBPHandler(model, 0.5, keep_one=False)
    handler.set_plan([False] * 4)
    assert not model(torch.ones(1, 1, 8)).sum().requires_grad
    x = torch.ones(1, 1, 8, requires_grad=True)  # full fine-tuning: the embedding below still needs its gradient
    assert model(x).sum().requires_grad


def test_dropped_branches_leave_exactly_their_parameters_without_gradient():
    model = toy_model()
    handler = DropBPHandler(model, 0.5)
    handler.set_plan([True, False, True, False])
    model(torch.ones(2, 3, 8)).sum().backward()
    for name, grad in gradients(model).items():
        assert (grad is not None) == (int(name.split(".")[0]) in (0, 2)), name


def test_strict_mode_names_gates_that_were_not_called():
    model = toy_model()
    handler = DropBPHandler(model, 0.5)
    handler.step()
    with pytest.raises(RuntimeError, match=r"4 of 4 gates were not called .* \(0\.gate, 1\.gate, 2\.gate, 3\.gate\)"):
        handler.step()
    model[0](torch.ones(1, 1, 8))
    with pytest.raises(RuntimeError, match=r"3 of 4 gates were not called .* strict=False if the model leaves"):
        handler.step()
    model(torch.ones(1, 1, 8))
    handler.step()
    with torch.no_grad():
        model(torch.ones(1, 1, 8))
    with pytest.raises(RuntimeError, match="4 of 4 gates"):
        handler.step()
    relaxed = DropBPHandler(model, 0.5, strict=False)
    relaxed.step()
    relaxed.step()


def test_unbiased_grad_scale_follows_the_rates_of_the_plan():
    handler = DropBPHandler(toy_model(), 0.5, grad_scale="unbiased", strict=False)
    scales = lambda: [gate.grad_scale for gate in handler.gates.values()]  # noqa: E731
    assert scales() == [2.0] * 4
    handler.set_drop_rates([0.0, 0.5, 0.75, 0.9])
    assert scales() == [2.0] * 4  # micro-batches of a step go on as its plan was drawn
    for new_plan in (handler.step, lambda: handler.set_plan([True] * 4)):
        new_plan()
        assert scales() == pytest.approx([1.0, 2.0, 4.0, 10.0])


def test_a_plan_does_not_depend_on_the_shape_of_a_batch():
    """Where branches cost alike at one length and not at another: ranks see other lengths, resumed runs none yet."""
    model = toy_model(8)
    for number, block in enumerate(model):
        block.gate.flops = lambda batch_size, seq_len, power=1 + number % 2: float(batch_size * seq_len**power)
    handler = DropBPHandler(model, 0.5)
    plans = [handler.draw(step) for step in range(8)]
    model(torch.ones(2, 1, 8))
    assert len(set(handler.flops())) == 1
    assert [handler.draw(step) for step in range(8)] == plans
    assert {sum(plan.kept[0::2]) for plan in plans} == {sum(plan.kept[1::2]) for plan in plans} == {2}


def test_a_new_handler_takes_back_the_plan_of_the_old_one():
    model = toy_model()
    DropBPHandler(model, 0.5).set_plan([False] * 4)
    handler = DropBPHandler(model, 0.5)
    assert handler.plan.kept == tuple(gate.kept for gate in handler.gates.values()) == (True,) * 4
    assert handler.plan.step == -1  # drawn for no step


def test_report_counts_what_was_drawn():
    model = toy_model()
    handler = DropBPHandler(model, 0.5)
    for _ in range(10):
        train_step(model, handler)
    report = handler.report()
    assert report["num_steps"] == 10
    assert report["realised_drop_rate"] == pytest.approx(0.5)
    assert report["flops_kept"] == pytest.approx(0.5)
    assert [branch["name"] for branch in report["branches"]] == [f"{i}.gate" for i in range(4)]
    assert sum(branch["num_kept"] for branch in report["branches"]) == 20
    for branch in report["branches"]:
        assert branch["num_kept"] + branch["num_dropped"] == 10
        assert branch["flops"] == 8.0 * 2 * 3 * 64  # the shape of the last call
    assert DropBPHandler(toy_model(), 0.5).report()["realised_drop_rate"] is None


def test_resume_is_exact():
    def fresh():
        model = toy_model(6)
        return model, DropBPHandler(model, 0.5, seed=7)

    model, handler = fresh()
    plans = []
    for step in range(8):
        if step == 4:
            state = json.loads(json.dumps(handler.state_dict()))  # survives a JSON file
        plans.append(handler.step())
        model(torch.ones(1, 1, 8))
    resumed_model, resumed = fresh()
    resumed.load_state_dict(state)
    assert resumed.plan == plans[3]
    for step in range(4, 8):
        assert resumed.step() == plans[step]
        resumed_model(torch.ones(1, 1, 8))
    assert resumed.state_dict() == handler.state_dict()


@pytest.mark.parametrize("granularity", ["branch", "sample"])
def test_resume_within_a_schedule(granularity):
    """Between two micro-batches of a step, in a handler that was not told how long the run is."""

    def fresh(**options):
        model = toy_model()
        options = {"grad_scale": "unbiased", "granularity": granularity, "schedule": "cosine", **options}
        return model, DropBPHandler(model, 0.75, strict=False, **options)

    _, handler = fresh(total_steps=8)
    for _ in range(5):
        handler.step()
    model, resumed = fresh()
    resumed.load_state_dict(json.loads(json.dumps(handler.state_dict())))
    found = [gate.grad_scale for gate in resumed.gates.values()]
    assert found == [gate.grad_scale for gate in handler.gates.values()]
    assert 1.0 < found[0] < 4.0
    model(torch.ones(4, 3, 8)).sum().backward()
    assert [entry.total_steps for entry in (resumed, handler)] == [8, 8]
    assert resumed.draw(5).kept_shares == handler.draw(5).kept_shares


def test_calibrate_sets_rates_and_leaves_the_model_as_found():
    model = toy_model(6, dropout=0.1)
    handler = DropBPHandler(model, 0.5)
    handler.step()
    x = torch.randn(4, 3, 8)
    model(x).sum().backward()
    before = gradients(model)
    plan, rng = handler.plan, torch.get_rng_state()
    rates = handler.calibrate(lambda: model(x).square().sum())
    assert rates == handler.drop_rates
    assert len(set(rates)) > 1
    assert sum(rates) / 6 == pytest.approx(0.5, abs=0.1)
    assert handler.calibration.drop_rates == tuple(rates)
    assert handler.plan is plan
    assert [gate.kept for gate in handler.gates.values()] == list(plan.kept)
    assert torch.equal(torch.get_rng_state(), rng)
    assert model.training
    for name, grad in gradients(model).items():
        assert (grad is None) == (before[name] is None)
        assert grad is None or torch.equal(grad, before[name]), name


def test_a_calibration_is_used_again(tmp_path):
    model = toy_model()
    handler = DropBPHandler(model, 0.5)
    handler.calibrate(lambda: model(torch.ones(2, 3, 8)).square().sum())
    handler.calibration.save(tmp_path / "calibration.json")
    other = DropBPHandler(toy_model(), 0.5)
    assert other.use_calibration(tmp_path / "calibration.json") == handler.drop_rates == other.drop_rates
    assert other.calibration == handler.calibration
    less = DropBPHandler(toy_model(), 0.25)
    rates = less.use_calibration(handler.calibration)
    assert less.calibration == replace(handler.calibration, drop_rate=0.25, drop_rates=tuple(rates))
    assert rates == allocate(handler.calibration.sensitivities, handler.flops(), 0.25)
    with pytest.raises(ValueError, match=r"calibration: expected the 5 branches of this model, got 4 .* lacks 4\.gate"):
        DropBPHandler(toy_model(5), 0.5).use_calibration(handler.calibration)
    with pytest.raises(ValueError, match=r"drop_rate: expected less than 0\.9"):
        DropBPHandler(toy_model(), 0.95).use_calibration(handler.calibration)
    resumed = DropBPHandler(toy_model(), 0.5)
    resumed.load_state_dict(json.loads(json.dumps(handler.state_dict())))
    assert resumed.calibration == handler.calibration


def test_state_of_another_model_changes_nothing():
    handler = DropBPHandler(toy_model(4), 0.5)
    state = DropBPHandler(toy_model(5), 0.25).state_dict()
    with pytest.raises(ValueError, match=r"state: expected the 4 branches of this model, got 5 .* has no 4\.gate"):
        handler.load_state_dict(state)
    with pytest.raises(ValueError, match="state: expected version 1, got None"):
        handler.load_state_dict({})
    before = handler.state_dict()
    for name, wrong in (("calibration", {}), ("plan", ["kept"] * 4), ("plan", [False]), ("drop_rates", [0.5])):
        with pytest.raises((TypeError, ValueError), match=r"state|plan|drop_rates"):
            handler.load_state_dict({**DropBPHandler(toy_model(4), 0.25).state_dict(), "num_steps": 3, name: wrong})
    assert handler.state_dict() == before


@pytest.mark.parametrize("drop_rate", [1.0, -0.1, 1.5, float("nan"), float("inf")])
def test_drop_rate_out_of_range(drop_rate):
    with pytest.raises(ValueError, match="drop_rate: expected 0 <= drop_rate < 1"):
        DropBPHandler(toy_model(), drop_rate)


@pytest.mark.parametrize("drop_rate", ["0.5", None, True])
def test_drop_rate_of_a_wrong_type(drop_rate):
    with pytest.raises(TypeError, match="drop_rate: expected a number"):
        DropBPHandler(toy_model(), drop_rate)


def test_no_gates_names_the_module_types():
    with pytest.raises(ValueError, match="at least one DropBP gate, got none; module types found: Linear, Sequential"):
        DropBPHandler(torch.nn.Sequential(torch.nn.Linear(1, 1)), 0.5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"grad_scale": "big"}, ValueError, 'grad_scale: expected a finite number or "unbiased"'),
        ({"grad_scale": float("nan")}, ValueError, 'grad_scale: expected a finite number or "unbiased"'),
        ({"grad_scale": None}, ValueError, 'grad_scale: expected a finite number or "unbiased"'),
        ({"dropped_runs": "fast"}, ValueError, "dropped_runs: expected one of inference, detach, got 'fast'"),
        ({"sampler": "fair"}, ValueError, "sampler: expected a callable or one of balanced"),
        ({"total_steps": "many"}, ValueError, "total_steps: expected a number of steps, at least 1, got 'many'"),
        ({"total_steps": float("inf")}, ValueError, "total_steps: expected a number of steps, at least 1, got inf"),
        ({"seed": "a"}, TypeError, "seed: expected an integer, got 'a'"),
        ({"keep_one": 0}, TypeError, "keep_one: expected True or False, got 0"),
        ({"strict": "no"}, TypeError, "strict: expected True or False, got 'no'"),
    ],
)
def test_other_arguments(options, error, message):
    with pytest.raises(error, match=message):
        DropBPHandler(toy_model(), 0.5, **options)


@pytest.mark.parametrize("model", [None, "llama", [torch.nn.Linear(1, 1)], torch.nn.Linear])
def test_what_is_no_model(model):
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got (NoneType|str|list|type)"):
        DropBPHandler(model, 0.5)


def test_replicas_are_refused():
    with pytest.raises(ValueError, match="got DataParallel, which runs replicas; use DistributedDataParallel"):
        DropBPHandler(torch.nn.DataParallel(toy_model()), 0.5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda h: h.set_drop_rates([0.5, 0.5]), ValueError, "drop_rates: expected one for each of the 4 .* got 2"),
        (lambda h: h.set_drop_rates(0.5), TypeError, "drop_rates: expected a list with one for each .* got float"),
        (lambda h: h.set_plan([True]), ValueError, "plan: expected one entry for each of the 4"),
        (lambda h: h.set_plan(True), TypeError, "plan: expected a list with one entry for each .* got bool"),
        (lambda h: h.load_state_dict([]), TypeError, "state: expected what state_dict returned, got list"),
        (lambda h: h.load_state_dict({"version": 1}), ValueError, "state: expected the keys .* it lacks branches"),
        (lambda h: h.calibrate(torch.ones(())), TypeError, "loss: expected a function that returns it, .* got Tensor"),
        (lambda h: h.calibrate(None), TypeError, "loss: expected a function that returns it, .* got NoneType"),
        (lambda h: h.calibrate([]), ValueError, "loss: expected a function, or one for each micro-batch, got none"),
    ],
)
def test_arguments_of_methods(call, error, message):
    handler = DropBPHandler(toy_model(), 0.5)
    before = handler.state_dict()
    with pytest.raises(error, match=message):
        call(handler)
    assert handler.state_dict() == before


def test_shared_gate_counts_once():
    gate = DropBP()
    model = torch.nn.ModuleList([gate, gate])
    assert len(DropBPHandler(model, 0.5).gates) == 1


def test_flops_are_known_of_all_gates_or_of_none():
    model = toy_model(2)
    model[1].gate.flops = None
    with pytest.raises(ValueError, match=r"all 2 with flops or all without, but 1 lack them \(1\.gate\)"):
        DropBPHandler(model, 0.5, dropped_runs="detach")
    assert model[0].gate.dropped_runs == "inference"
    model[0].gate.flops = None
    handler = DropBPHandler(model, 0.5)
    assert len(set(handler.flops())) == 1
    x = torch.randn(2, 3, 8)
    assert len(handler.calibrate(lambda: model(x).square().sum())) == 2


def test_a_callable_sampler_is_used():
    handler = DropBPHandler(toy_model(), 0.5, sampler=lambda rates, flops, seed, step: (step % 2 == 0,) * len(rates))
    assert handler.draw(0) == DropPlan((True,) * 4, 0, 0)


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        ((True,) * 3, ValueError, "sampler: expected it to return 4 bools, got 3 at step 0"),
        (True, TypeError, "sampler: expected it to return a tuple of bools, got bool at step 0"),
        (None, TypeError, "sampler: expected it to return a tuple of bools, got NoneType"),
        ((1, 0, 0, 0), TypeError, "sampler: expected it to return bools, got 1 of type int"),
        ("TTTT", TypeError, "sampler: expected it to return a tuple of bools, got str"),
    ],
)
def test_what_a_callable_sampler_may_not_return(returned, error, message):
    handler = DropBPHandler(toy_model(), 0.5, sampler=lambda *_: returned)
    with pytest.raises(error, match=message):
        handler.step()
    assert handler.num_steps == 0
    assert all(gate.kept for gate in handler.gates.values())


def test_numbers_of_numpy():
    np = pytest.importorskip("numpy")
    handler = DropBPHandler(toy_model(), np.float32(0.5), seed=np.int64(3))
    assert json.loads(json.dumps(handler.state_dict()))["seed"] == 3
    assert repr(handler) == "DropBPHandler(4 branches, drop_rate=0.5, step 0)"
