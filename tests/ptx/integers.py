# SPDX-License-Identifier: Apache-2.0
"""Integer, bit and logic instructions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .operands import (
    Frame,
    Mask,
    Modifiers,
    Plain,
    apply,
    apply_ufunc,
    instruction,
    operands,
)
from .syntax import TYPE_BITS, Immediate, Instruction, PtxError

INTEGERS = ("u16", "s16", "u32", "s32", "u64", "s64")


def unsigned(type_name: str) -> str:
    return f"u{TYPE_BITS[type_name]}"


def bits_of(a: np.ndarray) -> np.ndarray:
    """A row of bits for each element, lowest first."""
    a = np.ascontiguousarray(a)
    return np.unpackbits(a.view(np.uint8).reshape(len(a), -1), axis=1, bitorder="little")


def ones(n: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """n low bits set."""
    one = dtype.type(1)
    return np.where(n >= dtype.itemsize * 8, ~dtype.type(0), np.left_shift(one, n.astype(dtype)) - one)


def multiply_high(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The upper half of the product."""
    bits = a.dtype.itemsize * 8
    if bits < 64:
        wide = np.dtype(f"{a.dtype.kind}{bits // 4}")
        return (a.astype(wide) * b.astype(wide) >> wide.type(bits)).astype(a.dtype)
    ua, ub = a.view(np.uint64), b.view(np.uint64)
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    a0, a1, b0, b1 = ua & low, ua >> half, ub & low, ub >> half
    middle = a1 * b0 + (a0 * b0 >> half)
    other = a0 * b1 + (middle & low)
    high = a1 * b1 + (middle >> half) + (other >> half)
    if a.dtype.kind == "i":  # -1 stands for 2^64 - 1
        high = high - np.where(a < 0, ub, 0).astype(np.uint64) - np.where(b < 0, ua, 0).astype(np.uint64)
    return high.view(a.dtype)


def _add_or_subtract(frame: Frame, ins: Instruction, modifiers: Modifiers) -> Plain:
    """add, sub, addc and subc of integers."""
    carry_in = ins.name in ("addc", "subc")
    sets_carry = modifiers.flag("cc")
    saturates = modifiers.flag("sat")
    kind = modifiers.type(*INTEGERS)
    d, a, b = operands(ins, 3)
    subtracts = ins.name.startswith("sub")
    if saturates and kind == "s32" and not (carry_in or sets_carry):
        wide = np.subtract if subtracts else np.add

        def saturated(x: np.ndarray, y: np.ndarray) -> np.ndarray:
            return np.clip(wide(x, y, dtype=np.int64), -(2**31), 2**31 - 1).astype(np.int32)

        return apply(frame.target(d, kind), saturated, frame.source(a, kind), frame.source(b, kind))
    if saturates:
        ins.fail(".sat is for .s32")
    plain = unsigned(kind)
    target, x, y = frame.target(d, plain), frame.source(a, plain), frame.source(b, plain)
    if not (carry_in or sets_carry):
        return apply_ufunc(target, np.subtract if subtracts else np.add, x, y)
    return _with_carry(frame, target, lambda: x, y, subtracts, carry_in, sets_carry)


def _with_carry(
    frame: Frame,
    target: np.ndarray,
    first: Callable[[], np.ndarray],
    y: np.ndarray,
    subtracts: bool,
    carry_in: bool,
    sets_carry: bool,
) -> Plain:
    carry = frame.block.carry

    def run(mask: Mask) -> None:
        x = first()
        extra = carry.astype(x.dtype) if carry_in else x.dtype.type(0)
        if subtracts:
            partial = x - y
            result = partial - extra
            out = (x < y) | (partial < extra)  # the carry is the borrow
        else:
            partial = x + y
            result = partial + extra
            out = (partial < x) | (result < partial)
        np.copyto(target, result, where=mask)
        if sets_carry:
            np.copyto(carry, out, where=mask)

    return run


def integer_add(frame: Frame, ins: Instruction, modifiers: Modifiers) -> Plain:
    return _add_or_subtract(frame, ins, modifiers)


instruction("addc", "subc")(_add_or_subtract)


