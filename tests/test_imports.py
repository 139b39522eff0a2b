"""Who may import whom (docs/architecture.md), and what an import must not do."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import forks
import pytest

import benchmarks
import dropbp_kernels
from dropbp_kernels.ops.schema import SCHEMAS

ROOT = Path(dropbp_kernels.__file__).parent
ARCHITECTURE = Path(__file__).parent.parent / "docs" / "architecture.md"
# Ops and their Triton kernels stand in one file each: of their own room those import only what several ops share.
SHARED = {"ops": {"schema", "boundary", "checks", "raw"}, "_triton": {"rows"}}


def levels():
    """The level of each room of the package, as docs/architecture.md lists them, lowest first.

    A room imports only rooms of a lower level and files of its own.
    """
    text = ARCHITECTURE.read_text().partition("Levels, lowest first;")[2].partition("\nOps never import")[0]
    items = re.findall(r"^(\d+)\. (.*(?:\n   .*)*)", text, re.MULTILINE)
    return {room: int(level) for level, rooms in items for room in re.findall(r"`(\w+)`", rooms)}


def imports_of(path):
    """(room, whole dotted name) of every module of this package that the file imports, also inside functions."""
    package = ("dropbp_kernels", *path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            names = [module] if node.module else [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "dropbp_kernels" and len(parts) > 1:
                yield parts[1], name


def test_no_import_goes_upward_or_sideways():
    wrong, level = [], levels()
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        room = parts[0]
        assert room in level, f"{room}: a new room needs a level in docs/architecture.md"
        for other, name in imports_of(path):
            if other == "__version__":
                continue
            if other == room and (room not in SHARED or parts[-1] == "__init__" or name.split(".")[-1] in SHARED[room]):
                continue
            if other not in level or level[other] >= level[room]:
                wrong.append(f"{'/'.join(parts)} imports {name}")
    assert not wrong


def test_every_file_is_on_a_map():
    text = ARCHITECTURE.read_text().partition("\n## The map\n")[2].partition("\nLevels,")[0]
    of_commands = (ROOT / "cli" / "__init__.py").read_text()
    for path in (*ROOT.rglob("*.py"), *(ROOT.parent / "csrc").rglob("*.*")):
        stem = re.sub("_kernels?$", "", path.stem)
        if stem in SCHEMAS or path.stem.startswith("__") or path.parent.name in ("compat", "host"):
            continue  # one line for all of these
        if path.parent.name == "cli":
            assert re.search(rf"\b{path.stem}\b", of_commands), path
        else:
            assert path.name in text, path
    patterns = re.findall(r"[\w*]+\.py", benchmarks.__doc__)
    for path in Path(benchmarks.__file__).parent.glob("*.py"):
        assert path.stem in ("__init__", "conftest") or any(path.match(pattern) for pattern in patterns), path


def test_what_reference_and_triton_import_of_ours():
    """The specification nothing; a Triton kernel its launch parameters, and no other op's file."""
    assert not list(imports_of(ROOT / "reference.py"))
    for path in (ROOT / "_triton").glob("*.py"):
        ours = [name for other, name in imports_of(path) if other not in ("tuning", "_triton")]
        assert not ours, (path.name, ours)


def test_environment_variables_are_read_in_one_place():
    readers = [
        path.relative_to(ROOT).as_posix()
        for path in ROOT.rglob("*.py")
        if "os.environ" in path.read_text() or "getenv" in path.read_text()
    ]
    assert readers == ["_backend.py"]


def test_test_modules_import_no_test_module():
    """What several of them use stands in a module of its own, so that each can be read, moved and run by itself."""
    imports = {
        (path.name, node.module)
        for path in Path(__file__).parent.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("test_")
    }
    assert not imports


def test_package_and_command_line_answer_without_torch():
    """Which takes seconds: help and what is wrong with an option are said before."""
    code = """
import sys
import dropbp_kernels
from dropbp_kernels.cli import main
for argv in (["--help"], ["finetune", "--help"], ["plan", "--help"], ["profile", "--help"], ["tune", "--help"]):
    try:
        main(argv)
    except SystemExit as stopped:
        assert stopped.code == 0
for line in (
    "fine", "finetune --adapter dora", "finetune --data none.txt", "finetune --resume no", "finetune --model bultin",
    "plan --model ./no", "plan --model llama --dtype int", "profile --model llama --drop-rate 2", "tune --rows 0",
):
    assert main(line.split()) == 2, line
assert "torch" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("module", ["dropbp_kernels.handler", "dropbp_kernels.ops", "dropbp_kernels.cli.finetuning"])
def test_import_is_light(module):
    """No optional package, no Triton, no CUDA query, no change of global state at import."""
    code = f"""
import sys, torch
torch.cuda.is_available = torch.cuda.device_count = torch.cuda.init = lambda *a: sys.exit("queried CUDA at import")
rng, threads = torch.get_rng_state(), torch.get_num_threads()
import {module}
heavy = [m for m in ("triton", "transformers", "peft", "matplotlib", "accelerate", "rich") if m in sys.modules]
assert not heavy, heavy
assert torch.equal(rng, torch.get_rng_state()) and threads == torch.get_num_threads()
"""
    result = forks.run(code, flags=("-W", "error"))
    assert result.returncode == 0, result.stderr


def test_every_name_that_is_shown_is_there():
    pytest.importorskip("peft")
    shown = dir(dropbp_kernels)
    assert {"DropBPCallback", "apply_dropbp", "coreset", "losses", "paca"} < set(shown)
    assert not {"Any", "importlib", "handler"} & set(shown)
    assert all(hasattr(dropbp_kernels, name) for name in shown)
    with pytest.raises(AttributeError, match="has no attribute 'apply_dropb'"):
        dropbp_kernels.apply_dropb  # noqa: B018
