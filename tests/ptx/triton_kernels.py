"""Runs launches of Triton kernels on tensors of the CPU as an H200 would: compiled for it, their PTX on machine.py."""

import contextlib
import struct
from collections.abc import Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from .machine import launch
from .memory import Traffic, extent
from .program import parse

TARGET = GPUTarget("cuda", 90, 32)
FORMATS = {"i32": "i", "i64": "q", "fp32": "f", "fp64": "d"}  # of scalars


@contextlib.contextmanager
def compiled_launches(num_last_blocks: int | None = None) -> Iterator[dict[str, Traffic]]:
    """Inside, kernels run compiled, all blocks or the last. Yields the traffic of each kernel's last launch."""
    backend = make_backend(TARGET)
    seen: dict[str, Traffic] = {}

    def run(kernel: Any, *arguments: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> None:
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, kinds, options = bind(*arguments, **options)
        options, signature, constants, attributes = kernel._pack_args(backend, options, bound, kinds, options)
        source = ASTSource(kernel, signature, constants, attributes)
        compiled = triton.compile(source, target=TARGET, options=options.__dict__)
        program = parse(compiled.asm["ptx"])
        values, extents = [], []
        for name, kind in signature.items():
            if isinstance(bound[name], torch.Tensor):
                extents.append(extent(bound[name]))
                values.append(struct.pack("<Q", bound[name].data_ptr()))
            elif kind != "constexpr":
                values.append(struct.pack("<" + FORMATS[kind], bound[name]))
        values += [bytes(8)] * (len(program.parameters.variables) - len(values))  # memory that Triton may ask for
        block = (compiled.metadata.num_warps * TARGET.warp_size, 1, 1)
        shared_bytes = compiled.metadata.shared
        grid = (*grid, 1, 1)[:3]
        seen[kernel.__name__] = launch(program, grid, block, values, extents, shared_bytes, num_last_blocks)

    ordinary, JITFunction.run = JITFunction.run, run
    try:
        yield seen
    finally:
        JITFunction.run = ordinary