def integer_multiply(frame: Frame, ins: Instruction, modifiers: Modifiers) -> Plain:
    """mul, mad and madc of integers."""
    half = modifiers.one("lo", "hi", "wide")
    sets_carry = modifiers.flag("cc")
    kind = modifiers.type(*INTEGERS)
    d, a, b, *c = operands(ins, 3 if ins.name == "mul" else 4)
    x, y = frame.source(a, kind), frame.source(b, kind)
    product: Callable[[np.ndarray, np.ndarray], np.ndarray]
    if half == "wide":
        if TYPE_BITS[kind] == 64:
            ins.fail(".wide is for 16 and 32 bits")
        result = f"{kind[0]}{TYPE_BITS[kind] * 2}"
        wide = np.dtype(f"{x.dtype.kind}{x.dtype.itemsize * 2}")
        product = lambda p, q: np.multiply(p, q, dtype=wide)  # noqa: E731
    else:
        result = kind
        product = np.multiply if half == "lo" else multiply_high
    if ins.name == "mul":
        return apply(frame.target(d, result), product, x, y)
    plain = unsigned(result)
    addend, target = frame.source(c[0], plain), frame.target(d, plain)
    if ins.name == "mad" and not sets_carry:

        def run(mask: Mask) -> None:
            np.add(product(x, y).view(addend.dtype), addend, out=target, where=mask)

        return run
    return _with_carry(
        frame, target, lambda: product(x, y).view(addend.dtype), addend, False, ins.name == "madc", sets_carry
    )


@instruction("madc")
def _madc(frame: Frame, ins: Instruction, modifiers: Modifiers) -> Plain:
    return integer_multiply(frame, ins, modifiers)


def integer_divide(frame: Frame, ins: Instruction, modifiers: Modifiers) -> Plain:
    """div and rem of integers. Division by zero has no defined result, so it raises."""
    kind = modifiers.type(*INTEGERS)
    d, a, b = operands(ins, 3)
    target, x, y = frame.target(d, kind), frame.source(a, kind), frame.source(b, kind)
    plain = np.dtype(f"u{x.dtype.itemsize}")
    remainder = ins.name == "rem"

    def magnitude(v: np.ndarray) -> np.ndarray:
        return np.where(v < 0, np.negative(v.view(plain)), v.view(plain)) if v.dtype.kind == "i" else v

    def run(mask: Mask) -> None:
        if ((y == 0) & mask).any():
            raise PtxError("division by zero")
        p, q = magnitude(x), np.maximum(magnitude(y), plain.type(1))
        result = p % q if remainder else p // q
        if x.dtype.kind == "i":
            negative = x < 0 if remainder else (x < 0) != (y < 0)
            result = np.where(negative, np.negative(result), result)
        np.copyto(target, result.view(x.dtype), where=mask)

    return run


@instruction("rem")
def _rem(frame: Frame, ins: Instruction, modifiers: Modifiers) -> Plain:
    return integer_divide(frame, ins, modifiers)


def integer_unary(frame: Frame, ins: Instruction, modifiers: Modifiers) -> Plain:
    """abs and neg of integers."""
    kind = modifiers.type("s16", "s32", "s64")
    d, a = operands(ins, 2)
    return apply_ufunc(
        frame.target(d, kind), {"abs": np.absolute, "neg": np.negative}[ins.name], frame.source(a, kind)
    )


def integer_extreme(frame: Frame, ins: Instruction, modifiers: Modifiers) -> Plain:
    """min and max of integers."""
    kind = modifiers.type(*INTEGERS)
    d, a, b = operands(ins, 3)
    ufunc = {"min": np.minimum, "max": np.maximum}[ins.name]
    return apply_ufunc(frame.target(d, kind), ufunc, frame.source(a, kind), frame.source(b, kind))


