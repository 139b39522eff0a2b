"""Runs PTX on the CPU: all threads of a launch at once, in NumPy.

Threads that went different ways run by turns, those at the lowest instruction first, and join where they meet again.
Approximate instructions (ex2, rsqrt, division) are exact to rounding here, and arithmetic rounds to nearest, also where
exp asks for down.
"""

import math
import re
import struct
from collections.abc import Sequence

import numpy as np

from .arithmetic import BITS, OPERATIONS, OTHER_ROUNDINGS, convert, read, write
from .memory import Fault, GlobalMemory, Order, OwnMemory, Traffic
from .program import Instruction, Program

WARP = 32
# Where a generic address lies in the memories that a block or a thread has to itself.
WINDOWS = {"shared": 1 << 62, "local": 1 << 61}
THREADS_AT_ONCE = 1 << 14  # of whole blocks, for NumPy's arrays to stay in a cache


def launch(
    program: Program,
    grid: Sequence[int],
    block: Sequence[int],
    arguments: Sequence[bytes],
    extents: Sequence[tuple[int, int]],
    shared_bytes: int = 0,
    num_last_blocks: int | None = None,
) -> Traffic:
    """Run `program` on grid (x, y, z) of blocks of (x, y, z) threads; returns what it moved.

    arguments: of each parameter. extents: the addresses that the kernel may touch, as (start, end). num_last_blocks:
    run only so many, at the end of the grid, which may touch the last megabyte of each extent: for huge tensors.
    Errors: Fault; NotImplementedError for what this machine does not know.
    """
    per_block, num_blocks = math.prod(block), math.prod(grid)
    if per_block % WARP:
        raise ValueError(f"block: expected a multiple of {WARP} threads, got {tuple(block)}")
    if per_block > program.max_threads:
        raise Fault(f"{program.name}: {per_block} threads a block, {program.max_threads} at most")
    first_block = 0
    if num_last_blocks is not None:
        first_block = max(num_blocks - num_last_blocks, 0)
        extents = [(max(start, end - (1 << 20)), end) for start, end in extents]
    threads = np.arange((num_blocks - first_block) * per_block)
    order = Order(threads // per_block, threads // WARP)
    memory = GlobalMemory(extents, order)
    at_once = max(THREADS_AT_ONCE // per_block, 1) * per_block
    for start in range(0, len(threads), at_once):
        group = _Threads(program, threads[start : start + at_once], order, memory, arguments, shared_bytes)
        group.place(grid, block, first_block)
        group.run()
    return memory.traffic


class _Threads:
    """Of some blocks: their registers, and where each of them is."""

    def __init__(
        self,
        program: Program,
        threads: np.ndarray,
        order: Order,
        memory: GlobalMemory,
        arguments: Sequence[bytes],
        shared_bytes: int,
    ) -> None:
        self._program, self._threads, self._order = program, threads, order
        self._block_of = order.block_of[threads] - order.block_of[threads[0]]  # among these
        self._registers: dict[str, np.ndarray] = {}
        self._special: dict[str, np.ndarray] = {}
        self._everyone = np.ones(len(threads), bool)
        self._alive = self._everyone
        of_block = order.block_of - order.block_of[threads[0]]
        of_thread = np.arange(len(order.block_of)) - threads[0]
        self._memories = {
            "global": memory,
            "shared": OwnMemory(self._block_of[-1] + 1, program.shared.size + shared_bytes, of_block, order),
            "local": OwnMemory(len(threads), program.local.size, of_thread, order),
        }
        self._parameters = bytearray(program.parameters.size)
        for variable, value in zip(program.parameters.variables.values(), arguments, strict=True):
            self._parameters[variable.offset : variable.offset + variable.size] = value

    def place(self, grid: Sequence[int], block: Sequence[int], first_block: int) -> None:
        """Say where in the grid these threads are."""
        within, block_index = self._threads % math.prod(block), first_block + self._threads // math.prod(block)
        self._special = {"%laneid": within % WARP, "%warpid": within // WARP}
        for axis, name in enumerate("xyz"):
            self._special[f"%tid.{name}"] = within // math.prod(block[:axis]) % block[axis]
            self._special[f"%ctaid.{name}"] = block_index // math.prod(grid[:axis]) % grid[axis]
            self._special[f"%ntid.{name}"] = np.full(len(within), block[axis])
            self._special[f"%nctaid.{name}"] = np.full(len(within), grid[axis])

    # ---- Who runs what.

    def run(self) -> None:
        """Until all threads have returned."""
        waiting = {0: self._everyone}  # instruction -> threads that are to run it
        at_barrier: list[tuple[int, np.ndarray]] = []  # the same, once their block is there
        with np.errstate(all="ignore"):
            while waiting:
                place = min(waiting)
                self._run_on(place, waiting.pop(place), waiting, at_barrier)
                if at_barrier:
                    self._pass_barriers(waiting, at_barrier)

    def _run_on(self, place: int, mask: np.ndarray, waiting: dict, at_barrier: list) -> None:
        """From `place` to where threads part, wait or meet others."""
        while place < len(self._program.code):
            instruction = self._program.code[place]
            chosen = mask & self._predicate(instruction)
            opcode = instruction.opcode
            place += 1
            if opcode in ("bra", "ret", "exit", "bar", "barrier"):
                if opcode == "bra":
                    _send(waiting, self._program.labels[instruction.operands[0]], chosen)
                elif opcode in ("ret", "exit"):
                    self._alive = self._alive & ~chosen
                elif "warp" in instruction.modifiers:
                    self._expect_whole_warps(instruction, chosen)
                    self._order.pass_warps(self._threads[chosen])
                    _send(waiting, place, chosen)
                else:
                    _wait(at_barrier, place, chosen)
                return _send(waiting, place, mask & ~chosen)
            if chosen.any():
                self._execute(instruction, chosen)
            if waiting and min(waiting) <= place:
                return _send(waiting, place, mask)
        self._alive = self._alive & ~mask

    def _pass_barriers(self, waiting: dict, at_barrier: list) -> None:
        """Let go the blocks all of whose threads have arrived."""
        arrived = np.logical_or.reduce([mask for _, mask in at_barrier])
        is_blocked = np.zeros(self._block_of[-1] + 1, bool)
        is_blocked[self._block_of[self._alive & ~arrived]] = True
        passes = arrived & ~is_blocked[self._block_of]
        if not passes.any():
            return
        for place, mask in at_barrier:
            is_passing = np.zeros(len(is_blocked), bool)
            is_passing[self._block_of[mask & passes]] = True
            of_block = is_passing[self._block_of]
            if (of_block & ~self._alive).any():
                raise Fault(f"{self._program.code[place - 1].text}: some threads of a block have returned")
            if (of_block & ~mask).any():
                raise Fault(f"{self._program.code[place - 1].text}: threads of a block wait at two barriers")
            _send(waiting, place, mask & passes)
        self._order.pass_blocks(self._threads[passes])
        at_barrier[:] = [(place, mask & ~passes) for place, mask in at_barrier if (mask & ~passes).any()]

    def _expect_whole_warps(self, instruction: Instruction, mask: np.ndarray) -> None:
        is_there, is_whole = mask.reshape(-1, WARP).any(1), (mask | ~self._alive).reshape(-1, WARP).all(1)
        if (is_there & ~is_whole).any():
            raise Fault(f"{instruction.text}: some threads of a warp are elsewhere")

    # ---- Operands.

    def _predicate(self, instruction: Instruction) -> np.ndarray:
        if instruction.predicate is None:
            return self._everyone
        value = self._registers[instruction.predicate]
        return ~value if instruction.is_negated else value

    def _raw(self, operand: str, size: int) -> np.ndarray:
        """The bits of an operand, as unsigned integers of `size` bytes; booleans for size 0, a predicate."""
        if operand.startswith("!"):
            return ~self._raw(operand[1:], size)
        if operand in self._registers:
            return self._registers[operand]
        if operand in self._special:
            return self._special[operand].astype(f"u{size}")
        if operand.startswith("%"):
            raise Fault(f"{self._program.name}: reads {operand}, which nothing has written")
        return np.full(len(self._threads), self._constant(operand, size), f"u{size}" if size else bool)

    def _constant(self, operand: str, size: int) -> int:
        for space in (self._program.shared, self._program.local):
            if operand in space.variables:
                return space.variables[operand].offset
        if operand.startswith("0f") and size == 8:
            (value,) = struct.unpack("<f", struct.pack("<I", int(operand[2:], 16)))
            return struct.unpack("<Q", struct.pack("<d", value))[0]
        if operand.startswith(("0f", "0d")):
            return int(operand[2:], 16)
        if not operand.lstrip("-")[0].isdigit():
            return 0  # a string of the module, which only the message of a failed assertion reads
        return int(operand.rstrip("U"), 0) % (1 << 8 * size) if size else int(operand, 0) != 0

    def _set(self, register: str, value: np.ndarray, mask: np.ndarray) -> None:
        if register == "_":
            return
        before = self._registers.get(register)
        if before is None:
            before = np.zeros_like(value)
        self._registers[register] = value if mask.all() else np.where(mask, value, before)

    def _address(self, operand: str) -> np.ndarray:
        """Of `[register or variable + bytes]`."""
        base, offset = _split_address(operand)
        if base.startswith("%"):
            return self._raw(base, 8).astype(np.int64) + offset
        return np.full(len(self._threads), self._constant(base, 8) + offset, np.int64)

    # ---- Instructions.

    def _execute(self, instruction: Instruction, mask: np.ndarray) -> None:
        special = {
            "ld": self._move, "st": self._move, "ldmatrix": self._move_matrices, "stmatrix": self._move_matrices,
            "mov": self._copy, "shfl": self._shuffle, "setp": self._compare, "cvt": self._convert,
            "cvta": self._make_generic,
        }.get(instruction.opcode)  # fmt: skip
        if special:
            return special(instruction, mask)
        if instruction.opcode == "call":
            called = next(operand for operand in instruction.operands if not operand.startswith("("))
            raise Fault(f"{self._program.name}: calls {called}, as an assertion does that fails")
        operation = OPERATIONS.get(instruction.opcode)
        if operation is None:
            raise NotImplementedError(f"{instruction.text}: this machine does not know {instruction.opcode}")
        kind, (to, *sources) = instruction.modifiers[-1], instruction.operands
        values = []
        for index, source in enumerate(sources):
            kind_of = operation.kind_of(kind, index, instruction.modifiers)
            values.append(read(self._raw(source, BITS[kind_of] // 8), kind_of))
        result = operation.run(instruction.modifiers, *values)
        self._set(to, write(result, operation.kind_of_result(kind, instruction.modifiers), instruction.modifiers), mask)

    def _convert(self, instruction: Instruction, mask: np.ndarray) -> None:
        if not OTHER_ROUNDINGS.isdisjoint(instruction.modifiers):
            raise NotImplementedError(f"{instruction.text}: this machine rounds to the nearest alone")
        to, *sources = instruction.operands
        kind_to, kind_from = (word for word in instruction.modifiers if word in BITS)
        values = [read(self._raw(source, BITS[kind_from] // 8), kind_from) for source in sources]
        self._set(to, convert(values, kind_to, instruction.modifiers), mask)

    def _copy(self, instruction: Instruction, mask: np.ndarray) -> None:
        """mov, also of a register into parts in braces and back."""
        to, source = instruction.operands
        size = BITS[instruction.modifiers[-1]] // 8
        if to.startswith("{"):
            names = _names(to)
            parts = np.ascontiguousarray(self._raw(source, size)).view(f"u{size // len(names)}")
            for index, name in enumerate(names):
                self._set(name, parts[index :: len(names)], mask)
        elif source.startswith("{"):
            names = _names(source)
            parts = np.stack([self._raw(name, size // len(names)) for name in names], axis=1)
            self._set(to, np.ascontiguousarray(parts).view(f"u{size}").ravel(), mask)
        else:
            self._set(to, self._raw(source, size), mask)

    def _compare(self, instruction: Instruction, mask: np.ndarray) -> None:
        """setp, whose result may be joined with another predicate, and written negated as well."""
        comparison, *words = instruction.modifiers
        to, first, second, *others = instruction.operands
        a, b = (read(self._raw(operand, BITS[words[-1]] // 8), words[-1]) for operand in (first, second))
        result = OPERATIONS["setp"].run([comparison], a, b)
        for other in others:
            join = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[words[0]]
            result = join(result, self._raw(other, 0))
        for register, value in zip(to.split("|"), (result, ~result), strict=False):
            self._set(register, value, mask)

    def _move(self, instruction: Instruction, mask: np.ndarray) -> None:
        """ld and st, of one element a thread or of several."""
        is_load = instruction.opcode == "ld"
        registers, address = instruction.operands[:2] if is_load else instruction.operands[1::-1]
        kind, names = instruction.modifiers[-1], _names(registers)
        size = BITS[kind] // 8
        if "param" in instruction.modifiers and not is_load:
            return  # of a call, which is a fault
        if "param" in instruction.modifiers:
            name, offset = _split_address(address)
            at = self._program.parameters.variables[name].offset + offset
            for index, register in enumerate(names):
                value = int.from_bytes(self._parameters[at + index * size : at + (index + 1) * size], "little")
                self._set(register, self._widened(register, np.full(len(mask), value, f"u{size}"), kind), mask)
            return
        values = None if is_load else np.stack([self._raw(name, size).astype(f"u{size}") for name in names])
        addresses = self._address(address)
        named = next((word for word in instruction.modifiers if word in self._memories), None)
        for space, of_these, offsets in [(named, mask, addresses)] if named else self._spaces(mask, addresses):
            found = self._access(space, instruction, of_these, offsets, size, len(names), values)
            if is_load:
                for register, value in zip(names, found, strict=True):
                    self._set(register, self._widened(register, value, kind), of_these)

    def _spaces(self, mask: np.ndarray, addresses: np.ndarray) -> list[tuple[str, np.ndarray, np.ndarray]]:
        """Where generic addresses point to: (memory, threads, addresses in it)."""
        found, is_elsewhere = [], np.zeros_like(mask)
        for space, start in WINDOWS.items():
            is_here = (addresses >= start) & ~is_elsewhere
            found.append((space, mask & is_here, addresses - start))
            is_elsewhere |= is_here
        found.append(("global", mask & ~is_elsewhere, addresses))
        return [(space, of_these, offsets) for space, of_these, offsets in found if of_these.any()]

    def _make_generic(self, instruction: Instruction, mask: np.ndarray) -> None:
        """cvta, also back: of global memory generic addresses are the same."""
        to, source = instruction.operands
        space = next(word for word in instruction.modifiers if word in self._memories)
        sign = -1 if "to" in instruction.modifiers else 1
        self._set(to, (self._raw(source, 8).astype(np.int64) + sign * WINDOWS.get(space, 0)).astype(np.uint64), mask)

    def _access(self, space, instruction, mask, addresses, size, count, values) -> np.ndarray:
        """Elements (count, threads) read or written by the threads of `mask`, in the memory `space`."""
        lanes = np.flatnonzero(mask)
        memory, who = self._memories[space], self._threads[lanes]
        if values is not None:
            memory.access(instruction.text, who, addresses[lanes], size, count, values[:, lanes])
            return values
        found = np.zeros((count, len(mask)), f"u{size}")
        found[:, lanes] = memory.access(instruction.text, who, addresses[lanes], size, count)
        return found

    def _widened(self, register: str, value: np.ndarray, kind: str) -> np.ndarray:
        """A register may be wider than what is loaded into it."""
        if register == "_" or (width := self._program.width(register)) <= value.itemsize:
            return value
        if kind[0] == "s":
            return value.view(f"i{value.itemsize}").astype(f"i{width}").view(f"u{width}")
        return value.astype(f"u{width}")

    def _move_matrices(self, instruction: Instruction, mask: np.ndarray) -> None:
        """ldmatrix and stmatrix, of 8 x 8 elements of 16 bits: thread 8 m + r has the address of row r of matrix m.

        A thread has two neighbours of a row in a register, with trans of a column.
        """
        if "b16" not in instruction.modifiers:
            raise NotImplementedError(f"{instruction.text}: this machine knows no other matrices than those of 16 bits")
        self._expect_whole_warps(instruction, mask)
        is_load = instruction.opcode == "ldmatrix"
        registers, address = instruction.operands if is_load else instruction.operands[::-1]
        of_rows, lane = self._address(address).reshape(-1, WARP), np.arange(WARP)
        for matrix, name in enumerate(_names(registers)):
            whole = np.zeros(len(mask), np.uint32) if is_load else self._raw(name, 4)
            for half in (0, 1):
                row, column = lane // 4, lane % 4 * 2 + half
                if "trans" in instruction.modifiers:
                    row, column = column, row
                addresses = (of_rows[:, 8 * matrix + row] + 2 * column).ravel()
                values = None if is_load else (whole >> 16 * half).astype(np.uint16)[None]
                found = self._access("shared", instruction, mask, addresses, 2, 1, values)
                if is_load:
                    whole |= found[0].astype(np.uint32) << 16 * half
            if is_load:
                self._set(name, whole, mask)

    def _shuffle(self, instruction: Instruction, mask: np.ndarray) -> None:
        """shfl.sync: a value of another thread of the warp; its own where that one is out of bounds."""
        mode = instruction.modifiers[1]
        to, *sources = instruction.operands
        value, lane, bounds, members = (self._raw(operand, 4) for operand in sources)
        is_here = (mask.reshape(-1, WARP) << np.arange(WARP)).sum(1)
        if (members & ~np.repeat(is_here, WARP))[mask].any():
            raise Fault(f"{instruction.text}: some threads of a warp are elsewhere")
        own, lane = np.arange(len(mask)) % WARP, (lane & 31).astype(np.int64)
        segment, limit = (bounds >> 8 & 31).astype(np.int64), (bounds & 31).astype(np.int64)
        first, last = own & segment, (own & segment) | (limit & ~segment)
        index = (lane & ~segment) | first
        source = {"bfly": own ^ lane, "idx": index, "down": own + lane, "up": own - lane}[mode]
        is_inside = source >= last if mode == "up" else source <= last
        self._order.pass_warps(self._threads[mask])
        register, _, inside = to.partition("|")
        self._set(register, value[np.arange(len(mask)) - own + np.where(is_inside, source, own)], mask)
        if inside:
            self._set(inside, is_inside, mask)


def _send(waiting: dict, place: int, mask: np.ndarray) -> None:
    if mask.any():
        waiting[place] = waiting[place] | mask if place in waiting else mask


def _wait(at_barrier: list, place: int, mask: np.ndarray) -> None:
    """Threads may come to the same barrier one after another."""
    for index, (other, there) in enumerate(at_barrier):
        if other == place:
            at_barrier[index] = place, there | mask
            return
    at_barrier.append((place, mask))


def _names(registers: str) -> list[str]:
    """Of one register, or of several in braces."""
    return [name.strip() for name in registers.strip("{}").split(",")]


def _split_address(operand: str) -> tuple[str, int]:
    match = re.fullmatch(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\w+)\s*)?\]", operand)
    if match is None:
        raise NotImplementedError(f"{operand}: this machine does not know such addresses")
    return match[1], int(match[2] or "0", 0)
