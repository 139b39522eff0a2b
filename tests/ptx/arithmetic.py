"""Arithmetic of PTX in NumPy. Registers hold bits, as unsigned integers; an instruction says what they mean."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

# Of each type; a predicate is a boolean.
BITS = {
    "pred": 0, "b8": 8, "u8": 8, "s8": 8, "b16": 16, "u16": 16, "s16": 16, "f16": 16, "bf16": 16, "b32": 32, "u32": 32,
    "s32": 32, "f32": 32, "f16x2": 32, "bf16x2": 32, "b64": 64, "u64": 64, "s64": 64, "f64": 64,
}  # fmt: skip
ROUNDINGS = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}  # to integers
OTHER_ROUNDINGS = {"rz", "rm", "rp", "rna", "rs"}  # of conversions, which round to nearest alone here


def read(bits: np.ndarray, kind: str) -> np.ndarray:
    """Numbers of the type `kind`: float32 for those of 16 bits, (2, threads) for pairs."""
    if kind == "pred":
        return bits
    if kind.endswith("x2"):
        halves = np.ascontiguousarray(bits).view(np.uint16)
        return np.stack([read(halves[part::2], kind[:-2]) for part in (0, 1)])
    size = BITS[kind] // 8
    bits = np.ascontiguousarray(bits.astype(f"u{size}", copy=False))  # of a wider register the low part
    if kind == "bf16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    if kind == "f16":
        return bits.view(np.float16).astype(np.float32)
    return bits.view(("u" if kind[0] == "b" else kind[0].replace("s", "i")) + str(size))


def write(numbers: np.ndarray, kind: str, modifiers: Sequence[str] = ()) -> np.ndarray:
    """The bits of numbers, rounded to nearest even."""
    if kind == "pred":
        return numbers
    if kind.endswith("x2"):
        halves = np.stack([write(half, kind[:-2]) for half in numbers], axis=1)
        return np.ascontiguousarray(halves).view(np.uint32).ravel()
    size = BITS[kind] // 8
    if kind == "bf16":
        bits = np.ascontiguousarray(_rounded_to_odd(numbers)).view(np.uint32)
        return np.where(np.isnan(numbers), 0x7FFF, (bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    if kind[0] == "f":
        numbers = numbers.astype(f"f{size}")
        if "ftz" in modifiers:
            numbers = np.where(np.abs(numbers) < np.finfo(f"f{size}").tiny, np.copysign(0, numbers), numbers)
            numbers = numbers.astype(f"f{size}")
        return np.ascontiguousarray(numbers).view(f"u{size}")
    return numbers.astype(f"u{size}")


def _rounded_to_odd(numbers: np.ndarray) -> np.ndarray:
    """As float32: of float64 so that rounding once more, to fewer digits, is as rounding once."""
    near = numbers.astype(np.float32)
    if numbers.dtype != np.float64:
        return near
    is_inexact = (near != numbers) & np.isfinite(near) & (near.view(np.uint32) & 1 == 0)
    towards = np.where(near < numbers, np.inf, -np.inf).astype(np.float32)
    return np.where(is_inexact, np.nextafter(near, towards), near)


def convert(values: list[np.ndarray], kind: str, modifiers: Sequence[str]) -> np.ndarray:
    """cvt: the bits of one value, or of two as a pair whose high half is the first."""
    if kind.endswith("x2"):
        return write(np.stack(values[::-1]), kind)
    (value,) = values
    for word in modifiers:
        if word in ROUNDINGS:
            value = ROUNDINGS[word](value)
    if "sat" in modifiers:
        value = np.clip(np.nan_to_num(value, nan=0), 0, 1)
    if kind[0] in "us" and value.dtype.kind == "f":  # what does not fit becomes the nearest that does
        limits = np.iinfo(f"{kind[0].replace('s', 'i')}{BITS[kind] // 8}")
        value = np.nan_to_num(value.astype(np.float64), nan=0)
        whole = np.clip(value, limits.min, limits.max).astype(object)
        return write(np.array([min(int(v), limits.max) for v in whole], limits.dtype), kind)
    return write(value, kind, modifiers)


def _divide(modifiers, a, b):
    if a.dtype.kind == "f":
        return a.astype(np.float64) / b
    b = np.where(b == 0, 1, b)  # of threads that do not divide
    return (np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b))).astype(a.dtype) if a.dtype.kind == "i" else a // b


def _remainder(modifiers, a, b):
    return a - _divide(modifiers, a, b) * np.where(b == 0, 1, b)


def _multiply(modifiers, a, b):
    if "wide" not in modifiers and "hi" not in modifiers:
        return a * b
    if a.itemsize == 8:
        return np.array([x * y >> 64 for x, y in zip(a.tolist(), b.tolist(), strict=True)], a.dtype)
    product = a.astype(f"{a.dtype.kind}{2 * a.itemsize}") * b
    return product if "wide" in modifiers else (product >> 8 * a.itemsize).astype(a.dtype)


def _multiply_add(modifiers, a, b, c):
    """fma: rounded once. Products of float32 are exact in float64."""
    wide = np.longdouble if a.dtype == np.float64 else np.float64
    return (a.astype(wide) * b + c).astype(np.float64)


def _shift_left(modifiers, a, count):
    width = 8 * a.itemsize
    return np.where(count >= width, 0, a << np.minimum(count, width - 1).astype(a.dtype)).astype(a.dtype)


def _shift_right(modifiers, a, count):
    width = 8 * a.itemsize
    shifted = a >> np.minimum(count, width - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(count >= width, 0, shifted).astype(a.dtype)


def _extract(modifiers, a, start, length):
    """bfe: a field of bits, whose sign goes on where `a` is signed."""
    start, length = (count.astype(np.int64) & 255 for count in (start, length))
    field = (a.astype(np.int64) >> start) & ((1 << length) - 1)
    is_negative = (length > 0) & (field >> np.maximum(length - 1, 0) & 1 == 1) & (a.dtype.kind == "i")
    return (field - np.where(is_negative, 1 << length, 0)).astype(a.dtype)


def _permute(modifiers, a, b, selector):
    """prmt: four bytes out of the eight of a and b."""
    pool = np.ascontiguousarray(np.stack([a, b], axis=1)).view(np.uint8)
    choices = selector[:, None] >> (4 * np.arange(4)) & 15
    chosen = np.take_along_axis(pool, choices & 7, axis=1)
    signs = np.where(chosen & 128, 255, 0)
    return np.where(choices & 8, signs, chosen).astype(np.uint8).view(np.uint32).ravel()


COMPARISONS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


def _compare(modifiers, a, b):
    name = modifiers[0]
    is_nan = np.isnan(a) | np.isnan(b) if a.dtype.kind == "f" else np.zeros(len(a), bool)
    if name in ("num", "nan"):
        return is_nan if name == "nan" else ~is_nan
    if name in COMPARISONS:
        return COMPARISONS[name](a, b) & ~is_nan
    return COMPARISONS[name.removesuffix("u")](a, b) | is_nan  # unordered


@dataclass
class Operation:
    """run(modifiers, *numbers) -> numbers; and of what type operands and result of an instruction of `kind` are."""

    run: Callable[..., np.ndarray]
    kind_of: Callable[[str, int, Sequence[str]], str] = lambda kind, index, modifiers: kind
    kind_of_result: Callable[[str, Sequence[str]], str] = lambda kind, modifiers: kind


def _of_product(kind: str, modifiers: Sequence[str]) -> str:
    return f"{kind[0]}{2 * BITS[kind]}" if "wide" in modifiers else kind


def _first_is_kind(kind: str, index: int, modifiers: Sequence[str]) -> str:
    return "u32" if index else kind


def _plain(function: Callable[..., np.ndarray]) -> Operation:
    return Operation(lambda modifiers, *values: function(*values))


def _exact(function: Callable[[np.ndarray], np.ndarray]) -> Operation:
    return Operation(lambda modifiers, value: function(value.astype(np.float64)))


def _extreme(quiet: Callable[..., np.ndarray], with_nan: Callable[..., np.ndarray]) -> Operation:
    return Operation(lambda modifiers, a, b: (with_nan if "NaN" in modifiers else quiet)(a, b))


OPERATIONS = {
    "add": _plain(np.add),
    "sub": _plain(np.subtract),
    "mul": Operation(_multiply, kind_of_result=_of_product),
    "mad": Operation(
        lambda modifiers, a, b, c: _multiply(modifiers, a, b) + c,
        lambda kind, index, modifiers: _of_product(kind, modifiers) if index == 2 else kind,
        _of_product,
    ),
    "fma": Operation(_multiply_add),
    "div": Operation(_divide),
    "rem": Operation(_remainder),
    "neg": _plain(np.negative),
    "abs": _plain(np.abs),
    "min": _extreme(np.fmin, np.minimum),
    "max": _extreme(np.fmax, np.maximum),
    "copysign": _plain(lambda sign, value: np.copysign(value, sign)),
    "sqrt": _exact(np.sqrt),
    "rsqrt": _exact(lambda value: 1 / np.sqrt(value)),
    "rcp": _exact(lambda value: 1 / value),
    "ex2": _exact(np.exp2),
    "lg2": _exact(np.log2),
    "tanh": _exact(np.tanh),
    "and": _plain(np.bitwise_and),
    "or": _plain(np.bitwise_or),
    "xor": _plain(np.bitwise_xor),
    "not": _plain(np.invert),
    "shl": Operation(_shift_left, _first_is_kind),
    "shr": Operation(_shift_right, _first_is_kind),
    "bfe": Operation(_extract, _first_is_kind),
    "prmt": Operation(_permute),
    "setp": Operation(_compare),
    "selp": Operation(
        lambda modifiers, a, b, choice: np.where(choice, a, b),
        lambda kind, index, modifiers: "pred" if index == 2 else kind,
    ),
}