@instruction("sad")
def _sad(frame: Frame, ins: Instruction, modifiers: Modifiers) -> Plain:
    kind = modifiers.type(*INTEGERS)
    d, a, b, c = operands(ins, 4)
    plain = unsigned(kind)

    def sum_of_difference(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        return z + np.where(x < y, y.view(z.dtype) - x.view(z.dtype), x.view(z.dtype) - y.view(z.dtype))

    return apply(
        frame.target(d, plain),
        sum_of_difference,
        frame.source(a, kind),
        frame.source(b, kind),
        frame.source(c, plain),
    )


# ---- logic and shifts


@instruction("and", "or", "xor")
def _logic(frame: Frame, ins: Instruction, modifiers: Modifiers) -> Plain:
    kind = modifiers.type("pred", "b16", "b32", "b64")
    d, a, b = operands(ins, 3)
    ufunc = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[ins.name]
    return apply_ufunc(frame.target(d, kind), ufunc, frame.source(a, kind), frame.source(b, kind))


@instruction("not")
def _not(frame: Frame, ins: Instruction, modifiers: Modifiers) -> Plain:
    kind = modifiers.type("pred", "b16", "b32", "b64")
    d, a = operands(ins, 2)
    return apply_ufunc(frame.target(d, kind), np.invert, frame.source(a, kind))


@instruction("cnot")
def _cnot(frame: Frame, ins: Instruction, modifiers: Modifiers) -> Plain:
    kind = modifiers.type("b16", "b32", "b64")
    d, a = operands(ins, 2)
    target = frame.target(d, kind)
    return apply(target, lambda x: (x == 0).astype(target.dtype), frame.source(a, kind))


@instruction("lop3")
def _lop3(frame: Frame, ins: Instruction, modifiers: Modifiers) -> Plain:
    modifiers.type("b32")
    d, a, b, c, table = operands(ins, 5)
    if not isinstance(table, Immediate) or not 0 <= int(table.value) <= 255:
        ins.fail("the table is a byte")
    terms = [i for i in range(8) if int(table.value) >> i & 1]
    complement = len(terms) > 4
    if complement:
        terms = [i for i in range(8) if i not in terms]

    def logic(*abc: np.ndarray) -> np.ndarray:
        result = np.zeros_like(abc[0])
        for i in terms:  # bit 2 of i is a's
            p, q, r = (v if i >> shift & 1 else ~v for v, shift in zip(abc, (2, 1, 0), strict=True))
            result |= p & q & r
        return ~result if complement else result

    return apply(frame.target(d, "b32"), logic, *(frame.source(operand, "b32") for operand in (a, b, c)))


@instruction("shl", "shr")
def _shift(frame: Frame, ins: Instruction, modifiers: Modifiers) -> Plain:
    left = ins.name == "shl"
    kind = modifiers.type(*(("b16", "b32", "b64") if left else ("b16", "b32", "b64", *INTEGERS)))
    d, a, b = operands(ins, 3)
    target, x, n = frame.target(d, kind), frame.source(a, kind), frame.source(b, "u32")
    ufunc = np.left_shift if left else np.right_shift
    limit = np.uint32(TYPE_BITS[kind])  # numpy shifts everything out at this amount, as PTX does
    if isinstance(b, Immediate):
        return apply_ufunc(target, ufunc, x, np.minimum(n, limit).astype(x.dtype))

    def run(mask: Mask) -> None:
        ufunc(x, np.minimum(n, limit).astype(x.dtype), out=target, where=mask)

    return run


@instruction("shf")
def _funnel(frame: Frame, ins: Instruction, modifiers: Modifiers) -> Plain:
    left = modifiers.one("l", "r") == "l"
    clamps = modifiers.one("clamp", "wrap") == "clamp"
    modifiers.type("b32")
    d, a, b, c = operands(ins, 4)

    def shift(low: np.ndarray, high: np.ndarray, amount: np.ndarray) -> np.ndarray:
        n = (np.minimum(amount, 32) if clamps else amount & 31).astype(np.uint64)
        both = high.astype(np.uint64) << np.uint64(32) | low
        return (both << n >> np.uint64(32) if left else both >> n).astype(np.uint32)

    return apply(frame.target(d, "b32"), shift, *(frame.source(operand, "u32") for operand in (a, b, c)))


# ---- bits


@instruction("popc", "clz")
def _count_bits(frame: Frame, ins: Instruction, modifiers: Modifiers) -> Plain:
    kind = modifiers.type("b32", "b64")
    d, a = operands(ins, 2)

    def leading_zeros(x: np.ndarray) -> np.ndarray:
        bits = bits_of(x)[:, ::-1]
        return np.where(bits.any(axis=1), bits.argmax(axis=1), bits.shape[1])

    count = leading_zeros if ins.name == "clz" else lambda x: bits_of(x).sum(axis=1)
    return apply(frame.target(d, "u32"), lambda x: count(x).astype(np.uint32), frame.source(a, kind))


@instruction("bfind")
def _find_bit(frame: Frame, ins: Instruction, modifiers: Modifiers) -> Plain:
    from_top = modifiers.flag("shiftamt")
    kind = modifiers.type("u32", "s32", "u64", "s64")
    d, a = operands(ins, 2)

    def find(x: np.ndarray) -> np.ndarray:
        bits = bits_of(np.where(x < 0, ~x, x))[:, ::-1]
        zeros = bits.argmax(axis=1)
        found = zeros if from_top else bits.shape[1] - 1 - zeros
        return np.where(bits.any(axis=1), found, 0xFFFFFFFF).astype(np.uint32)

    return apply(frame.target(d, "u32"), find, frame.source(a, kind))


@instruction("brev")
def _reverse(frame: Frame, ins: Instruction, modifiers: Modifiers) -> Plain:
    kind = modifiers.type("b32", "b64")
    d, a = operands(ins, 2)

    def reverse(x: np.ndarray) -> np.ndarray:
        return np.packbits(bits_of(x)[:, ::-1], axis=1, bitorder="little").view(x.dtype)[:, 0]

    return apply(frame.target(d, kind), reverse, frame.source(a, kind))


@instruction("bfe")
def _extract(frame: Frame, ins: Instruction, modifiers: Modifiers) -> Plain:
    kind = modifiers.type("u32", "s32", "u64", "s64")
    d, a, b, c = operands(ins, 4)
    width = TYPE_BITS[kind]
    plain = unsigned(kind)

    def extract(x: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
        pos, length = (position & 0xFF).astype(x.dtype), (length & 0xFF).astype(x.dtype)
        known = ones(np.minimum(length, np.maximum(width, pos) - pos), x.dtype)
        result = x >> np.minimum(pos, width) & known
        if kind[0] == "s":
            sign = x >> np.minimum(pos + np.maximum(length, 1) - 1, width - 1) & x.dtype.type(1)
            result = np.where((sign == 1) & (length > 0), result | ~known, result)
        return result

    return apply(
        frame.target(d, plain),
        extract,
        frame.source(a, plain),
        frame.source(b, "u32"),
        frame.source(c, "u32"),
    )


@instruction("bfi")
def _insert(frame: Frame, ins: Instruction, modifiers: Modifiers) -> Plain:
    kind = modifiers.type("b32", "b64")
    d, a, b, c, e = operands(ins, 5)
    width = TYPE_BITS[kind]

    def insert(x: np.ndarray, into: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
        pos, length = (position & 0xFF).astype(x.dtype), (length & 0xFF).astype(x.dtype)
        count = np.minimum(length, np.maximum(width, pos) - pos)
        shift = np.minimum(pos, width)
        field = ones(count, x.dtype) << shift
        return into & ~field | x << shift & field

    sources = [frame.source(a, kind), frame.source(b, kind), frame.source(c, "u32"), frame.source(e, "u32")]
    return apply(frame.target(d, kind), insert, *sources)


@instruction("prmt")
def _permute(frame: Frame, ins: Instruction, modifiers: Modifiers) -> Plain:
    modifiers.type("b32")
    d, a, b, c = operands(ins, 4)

    def permute(low: np.ndarray, high: np.ndarray, control: np.ndarray) -> np.ndarray:
        both = np.stack([low, high], axis=1).view(np.uint8)
        selectors = control[:, None] >> np.arange(0, 16, 4, dtype=np.uint32) & np.uint32(15)
        picked = np.take_along_axis(both, (selectors & 7).astype(np.intp), axis=1)
        signs = np.where(picked & 0x80, 0xFF, 0).astype(np.uint8)
        return np.where(selectors & 8, signs, picked).view(np.uint32)[:, 0]

    return apply(frame.target(d, "b32"), permute, *(frame.source(operand, "b32") for operand in (a, b, c)))
