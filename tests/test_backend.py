"""Which backend serves an op, what happens when one is missing, and that nothing leaks out of use_backend."""

import os
import shutil
from pathlib import Path

import forks
import pytest
import torch

import dropbp_kernels
from dropbp_kernels import _backend, reference
from dropbp_kernels.cli import info
from dropbp_kernels.ops import gated_residual_add  # noqa: F401  (installs the ops)
from dropbp_kernels.ops.schema import SCHEMAS

PACKAGE = Path(dropbp_kernels.__file__).parent
STEM = "gated_residual_add"
REPORT = """
import torch
from dropbp_kernels import _backend
from dropbp_kernels.ops import gated_residual_rms_norm
x = torch.ones(2, 8)
normed, residual = gated_residual_rms_norm(x, x, torch.ones(8))
assert residual.tolist() == [[2.0] * 8] * 2 and (normed - 1).abs().max() < 1e-6
for stem in ("gated_residual_add", "gated_residual_rms_norm"):
    print(stem, _backend.serving(stem, "cpu"), _backend.serving(stem, "cuda"), _backend.serving(stem, "meta"))
for backend in _backend.BACKENDS:
    print(backend, _backend.why_not(backend, "gated_residual_add"))
"""
HIDE_TRITON = """
import importlib.util as util
find = util.find_spec
util.find_spec = lambda name: None if name == "triton" else find(name)
"""


def run(code=REPORT, path=PACKAGE.parent, prelude="", **environment):
    """Run code in a process without the package, then with that of `path`; (stdout, stderr)."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("DROPBP_KERNELS_BACKEND", "TRITON_INTERPRET", "CC")}
    result = forks.run(prelude + code, environment={**inherited, "PYTHONPATH": str(path), **environment}, cwd=path)
    return result.stdout if result.returncode == 0 else None, result.stderr


def copy_of_package(folder, **libraries):
    """The package without compiled parts, plus the given files in their place."""
    shutil.copytree(PACKAGE, folder / "dropbp_kernels", ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__"))
    for name, content in libraries.items():
        (folder / "dropbp_kernels" / f"{name}.so").write_text(content)
    return folder


def test_names_line_up():
    """Raw op, reference and Triton launcher of every schema are there under the same stem and name."""
    pytest.importorskip("triton")
    from importlib import import_module

    for stem, names in SCHEMAS.items():
        kernels = import_module(f"dropbp_kernels._triton.{stem}")
        for name in names:
            assert hasattr(torch.ops.dropbp_kernels, name)
            assert callable(getattr(reference, f"{name}_reference"))
            assert callable(getattr(kernels, f"launch_{name}"))


def test_ladder():
    for stem, names in SCHEMAS.items():
        serving = _backend.serving(stem, "cpu")
        assert serving == next(b for b in ("cpp", "reference") if _backend.why_not(b, stem) is None)
        has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key(f"dropbp_kernels::{next(iter(names))}", "CPU")
        assert has_kernel == (serving != "reference")
        assert _backend.serving(stem, "xpu") == "reference"
        if torch.version.cuda is None:
            assert "without CUDA" in _backend.why_not("cuda", stem)


def test_use_backend_forces_and_restores(monkeypatch):
    calls = []

    def spy(*arguments):
        calls.append(arguments)
        return torch.zeros(1)

    ordinary = torch.ops.dropbp_kernels.gated_residual_add
    one = torch.ones(1)
    with monkeypatch.context() as patch:
        patch.setattr(reference, "gated_residual_add_reference", spy)
        with _backend.use_backend("reference"):
            ordinary(one, one, None)
    assert len(calls) == 1
    assert ordinary(one, one, None).item() == 2.0
    with pytest.raises(KeyError), _backend.use_backend("reference"):
        raise KeyError
    assert ordinary(one, one, None).item() == 2.0
    assert len(calls) == 1


def test_use_backend_nests(monkeypatch):
    # The default of torch 2.11, where one registration from Python refuses another.
    monkeypatch.setitem(torch.library.Library.impl.__kwdefaults__, "allow_override", False)
    one = torch.ones(1)
    for outer in ("reference", "triton"):
        if _backend.why_not(outer, STEM) is not None:
            continue
        with _backend.use_backend(outer):
            with _backend.use_backend("reference"):
                assert torch.ops.dropbp_kernels.gated_residual_add(one, one, None).item() == 2.0
            assert torch.ops.dropbp_kernels.gated_residual_add(one, one, None).item() == 2.0


def test_use_backend_refuses(monkeypatch):
    with pytest.raises(ValueError, match="backend: expected one of reference, cpp, triton, cuda, got 'tpu'"):
        _backend.use_backend("tpu").__enter__()
    monkeypatch.setitem(_backend._missing, "cpp", "_C was not built")
    with pytest.raises(RuntimeError, match="backend 'cpp' cannot serve here: _C was not built"):
        _backend.use_backend("cpp").__enter__()


def test_without_compiled_parts_or_triton(tmp_path):
    output, errors = run(path=copy_of_package(tmp_path), prelude=HIDE_TRITON)
    assert output, errors
    assert "gated_residual_add reference reference reference" in output
    assert "gated_residual_rms_norm reference reference reference" in output
    assert "cpp _C was not built" in output
    assert "triton triton is not installed" in output
    assert errors == ""


def test_triton_serves_where_it_can_build_its_launcher(tmp_path):
    """It compiles a C file: without a compiler, or Python's headers, its first kernel would be an error."""
    pytest.importorskip("triton")
    package, compiler = copy_of_package(tmp_path), tmp_path / "some-cc"
    compiler.touch(0o755)
    (tmp_path / "Python.h").touch()
    for headers, environment, serving, reason in (
        (tmp_path, {"PATH": "", "CC": str(compiler)}, "triton", "None"),
        (tmp_path, {"PATH": ""}, "reference", "no C compiler was found ($CC, gcc, clang), which Triton needs"),
        (tmp_path, {"CC": "no-such-cc"}, "reference", "no C compiler was found"),
        ("/nowhere", {"CC": str(compiler)}, "reference", "Python's C headers are not installed, which Triton needs"),
    ):
        prelude = (
            f"import sysconfig; sysconfig.get_path = lambda name, scheme: '{headers}'\n"
            "import torch; torch.version.cuda = '13.0'\n"
        )
        output, errors = run(path=package, prelude=prelude, **environment)
        assert output, errors
        assert f"gated_residual_add reference {serving} reference" in output
        assert f"triton {reason}" in output
        assert errors == ""


