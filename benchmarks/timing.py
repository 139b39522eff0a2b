"""How a time is taken: warm, from a cold cache, variants in turn, median and p20/p80.

Cold cache. A kernel that runs twice on the same data reads it from the cache the second time; in training it does not.
On a CPU every sample uses another of many input sets, together far larger than the last cache level. On a GPU a buffer
larger than the L2 is written before every sample; that also keeps the GPU busy while the host launches the sample, so
that the events bracket the kernels and not the launches. What is called many times in one sample (num_calls) is a
matter of the host: its own clock takes the time, on a GPU too, from when the GPU has nothing left to do.

In turn. Round by round every variant is timed once, so that a noisy neighbour or a clock change meets all of them. Each
round has another random order: what runs after a variant that left the cache full of dirty lines pays for them.

On a CPU the heap is told to keep what it is given back. Whether a result lands in pages that the system must clear
first is luck of the heap otherwise, differs between variants, and costs several times what an addition does.
"""

import ctypes
import gc
import math
import platform
import random
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

WARM_UP_CALLS = 2
MIN_ROUNDS, MAX_ROUNDS = 9, 200
MAX_INPUT_SETS = 512
Name = TypeVar("Name")
Result = TypeVar("Result")
COPY_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}


@dataclass(frozen=True)
class Variant:
    """One way to compute a case: prepare(inputs) -> state is not timed, run(state) is."""

    run: Callable[[Any], Any]
    prepare: Callable[[Any], Any] = lambda inputs: inputs


@dataclass(frozen=True)
class Case:
    """One thing to compute, in several variants.

    moved_bytes: the least that must be read and written, the same number for all variants (0: not a matter of bytes).
    make_inputs: fresh random inputs. num_calls: calls of run in one sample, for what takes microseconds.
    """

    op: str
    case: str
    direction: str  # fwd, bwd, fwd+bwd
    dtype: torch.dtype
    rows: int
    width: int
    moved_bytes: int
    make_inputs: Callable[[], Any]
    variants: dict[str, Variant]
    num_calls: int = 1


@dataclass
class Timing:
    """Times of one variant of a case, in milliseconds."""

    samples_ms: list[float] = field(default_factory=list)

    @property
    def median_ms(self) -> float:
        return statistics.median(self.samples_ms)

    @property
    def p20_ms(self) -> float:
        return quantile(self.samples_ms, 0.2)

    @property
    def p80_ms(self) -> float:
        return quantile(self.samples_ms, 0.8)


def quantile(samples: Sequence[float], share: float) -> float:
    """The value below which `share` of the samples lie, interpolated linearly."""
    ordered = sorted(samples)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    return ordered[low] + (place - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])


def cache_bytes(device: torch.device) -> int:
    """Size of the last cache level in front of `device`'s memory; 32 MiB where it cannot be read."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    levels = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    return int(levels[-1].read_text().strip().removesuffix("K")) << 10 if levels else 32 << 20


def measure(case: Case, device: torch.device, *, seconds: float, min_rounds: int = MIN_ROUNDS) -> dict[str, Timing]:
    """Time every variant of `case` for about `seconds` in all; at least `min_rounds` samples each."""
    on_gpu = device.type == "cuda" and case.num_calls == 1
    clock = _CudaClock(device) if on_gpu else _HostClock(device)
    shuffle = random.Random(0)
    num_variants = len(case.variants)
    # Without time beyond the least number of rounds there is no use for more sets than these take.
    sets = _input_sets(case, device, MAX_INPUT_SETS if seconds else num_variants * min_rounds)
    share = len(sets) // num_variants  # sets of one variant
    for variant in case.variants.values():
        for index in range(WARM_UP_CALLS):
            variant.run(variant.prepare(sets[index % len(sets)]))

    timings = {name: Timing() for name in case.variants}
    pending: dict[str, deque[Any]] = {name: deque() for name in case.variants}
    if seconds:
        gc.collect()  # takes a third of a second, which a run without time is not worth
    gc.disable()  # the collector would stop one sample or another for milliseconds
    try:
        started, num_rounds = time.perf_counter(), 0
        while num_rounds < MAX_ROUNDS:
            is_late = time.perf_counter() - started > seconds
            if num_rounds >= min_rounds and is_late:
                break
            order = list(enumerate(case.variants.items()))
            shuffle.shuffle(order)
            for place, (name, variant) in order:
                if not pending[name]:
                    indices = [place + num_variants * (num_rounds + k) for k in range(share)]
                    pending[name].extend(variant.prepare(sets[index % len(sets)]) for index in indices)
                clock.sample(timings[name].samples_ms, variant.run, pending[name].popleft(), case.num_calls)
            num_rounds += 1
        clock.finish()
    finally:
        gc.enable()
    return timings


def in_turn(
    runs: Mapping[Name, Callable[[], Result]], num_rounds: int, num_warm_up: int = 0, what: str = "rounds"
) -> dict[Name, list[Result]]:
    """What each run returns in every round; a round starts with another run than the one before.

    For what takes long enough that no cache is warm. Warm-up rounds are left out of the result.
    """
    from tqdm import tqdm

    results: dict[Name, list[Result]] = {name: [] for name in runs}
    names = list(runs)
    for number in tqdm(range(num_warm_up + num_rounds), desc=what, leave=False, disable=None):
        for place in range(len(names)):
            name = names[(place + number) % len(names)]
            result = runs[name]()
            if number >= num_warm_up:
                results[name].append(result)
    return results


def milliseconds(call: Callable[[], Any], device: torch.device) -> float:
    """Of one call, the device waited for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start_ns = time.perf_counter_ns()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter_ns() - start_ns) / 1e6


