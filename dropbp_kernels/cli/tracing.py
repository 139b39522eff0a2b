"""What each branch of a model did in one step, read off a torch.profiler trace.

The modules of a branch are put into named ranges while they run. Autograd numbers its nodes: an operator in a range
that made a node, and the event in which the engine runs that node, bear the same number. So the backward of a branch
is found by what the engine did, not by what the gates say.
"""

import bisect
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from ..handler import DropBPHandler
from ..measure import saved_bytes

RANGE = "dropbp branch "
ENGINE = "autograd::engine::evaluate_function"


@dataclass(frozen=True)
class BranchTrace:
    """One branch in one step. Times in milliseconds, of the trace; flops are the branch's, forward."""

    name: str
    kept: bool
    saved_bytes: int
    forward_ms: float
    backward_ms: float
    num_backward: int
    flops: float

    def fault(self) -> str | None:
        """What contradicts the plan, if anything does."""
        if not self.kept and self.num_backward:
            return f"{self.name}: dropped, but autograd ran {self.num_backward} backward functions of it"
        if not self.kept and self.saved_bytes:
            return f"{self.name}: dropped, but it saved {self.saved_bytes} bytes for a backward"
        if self.kept and not self.num_backward:
            return f"{self.name}: kept, but autograd ran no backward function of it"
        return None


def trace_branches(handler: DropBPHandler, step: Callable[[], Any]) -> list[BranchTrace]:
    """Run `step` (forward and backward) three times under the plan that is set: to warm up, traced, counting bytes.

    Errors: ValueError when a gate does not know the modules of its branch.
    """
    unknown = next((name for name, gate in handler.gates.items() if not gate.modules_of_branch), None)
    if unknown is not None:
        raise ValueError(f"gates: expected all to know their modules, but {unknown} does not")
    step()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with _around(handler, lambda name: record_function(RANGE + name)), profile(activities=activities) as trace:
        step()
    saved = dict.fromkeys(handler.gates, 0)

    @contextlib.contextmanager
    def counting(name: str) -> Iterator[None]:
        with saved_bytes() as counted:
            yield
        saved[name] += counted.num_bytes

    with _around(handler, counting):
        step()
    # The timeline of a GPU repeats the ranges where their kernels ran, behind the calls: those are no calls.
    calls = [event for event in trace.events() if event.device_type == DeviceType.CPU]
    forward_us, nodes = _forward(calls)
    backward = _backward(calls, nodes)
    return [
        BranchTrace(
            name,
            bool(kept),
            saved[name],
            forward_us.get(name, 0.0) / 1e3,
            sum(backward.get(name, [])) / 1e3,
            len(backward.get(name, [])),
            flops,
        )
        for name, kept, flops in zip(handler.gates, handler.plan, handler.flops(), strict=True)
    ]


@contextlib.contextmanager
def _around(handler: DropBPHandler, context: Callable[[str], Any]) -> Iterator[None]:
    """Enter context(name) around every call of a module of branch `name`."""
    handles = []
    opened: list[Any] = []

    def entering(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            opened.append(context(name))
            opened[-1].__enter__()

        return hook

    def leaving(module: nn.Module, args: Any, output: Any) -> None:
        opened.pop().__exit__(None, None, None)

    for name, gate in handler.gates.items():
        for module in gate.modules_of_branch:
            handles.append(module.register_forward_pre_hook(entering(name)))
            handles.append(module.register_forward_hook(leaving))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _time_us(event: Any) -> float:
    """Of the device where that is a GPU, else of the CPU."""
    return event.device_time_total if torch.cuda.is_available() else event.time_range.elapsed_us()


def _forward(events: Any) -> tuple[dict[str, float], dict[tuple[int, int], str]]:
    """Time in the ranges of each branch, and which branch made the autograd node of (thread, number)."""
    in_order = sorted(events, key=lambda event: event.time_range.start)
    numbered = [event for event in in_order if event.sequence_nr >= 0 and not event.name.startswith(ENGINE)]
    starts = [event.time_range.start for event in numbered]
    time_us: dict[str, float] = {}
    nodes: dict[tuple[int, int], str] = {}
    for range_ in in_order:
        if not range_.name.startswith(RANGE):
            continue
        name = range_.name.removeprefix(RANGE)
        time_us[name] = time_us.get(name, 0.0) + _time_us(range_)
        first = bisect.bisect_left(starts, range_.time_range.start)
        after = bisect.bisect_left(starts, range_.time_range.end)
        # An operator that makes no node bears the number of the next one, which may be made after the range.
        end = numbered[after].sequence_nr if after < len(numbered) else float("inf")
        for event in numbered[first:after]:
            if event.sequence_nr < end:
                nodes[event.thread, event.sequence_nr] = name
    return time_us, nodes


def _backward(events: Any, nodes: dict[tuple[int, int], str]) -> dict[str, list[float]]:
    """Times of the backward functions of each branch."""
    found: dict[str, list[float]] = {}
    for event in events:
        if event.name.startswith(ENGINE) and event.sequence_nr >= 0:
            name = nodes.get((event.fwd_thread, event.sequence_nr))
            if name is not None:
                found.setdefault(name, []).append(_time_us(event))
    return found
