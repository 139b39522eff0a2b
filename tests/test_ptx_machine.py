"""The machine that runs compiled kernels on a CPU: it computes as PTX says, and stops at what a kernel must not do."""

import struct

import numpy as np
import pytest
import torch
from ptx.fat_binary import lz4
from ptx.machine import launch
from ptx.memory import Fault, extent
from ptx.program import parse

REGISTERS = ".reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<9>; .reg .b64 %d<19>;"
# %d1, %d2: addresses of this thread's 8 bytes in x and y; %r1: its number.
KERNEL = """
.visible .entry kernel(.param .u64 x, .param .u64 y)
{
    %s
    .shared .align 16 .b8 memory[512];
    ld.param.u64 %%d1, [x];
    ld.param.u64 %%d2, [y];
    mov.u32 %%r1, %%tid.x;
    mov.u32 %%r2, %%ctaid.x;
    mov.u32 %%r3, %%ntid.x;
    mad.lo.u32 %%r1, %%r2, %%r3, %%r1;
    mul.wide.u32 %%d3, %%r1, 8;
    add.s64 %%d1, %%d1, %%d3;
    add.s64 %%d2, %%d2, %%d3;
    %s
    ret;
}
"""


def run(body, x, y, threads=32, blocks=1):
    arguments = [struct.pack("<Q", tensor.data_ptr()) for tensor in (x, y)]
    program = parse(KERNEL % (REGISTERS, body))
    return launch(program, (blocks, 1, 1), (threads, 1, 1), arguments, [extent(x), extent(y)])


def numbers(values, dtype):
    """One in each 8 bytes, over and over."""
    x = torch.zeros(65, 8, dtype=torch.uint8)[:64]  # where the next tensor cannot begin right behind it
    data = np.resize(np.array(values, dtype), 64)
    x.numpy()[:, : data.itemsize] = data.view(np.uint8).reshape(64, -1)
    return x


