"""What every test shares: seeds, threads, and the backends that an op is tested in."""

import contextlib
import ctypes
import gc
import importlib
import os
import sys
from pathlib import Path

import torch

if not torch.cuda.is_available():  # before anything imports Triton: its kernels then run on CPU tensors
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from cuda_errors import pytest_runtest_logfinish  # noqa: F401

from dropbp_kernels import _backend, tuning
from dropbp_kernels.ops.schema import SCHEMAS

sys.path.append(str(Path(__file__).parent.parent))  # benchmarks, for who starts pytest by its own name

torch.set_num_threads(2)
M_PERTURB = -6  # of malloc.h


def pytest_collection_modifyitems(items):
    """Files with a slow test run first, so that no process is left alone with one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish():
    """What is imported by now stays: accelerate collects garbage for every Trainer, and need not look there."""
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()  # else nanobind's modules take what lives at the end for leaked, and say so


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def turns_apart(monkeypatch):
    """Every turn of a conversation has stages of its own, as it has where batches are large."""
    from dropbp_kernels.integrations import target_plans
    from dropbp_kernels.targets import plan_targets

    monkeypatch.setitem(plan_targets.__kwdefaults__, "turns", "apart")
    monkeypatch.setattr(target_plans, "_turns", lambda decoder, rule: "apart")


@pytest.fixture
def one_thread():
    """For tensors so small that a second thread gains nothing, and loses much where other work wants its core."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


# Where there is a GPU the Triton and CUDA kernels run on it, else Triton's on the CPU.
_GPU = [pytest.param(name, marks=pytest.mark.gpu) for name in ("triton", "cuda")] if torch.cuda.is_available() else []


@pytest.fixture(params=["reference", "cpp", *(_GPU or ["triton"])])
def backend(request, monkeypatch):
    """Serve all ops from one backend; skipped, with the reason, where it cannot serve."""
    name = request.param
    if (reason := _backend.why_not(name, "gated_residual_add")) is not None:
        pytest.skip(f"{name}: {reason}")
    if name == "triton" and _backend.is_interpreting():
        _round_like_hardware(monkeypatch)
        _save_the_interpreter_work(monkeypatch)
    with _backend.use_backend(name):
        yield name


@pytest.fixture
def device(backend):
    """Where the backend under test runs."""
    on_gpu = backend == "cuda" or (backend == "triton" and not _backend.is_interpreting())
    return torch.device("cuda" if on_gpu else "cpu")


@pytest.fixture
def in_chunks(backend):
    """Triton programs hold 32 columns at a time, so that small tensors already have rows of several chunks."""
    if backend != "triton":
        yield
        return
    for stem in SCHEMAS:
        importlib.import_module(f"dropbp_kernels._triton.{stem}")
    with contextlib.ExitStack() as stack:
        for table in tuning.TABLES.values():
            stack.enter_context(table.override(tuning.Config(32, 1, 2)))
        yield


@pytest.fixture
def cut_attention():
    """`target_cases.cut_attention`, undone afterwards."""
    target_cases = importlib.import_module("target_cases")  # imports transformers, which few tests need
    yield target_cases.cut_attention
    target_cases.forget_cut()


@pytest.fixture
def poisoned():
    """Fresh memory is NaN or near the largest number, so that an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN, and not what compiled kernels get on a CPU
    glibc_option = getattr(ctypes.CDLL(None), "mallopt", lambda option, value: 0)
    glibc_option(M_PERTURB, 0x80)  # which fills that, with bytes 0x7f
    yield
    glibc_option(M_PERTURB, 0)
    torch.use_deterministic_algorithms(False)


def _round_like_hardware(monkeypatch):
    """Triton's interpreter cuts bfloat16 off where a GPU rounds to nearest even; let it round."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(values, source, target, mode):
        if source != tl.float32 or target != tl.bfloat16:
            return convert(values, source, target, mode)
        bits = torch.from_numpy(values.copy()).view(torch.float32).to(torch.bfloat16).view(torch.int16)
        return bits.numpy().view("uint16")

    monkeypatch.setattr(interpreter, "_convert_float", rounded)


def _save_the_interpreter_work(monkeypatch):
    """Two things that Triton's interpreter does over and over, which take 40 % of its time and change nothing.

    It puts its own functions into `triton.language` for a launch, and looks there for more to replace at each call of a
    device function; and it makes a table of all dtypes for each dtype that it looks up.
    """
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    if not all(hasattr(interpreter, name) for name in ("_LangPatchScope", "_patch_lang", "_get_np_dtype")):
        return  # another Triton than 3.9
    patch, look_up, found = interpreter._patch_lang, interpreter._get_np_dtype, {}

    def patch_once(function):
        languages = [value for value in function.__globals__.values() if value in (interpreter.tl, interpreter.tl.core)]
        if languages and not any(is_builtin(language.load) for language in languages):
            return interpreter._LangPatchScope()
        return patch(function)

    def look_up_once(dtype):
        if dtype.name not in found:
            found[dtype.name] = look_up(dtype)
        return found[dtype.name]

    monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
    monkeypatch.setattr(interpreter, "_get_np_dtype", look_up_once)
