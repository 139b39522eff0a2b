"""setup.py: what it decides to build, the sentences it says, and the wheel and the archive that come out."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

import dropbp_kernels

ROOT = Path(__file__).parent.parent


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """setup.py as a module, in an environment without any of its variables and without a toolkit in the usual place."""
    for name in ("DROPBP_KERNELS_CUDA", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "CXX", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("dropbp_kernels_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "USUAL_CUDA_HOME", tmp_path / "usual")
    return module


def make_tool(folder: Path, name: str) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    tool = folder / name
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    return str(tool)


def names(extensions: list) -> list[str]:
    return [extension.name.rpartition(".")[2] for extension in extensions]


def test_finds_the_compiler(build, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.find_compiler() is None
    make_tool(tmp_path, "g++")
    assert build.find_compiler() == "g++"
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    assert build.find_compiler() is None


def test_finds_nvcc_of_cuda_home_before_path_before_the_usual_place(build, monkeypatch, tmp_path):
    in_usual_place = make_tool(tmp_path / "usual" / "bin", "nvcc")
    on_path = make_tool(tmp_path / "path", "nvcc")
    of_home = make_tool(tmp_path / "cuda" / "bin", "nvcc")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.find_nvcc() == in_usual_place
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    assert build.find_nvcc() == on_path
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    assert build.find_nvcc() == of_home
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "empty"))
    assert build.find_nvcc() is None


@pytest.mark.parametrize(
    ("choice", "nvcc", "expected"),
    [("", None, False), ("", "nvcc", True), ("0", "nvcc", False), ("0", None, False), ("1", "nvcc", True)],
)
def test_cuda_is_built_where_a_toolkit_is_unless_told(build, monkeypatch, choice, nvcc, expected):
    monkeypatch.setenv("DROPBP_KERNELS_CUDA", choice)
    assert build.wants_cuda(nvcc) is expected


def test_cuda_without_a_toolkit_is_one_sentence(build, monkeypatch):
    monkeypatch.setenv("DROPBP_KERNELS_CUDA", "1")
    with pytest.raises(
        SystemExit,
        match=r"DROPBP_KERNELS_CUDA=1, but no nvcc is in \$CUDA_HOME/bin, on PATH or in .+/usual/bin; "
        r"install a CUDA toolkit\.$",
    ):
        build.wants_cuda(None)
    monkeypatch.setenv("DROPBP_KERNELS_CUDA", "yes")
    with pytest.raises(SystemExit, match="must be 0 or 1, got 'yes'"):
        build.wants_cuda(None)


def test_arch_list(build):
    sm = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in (80, 90, 100, 120)]
    assert build.cuda_arch_flags("") == [*sm, "-gencode=arch=compute_120,code=compute_120"]
    # An older toolkit: only what it knows, and PTX of its last.
    assert build.cuda_arch_flags("", {"sm_80", "sm_90"}) == [*sm[:2], "-gencode=arch=compute_90,code=compute_90"]
    assert build.cuda_arch_flags("8.0 9.0") == sm[:2]
    assert build.cuda_arch_flags("8.0;9.0a+PTX") == [
        sm[0],
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90a,code=compute_90a",
    ]
    with pytest.raises(SystemExit, match=r"must hold numbers such as 8.0 or 9\.0\+PTX, got 'Hopper'"):
        build.cuda_arch_flags("8.0;Hopper")


def test_no_toolkit_architecture_is_a_sentence(build):
    with pytest.raises(SystemExit, match="none of"):
        build.cuda_arch_flags("", {"sm_50"})


def test_torch_missing_or_old_is_one_sentence(build, monkeypatch):
    assert (build.find_torch() / "include" / "torch" / "csrc" / "stable").is_dir()
    monkeypatch.setattr(build.importlib.metadata, "version", lambda name: "2.10.1+cu128")
    with pytest.raises(SystemExit, match=r"needs torch >= 2.11, got torch 2.10.1"):
        build.find_torch()
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"needs torch >= 2.11; install it first"):
        build.find_torch()


def test_ninja_missing_is_one_sentence(build, monkeypatch, tmp_path):
    assert Path(build.find_ninja()).exists()
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="needs ninja; run pip install ninja"):
        build.find_ninja()


@pytest.mark.skipif(sys.platform != "linux", reason="kernels are built on Linux only")
class TestPlan:
    def test_without_a_compiler_the_package_stays_pure(self, build, monkeypatch, tmp_path, capfd):
        monkeypatch.setenv("PATH", str(tmp_path))
        assert build.planned_extensions() == []
        assert capfd.readouterr().err.splitlines() == [
            "dropbp_kernels: no C++ compiler was found ($CXX, c++, g++, clang++); plain PyTorch serves every op."
        ]

    def test_cuda_demanded_without_a_compiler(self, build, monkeypatch, tmp_path):
        make_tool(tmp_path, "nvcc")
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setenv("DROPBP_KERNELS_CUDA", "1")
        with pytest.raises(SystemExit, match=r"no C\+\+ compiler was found"):
            build.planned_extensions()

    def test_compiler_and_toolkit_give_every_library(self, build, monkeypatch, tmp_path):
        make_tool(tmp_path, "c++")
        monkeypatch.setenv("PATH", str(tmp_path))
        host = ["_host"] if Path(sysconfig.get_path("include"), "Python.h").exists() else []
        assert names(build.planned_extensions()) == ["_C", *host]
        make_tool(tmp_path, "nvcc")
        assert names(build.planned_extensions()) == ["_C", "_C_cuda", *host]
        monkeypatch.setenv("DROPBP_KERNELS_CUDA", "0")
        assert names(build.planned_extensions()) == ["_C", *host]

    def test_every_source_is_built(self, build):
        built = {source for name in build.FOLDERS for source in build.sources_of(name)}
        present = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".cu")}
        assert built == present

    def test_another_system_stays_pure(self, build, monkeypatch, capfd):
        monkeypatch.setattr(build.sys, "platform", "win32")
        assert build.planned_extensions() == []
        assert "Linux only, not on win32" in capfd.readouterr().err


def test_stable_abi_of_the_oldest_torch_is_asked_for(build, monkeypatch, tmp_path):
    make_tool(tmp_path, "c++")
    monkeypatch.setenv("PATH", str(tmp_path))
    text = build.ninja_file(build.planned_extensions(), Path("build"))
    assert f"-DTORCH_TARGET_VERSION={0x020B000000000000}ULL" in text
    assert "_C_cuda" not in text


def can_build() -> bool:
    has_compiler = any(shutil.which(name) for name in ("c++", "g++", "clang++"))
    has_tools = all(importlib.util.find_spec(name) for name in ("ninja", "pybind11", "setuptools", "wheel"))
    return sys.platform == "linux" and has_compiler and has_tools


def current_build() -> Path | None:
    """The folder of this checkout's build, where no source is newer."""
    sources = [ROOT / "setup.py", *(ROOT / "csrc").rglob("*.*")]
    newest = max(path.stat().st_mtime for path in sources)
    libraries = (ROOT / "build").glob(f"*-{sys.implementation.cache_tag}/_C.so")
    return next((path.parent for path in libraries if path.stat().st_mtime > newest), None)