def test_library_that_does_not_load(tmp_path):
    """Built for another platform or torch: one warning that says so, and plain PyTorch serves."""
    output, errors = run(path=copy_of_package(tmp_path, _C="not a library"))
    assert output, errors
    assert "gated_residual_add reference" in output
    assert "cpp _C.so does not load: " in output
    assert "RuntimeWarning: dropbp_kernels: _C.so does not load: " in errors
    assert "using plain PyTorch instead" in errors


@pytest.mark.parametrize("forced", ["reference", "cpp", "triton"])
def test_forced_by_environment(forced):
    if _backend.why_not(forced, STEM) is not None:
        pytest.skip(f"{forced}: {_backend.why_not(forced, STEM)}")
    output, errors = run(DROPBP_KERNELS_BACKEND=forced, TRITON_INTERPRET="1")
    assert output, errors
    assert f"gated_residual_add {forced} " in output
    assert f"gated_residual_rms_norm {forced} " in output
    for other in {"cpp", "triton"} - {forced}:
        assert f"{other} DROPBP_KERNELS_BACKEND={forced}" in output


def test_forced_to_an_unknown_backend():
    output, errors = run(DROPBP_KERNELS_BACKEND="fast")
    assert output is None
    assert "DROPBP_KERNELS_BACKEND: expected one of reference, cpp, triton, cuda, got 'fast'" in errors


def test_triton_on_a_torch_without_cuda_says_how_to_run():
    if torch.version.cuda is not None:
        pytest.skip("this torch has CUDA")
    output, errors = run()
    assert output, errors
    assert "triton this torch was built without CUDA (TRITON_INTERPRET=1 runs the kernels on the CPU)" in output


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("DROPBP_KERNELS_CACHE", str(tmp_path / "mine"))
    assert _backend.cache_dir() == tmp_path / "mine"
    monkeypatch.delenv("DROPBP_KERNELS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert _backend.cache_dir() == tmp_path / "dropbp_kernels"


def test_host_is_left_out_where_reference_is_forced(monkeypatch):
    monkeypatch.setenv("DROPBP_KERNELS_BACKEND", "reference")
    assert _backend.host() is None
    assert info.collect()["host"] == "plain Python: DROPBP_KERNELS_BACKEND=reference"
