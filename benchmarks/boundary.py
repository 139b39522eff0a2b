"""Count what the boundary between two branches costs in each of its four states: kernels, bytes saved, bytes allocated.

    python -m benchmarks.boundary --device cuda

A dropped branch must cost nothing in backward: no kernel, no allocation. On a GPU the profiler counts what ran and
the allocator what was allocated; on a CPU the operators that the backward calls stand for kernels.
"""

import argparse
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dropbp_kernels.measure import PeakLiveBytes, saved_bytes
from dropbp_kernels.ops import gated_residual_add, gated_residual_layer_norm, gated_residual_rms_norm

ROWS, WIDTH = 4096, 4096


class _CountOperators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is not torch.ops.aten.detach.default  # makes a handle, computes nothing
        return func(*args, **(kwargs or {}))


def count_kernels(run: Callable[[], Any], device: torch.device) -> int:
    """Number of kernels (and copies) that `run` starts on a GPU, or of operators that it calls on a CPU."""
    if device.type == "cpu":
        with _CountOperators() as counter:
            run()
        return counter.count
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events())


def count_allocated(run: Callable[[], Any], device: torch.device) -> int:
    """Peak bytes that `run` allocates."""
    if device.type == "cpu":
        with PeakLiveBytes() as live:
            run()
        return live.peak_bytes
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def boundary_counts(device: torch.device, rows: int = ROWS, width: int = WIDTH) -> list[dict[str, Any]]:
    """One entry for each op and state: is anything run, saved or allocated?"""
    residual, branch, grad = (torch.randn(rows, width, device=device, dtype=torch.bfloat16) for _ in range(3))
    weight = torch.ones(width, device=device, dtype=torch.bfloat16)
    residual.requires_grad_()

    def norm(op: Callable[..., Any], is_kept: bool, next_kept: bool) -> Callable[[], list[Tensor]]:
        def forward() -> list[Tensor]:
            pending = branch.detach().requires_grad_(is_kept)
            outputs = op(residual, pending, weight, next_kept=next_kept)
            return [tensor for tensor in outputs if tensor.requires_grad]

        return forward

    def add(is_kept: bool) -> Callable[[], list[Tensor]]:
        return lambda: [gated_residual_add(residual, branch.detach().requires_grad_(is_kept))]

    words = {True: "kept", False: "dropped"}
    cases = {
        (op.__name__, f"{words[is_kept]}, then {words[next_kept]}"): (norm(op, is_kept, next_kept), next_kept)
        for op in (gated_residual_rms_norm, gated_residual_layer_norm)
        for is_kept in (True, False)
        for next_kept in (True, False)
    }
    cases |= {("gated_residual_add", words[is_kept]): (add(is_kept), False) for is_kept in (True, False)}
    counts = []
    for (op, state), (forward, runs_backward) in cases.items():

        def backward(outputs: list[Tensor]) -> Any:
            return torch.autograd.grad(outputs, residual, [grad] * len(outputs))

        backward(forward())  # compiles kernels, fills caches
        num_forward = count_kernels(forward, device)
        with saved_bytes() as saved:
            outputs = forward()
        num_backward = count_kernels(functools.partial(backward, outputs), device)
        outputs = forward()
        counts.append(
            {
                "op": op,
                "state": state,
                "forward_kernels": num_forward,
                "saved_bytes": saved.num_bytes,
                "backward_kernels": num_backward,
                "backward_allocated_bytes": count_allocated(functools.partial(backward, outputs), device),
                "must_be_free": not runs_backward,
            }
        )
    return counts


def is_free(entry: dict[str, Any]) -> bool:
    return not (entry["saved_bytes"] or entry["backward_kernels"] or entry["backward_allocated_bytes"])


def is_counted(entry: dict[str, Any]) -> bool:
    """Whether the profiler saw anything: no forward is without a kernel."""
    return entry["forward_kernels"] > 0


def main(arguments: list[str] | None = None) -> int:
    """Print the counts; 0 when every state that must be free is, and was seen to be."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.boundary", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the counts here")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    counts = boundary_counts(device, *((ROWS, WIDTH) if device.type == "cuda" else (64, 64)))
    print(f"{'op':<26} {'state':<22} {'forward':>8} {'saved bytes':>12} {'backward':>9} {'allocated':>11}")
    for entry in counts:
        verdict = "" if not entry["must_be_free"] else "  free" if is_free(entry) else "  NOT FREE"
        verdict = verdict if is_counted(entry) else "  NOT COUNTED: the profiler saw no kernel"
        print(
            f"{entry['op']:<26} {entry['state']:<22} {entry['forward_kernels']:>8} {entry['saved_bytes']:>12} "
            f"{entry['backward_kernels']:>9} {entry['backward_allocated_bytes']:>11}{verdict}"
        )
    if options.json:
        options.json.write_text(json.dumps(counts, indent=2) + "\n")
    is_good = all(is_counted(entry) and (is_free(entry) or not entry["must_be_free"]) for entry in counts)
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
