"""What an op is compared with, and the check every variant must pass before its time counts.

eager      plain PyTorch as a model writes it
aten       PyTorch's own fused norm after an add, where there is one
compile    torch.compile of eager, static shapes (its best case)
liger      the peer package liger-kernel, on a GPU, when it is installed
quack      the peer package quack-kernels, on a Hopper GPU or newer, when it is installed
others     the backends of this package that can serve on the device
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

import dropbp_kernels.ops  # noqa: F401  (registers them)
from dropbp_kernels import _backend, reference

# Error allowed on top of twice that of eager, by dtype: about a unit in the last place of the largest value.
ATOL = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
RMS_EPS, LAYER_EPS = 1e-6, 1e-5  # the defaults of our ops

Function = TypeVar("Function", bound=Callable[..., Any])

compiler = "inductor"  # of `compiled`; `run` sets another at the tiny scale


class WrongResult(RuntimeError):
    """A variant's result is too far from the reference: its time would mean nothing."""


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile of `function` for one shape; earlier shapes are forgotten, or they would count towards a limit."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False, backend=compiler)


def backends(stem: str, device: torch.device) -> list[str]:
    """Compiled and Triton backends that serve `stem` on `device`, best first; reference if none does."""
    ladder = ("cpp",) if device.type == "cpu" else ("cuda", "triton")
    return [name for name in ladder if _backend.why_not(name, stem) is None] or ["reference"]


def raw_op(backend: str, stem: str, name: str, device: torch.device) -> Callable[..., Any]:
    """The raw op `name` in `backend`: through the dispatcher where that backend serves, else called directly."""
    if backend == _backend.serving(stem, device.type):
        return getattr(torch.ops.dropbp_kernels, name)
    if backend == "triton":
        return getattr(importlib.import_module(f"dropbp_kernels._triton.{stem}"), f"launch_{name}")
    return getattr(reference, f"{name}_reference")


def add_then_norm(residual: Tensor, branch: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The boundary of two branches as Llama models write it: (normed, new_residual)."""
    new_residual = residual + branch
    x = new_residual.float()
    normalized = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + RMS_EPS)
    return weight * normalized.to(branch.dtype), new_residual


def add_then_aten_norm(residual: Tensor, branch: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The same with PyTorch's own norm."""
    new_residual = residual + branch
    return F.rms_norm(new_residual, weight.shape, weight, RMS_EPS), new_residual


def add_then_aten_layer_norm(residual: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The boundary of two branches as GPT models write it: (normed, new_residual)."""
    new_residual = residual + branch
    return F.layer_norm(new_residual, weight.shape, weight, bias, LAYER_EPS), new_residual


class PeerMissing(RuntimeError):
    """Why a peer package cannot be measured here, in a few words."""


def peer(distribution: str, module: str, attribute: str, device: torch.device) -> Any:
    """attribute of a peer package's module. Raises PeerMissing with the reason where it cannot run on `device`."""
    if device.type != "cuda":
        raise PeerMissing("runs on a CUDA GPU only")
    try:
        if importlib.util.find_spec(module) is None:
            raise PeerMissing(f"{distribution} is installed, but has no {module}")
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise PeerMissing(f"{error.name} is not installed (pip install {distribution})") from error
    except ImportError as error:
        raise PeerMissing(f"{module} does not import: {error}") from error
    except AttributeError as error:
        raise PeerMissing(f"{distribution} is installed, but {module} has no {attribute}") from error


def liger_add_rms_norm(device: torch.device) -> Callable[..., tuple[Tensor, Tensor]]:
    """liger-kernel's fused add and norm."""
    function = peer("liger-kernel", "liger_kernel.ops.fused_add_rms_norm", "LigerFusedAddRMSNormFunction", device)

    def add_rms_norm(residual: Tensor, branch: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        # Not in place: its backward would overwrite the gradient that the next sample still needs.
        return function.apply(branch, residual, weight, RMS_EPS, 0.0, "llama", False)

    return add_rms_norm


def quack_add_rms_norm(device: torch.device) -> Callable[..., tuple[Tensor, Tensor]]:
    """quack's fused add and norm."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        raise PeerMissing("quack needs a Hopper GPU or a newer one")
    function = peer("quack-kernels", "quack.rmsnorm", "rmsnorm", device)

    def add_rms_norm(residual: Tensor, branch: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return function(branch, weight, residual=residual, eps=RMS_EPS, prenorm=True)

    return add_rms_norm


@functools.cache
def say_once(line: str) -> None:
    print(line, flush=True)


def available(
    peers: dict[str, Callable[[torch.device], Callable[..., Any]]], device: torch.device
) -> dict[str, Callable[..., Any]]:
    """The peers that can be measured on `device`, by name; prints a line for each that cannot."""
    found = {}
    for name, load in peers.items():
        try:
            found[name] = load(device)
        except PeerMissing as reason:
            say_once(f"{name} is left out: {reason}")
    return found


def right_ones(
    what: str,
    functions: Mapping[str, Function],
    results_of: Callable[[Function], Sequence[Tensor]],
    eager: Sequence[Tensor],
    exact: Sequence[Tensor],
) -> dict[str, Function]:
    """The functions, by name, whose results check_results lets pass.

    A wrong peer is not measured, and a line says so: its fault, or its bad luck, must not keep ours from being timed. A
    wrong backend of ours, and eager beside itself, raise WrongResult.
    """
    right = {}
    for name, function in functions.items():
        try:
            check_results(f"{what}, {name}", results_of(function), eager, exact)
        except WrongResult as error:
            if name == "eager" or name in _backend.BACKENDS:
                raise
            say_once(f"{name} is not measured: {error}")
        else:
            right[name] = function
    return right


def check_results(what: str, actual: Sequence[Tensor], eager: Sequence[Tensor], exact: Sequence[Tensor]) -> None:
    """Raise WrongResult unless each tensor's error against float64 is at most twice eager's, plus ATOL."""
    for place, (ours, plain, truth) in enumerate(zip(actual, eager, exact, strict=True)):
        if ours.shape != plain.shape or ours.dtype != plain.dtype:
            raise WrongResult(f"{what}: result {place} is {ours.dtype} {tuple(ours.shape)}, eager's {plain.dtype}")
        error = _error(ours, truth)
        allowed = 2 * _error(plain, truth) + ATOL[ours.dtype] * max(1.0, truth.abs().max().item())
        if not error <= allowed:
            raise WrongResult(f"{what}: result {place} is off by {error:.3g}, allowed {allowed:.3g}")


def _error(actual: Tensor, exact: Tensor) -> float:
    return (actual.double() - exact).abs().nan_to_num(nan=float("inf")).max().item()
