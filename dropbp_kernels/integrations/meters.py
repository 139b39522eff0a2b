"""What a training loop logs about dropping: counted from plans and shapes, and timed where that is asked for."""

import sys
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..handler import DropBPHandler
from ..sensitivity import left_as_found
from ..targets import TargetRule
from .gating import ModuleGate


def saved_bytes_by_branch(handler: DropBPHandler, forward: Callable[[], Any]) -> list[int]:
    """Bytes that autograd keeps for each branch of `handler`, in model order, when all are kept and forward() runs.

    What the branch's own operators save, parameters and what lies outside the gates excluded (a norm that is fused with
    the add before it too: it saves that sum and a float a row); a storage that several branches save counts for the
    first. Under gradient checkpointing a branch saves nothing, and counts as nothing.
    Gradients, RNG states, modes and plan are left as found.

    Errors: those of forward.
    Cost:   one forward with gradients enabled, in the memory of inference: what it would save is counted and let go.
    """
    num_bytes = [0] * len(handler.gates)
    running: list[int] = []  # the branch that runs now, innermost last
    alive: set[int] = set()  # storages counted; forgotten when they die, since their address may be used again

    def pack(tensor: Tensor) -> None:  # keeps nothing: an undropped graph may not fit where a dropped one does
        base = tensor._base if tensor._base is not None else tensor
        storage = tensor.untyped_storage()
        if running and not isinstance(base, nn.Parameter) and storage._cdata not in alive:
            alive.add(storage._cdata)
            weakref.finalize(storage, alive.discard, storage._cdata)
            num_bytes[running[-1]] += storage.nbytes()

    def counted(index: int, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run_counted(*args: Any, **kwargs: Any) -> Tensor:
            running.append(index)
            try:
                return run(*args, **kwargs)
            finally:
                running.pop()

        return run_counted

    with left_as_found(handler), torch.enable_grad(), ExitStack() as hooks:
        for index, gate in enumerate(handler.gates.values()):
            gate.kept = True
            if not isinstance(gate, ModuleGate):
                vars(gate)["run"] = counted(index, gate.run)
                hooks.callback(vars(gate).pop, "run")
                continue
            for module in gate.modules_of_branch:
                hooks.enter_context(module.register_forward_pre_hook(lambda *_, i=index: running.append(i)))
                hooks.enter_context(module.register_forward_hook(lambda *_: _pop(running), always_call=True))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda nothing: nothing):
            forward()
    return num_bytes


def _pop(stack: list[int]) -> None:
    stack.pop()


class PlanMeter:
    """Means over the plans since the last `read`: realised rate, backward FLOPs kept, bytes not saved, tokens a second.

    bytes_per_token: what each branch saves for a token when it is kept, None until that was measured.
    """

    def __init__(self, handler: DropBPHandler):
        self.handler = handler
        self.bytes_per_token: list[float] | None = None
        self._num_rows = 0  # of the calls since the last micro-batch: a loss may call the model once for each column
        self._hook = handler.model.register_forward_hook(lambda *_: self._called())
        self._clear()

    def _clear(self) -> None:
        self._num_plans = self._num_tokens = 0
        self._num_dropped = self._flops_kept = self._flops = self._seconds = 0.0
        self._rows_dropped = [0.0] * len(self.handler.gates)
        self._started: float | None = None

    def _called(self) -> None:
        if torch.is_grad_enabled():
            self._num_rows += self._rows_of_last_call()

    def _rows_of_last_call(self) -> int:
        gate = next(iter(self.handler.gates.values()))
        return gate.batch_size * gate.seq_len

    def start_step(self) -> None:
        """The optimizer step begins: time runs."""
        self._started = time.perf_counter()
        self._num_rows = 0

    def count_micro_batch(self) -> None:
        """Forward and backward ran under the plan of now; the gates know at which shape."""
        kept, flops = self.handler.plan.kept_shares, self.handler.flops()
        # Who calls the decoder by itself passes by the model's hooks.
        num_rows, self._num_rows = self._num_rows or self._rows_of_last_call(), 0
        targets = self.handler.targets  # under whose plan a gate sees only some of the batch with gradients
        self._num_plans += 1
        self._num_tokens += num_rows if targets is None else targets.num_tokens or num_rows
        self._num_dropped += len(kept) - sum(kept)
        self._flops += sum(flops)
        self._flops_kept += sum(cost * share for cost, share in zip(flops, kept, strict=True))
        # Not yet bytes: in the first step nobody knows those of a row.
        self._rows_dropped = [
            rows + num_rows * (1.0 - share) for rows, share in zip(self._rows_dropped, kept, strict=True)
        ]

    def end_step(self) -> None:
        """The optimizer step ended; what comes until the next one (evaluation, saving) takes none of its time."""
        if self._started is not None:
            self._seconds += time.perf_counter() - self._started
            self._started = None

    def read(self, num_processes: int = 1) -> dict[str, float]:
        """The means since the last read, and a fresh start; empty when no plan was counted."""
        if not self._num_plans:
            return {}
        values = {
            "drop_rate": self._num_dropped / (self._num_plans * len(self.handler.gates)),
            "flops_kept": self._flops_kept / self._flops,
        }
        if self.bytes_per_token is not None:
            num_bytes = sum(size * rows for size, rows in zip(self.bytes_per_token, self._rows_dropped, strict=True))
            values["bytes_not_saved"] = num_bytes / self._num_plans
        if self._seconds:
            values["tokens_per_second"] = num_processes * self._num_tokens / self._seconds
        self._clear()
        return values

    def close(self) -> None:
        """Take the hook off the model."""
        self._hook.remove()


