"""The documents of a data set, as they stand in files: texts, pairs of prompt and completion, chats."""

import codecs
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import corpus
from .errors import UserError

BUILTIN = ("builtin:docstrings", "builtin:docs")
FORMS = ({"text"}, {"prompt", "completion"}, {"messages"})


@dataclass(frozen=True)
class Document:
    """One unit of data as it stands in a file: `kind` is "text", "pair" or "chat"; `origin` is for messages."""

    kind: str
    content: Any
    origin: str


def check_data_path(name: str) -> None:
    """Raise a UserError unless `name` is a built-in data set or a file or folder that could be one."""
    if name in BUILTIN:
        return
    if name.startswith("builtin"):
        raise UserError(f"--data: expected {' or '.join(BUILTIN)}, a file or a folder, got {name!r}")
    _files(name)


def _files(name: str) -> list[Path]:
    path = Path(name).expanduser()
    if not path.exists():
        raise UserError(f"--data {name}: no such file or folder")
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".jsonl") and p.is_file())
        if not found:
            raise UserError(f"--data {name}: expected .txt or .jsonl files in this folder, found none")
        return found
    if path.suffix not in (".txt", ".jsonl"):
        raise UserError(
            f"--data {name}: expected a .txt file, or .jsonl with an object a line, got {path.suffix or 'no'} suffix"
        )
    return [path]


def read_documents(name: str, seq_len: int, note: Callable[[str], None] = print) -> Iterator[Document]:
    """The documents of the data called `name`, a built-in one, a file or a folder, in order.

    seq_len: the longest example that a built-in data set may have. note: told what is read but not used.
    Errors: UserError when the data are missing, empty or malformed (with file and line).
    """
    if name == "builtin:docs":
        yield Document("text", corpus.documentation(), name)
        return
    if name == "builtin:docstrings":
        for prompt, completion in corpus.docstring_pairs(seq_len - 2):  # a token begins the row, one ends it
            yield Document("pair", (prompt, completion), name)
        return
    paths = _files(name)
    for path in paths:
        text = _read(path)
        if not text.strip():
            if len(paths) == 1:
                raise UserError(f"--data {path}: the file is empty")
            note(f"{path}: left out, since it is empty")
            continue
        if path.suffix == ".txt":
            yield Document("text", text, str(path))
            continue
        ignored: set[str] = set()
        for number, line in enumerate(text.split("\n"), 1):  # not splitlines: a string may hold U+2028
            if line.strip():
                yield _parse_line(line, f"{path}, line {number}", ignored)
        if ignored:
            note(f"{path}: keys not used: {', '.join(sorted(ignored))}")


def _read(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"--data {path}: {error.strerror}") from error
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # what Windows calls Unicode
        raise UserError(f"--data {path}: expected UTF-8 text, got UTF-16; save it as UTF-8")
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise UserError(f"--data {path}: expected UTF-8 text, byte {error.start} is not") from error


def _parse_line(line: str, origin: str, ignored: set[str]) -> Document:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{origin}: not JSON: {error.msg} at character {error.colno}") from error
    except (ValueError, RecursionError) as error:  # numbers and nesting beyond Python's bounds
        raise UserError(f"{origin}: not JSON that Python reads: {error}") from error
    if "\\u" in line and not _is_unicode(entry):
        raise UserError(f'{origin}: expected text, got half of a character, as in "\\ud83d"')
    expected = "text, or prompt and completion, or messages"
    if not isinstance(entry, dict):
        raise UserError(f"{origin}: expected an object with {expected}, got {type(entry).__name__}")
    forms = [form for form in FORMS if form <= entry.keys()]
    if len(forms) != 1:
        raise UserError(f"{origin}: expected the keys {expected}, got {', '.join(entry) or 'none'}")
    ignored |= entry.keys() - forms[0]
    if "messages" in forms[0]:
        return Document("chat", _checked_messages(entry["messages"], origin), origin)
    for key in forms[0]:
        if not isinstance(entry[key], str):
            raise UserError(f"{origin}: expected {key} to be a string, got {type(entry[key]).__name__}")
    if "text" in forms[0]:
        return Document("text", entry["text"], origin)
    return Document("pair", (entry["prompt"], entry["completion"]), origin)


def _is_unicode(entry: Any) -> bool:
    """Whether it could be written as UTF-8: an escape in JSON may be half of a pair, which is no character."""
    try:
        json.dumps(entry, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _checked_messages(messages: Any, origin: str) -> list[dict[str, Any]]:
    is_list = isinstance(messages, list) and messages
    if not is_list or not all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages):
        raise UserError(f"{origin}: expected messages to be a list of objects with role and content")
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError(f"{origin}: expected a message with the role assistant: only those are trained on")
    return messages
