"""How calls are timed: in turns, on inputs that no cache holds, and nothing but the calls themselves."""

import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks import timing
from benchmarks.timing import Case, Timing, Variant

CPU = torch.device("cpu")


def case_of(variants, make_inputs=lambda: (), num_calls=1):
    return Case("op", "case", "fwd", torch.float32, 2, 3, 0, make_inputs, variants, num_calls)


def test_quantile_by_hand():
    assert timing.quantile([4.0, 1.0, 3.0, 2.0, 5.0], 0.2) == pytest.approx(1.8)
    assert timing.quantile([4.0, 1.0, 3.0, 2.0, 5.0], 0.8) == pytest.approx(4.2)
    assert timing.quantile([7.0], 0.8) == 7.0


@pytest.fixture
def wait(monkeypatch):
    """Makes the clock of timings go on by so many milliseconds; it stands otherwise, however busy the machine is."""
    now_ns = [0]
    clock = SimpleNamespace(perf_counter=time.perf_counter, perf_counter_ns=lambda: now_ns[0])
    monkeypatch.setattr(timing, "time", clock)

    def wait(milliseconds):
        now_ns[0] += milliseconds * 1_000_000

    return wait


def test_variants_take_turns_and_only_run_is_timed(wait):
    calls = []

    def prepare(inputs):
        wait(20)
        return "state"

    def call(name):
        def run(state):
            wait(3)
            calls.append((name, state))

        return run

    case = case_of({"a": Variant(call("a"), prepare), "b": Variant(call("b"))}, num_calls=2)
    timings = timing.measure(case, CPU, seconds=0.0, min_rounds=16)
    names = [name for name, _ in calls][-4 * 16 :]
    assert {tuple(names[i : i + 4]) for i in range(0, len(names), 4)} == {
        ("a", "a", "b", "b"),
        ("b", "b", "a", "a"),
    }  # in either order
    assert {state for name, state in calls if name == "a"} == {"state"}
    # Of one call, where a sample is several; without what prepares them.
    assert timings["a"].samples_ms == timings["b"].samples_ms == [3.0] * 16


def test_many_calls_on_a_gpu_are_timed_by_the_host_when_it_is_idle(monkeypatch, wait):
    """By events the first calls, launched while a buffer is written, would count for nothing."""
    calls = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: calls.append("wait"))
    case = case_of({"a": Variant(lambda _: calls.append("call") or wait(5))}, num_calls=2)
    timings = timing.measure(case, torch.device("cuda"), seconds=0.0, min_rounds=2)
    assert calls[timing.WARM_UP_CALLS :] == ["wait", "call", "call"] * 2
    assert timings["a"].median_ms == 5.0


def test_samples_rotate_among_inputs_that_exceed_the_cache(monkeypatch):
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 100)
    made, used = [], []

    def make_inputs():
        made.append(torch.zeros(10))  # 40 bytes: 10 sets make four times the cache
        return made[-1]

    variants = {name: Variant(lambda state: used.append(state.data_ptr())) for name in "ab"}
    timing.measure(case_of(variants, make_inputs), CPU, seconds=0.0, min_rounds=5)
    assert len(made) == 10
    assert len(set(used[-10:])) == 10  # no set comes back before all others were used


def test_rounds_start_with_another_run_each_and_warm_up_is_left_out():
    calls = []
    runs = {name: lambda name=name: calls.append(name) or len(calls) for name in "abc"}
    assert timing.in_turn(runs, num_rounds=2, num_warm_up=1) == {"a": [6, 8], "b": [4, 9], "c": [5, 7]}
    assert calls == [*"abc", *"bca", *"cab"]


def test_copy_bandwidth_counts_reads_and_writes(monkeypatch):
    monkeypatch.setattr(timing, "measure", lambda *args, **kwargs: {"copy": Timing([2.0, 2.0])})
    assert timing.copy_bandwidth(CPU, 1_000_000) == pytest.approx(1.0)  # 2 MB in 2 ms