def peak_memory_bytes() -> int:
    """Peak of memory allocated on the GPU in use, else the peak resident size of this process (0 where unknown)."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


class TimeMeter:
    """Times the forwards, backwards and optimizer steps of a training loop from its events.

    The GPU is waited for at every mark, so that a time is that of its own work; this costs a little speed.
    """

    PARTS = ("forward", "backward", "step")

    def __init__(self, model: nn.Module):
        self.totals = dict.fromkeys(self.PARTS, 0.0)
        self.num_steps = 0
        self._window = dict(self.totals)
        self._window_steps = 0
        self._marks: dict[str, float] = {}
        self._targets = TargetRule.of(model)
        self._hooks = [
            model.register_forward_pre_hook(lambda *_: self._forward_begins()),
            model.register_forward_hook(lambda *_: self._forward_ended()),
        ]

    def _forward_begins(self) -> None:
        if torch.is_grad_enabled() or (self._targets is not None and self._targets.is_inference):
            self.begin("forward")

    def _forward_ended(self) -> None:
        self.end("forward")
        if torch.is_grad_enabled():
            self.begin("backward")

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Forwards inside are none of the loop's own."""
        totals, window, marks = dict(self.totals), dict(self._window), dict(self._marks)
        yield
        self.totals, self._window, self._marks = totals, window, marks

    def begin(self, part: str) -> None:
        self._marks[part] = self._now()

    def end(self, part: str) -> None:
        """Nothing happens when the part never began, as the backward of a forward that some other code ran."""
        if part not in self._marks:
            return
        seconds = self._now() - self._marks.pop(part)
        self.totals[part] += seconds
        self._window[part] += seconds
        if part == "step":
            self.num_steps += 1
            self._window_steps += 1

    def _now(self) -> float:
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return time.perf_counter()

    def read(self) -> dict[str, float]:
        """Milliseconds of each part for a step, the mean since the last read, and the peak of memory so far."""
        if not self._window_steps:
            return {}
        values = {f"{part}_ms": 1e3 * seconds / self._window_steps for part, seconds in self._window.items()}
        self._window, self._window_steps = dict.fromkeys(self.PARTS, 0.0), 0
        return {**values, "peak_memory_mib": peak_memory_bytes() / 2**20}

    def summary(self) -> str:
        """One line: the mean of each part over all steps, and the peak of memory."""
        if not self.num_steps:
            return "no step was timed"
        means = ", ".join(f"{part} {1e3 * seconds / self.num_steps:.1f} ms" for part, seconds in self.totals.items())
        return f"{means}, peak memory {peak_memory_bytes() / 2**20:.0f} MiB (mean of {self.num_steps} optimizer steps)"

    def close(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()