@pytest.mark.slow
@pytest.mark.skipif(not can_build(), reason="needs Linux, a C++ compiler, ninja, pybind11, setuptools and wheel")
def test_wheel_holds_the_package_and_imports_alone(tmp_path):
    """A wheel built from a copy of the sources, unpacked somewhere else, serves the CPU from C++."""
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("dropbp_kernels", "csrc"):
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, source / name)
    # What the compiler makes of the sources is not what this looks at: ninja is given what it made of them in this
    # checkout. Where it made nothing of these: one instruction set, not optimised.
    environment = {**os.environ, "DROPBP_KERNELS_CUDA": "0"}
    if (built := current_build()) is not None:
        shutil.copytree(built, source / "build" / built.name)
    else:
        environment["CXXFLAGS"] = "-O0 -DDROPBP_X86=0 -DDROPBP_INLINE=inline"
    environment.pop("DROPBP_KERNELS_BACKEND", None)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps"]
    command = [*pip, "-w", str(tmp_path), "."]
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

    (wheel,) = tmp_path.glob("*.whl")
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert wheel.name.startswith(f"dropbp_kernels-{dropbp_kernels.__version__}-{tag}-{tag}-linux_")
    with zipfile.ZipFile(wheel) as archive:
        files = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    python_files = {str(path.relative_to(ROOT)) for path in (ROOT / "dropbp_kernels").rglob("*.py")}
    assert python_files <= files
    configs = {str(path.relative_to(ROOT)) for path in (ROOT / "dropbp_kernels").rglob("*.json")}
    assert {"dropbp_kernels/py.typed", *configs} <= files
    assert {"dropbp_kernels/_C.so", f"dropbp_kernels/_host{sysconfig.get_config_var('EXT_SUFFIX')}"} <= files
    assert not [name for name in files if name.startswith(("csrc", "tests", "benchmarks", "build"))]

    program = (
        "import dropbp_kernels.ops; from dropbp_kernels import _backend; "
        "print(dropbp_kernels.__file__, _backend.serving('gated_residual_add', 'cpu'), _backend.host() is not None)"
    )
    environment["PYTHONPATH"] = str(tmp_path / "site")
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.stdout.split() == [str(tmp_path / "site/dropbp_kernels/__init__.py"), "cpp", "True"], done.stderr


@pytest.mark.skipif(importlib.util.find_spec("setuptools") is None, reason="needs setuptools")
def test_sources_are_packed_whole(tmp_path):
    """What README speaks of works from the archive too: its links, make test, make bench."""
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns("*.so", "*.o", "__pycache__", ".*")
    for folder in ("dropbp_kernels", "csrc", "tests", "docs", "benchmarks", "examples", ".ci"):
        shutil.copytree(ROOT / folder, source / folder, ignore=ignore)
    texts = ("README.md", "CHANGELOG.md", "LICENSE", "MANIFEST.in", "Makefile", "constraints.txt", "pyproject.toml")
    for name in (*texts, "setup.py", ".clang-format", ".pre-commit-config.yaml"):
        shutil.copy(ROOT / name, source)
    expected = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    command = [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", str(tmp_path)]
    environment = {**os.environ, "DROPBP_KERNELS_CUDA": "0"}
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        packed = {name.partition("/")[2] for name in files.getnames()}
    assert expected <= packed
