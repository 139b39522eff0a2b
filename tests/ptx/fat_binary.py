"""Device code within what nvcc compiled and linked."""

import struct
from collections.abc import Iterator

try:
    import zstandard
except ImportError:
    zstandard = None

MAGIC = struct.pack("<I", 0xBA55ED50)
HEADER_SIZE = 16


def fat_binaries(content: bytes) -> Iterator[bytes]:
    """Each in the bytes of an object or library."""
    at = content.find(MAGIC)
    while at >= 0:
        size = size_of(content[at : at + HEADER_SIZE])
        yield content[at : at + size]
        at = content.find(MAGIC, at + size)


def size_of(header: bytes) -> int:
    """Of the fat binary that begins so: of its header and of what follows."""
    _, _, header_size, size = struct.unpack("<IHHQ", header)
    return header_size + size


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


def ptx_of(binary: bytes) -> str:
    """The PTX of a fat binary, of the newest architecture. Errors: ValueError where this cannot read any."""
    found = [code for kind, _, code in entries(binary) if kind == "ptx"]
    if not found:
        raise ValueError("there is no PTX in it, for lack of +PTX in TORCH_CUDA_ARCH_LIST")
    code = found[-1]
    if code.startswith(b"\x28\xb5\x2f\xfd"):  # what nvcc 13 writes
        if zstandard is None:
            raise ValueError("needs zstandard, to read what nvcc compressed")
        code = zstandard.ZstdDecompressor().decompressobj().decompress(code)
    elif not code.lstrip(b"\n").startswith(b".version"):
        code = lz4(code)  # nvcc 12
    text = code.partition(b"\0")[0].decode()
    if ".address_size" not in text:
        raise ValueError("its PTX is compressed in a way that is not known here")
    return text


def lz4(block: bytes) -> bytes:
    """What an LZ4 block holds, which zeros may follow: literals, and repetitions of what stands `distance` before."""
    result, at = bytearray(), 0

    def length(nibble: int) -> int:
        nonlocal at
        total, more = nibble, 255 if nibble == 15 else 0
        while more == 255:
            more = block[at]
            total, at = total + more, at + 1
        return total

    while at < len(block):
        token = block[at]
        at += 1
        count = length(token >> 4)
        result += block[at : at + count]
        at += count
        distance = int.from_bytes(block[at : at + 2], "little")
        at += 2
        if distance == 0:  # behind the last literals
            break
        count = length(token & 15) + 4
        start = len(result) - distance
        for place in range(start, start + count, distance):  # it may repeat what it writes
            result += result[place : min(place + distance, start + count)]
    return bytes(result)