def _input_sets(case: Case, device: torch.device, max_sets: int) -> list[Any]:
    """Enough sets of inputs for a cold cache; a multiple of the number of variants."""
    sets = [case.make_inputs()]
    num_sets = 1
    if device.type == "cpu" and case.num_calls == 1:
        set_bytes = sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(sets[0]) if isinstance(leaf, Tensor))
        # Four times the cache: variants share the sets, and each prepares a share of them at once.
        num_sets = min(math.ceil(4 * cache_bytes(device) / set_bytes), max_sets)
    num_sets = math.ceil(num_sets / len(case.variants)) * len(case.variants)
    if device.type == "cuda" or case.num_calls > 1:
        return sets * num_sets
    return sets + [case.make_inputs() for _ in range(num_sets - 1)]


class _HostClock:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        if platform.libc_ver()[0] == "glibc":
            libc = ctypes.CDLL(None)
            libc.mallopt(-4, 0)  # M_MMAP_MAX: no allocation is a mapping of its own
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: no free memory goes back to the kernel

    def sample(self, samples_ms: list[float], run: Callable[[Any], Any], state: Any, num_calls: int) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if num_calls == 1:
            start = time.perf_counter_ns()
            result = run(state)
            elapsed = time.perf_counter_ns() - start
        else:
            start = time.perf_counter_ns()
            for _ in range(num_calls):
                result = run(state)
            elapsed = time.perf_counter_ns() - start
        del result  # freed outside of the time, alike for all
        samples_ms.append(elapsed / num_calls / 1e6)

    def finish(self) -> None:
        pass


class _CudaClock:
    def __init__(self, device: torch.device) -> None:
        # A quarter of a millisecond of an H200, in which the host launches even a backward through Python.
        self.flush = torch.empty(max(2 * cache_bytes(device), 1 << 30), dtype=torch.int8, device=device)
        self.pending: list[tuple[list[float], Any, Any]] = []

    def sample(self, samples_ms: list[float], run: Callable[[Any], Any], state: Any, num_calls: int) -> None:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        start.record()
        run(state)
        end.record()
        self.pending.append((samples_ms, start, end))
        if len(self.pending) >= 64:  # bounds how far the host runs ahead, and thus the memory in flight
            self.finish()

    def finish(self) -> None:
        torch.cuda.synchronize()
        for samples_ms, start, end in self.pending:
            samples_ms.append(start.elapsed_time(end))
        self.pending.clear()


def copy_bandwidth(device: torch.device, nbytes: int | None = None) -> float:
    """GB/s (bytes read plus bytes written) of copying `nbytes` on `device`: a median, of at least 15 samples."""
    nbytes = nbytes or COPY_BYTES[device.type]
    # Random bits: constant data can move faster than real data.
    source = torch.randint(256, (nbytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    # I/O: read source + write target
    case = Case(
        op="copy",
        case="",
        direction="fwd",
        dtype=torch.uint8,
        rows=1,
        width=nbytes,
        moved_bytes=2 * nbytes,
        make_inputs=lambda: (source, target),
        variants={"copy": Variant(lambda pair: pair[1].copy_(pair[0]))},
    )
    # An idle GPU takes a while to raise its clock, and this is the first that it is asked to do.
    seconds = 0.3 if device.type == "cuda" else 0.0
    timing = measure(case, device, seconds=seconds, min_rounds=15)["copy"]
    return 2 * nbytes / timing.median_ms / 1e6
