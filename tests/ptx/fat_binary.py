"""Device code within what nvcc compiled and linked."""

import struct
from collections.abc import Iterator

MAGIC = struct.pack("<I", 0xBA55ED50)


def fat_binaries(content: bytes) -> Iterator[bytes]:
    """Each in the bytes of an object or library."""
    at = content.find(MAGIC)
    while at >= 0:
        _, _, header_size, size = struct.unpack_from("<IHHQ", content, at)
        yield content[at : at + header_size + size]
        at = content.find(MAGIC, at + header_size + size)


def entries(binary: bytes) -> Iterator[tuple[str, int, bytes]]:
    """("ptx" or "elf", architecture, code) of a fat binary.

    That is a header (magic, version, its own size, size of what follows) and entries, each with a header (kind,
    version, its own size, size of the code) that holds the architecture at byte 28.
    """
    at = struct.unpack_from("<H", binary, 6)[0]
    while at < len(binary):
        kind, _, header_size, size = struct.unpack_from("<HHIQ", binary, at)
        (architecture,) = struct.unpack_from("<I", binary, at + 28)
        yield {1: "ptx", 2: "elf"}[kind], architecture, binary[at + header_size : at + header_size + size]
        at += header_size + size
