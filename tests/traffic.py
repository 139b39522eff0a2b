"""Count the bytes that Triton kernels read and write, element by element, in Triton's interpreter."""

import contextlib
import importlib.util
from dataclasses import dataclass

import pytest

from dropbp_kernels import _backend

needs_the_interpreter = pytest.mark.skipif(
    not _backend.is_interpreting() or importlib.util.find_spec("triton") is None,
    reason="needs Triton's interpreter, which on a machine with a GPU is off",
)


@dataclass
class Traffic:
    read: int = 0
    written: int = 0


@contextlib.contextmanager
def counted_traffic():
    """Bytes of all unmasked elements that kernels load and store inside the block; repeated accesses count again."""
    from triton.runtime.interpreter import InterpreterBuilder

    traffic = Traffic()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def num_bytes(pointers, mask):
        return int(mask.data.sum()) * (pointers.get_element_ty().primitive_bitwidth // 8)

    def counting_load(self, pointers, mask, *rest):
        traffic.read += num_bytes(pointers, mask)
        return load(self, pointers, mask, *rest)

    def counting_store(self, pointers, value, mask, *rest):
        traffic.written += num_bytes(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = counting_load, counting_store
    try:
        yield traffic
    finally:
        InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = load, store
