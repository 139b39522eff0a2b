"""Builds the compiled parts. Everything else about the package stands in pyproject.toml.

======================  =======================  ==========================================================
library                 sources                  built
======================  =======================  ==========================================================
dropbp_kernels._host    csrc/host                where a C++ compiler, pybind11 and Python's headers are
dropbp_kernels._C       csrc/cpu                 where a C++ compiler is
dropbp_kernels._C_cuda  csrc/cuda                where a CUDA toolkit is (never by asking for a GPU)
======================  =======================  ==========================================================

`_C` and `_C_cuda` are plain shared libraries on libtorch's stable ABI, without Python: one build serves every torch
from 2.11 on. A missing compiler is no error, the package is whole in plain PyTorch; a compiler that fails is.

Environment: DROPBP_KERNELS_CUDA=0|1 (never | always, an error without a toolkit), CUDA_HOME, TORCH_CUDA_ARCH_LIST, CXX,
CXXFLAGS (after ours, of C++ alone), MAX_JOBS.
"""

import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
PACKAGE = "dropbp_kernels"
TORCH_MINIMUM = (2, 11)
DEFAULT_ARCHS = ("8.0", "9.0", "10.0", "12.0")
USUAL_CUDA_HOME = Path("/usr/local/cuda")  # NVIDIA's packages do not put it on PATH

# Contracted multiply-adds would make the result depend on the machine.
CPU_FLAGS = "-O3 -ffp-contract=off -fno-math-errno"
# GCC 12 calls the undefined halves of its own AVX-512 intrinsics uninitialized.
COMMON_FLAGS = "-std=c++17 -fPIC -fvisibility=hidden -Wall -Wextra -Wno-maybe-uninitialized -Wno-psabi"
FOLDERS = {"_C": "cpu", "_C_cuda": "cuda", "_host": "host"}


def note(sentence: str) -> None:
    print(f"{PACKAGE}: {sentence}", file=sys.stderr)


def quoted(path: str | Path) -> str:
    """path as ninja and the shell read it."""
    return shlex.quote(str(path)).replace("$", "$$")


def find_compiler() -> str | None:
    """The C++ compiler: $CXX, else the first of the usual names."""
    if command := os.environ.get("CXX"):
        return command if shutil.which(command.split()[0]) else None
    return next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


