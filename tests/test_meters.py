"""What DropBPCallback logs: counted from plans and shapes, and times."""

import dataclasses
import itertools
from types import SimpleNamespace

import pytest
import torch
from models import gradients, tiny_causal_lm, toy_model
from torch import nn

pytest.importorskip("accelerate")

from trainer_runs import NUM_BRANCHES, Watcher, train, two_rows
from transformers import TrainerCallback

from dropbp_kernels import DropBPCallback, DropBPHandler, apply_dropbp
from dropbp_kernels.integrations import meters
from dropbp_kernels.integrations.families import FAMILIES
from dropbp_kernels.integrations.meters import PlanMeter, TimeMeter, saved_bytes_by_branch
from dropbp_kernels.layer import DropBP
from dropbp_kernels.measure import saved_bytes

pytestmark = pytest.mark.usefixtures("one_thread")


def test_logs_reach_tensorboard(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    callback = DropBPCallback(0.5, measure=True)
    trainer = train(tmp_path / "run", callback, report_to="tensorboard")
    events = EventAccumulator(str(next((tmp_path / "logs").rglob("events*")).parent))
    events.Reload()
    written = {tag.removeprefix("train/"): [e.value for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    names = [name for name in logged[-1] if name.startswith("dropbp_")]
    assert set(names) == {
        *("dropbp_drop_rate", "dropbp_flops_kept", "dropbp_bytes_not_saved", "dropbp_tokens_per_second"),
        *("dropbp_forward_ms", "dropbp_backward_ms", "dropbp_step_ms", "dropbp_peak_memory_mib"),
    }
    for name in names:
        expected = [entry[name] for entry in logged if name in entry]
        assert written[name] == pytest.approx(expected, rel=1e-6), name
        assert min(expected) > 0
    assert written["dropbp_drop_rate"] == pytest.approx([0.5] * 3)


def test_logged_numbers_are_those_of_the_plans(tmp_path):
    callback = DropBPCallback(0.5, sampler="bernoulli")
    watcher = Watcher(callback)
    trainer = train(tmp_path, callback, callbacks=[watcher], gradient_accumulation_steps=2)
    flops = callback.handler.flops()
    sizes = saved_bytes_by_branch(callback.handler, lambda: trainer.model(**two_rows()))
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    for index, entry in enumerate(logged):
        kept = [plan.kept for plan in watcher.plans[4 * index : 4 * index + 4]]
        assert entry["dropbp_drop_rate"] == pytest.approx(1 - sum(map(sum, kept)) / (4 * NUM_BRANCHES))
        kept_flops = sum(f for plan in kept for f, k in zip(flops, plan, strict=True) if k)
        assert entry["dropbp_flops_kept"] == pytest.approx(kept_flops / (4 * sum(flops)))
        not_saved = sum(size for plan in kept for size, k in zip(sizes, plan, strict=True) if not k) / 4
        assert entry["dropbp_bytes_not_saved"] == pytest.approx(not_saved)


def test_tokens_a_second_are_those_of_all_processes_while_steps_ran(monkeypatch):
    """Two steps of 2 s and 3 s, two micro-batches of 2 x 3 tokens each; between them somebody evaluates for 8 s."""
    clock = iter([0.0, 2.0, 10.0, 13.0])
    monkeypatch.setattr(meters, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    model = toy_model()
    meter = PlanMeter(DropBPHandler(model, 0.5))
    for _ in range(2):
        meter.start_step()
        for _ in range(2):
            model(torch.ones(2, 3, 8))
            meter.count_micro_batch()
        meter.end_step()
    assert meter.read(num_processes=3)["tokens_per_second"] == pytest.approx(3 * 24 / 5)
    assert meter.read() == {}
    meter.count_micro_batch()  # of a step that has not ended yet
    assert "tokens_per_second" not in meter.read()


def test_a_loss_may_call_the_model_several_times(monkeypatch):
    """Of 2 x 3 and 2 x 5 tokens, with what is called without gradients and between the steps left out."""
    clock = iter([0.0, 1.0, 2.0, 3.0])
    monkeypatch.setattr(meters, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    model = toy_model()
    handler = DropBPHandler(model, 0.5)
    meter = PlanMeter(handler)
    meter.bytes_per_token = [10.0] * len(handler.gates)
    handler.set_plan([False] + [True] * (len(handler.gates) - 1))
    for _ in range(2):
        model(torch.ones(2, 7, 8))
        meter.start_step()
        model(torch.ones(2, 3, 8))
        model(torch.ones(2, 5, 8))
        with torch.no_grad():
            model(torch.ones(2, 4, 8))
        meter.count_micro_batch()
        meter.end_step()
    values = meter.read()
    assert values["tokens_per_second"] == 16.0
    assert values["bytes_not_saved"] == 160.0
    meter.close()
    assert not model._forward_hooks


def test_logs_are_of_all_processes_and_of_training_alone():
    callback = DropBPCallback(0.5)
    callback._plans = SimpleNamespace(read=lambda num_processes: {"processes": num_processes})
    for name, added in (("loss", {"dropbp_processes": 3}), ("eval_loss", {})):
        logs, state = {name: 1.0}, SimpleNamespace(log_history=[{}])
        callback.on_log(SimpleNamespace(world_size=3), state, None, logs=logs)
        assert logs == {name: 1.0, **added}
        assert state.log_history == [added]


@pytest.mark.parametrize("by_modules", [False, True])
def test_saved_bytes_by_branch_are_what_dropping_it_takes_off(by_modules):
    model, batch = tiny_causal_lm(), two_rows()
    family = dataclasses.replace(FAMILIES["llama"], forward=None) if by_modules else "llama"
    handler = apply_dropbp(model, 0.5, families=[family], fused=False)  # a fused norm saves in no branch
    handler.set_plan([True, False, True, True, False, True])
    grads, plan = gradients(model), handler.plan
    with torch.no_grad():
        sizes = saved_bytes_by_branch(handler, lambda: model(**batch))
    assert handler.plan is plan
    assert [gate.kept for gate in handler.gates.values()] == list(plan.kept)
    assert not any("run" in vars(gate) for gate in handler.gates.values())
    assert gradients(model) == grads

    def saved(kept):
        handler.set_plan(kept)
        with saved_bytes() as count:
            model(**batch)
        return count.num_bytes

    everything = saved([True] * NUM_BRANCHES)
    taken_off = [everything - saved([i != index for i in range(NUM_BRANCHES)]) for index in range(NUM_BRANCHES)]
    assert sizes[1:] == taken_off[1:]
    assert sizes[0] == taken_off[0] + 2 * 12 * 8 * 4  # cosines and sines, which all attentions save
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert saved_bytes_by_branch(handler, lambda: model(**batch)) == [0] * NUM_BRANCHES


def test_what_a_branch_within_a_branch_saves_is_the_inner_ones():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.outer, self.inner = DropBP(flops=lambda *shape: 1.0), DropBP(flops=lambda *shape: 1.0)

        def forward(self, x):
            return self.outer.residual_add(x, lambda x: self.inner.residual_add(x, torch.sin).sigmoid())

    handler = DropBPHandler(model := Nested(), 0.5)
    x = torch.randn(1, 3, 8, requires_grad=True)
    assert saved_bytes_by_branch(handler, lambda: model(x)) == [x.nbytes, x.nbytes]


def test_probes_are_not_timed(tmp_path, monkeypatch):
    """By a clock that ticks when it is read: two forwards and two backwards a step, in those with a probe too."""
    ticks = itertools.count()
    monkeypatch.setattr(meters, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    callback = DropBPCallback(0.5, rates="sensitivity", calibrate_at=0.5, measure=True)
    trainer = train(tmp_path, callback, gradient_accumulation_steps=2, logging_steps=1)
    assert callback.handler.calibration is not None
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    for name in ("dropbp_forward_ms", "dropbp_backward_ms"):
        assert [entry[name] for entry in logged] == [2000.0] * 6


def test_times_by_hand(monkeypatch):
    """By a clock that ticks when it is read. Forwards without a gradient take no time, nor does what is paused."""
    ticks = itertools.count()
    monkeypatch.setattr(meters, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    model = nn.Linear(2, 2)
    meter = TimeMeter(model)
    assert (meter.read(), meter.summary()) == ({}, "no step was timed")
    x = torch.ones(1, 2)
    meter.end("backward")  # never began
    for _ in range(2):
        meter.begin("step")
        for _ in range(2):
            model(x)  # backward begins at its end
            with torch.no_grad():
                model(x)
            with meter.paused():
                model(x)
                meter.end("backward")
            meter.end("backward")
            meter.end("backward")
        meter.end("step")
    # Reads of the clock: 2 for a forward, 1 where the backward begins, 4 in the pause, 1 at the end.
    totals = {"forward": 4.0, "backward": 4 * 5.0, "step": 2 * 17.0}
    assert meter.totals == totals
    values = meter.read()
    assert values.pop("peak_memory_mib") > 50  # of this process: torch alone takes more
    assert values == {f"{part}_ms": 1e3 * seconds / 2 for part, seconds in totals.items()}
    assert meter.read() == {}
    assert meter.summary().startswith("forward 2000.0 ms, backward 10000.0 ms, step 17000.0 ms, peak memory ")
    meter.close()
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_measure_prints_times_and_memory(tmp_path, capsys):
    trainer = train(tmp_path, DropBPCallback(0.5, measure=True), gradient_accumulation_steps=2)
    out = capsys.readouterr().out
    assert "DropBP: forward " in out
    assert "(mean of 6 optimizer steps)" in out
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert 0 < entry["dropbp_forward_ms"] + entry["dropbp_backward_ms"] < entry["dropbp_step_ms"]
    assert not trainer.model._forward_hooks
    assert not trainer.model._forward_pre_hooks


def test_one_process_of_several_prints_times(tmp_path, capsys):
    class Second(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            state.is_world_process_zero = False

    train(tmp_path, DropBPCallback(0.5, measure=True), callbacks=[Second()], max_steps=1)
    assert "DropBP: " not in capsys.readouterr().out
