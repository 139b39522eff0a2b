"""Reads a kernel of PTX, the assembly that nvcc and Triton hand to the GPU's own assembler."""

import re
from dataclasses import dataclass, field

from .arithmetic import BITS


@dataclass
class Instruction:
    """@predicate opcode.modifier.modifier operand, operand"""

    text: str
    opcode: str
    modifiers: list[str]
    operands: list[str]
    predicate: str | None = None
    is_negated: bool = False


@dataclass
class Variable:
    """Of the kernel's parameters, or of the shared or local memory: where it lies there, in bytes."""

    offset: int
    size: int


@dataclass
class Space:
    """A memory that the kernel declares variables in."""

    variables: dict[str, Variable] = field(default_factory=dict)
    size: int = 0

    def declare(self, name: str, size: int, alignment: int) -> None:
        offset = -(-self.size // alignment) * alignment
        self.variables[name] = Variable(offset, size)
        self.size = offset + size


@dataclass
class Program:
    name: str
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)  # of registers, in bytes, by their names without the number
    parameters: Space = field(default_factory=Space)
    shared: Space = field(default_factory=Space)
    local: Space = field(default_factory=Space)
    max_threads: int = 1024  # of a block

    def width(self, register: str) -> int:
        return self.widths[register.rstrip("0123456789")]


def _declare(space: Space, declaration: str) -> None:
    """Such as `.align 16 .b8 name[64]`, or `.u64 .ptr .global .align 1 name`, where that is of what it points to."""
    *words, name = declaration.split()
    element = next(BITS[word[1:]] // 8 for word in words if word[1:] in BITS)
    alignment = int(words[words.index(".align") + 1]) if ".align" in words and ".ptr" not in words else element
    name, _, count = name.partition("[")
    space.declare(name, element * int(count.rstrip("]") or 0) if count else element, max(alignment, element))


def parse(ptx: str, name: str | None = None) -> Program:
    """The kernel `name` of a module; None: the only one."""
    ptx = re.sub(r"//.*", "", ptx)
    ptx = re.sub(r"^\s*\.(loc|file|pragma)\b.*$", "", ptx, flags=re.MULTILINE)
    entries = list(re.finditer(r"\.entry\s+([\w$]+)\s*\(", ptx))
    found = [entry for entry in entries if name in (None, entry[1])]
    if len(found) != 1:
        raise ValueError(f"name: expected one of {[entry[1] for entry in entries]}, got {name}")
    program = Program(found[0][1])
    for variable in re.finditer(r"^\s*(?:\.\w+ )*\.shared\s+([^;]*);", ptx[: entries[0].start()], re.MULTILINE):
        _declare(program.shared, variable[1])
    end = ptx.index(")", found[0].end())
    for parameter in filter(None, (text.strip() for text in ptx[found[0].end() : end].split(","))):
        _declare(program.parameters, parameter.removeprefix(".param").strip())
    start = ptx.index("{", end)
    if bound := re.search(r"\.maxntid (\d+)", ptx[end:start]):
        program.max_threads = int(bound[1])
    _parse_body(program, _body(ptx, start))
    return program


def _body(ptx: str, start: int) -> str:
    depth = 0
    for place in range(start, len(ptx)):
        depth += (ptx[place] == "{") - (ptx[place] == "}")
        if depth == 0:
            return ptx[start + 1 : place]
    raise ValueError("expected a closing brace of the kernel")


def _parse_body(program: Program, body: str) -> None:
    for statement in body.split(";"):
        text = " ".join(statement.split())
        while True:  # braces of scopes, and labels
            if text[:1] in ("{", "}"):
                text = text[1:].strip()
            elif label := re.match(r"([\w$]+):", text):
                program.labels[label[1]] = len(program.code)
                text = text[label.end() :].strip()
            else:
                break
        if text.startswith(".reg"):
            _, kind, names = text.split(maxsplit=2)
            for register in names.split(","):  # such as %r<64>, or a name by itself
                program.widths[register.strip().partition("<")[0]] = BITS[kind[1:]] // 8
        elif text.startswith(".shared"):
            _declare(program.shared, text.removeprefix(".shared"))
        elif text.startswith(".local"):
            _declare(program.local, text.removeprefix(".local"))
        elif text and not text.startswith(".param"):  # of calls
            program.code.append(_instruction(text))


def _instruction(text: str) -> Instruction:
    predicate = None
    rest = text
    if text.startswith("@"):
        predicate, rest = text[1:].split(maxsplit=1)
    is_negated = predicate is not None and predicate.startswith("!")
    words, _, operands = rest.partition(" ")
    opcode, *modifiers = words.split(".")
    # A comma within braces or brackets does not part operands.
    parts = [part.strip() for part in re.split(r",(?![^{\[]*[}\]])", operands)] if operands else []
    return Instruction(text, opcode, modifiers, parts, predicate and predicate.removeprefix("!"), is_negated)