def find_nvcc() -> str | None:
    """nvcc of $CUDA_HOME, else the one on PATH, else that of the usual place."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if not home and (found := shutil.which("nvcc")):
        return found
    return shutil.which("nvcc", path=str(Path(home or USUAL_CUDA_HOME, "bin")))


def wants_cuda(nvcc: str | None) -> bool:
    """Whether to build _C_cuda. Exits when it is asked for and cannot be had."""
    choice = os.environ.get("DROPBP_KERNELS_CUDA", "")
    if choice not in ("", "0", "1"):
        sys.exit(f"{PACKAGE}: DROPBP_KERNELS_CUDA must be 0 or 1, got {choice!r}.")
    if choice == "1" and nvcc is None:
        sys.exit(
            f"{PACKAGE}: DROPBP_KERNELS_CUDA=1, but no nvcc is in $CUDA_HOME/bin, on PATH or in {USUAL_CUDA_HOME}/bin; "
            "install a CUDA toolkit."
        )
    return choice != "0" and nvcc is not None


def cuda_arch_flags(arch_list: str, supported: set[str] | None = None) -> list[str]:
    """nvcc's -gencode flags of a TORCH_CUDA_ARCH_LIST such as "8.0;9.0+PTX".

    Empty means DEFAULT_ARCHS, as far as the toolkit has them (`supported`, such as "sm_80"), and PTX of the last.
    """
    archs = arch_list.replace(";", " ").split()
    if not archs:
        known = [arch for arch in DEFAULT_ARCHS if supported is None or f"sm_{arch.replace('.', '')}" in supported]
        if not known:
            sys.exit(
                f"{PACKAGE}: this nvcc knows none of {', '.join(DEFAULT_ARCHS)}; name others in TORCH_CUDA_ARCH_LIST."
            )
        archs = [*known[:-1], known[-1] + "+PTX"]
    flags = []
    for arch in archs:
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", arch)
        if match is None:
            sys.exit(f"{PACKAGE}: TORCH_CUDA_ARCH_LIST must hold numbers such as 8.0 or 9.0+PTX, got {arch!r}.")
        number = match[1] + match[2]
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[3]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def supported_cuda_archs(nvcc: str) -> set[str]:
    return set(subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split())


def find_torch() -> Path:
    """The folder of the installed torch, found without importing it. Exits when it is missing or too old."""
    spec = importlib.util.find_spec("torch")
    minimum = ".".join(map(str, TORCH_MINIMUM))
    if spec is None or spec.origin is None:
        sys.exit(f"{PACKAGE}: building needs torch >= {minimum}; install it first, or build with pip's isolation.")
    version = importlib.metadata.version("torch")
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < TORCH_MINIMUM:
        sys.exit(f"{PACKAGE}: building needs torch >= {minimum}, got torch {version}.")
    return Path(spec.origin).parent


def find_ninja() -> str:
    if importlib.util.find_spec("ninja"):
        import ninja

        bundled = Path(ninja.BIN_DIR, "ninja")
        if bundled.exists():
            return str(bundled)
    ninja_command = shutil.which("ninja")
    if ninja_command is None:
        sys.exit(f"{PACKAGE}: building needs ninja; run pip install ninja.")
    return ninja_command


def planned_extensions() -> list[Extension]:
    """The libraries that this machine can build; says in a sentence each what it leaves out."""
    if sys.platform != "linux":
        note(f"compiled kernels are built on Linux only, not on {sys.platform}; plain PyTorch serves every op.")
        return []
    nvcc = find_nvcc()
    cuda = wants_cuda(nvcc)
    if find_compiler() is None:
        if os.environ.get("DROPBP_KERNELS_CUDA") == "1":
            sys.exit(f"{PACKAGE}: DROPBP_KERNELS_CUDA=1, but no C++ compiler was found ($CXX, c++, g++, clang++).")
        note("no C++ compiler was found ($CXX, c++, g++, clang++); plain PyTorch serves every op.")
        return []
    names = ["_C"]
    if cuda:
        names.append("_C_cuda")
    if importlib.util.find_spec("pybind11") is None:
        note("pybind11 is not installed; host algorithms run in plain Python.")
    elif not Path(sysconfig.get_path("include"), "Python.h").exists():
        note("Python's C headers are not installed; host algorithms run in plain Python.")
    else:
        names.append("_host")
    return [Extension(f"{PACKAGE}.{name}", sources_of(name)) for name in names]


def sources_of(name: str) -> list[str]:
    folder = ROOT / "csrc" / FOLDERS[name]
    return sorted(str(path.relative_to(ROOT)) for path in folder.iterdir() if path.suffix in (".cpp", ".cu"))


def ninja_file(extensions: list[Extension], build: Path) -> str:
    """Text of the ninja file that compiles `extensions` into the folder `build`, run from ROOT."""
    torch = find_torch()
    version = TORCH_MINIMUM[0] << 56 | TORCH_MINIMUM[1] << 48
    stable = f"-DTORCH_TARGET_VERSION={version}ULL -isystem {quoted(torch / 'include')}"
    prefix_map = f"-ffile-prefix-map={quoted(torch)}=torch"  # no path of the building machine in the libraries
    compiler, nvcc = find_compiler(), find_nvcc()
    lines = [
        f"builddir = {build}",  # of ninja's own records: without them a copy of the folder would be built anew
        f"cxx = {compiler}",
        f"common = {COMMON_FLAGS}",
        "rule cxx",
        f"  command = $cxx -MMD -MF $out.d $common $flags {os.environ.get('CXXFLAGS', '')} -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $cxx -shared -o $out $in $flags",
    ]
    flags = {"_C": f"{CPU_FLAGS} {prefix_map} {stable}"}
    link = {"_C": f"-L{quoted(torch / 'lib')} -ltorch_cpu -Wl,--as-needed"}
    names = [extension.name.rpartition(".")[2] for extension in extensions]
    if "_C_cuda" in names:
        archs = cuda_arch_flags(os.environ.get("TORCH_CUDA_ARCH_LIST", ""), supported_cuda_archs(nvcc))
        host = "-Xcompiler=-fPIC,-fvisibility=hidden " + prefix_map.replace("-ffile", "-Xcompiler=-ffile")
        flags["_C_cuda"] = f"-O3 -std=c++17 {host} -DUSE_CUDA {stable} {' '.join(archs)}"
        # A CPU-only torch has no libtorch_cuda to link with. An empty library of that name stands in, so that the real
        # one, loaded by a CUDA build of torch, is found by name when _C_cuda is loaded.
        link["_C_cuda"] = f"-L{quoted(torch / 'lib')} -ltorch_cpu -L{build} -Xlinker=--no-as-needed -ltorch_cuda"
        lines += [
            f"nvcc = {quoted(nvcc)} -ccbin {compiler}",
            "rule nvcc",
            "  command = $nvcc -MMD -MF $out.d $flags -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule nvlink",
            "  command = $nvcc -shared -nodlink -cudart static -o $out $in $flags",
            "rule stub",
            "  command = $cxx -shared -Wl,-soname,libtorch_cuda.so -x c++ /dev/null -o $out",
            f"build {build}/libtorch_cuda.so: stub",
        ]
    if "_host" in names:
        import pybind11

        flags["_host"] = (
            f"-O3 -isystem {quoted(pybind11.get_include())} -isystem {quoted(sysconfig.get_path('include'))}"
        )
        link["_host"] = ""
    for name, extension in zip(names, extensions, strict=True):
        objects = []
        for source in extension.sources:
            objects.append(f"{build}/{name}/{Path(source).stem}.o")
            lines.append(f"build {objects[-1]}: {'nvcc' if source.endswith('.cu') else 'cxx'} {source}")
            lines.append(f"  flags = {flags[name]}")
        rule, extra = ("nvlink", f" | {build}/libtorch_cuda.so") if name == "_C_cuda" else ("link", "")
        lines.append(f"build {build}/{library_filename(extension.name)}: {rule} {' '.join(objects)}{extra}")
        lines.append(f"  flags = {link[name]}")
    return "\n".join(lines) + "\n"


def library_filename(fullname: str) -> str:
    name = fullname.rpartition(".")[2]
    return name + (sysconfig.get_config_var("EXT_SUFFIX") if name == "_host" else ".so")


class NinjaBuild(build_ext):
    """build_ext with ninja: incremental, parallel, and nvcc where it is needed."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")[:-1], library_filename(fullname)))

    def build_extensions(self) -> None:
        # Relative, and the same for every kind of install, so that a second build has nothing to do.
        build = Path("build", f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}")
        (ROOT / build).mkdir(parents=True, exist_ok=True)
        (ROOT / build / "build.ninja").write_text(ninja_file(self.extensions, build))
        command = [find_ninja(), "-f", str(build / "build.ninja")]
        if jobs := os.environ.get("MAX_JOBS"):
            command.append(f"-j{jobs}")
        if subprocess.run(command, cwd=ROOT).returncode:
            sys.exit(
                f"{PACKAGE}: the compiler failed, its message stands above; DROPBP_KERNELS_CUDA=0 leaves CUDA out."
            )
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / build / library_filename(extension.name), target)


if __name__ == "__main__":
    setup(ext_modules=planned_extensions(), cmdclass={"build_ext": NinjaBuild})
