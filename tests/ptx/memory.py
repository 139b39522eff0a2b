"""Memories of a kernel that watch what its threads do: addresses outside, unaligned or unwritten, and races.

Threads are numbered through all blocks of a launch. Two accesses of a byte by two threads, one of them a write, are a
race unless a barrier lies between them: of the block, or of the warp where they share one.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

SECTOR = 32  # bytes, the least that a GPU moves
NOBODY, MANY = 0, -1  # other threads, warps and blocks are noted as their number + 1


class Fault(Exception):
    """What a GPU stops at, or what makes a result depend on which thread comes first."""


class Order:
    """Which warp and block each thread is of, and how many barriers these have passed."""

    def __init__(self, block_of: np.ndarray, warp_of: np.ndarray) -> None:
        self.block_of, self.warp_of = block_of, warp_of
        self._passed_by_block = np.zeros(block_of[-1] + 1, np.int32)
        self._passed_by_warp = np.zeros(warp_of[-1] + 1, np.int32)

    def pass_blocks(self, threads: np.ndarray) -> None:
        self._passed_by_block[np.unique(self.block_of[threads])] += 1
        self.pass_warps(threads)

    def pass_warps(self, threads: np.ndarray) -> None:
        self._passed_by_warp[np.unique(self.warp_of[threads])] += 1

    def now(self, threads: np.ndarray) -> np.ndarray:
        """(2, threads): barriers that the block, and the warp, of each has passed."""
        return np.stack([self._passed_by_block[self.block_of[threads]], self._passed_by_warp[self.warp_of[threads]]])


@dataclass
class Traffic:
    """Of global memory. A sector counts for each instruction of a warp that touches it, a byte for each thread."""

    sectors_read: int = 0
    sectors_written: int = 0
    bytes_read: int = 0
    bytes_written: int = 0

    def count(self, warps: np.ndarray, addresses: np.ndarray, size: int, is_write: bool) -> None:
        sectors = np.unique(np.stack([warps, addresses // SECTOR]), axis=1).shape[1]
        if is_write:
            self.sectors_written += sectors
            self.bytes_written += size * len(addresses)
        else:
            self.sectors_read += sectors
            self.bytes_read += size * len(addresses)


class Watch:
    """For each byte: who wrote it last and who has read it, and when."""

    def __init__(self, num_bytes: int, order: Order) -> None:
        self._order = order
        self._writer = np.zeros(num_bytes, np.int32)
        self._written_at = np.zeros((2, num_bytes), np.int32)
        self._readers = np.zeros((3, num_bytes), np.int32)  # thread, warp, block
        self._read_at = np.zeros((2, num_bytes), np.int32)

    def access(self, place: np.ndarray, threads: np.ndarray, is_write: bool) -> np.ndarray:
        """Note that each of `threads` touches the byte at `place`; where that is a race."""
        who = np.stack([threads, self._order.warp_of[threads], self._order.block_of[threads]]) + 1
        now = self._order.now(threads)
        writer = self._writer[place]
        known = np.maximum(writer - 1, 0)
        is_ordered = self._is_ordered(
            self._order.block_of[known] + 1 == who[2],
            self._order.warp_of[known] + 1 == who[1],
            now,
            self._written_at[:, place],
        )
        is_race = (writer != NOBODY) & (writer != who[0]) & ~is_ordered
        if not is_write:
            self._note_readers(place, who, now)
            return is_race
        thread, warp, block = self._readers[:, place]
        is_ordered = self._is_ordered(block == who[2], warp == who[1], now, self._read_at[:, place])
        is_race |= (thread != NOBODY) & (thread != who[0]) & ~is_ordered
        self._writer[place], self._written_at[:, place] = who[0], now
        # Threads of one warp may write the same in one instruction; the memories compare what they write.
        return is_race | (self._order.warp_of[self._writer[place] - 1] + 1 != who[1])

    @staticmethod
    def _is_ordered(same_block, same_warp, now, then) -> np.ndarray:
        return (same_block & (then[0] < now[0])) | (same_warp & (then[1] < now[1]))

    def _note_readers(self, place: np.ndarray, who: np.ndarray, now: np.ndarray) -> None:
        # Who read before a barrier of the block is no matter to others of that block.
        is_over = (self._readers[2, place] == who[2]) & (self._read_at[0, place] < now[0])
        for level, (known, new) in enumerate(zip(self._readers, who, strict=True)):
            before = known[place]
            known[place] = new
            is_one = (before == NOBODY) | (before == new) | (is_over & (level < 2))
            known[place[~is_one | (known[place] != new)]] = MANY  # others before, or in this instruction
        self._read_at[:, place] = now


def _check_alignment(text: str, addresses: np.ndarray, size: int) -> None:
    if (addresses % size).any():
        raise Fault(f"{text}: address {addresses[addresses % size != 0][0]:#x} is no multiple of {size}")


def _load(elements: np.ndarray, at: np.ndarray, count: int) -> np.ndarray:
    return elements[at + np.arange(count)[:, None]]


def _store(text: str, elements: np.ndarray, at: np.ndarray, values: np.ndarray) -> None:
    where = at + np.arange(len(values))[:, None]
    elements[where] = values
    if (elements[where] != values).any():
        raise Fault(f"{text}: threads write different values to one place")


class GlobalMemory:
    """Of a launch: tensors, given as (start, end) of their bytes on the host. No other byte may be touched."""

    def __init__(self, extents: Sequence[tuple[int, int]], order: Order) -> None:
        joined: list[list[int]] = []
        for start, end in sorted(extent for extent in extents if extent[0] < extent[1]):
            if joined and start <= joined[-1][1]:
                joined[-1][1] = max(joined[-1][1], end)
            else:
                joined.append([start, end])
        # Of a launch without tensors: none of its addresses is inside.
        self._starts, self._ends = np.array(joined or [[0, 0]], np.int64).T
        self._bases = self._starts // 16 * 16  # an access lies at a multiple of its size
        sizes = -(-(self._ends - self._bases) // 16) * 16
        self._bytes = [
            np.ctypeslib.as_array((ctypes.c_uint8 * int(size)).from_address(int(base)))
            for base, size in zip(self._bases, sizes, strict=True)
        ]
        self._watches = [Watch(int(size), order) for size in sizes]
        self._order = order
        self.traffic = Traffic()

    def access(
        self, text: str, threads: np.ndarray, addresses: np.ndarray, size: int, count: int, values=None
    ) -> np.ndarray | None:
        """`count` elements of `size` bytes at each address: read, or written from `values` (count, threads)."""
        whole = size * count
        _check_alignment(text, addresses, whole)
        which = np.searchsorted(self._starts, addresses, side="right") - 1
        is_outside = (which < 0) | (addresses + whole > self._ends[which])
        if is_outside.any():
            thread, address = threads[is_outside][0], addresses[is_outside][0]
            near = np.abs(self._starts - address).argmin()
            raise Fault(
                f"{text}: thread {thread} is outside of all tensors, {address - self._starts[near]} bytes from the "
                f"start of one of {self._ends[near] - self._starts[near]}"
            )
        self.traffic.count(self._order.warp_of[threads], addresses, whole, values is not None)
        result = np.empty((count, len(threads)), f"u{size}")
        for tensor in np.unique(which):
            lanes = np.flatnonzero(which == tensor)
            offsets = addresses[lanes] - self._bases[tensor]
            place = (offsets[:, None] + np.arange(whole)).ravel()
            if self._watches[tensor].access(place, np.repeat(threads[lanes], whole), values is not None).any():
                raise Fault(f"{text}: race in global memory")
            elements = self._bytes[tensor].view(f"u{size}")
            if values is None:
                result[:, lanes] = _load(elements, offsets // size, count)
            else:
                _store(text, elements, offsets // size, values[:, lanes])
        return result if values is None else None


def extent(tensor: torch.Tensor) -> tuple[int, int]:
    """The addresses of its first byte, and of the one after its last."""
    start = tensor.data_ptr()
    if tensor.numel() == 0:
        return start, start
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()


class OwnMemory:
    """`num_bytes` for each block (shared memory) or thread (local memory), which nobody has written yet."""

    def __init__(self, num_owners: int, num_bytes: int, owner_of: np.ndarray, order: Order) -> None:
        self._size, self._owner_of = num_bytes, owner_of
        self._stride = -(-num_bytes // 16) * 16
        self._bytes = np.zeros(num_owners * self._stride, np.uint8)
        self._is_written = np.zeros(len(self._bytes), bool)
        self._watch = Watch(len(self._bytes), order)

    def access(
        self, text: str, threads: np.ndarray, addresses: np.ndarray, size: int, count: int, values=None
    ) -> np.ndarray | None:
        """As that of GlobalMemory; addresses begin at 0 for each owner."""
        whole = size * count
        _check_alignment(text, addresses, whole)
        if (addresses < 0).any() or (addresses + whole > self._size).any():
            raise Fault(f"{text}: expected {whole} bytes of {self._size}, got those from {addresses.max()}")
        offsets = addresses + self._owner_of[threads] * self._stride
        place = (offsets[:, None] + np.arange(whole)).ravel()
        if values is None and not self._is_written[place].all():
            raise Fault(f"{text}: reads what nobody has written")
        if self._watch.access(place, np.repeat(threads, whole), values is not None).any():
            raise Fault(f"{text}: race in shared memory")
        elements = self._bytes.view(f"u{size}")
        if values is None:
            return _load(elements, offsets // size, count)
        _store(text, elements, offsets // size, values)
        self._is_written[place] = True
        return None
