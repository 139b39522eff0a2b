"""Text that is always there: the source files of Python's standard library, and the documentation inside pydoc_data.

Modules are split into two fixed halves by a hash of their name: one to pretrain the built-in model, the other for its
fine-tuning task. Which modules exist and what they say depends on the Python version; `fingerprint` tells.
"""

import ast
import functools
import hashlib
import importlib
import sysconfig
import textwrap
from pathlib import Path

from .errors import UserError

PRETRAINING, FINETUNING = 0, 1
# Tests and tools that some installations leave out, tables of code points, and what is not the library's.
_LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "tkinter", "ensurepip", "encodings", "pydoc_data"}
_LEFT_OUT |= {"site-packages", "dist-packages", "__pycache__"}


@functools.cache
def modules(half: int) -> tuple[tuple[str, str], ...]:
    """(path inside the library, source) of one half of the modules, sorted by path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _LEFT_OUT & set(relative.parts) or relative.name.startswith("_sysconfigdata"):
            continue
        if hashlib.sha1(relative.as_posix().encode()).digest()[0] % 2 == half:
            found.append((relative.as_posix(), path.read_text(encoding="utf-8", errors="replace")))
    if not found:
        raise UserError(f"the built-in data is made from Python's standard library, but {root} holds no .py files")
    return tuple(found)


def fingerprint(half: int) -> str:
    """Hash of names and sources of one half."""
    digest = hashlib.sha1()
    for name, source in modules(half):
        digest.update(f"{name}\0{source}\0".encode())
    return digest.hexdigest()


@functools.cache
def docstring_pairs(max_bytes: int) -> tuple[tuple[str, str], ...]:
    r"""(prompt, completion) for each documented function and class of the fine-tuning half.

    The prompt is the source without its docstring, then the opening \"\"\"; the completion is the docstring and the
    closing ones.
    A pair has at most max_bytes bytes: the completion is cut at half of them, then lines at the end of the source.
    """
    pairs = []
    for _, source in modules(FINETUNING):
        lines = source.splitlines()
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            documentation = ast.get_docstring(node)
            expression = node.body[0]
            if not documentation or expression.lineno == node.lineno:  # a one-liner: nothing to cut out
                continue
            code = lines[node.lineno - 1 : expression.lineno - 1] + lines[expression.end_lineno : node.end_lineno]
            pairs.append(_fit(textwrap.dedent("\n".join(code)), documentation, max_bytes))
    return tuple(pairs)


def _fit(code: str, documentation: str, max_bytes: int) -> tuple[str, str]:
    completion = (documentation + '"""').encode()[: max_bytes // 2].decode(errors="ignore")
    budget = max_bytes - len(completion.encode()) - len('\n"""')
    kept = code.encode()[:budget].decode(errors="ignore")
    if kept != code and "\n" in kept:
        kept = kept[: kept.rindex("\n")]
    return f'{kept}\n"""', completion


def documentation() -> str:
    """Python's language reference as the help system prints it: English text."""
    topics = importlib.import_module("pydoc_data.topics").topics
    return "\n\n".join(topics[name].strip() for name in sorted(topics))