# instruction on (%r or %d) 4 (and 5): type of operands, of the result, operands, result
ARITHMETIC = [
    ("add.rn.f32 R, A, B", "f4", "f4", [1.5, 1e30], [2.25, 1.0], [3.75, 1e30]),
    ("add.s32 R, A, B", "i4", "i4", [2**31 - 1], [1], [-(2**31)]),
    ("sub.s64 R, A, B", "i8", "i8", [1], [2], [-1]),
    ("mul.lo.s32 R, A, B", "i4", "i4", [2**20], [2**12 + 1], [2**20]),
    ("mul.hi.u32 R, A, B", "u4", "u4", [2**31], [6], [3]),
    ("mul.hi.s64 R, A, B", "i8", "i8", [-(2**62)], [4], [-1]),
    ("mul.wide.s32 R, A, B", "i4", "i8", [-(2**30)], [8], [-(2**33)]),
    ("mad.wide.u32 R, A, B, 5", "u4", "u8", [2**31], [2], [2**32 + 5]),
    ("div.s32 R, A, B", "i4", "i4", [-7, 7], [2, -2], [-3, -3]),
    ("rem.s32 R, A, B", "i4", "i4", [-7, 7], [2, -2], [-1, 1]),
    ("div.u64 R, A, B", "u8", "u8", [2**63], [3], [2**63 // 3]),
    ("fma.rn.f32 R, A, B, 0fBF800000", "f4", "f4", [1 + 2**-23], [1 - 2**-23], [-(2.0**-46)]),
    ("neg.f32 R, A", "f4", "f4", [1.5], None, [-1.5]),
    ("abs.s32 R, A", "i4", "i4", [-3], None, [3]),
    ("min.f32 R, A, B", "f4", "f4", [np.nan, 2], [1, 3], [1, 2]),
    ("max.NaN.f32 R, A, B", "f4", "f4", [np.nan, 2], [1, 3], [np.nan, 3]),
    ("copysign.f32 R, A, B", "f4", "f4", [-2], [3], [-3]),
    ("ex2.approx.f32 R, A", "f4", "f4", [3, -1], None, [8, 0.5]),
    ("ex2.approx.ftz.f32 R, A", "f4", "f4", [-140], None, [0]),
    ("rsqrt.approx.f32 R, A", "f4", "f4", [0.25], None, [2]),
    ("sqrt.rn.f64 R, A", "f8", "f8", [2], None, [2**0.5]),
    ("and.b32 R, A, B", "u4", "u4", [12], [10], [8]),
    ("not.b32 R, A", "u4", "u4", [0], None, [2**32 - 1]),
    ("shl.b32 R, A, B", "u4", "u4", [3, 3], [31, 32], [2**31, 0]),
    ("shr.u32 R, A, B", "u4", "u4", [2**31, 5], [31, 40], [1, 0]),
    ("shr.s32 R, A, B", "i4", "i4", [-8, -8], [1, 40], [-4, -1]),
    ("bfe.u32 R, A, 4, 8", "u4", "u4", [0xABCD], None, [0xBC]),
    ("bfe.s32 R, A, 4, 8", "i4", "i4", [0xABCD], None, [0xBC - 256]),
    ("prmt.b32 R, A, B, 0x7531", "u4", "u4", [0x33221100], [0x77665544], [0x77553311]),
    ("prmt.b32 R, A, B, 0x000B", "u4", "u4", [0x80000011], [0], [0x111111FF]),
    ("add.rn.bf16x2 R, A, B", "u4", "u4", [0x3F803F80], [0x40003B80], [0x40403F80]),  # 1 + 2, 1 + 2^-8 to even
    ("cvt.rn.bf16x2.f32 R, A, B", "f4", "u4", [1, 1.0039062], [-2, 1.0117188], [0x3F80C000, 0x3F803F82]),
    ("cvt.rzi.s32.f32 R, A", "f4", "i4", [-2.7, 3e9, np.nan], None, [-2, 2**31 - 1, 0]),
    ("cvt.rni.f32.f32 R, A", "f4", "f4", [2.5, 3.5], None, [2, 4]),
    ("cvt.s64.s32 R, A", "i4", "i8", [-5], None, [-5]),
    ("cvt.u64.u32 R, A", "i4", "i8", [-5], None, [2**32 - 5]),
    ("cvt.rn.f32.s32 R, A", "i4", "f4", [-5], None, [-5]),
    ("cvt.f64.f32 R, A", "f4", "f8", [0.1], None, [np.float64(np.float32(0.1))]),
    ("setp.lt.f32 %p1, A, B; selp.b32 R, 1, 0, %p1", "f4", "u4", [1, 2, np.nan], [2, 1, 1], [1, 0, 0]),
    ("setp.geu.f32 %p1, A, B; selp.b32 R, 1, 0, %p1", "f4", "u4", [1, 2, np.nan], [2, 1, 1], [0, 1, 1]),
    ("setp.ne.f32 %p1|%p2, A, B; selp.b32 R, 1, 0, %p2", "f4", "u4", [1, np.nan], [1, 1], [1, 1]),
    ("setp.gt.s32 %p1, A, B; selp.b32 R, 7, 9, !%p1", "i4", "u4", [-1, 1], [0, 0], [7, 9]),
    (
        "setp.lo.u32 %p1, A, B; setp.eq.and.u32 %p2, A, 1, %p1; selp.b32 R, 1, 0, %p2",
        "u4",
        "u4",
        [1, 1],
        [2, 0],
        [1, 0],
    ),
    ("mov.b32 {%h1, %h2}, A; mov.b32 R, {%h2, %h1}", "u4", "u4", [0x12345678], None, [0x56781234]),
]


@pytest.mark.parametrize(("text", "kind", "kind_to", "a", "b", "expected"), ARITHMETIC, ids=lambda value: str(value))
def test_arithmetic(text, kind, kind_to, a, b, expected):
    names = {"A": "%r4" if kind[1] == "4" else "%d4", "B": "%r5" if kind[1] == "4" else "%d5"}
    names["R"] = "%r6" if kind_to[1] == "4" else "%d6"
    for name, register in names.items():
        text = " ".join(word.replace(name, register) if word.strip(",;") == name else word for word in text.split())
    bits, bits_to = 8 * int(kind[1]), 8 * int(kind_to[1])
    x, y = numbers(a, kind), numbers(b if b is not None else a, kind)
    out = y if b is not None else torch.zeros_like(x)
    run(
        f"ld.global.b{bits} {names['A']}, [%d1]; ld.global.b{bits} {names['B']}, [%d2]; {text}; "
        f"st.global.b{bits_to} [%d2], {names['R']};",
        x,
        out,
    )
    found = out.numpy()[: len(expected), : int(kind_to[1])].copy().view(kind_to).ravel()
    np.testing.assert_array_equal(found, np.array(expected, kind_to))


@pytest.mark.parametrize(("kind", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_short_floats_round_as_torch_does(kind, dtype):
    values = torch.cat([torch.randn(28) * 10 ** torch.arange(-14.0, 14), torch.tensor([float("inf"), 0.0, 1e-8, 7e4])])
    x, out = numbers(values.numpy(), "f4"), numbers([0], "u4")
    run(f"ld.global.b32 %r4, [%d1]; cvt.rn.{kind}.f32 %h1, %r4; st.global.b16 [%d2], %h1;", x, out)
    assert torch.equal(out[:32, :2].contiguous().view(dtype).ravel(), values.to(dtype))
    back = numbers([0], "u4")
    run(f"ld.global.b16 %h1, [%d1]; cvt.f32.{kind} %r4, %h1; st.global.b32 [%d2], %r4;", out, back)
    assert torch.equal(back[:32, :4].contiguous().view(torch.float32).ravel(), values.to(dtype).float())


def test_threads_part_and_meet():
    """Each thread loops as often as its number says; behind the loop all of them shuffle together."""
    out = numbers([0], "u4")
    run(
        """mov.u32 %r4, 0; mov.u32 %r5, 0;
        loop: setp.ge.u32 %p1, %r5, %r1; @%p1 bra done; add.u32 %r4, %r4, %r5; add.u32 %r5, %r5, 1; bra loop;
        done: shfl.sync.bfly.b32 %r6, %r4, 1, 31, -1; st.global.b32 [%d2], %r6;""",
        numbers([0], "u4"),
        out,
    )
    sums = np.arange(32) * (np.arange(32) - 1) // 2
    np.testing.assert_array_equal(out.numpy()[:32, :4].copy().view("u4").ravel(), sums[np.arange(32) ^ 1])


@pytest.mark.parametrize(
    ("shuffle", "expected"),
    [
        ("idx.b32 %r4|%p1, %r1, 3, 31", [3] * 32),
        ("bfly.b32 %r4|%p1, %r1, 16, 31", [*range(16, 32), *range(16)]),
        ("down.b32 %r4|%p1, %r1, 2, 31", [*range(2, 32), 30, 31]),
        ("up.b32 %r4|%p1, %r1, 2, 0", [0, 1, *range(30)]),
        ("down.b32 %r4|%p1, %r1, 1, 0x1807", [min(i + 1, i | 7) for i in range(32)]),  # within eight threads
    ],
)
def test_shuffles(shuffle, expected):
    out = numbers([0], "u4")
    run(f"shfl.sync.{shuffle}, -1; st.global.b32 [%d2], %r4;", out.clone(), out)
    assert out.numpy()[:32, :4].copy().view("u4").ravel().tolist() == expected


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_matrices(trans):
    """Thread t gives elements 2 t and 2 t + 1 of a matrix, whose rows lie 16 bytes apart; and takes them again."""
    out, again = numbers([0], "u4"), numbers([0], "u4")
    run(
        f"""mul.lo.u32 %r4, %r1, 2; add.u32 %r5, %r4, 1; shl.b32 %r5, %r5, 16; or.b32 %r4, %r4, %r5;
        and.b32 %r5, %r1, 7; mul.lo.u32 %r5, %r5, 16; mov.u32 %r6, memory; add.u32 %r6, %r6, %r5; cvt.u64.u32 %d4, %r6;
        stmatrix.sync.aligned.m8n8.x1{trans}.shared.b16 [%d4], {{%r4}}; bar.warp.sync -1;
        ldmatrix.sync.aligned.m8n8.x1{trans}.shared.b16 {{%r7}}, [%d4]; st.global.b32 [%d1], %r7;
        mul.lo.u32 %r5, %r1, 4; cvt.u64.u32 %d5, %r5; ld.shared.b32 %r8, [%d5]; st.global.b32 [%d2], %r8;""",
        again,
        out,
    )
    matrix = out.numpy()[:32, :4].copy().view("u2").reshape(8, 8)
    np.testing.assert_array_equal(matrix.T if trans else matrix, np.arange(64).reshape(8, 8))
    np.testing.assert_array_equal(again.numpy()[:32, :4].copy().view("u2").ravel(), np.arange(64))


def test_traffic():
    x, out = numbers([0], "u4"), numbers([0], "u4")
    traffic = run("ld.global.v2.b32 {%r4, %r5}, [%d1]; st.global.b32 [%d2], %r4;", x, out, threads=64)
    # Of 64 times 8 bytes all are read, and of all sectors the half is written.
    assert (traffic.bytes_read, traffic.sectors_read) == (512, 16)
    assert (traffic.bytes_written, traffic.sectors_written) == (256, 16)
    traffic = run("ld.global.b32 %r4, [%d1]; ld.global.b32 %r5, [%d1+4]; st.global.b64 [%d2], 0;", x, out, threads=64)
    assert (traffic.bytes_read, traffic.sectors_read) == (512, 32)  # each sector once for each instruction


# Each thread writes a word of its own, and reads that of the thread so many bytes on.
OWN = "mul.lo.u32 %r4, %r1, 4; mov.u32 %r5, memory; add.u32 %r5, %r5, %r4; cvt.u64.u32 %d4, %r5; "
OWN += "st.shared.u32 [%d4], %r1;"
OTHER = "xor.b32 %r6, %r4, {}; mov.u32 %r7, memory; add.u32 %r7, %r7, %r6; cvt.u64.u32 %d5, %r7; "
OTHER += "ld.shared.u32 %r8, [%d5];"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.global.b32 %r4, [%d1+512];", "outside of all tensors, 512 bytes from the start of one of 512"),
        ("ld.global.b32 %r4, [%d1+-8];", "outside of all tensors, -8 bytes"),
        ("ld.global.b32 %r4, [%d1+2];", "is no multiple of 4"),
        ("ld.global.v2.b64 {%d4, %d5}, [%d1];", "is no multiple of 16"),
        ("add.u32 %r4, %r5, 1;", "reads %r5, which nothing has written"),
        ("ld.shared.b32 %r4, [memory];", "reads what nobody has written"),
        ("mov.u64 %d4, 512; st.shared.b32 [%d4], 0;", "expected 4 bytes of 512"),
        (OWN + OTHER.format(4), "race in shared memory"),  # within a warp
        (OWN + "bar.warp.sync -1;" + OTHER.format(128), "race in shared memory"),  # across warps
        (OWN + "bar.sync 0;" + OTHER.format(128) + "st.shared.b32 [%d4], 1;", "race in shared memory"),
        ("setp.lt.u32 %p1, %r1, 32; @%p1 st.shared.b32 [memory], %r1;", "threads write different values to one place"),
        ("ld.param.u64 %d4, [y]; st.global.b32 [%d4], %r2;", "race in global memory"),  # two warps
        ("ld.param.u64 %d4, [x]; ld.global.b32 %r4, [%d4]; st.global.b32 [%d1], 1;", "race in global memory"),
        ("setp.lt.u32 %p1, %r1, 32; @%p1 ret; bar.sync 0;", "some threads of a block have returned"),
        ("setp.lt.u32 %p1, %r1, 32; @%p1 bra on; bar.sync 0; ret; on: bar.sync 0;", "threads of a block wait at two"),
        ("setp.lt.u32 %p1, %r1, 16; @%p1 shfl.sync.idx.b32 %r4, %r1, 0, 31, -1;", "some threads of a warp are"),
        ("setp.lt.u32 %p1, %r1, 16; @%p1 bar.warp.sync -1;", "some threads of a warp are elsewhere"),
        ("frobnicate.b32 %r4, %r1;", "does not know frobnicate"),
        ("cvt.rz.bf16.f32 %r4, %r1;", "rounds to the nearest alone"),
        ("call.uni (retval0), vprintf, (param0, param1);", "as an assertion does that fails"),
        # The same as some of the above, put right.
        ("ld.global.b32 %r4, [%d1+4];", None),
        (OWN + "bar.warp.sync -1;" + OTHER.format(4), None),
        (OWN + "bar.sync 0;" + OTHER.format(128), None),
        (OWN + "bar.sync 0;" + OTHER.format(128) + "bar.sync 0; st.shared.b32 [%d4], 1;", None),
        ("setp.lt.u32 %p1, %r1, 32; @%p1 st.shared.b32 [memory], 7;", None),
        ("ld.global.b32 %r4, [%d1]; st.global.b32 [%d1], %r4;", None),
    ],
)  # fmt: skip
def test_faults(body, message):
    x, y = numbers([0], "u4"), numbers([0], "u4")
    if message is None:
        run(body, x, y, threads=64)
    else:
        with pytest.raises((Fault, NotImplementedError), match=message):
            run(body, x, y, threads=64)


def test_blocks_may_not_meet_in_global_memory():
    """There is no barrier between blocks."""
    body = "xor.b32 %r4, %r1, {}; mul.wide.u32 %d4, %r4, 8; ld.param.u64 %d5, [y]; add.s64 %d5, %d5, %d4; "
    body += "st.global.b32 [%d2], %r1; bar.sync 0; ld.global.b32 %r5, [%d5];"
    run(body.format(1), numbers([0], "u4"), numbers([0], "u4"), threads=32, blocks=2)
    with pytest.raises(Fault, match="race in global memory"):
        run(body.format(32), numbers([0], "u4"), numbers([0], "u4"), threads=32, blocks=2)


def test_last_blocks_alone():
    out = numbers([0], "u4")
    program = parse(KERNEL % (REGISTERS, "st.global.b32 [%d2], %r1;"))
    arguments = [struct.pack("<Q", out.data_ptr())] * 2
    launch(program, (2, 1, 1), (32, 1, 1), arguments, [extent(out)], num_last_blocks=1)
    assert out.numpy()[:, :4].copy().view("u4").ravel().tolist() == [0] * 32 + [*range(32, 64)]


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        (b"\x13\n\x01\x00\x50hello", b"\n" * 8 + b"hello"),
        (b"\x1fa\x01\x00\x02\x10b\0\0", b"a" * 22 + b"b"),  # zeros follow
        (b"\x3eabc\x03\x00\xf0\x01" + b"0123456789abcdef", b"abc" * 7 + b"0123456789abcdef"),
    ],
)
def test_what_nvcc_12_compresses(block, expected):
    assert lz4(block) == expected
