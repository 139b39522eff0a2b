"""The steps of the command line's runs by themselves: what is random, what is trained on, validation by hand."""

import contextlib
import itertools
import signal
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dropbp_kernels.cli.data import IGNORED, Data, Row
from dropbp_kernels.cli.settings import Settings
from dropbp_kernels.cli.training import History, Run, _postfix, _until_interrupted, train
from dropbp_kernels.coreset import CoresetSelector

pytestmark = pytest.mark.usefixtures("one_thread")


class Noisy(nn.Module):
    """Its loss is the mean of its labels by a weight of 1, and of what dropout leaves of it."""

    def __init__(self, rate=0.5):
        super().__init__()
        self.weight, self.dropout = nn.Parameter(torch.ones(64)), nn.Dropout(rate)
        self.unused, self.calls = nn.Parameter(torch.ones(2)), []

    def forward(self, input_ids, labels):
        self.calls.append((self.training, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        targets = labels[:, 1:][labels[:, 1:] != IGNORED]
        return SimpleNamespace(loss=targets.float().mean() * self.dropout(self.weight).mean())


def rows(*labels):
    return [Row(torch.tensor(row), torch.tensor(row)) for row in labels]


def run_of(model, data, coreset=None, **settings):
    defaults = {"device": "cpu", "dtype": "float32", "learning_rate": 0.0, "batch_size": 2, "steps": 4}
    settings = Settings(**{**defaults, **settings})
    return Run("ours", model, None, settings.batch_size, Data(data, 0, 0, ""), settings, coreset)


def test_noise_is_a_function_of_seed_and_step_alone():
    def losses(seed, num_draws_before):
        run = run_of(Noisy(), rows(*[[1, 2, 3]] * 8), seed=seed)
        for step in range(3):
            torch.rand(num_draws_before)
            run.step(step)
        return run.history.train_loss

    assert losses(0, 0) == losses(0, 5) != losses(1, 0)
    assert len(set(losses(0, 0))) == 3


def test_autocast_where_the_dtype_asks_for_it():
    for dtype, is_cast in (("float32", False), ("bfloat16", True)):
        run = run_of(model := Noisy(), rows([1, 2]) * 4, dtype=dtype)
        run.loss(*run.data.batch(0, 2))
        assert model.calls == [(True, True, is_cast)]


def test_validation_by_hand():
    """Batches of two rows, shortest first; the mean is over labels, whose first of a row has no loss."""
    data = rows(*[[9, 9]] * 60)
    data[0], data[20], data[40] = rows([7, 2], [7, 4, 4], [7, IGNORED, 1, 1])
    run = run_of(model := Noisy(), data)
    assert [len(row.ids) for row in run.data.validation] == [2, 3, 4]
    run.history.validation.append((0, 5.0))
    assert run.validate(3) == pytest.approx((2 + 4 + 4 + 1 + 1) / 5)
    assert run.history.validation == [(0, 5.0), (3, pytest.approx(12 / 5))]
    assert model.calls == [(False, False, False)] * 2
    assert model.training


@pytest.mark.parametrize("missing_grad", ["skip", "zero"])
def test_a_step_by_hand(monkeypatch, missing_grad):
    """A gradient of norm 100, clipped to 1; a parameter that gets none; a clock that is read four times."""
    run = run_of(model := Noisy(0.0), rows([800, 800]) * 4, missing_grad=missing_grad)
    clock = iter([0.0, 1.0, 3.0, 6.0])
    monkeypatch.setattr(run, "now", lambda: next(clock))
    seen = []

    def note(optimizer, args, kwargs):
        seen.append((float(model.weight.grad.norm()), model.unused.grad is None))

    run.optimizer.register_step_pre_hook(note)
    run.step(0)
    assert seen == [(pytest.approx(1.0), missing_grad == "skip")]
    assert all(parameter.grad is None for parameter in model.parameters())
    history = run.history
    assert (history.forward_s, history.backward_s, history.step_s) == ([1.0], [2.0], [6.0])
    assert history.train_loss == [800.0]
    assert run.num_tokens == 2 * 16


def test_it_calibrates_once_after_a_tenth_of_the_steps(monkeypatch):
    class Handler:
        calibration = None

        def __init__(self):
            self.seen = []

        def step(self):
            self.seen.append("step")

        def calibrate(self, loss, *, allocation):
            self.calibration = loss().item()
            self.seen.append(allocation)

    run = run_of(Noisy(0.0), rows([5, 5]) * 4, rates="sensitivity", allocation="optimal", steps=20)
    run.handler = Handler()
    ticks = itertools.count()
    monkeypatch.setattr(run, "now", lambda: float(next(ticks)))
    for step in range(4):
        run.step(step)
    assert run.handler.seen == ["step", "step", "optimal", "step", "step"]
    assert (run.handler.calibration, run.history.calibration_s) == (5.0, 1.0)


def test_a_trial_of_a_coreset_leaves_no_trace():
    selector = CoresetSelector(model := Noisy(), method="random")
    run = run_of(model, rows(*[[n, n] for n in range(24)]), selector)
    batch = run.data.batch(0, 12)
    tried, again, chosen, later = (run.chosen(batch, is_trial=is_trial)[0] for is_trial in (True, True, False, False))
    assert tried.shape == (6, 16)
    assert torch.equal(tried, again)
    assert torch.equal(tried, chosen)
    assert not torch.equal(chosen, later)
    assert selector.step == 2


def test_a_state_holds_all_that_the_next_step_depends_on(tmp_path):
    def made():
        selector = CoresetSelector(model := Noisy(), method="random", seed=3)
        return run_of(model, rows(*[[n, n] for n in range(24)]), selector, learning_rate=0.1, batch_size=8)

    whole, first, second = made(), made(), made()
    whole.step(0), first.step(0)
    whole.validate(1), first.validate(1)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    whole.step(1), second.step(1)
    assert second.history.train_loss == whole.history.train_loss
    assert second.history.validation == whole.history.validation
    assert torch.equal(second.model.weight, whole.model.weight)
    assert second.coreset.state_dict() == whole.coreset.state_dict()


class Counted:
    """A run that notes its steps and validations in a list that several share."""

    def __init__(self, name, events):
        self.name, self.events, self.history, self.num_tokens = name, events, History(), 1

    def step(self, step):
        self.events.append((self.name, step))
        self.history.train_loss.append(1.0)

    def validate(self, step):
        self.events.append((self.name, f"after {step}"))
        self.history.validation.append((step, 2.0))


def test_runs_take_turns_and_are_validated_four_times_after_the_first():
    events, notes, saved = [], [], []
    runs = [Counted(name, events) for name in "ab"]
    settings = Settings(steps=6, save_every=3)
    assert train(runs, settings, 0, saved.append, notes.append) == 6
    steps = [(name, step) for step in range(6) for name in ("ab" if step % 2 == 0 else "ba")]
    assert [event for event in events if event in steps] == steps
    assert runs[0].history.validation == runs[1].history.validation == [(step, 2.0) for step in (0, 2, 4, 6)]
    assert events[0] == ("a", "after 0")
    assert ("b", "after 0") not in events  # where they are all the same model
    assert saved == [3]
    assert _postfix(runs, 2.0) == "loss 1.000, 1 tokens/s"  # of both
    assert notes[0] == "validation loss after 0 steps: a 2.0000, b 2.0000"
    events.clear()
    assert train(runs, Settings(steps=7, save_every=0), 6, saved.append, notes.append) == 7
    assert events == [("a", 6), ("b", 6), ("a", "after 7"), ("b", "after 7")]
    assert saved == [3]


@pytest.fixture
def interruptible():
    """Python's own handler of Ctrl-C, which a process that a shell put into the background begins without."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_the_second_interrupt_is_an_interrupt(capfd):
    before = signal.getsignal(signal.SIGINT)
    for number in (1, 2):
        with contextlib.suppress(KeyboardInterrupt), _until_interrupted() as interrupted:
            assert not interrupted.is_set()
            signal.raise_signal(signal.SIGINT)
            assert interrupted.is_set()
            assert "Ctrl-C again to stop at once" in capfd.readouterr().err
            if number == 2:
                signal.raise_signal(signal.SIGINT)
                raise AssertionError("expected KeyboardInterrupt")
        assert signal.getsignal(signal.SIGINT) is before
    with _until_interrupted():
        pass
    assert signal.getsignal(signal.SIGINT) is before


def test_signals_are_left_alone_in_a_thread():
    def enter():
        with _until_interrupted() as interrupted:
            return interrupted.is_set()

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(enter).result() is False
