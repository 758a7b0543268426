# SPDX-License-Identifier: Apache-2.0
"""Instructions, and what the manual says that they compute: of one thread, in exact arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np

from .snippets import Snippet, decode, encode


def wrap(width: int, value: int) -> int:
    return value & ((1 << width) - 1)


def truncated(a: int, b: int) -> int:
    quotient = abs(a) // abs(b)
    return quotient if (a < 0) == (b < 0) else -quotient


def extract(width: int, signed: bool) -> Callable:
    def bfe(a: int, b: int, c: int) -> int:
        bits, pos, length = wrap(width, a), b & 255, c & 255
        sign = bits >> min(pos + length - 1, width - 1) & 1 if signed and length else 0
        picked = (bits >> (pos + i) & 1 if i < length and pos + i < width else sign for i in range(width))
        return sum(bit << i for i, bit in enumerate(picked))

    return bfe


def insert(a: int, b: int, c: int) -> int:
    """bfi.b32 with the position in the low and the length in the high half of c."""
    for i in range(c >> 16 & 255):
        if (c & 255) + i < 32:
            at = (c & 255) + i
            b = b & ~(1 << at) | (a >> i & 1) << at
    return b


def permute(a: int, b: int, c: int) -> int:
    result = 0
    for i in range(4):
        control = c >> (4 * i) & 15
        byte = (b << 32 | a) >> (8 * (control & 7)) & 255
        result |= ((255 if byte & 128 else 0) if control & 8 else byte) << (8 * i)
    return result


def top_bit(a: int) -> int:
    return wrap(32, (a if a >= 0 else ~a).bit_length() - 1)


def saturated(bits: int, value: int) -> int:
    return max(-(1 << (bits - 1)), min((1 << (bits - 1)) - 1, value))


def integer_cases() -> list[tuple[Snippet, Callable]]:
    S = Snippet
    cases = []
    for kind in ("u16", "s16", "u32", "s32", "u64", "s64"):
        width, one, two, three = int(kind[1:]), (kind,), (kind, kind), (kind,) * 3
        cases += [
            (S(f"add.{kind} d, a, b;", kind, two), lambda a, b: a + b),
            (S(f"sub.{kind} d, a, b;", kind, two), lambda a, b: a - b),
            (S(f"mul.lo.{kind} d, a, b;", kind, two), lambda a, b: a * b),
            (S(f"mul.hi.{kind} d, a, b;", kind, two), lambda a, b, w=width: a * b >> w),
            (S(f"mad.lo.{kind} d, a, b, c;", kind, three), lambda a, b, c: a * b + c),
            (S(f"mad.hi.{kind} d, a, b, c;", kind, three), lambda a, b, c, w=width: (a * b >> w) + c),
            (S(f"min.{kind} d, a, b;", kind, two), min),
            (S(f"max.{kind} d, a, b;", kind, two), max),
            (S(f"sad.{kind} d, a, b, c;", kind, three), lambda a, b, c: c + abs(a - b)),
            (S(f"or.b{width} b, b, 1; div.{kind} d, a, b;", kind, two), lambda a, b: truncated(a, b | 1)),
            (
                S(f"or.b{width} b, b, 1; rem.{kind} d, a, b;", kind, two),
                lambda a, b: a - truncated(a, b | 1) * (b | 1),
            ),
            (S(f"shr.{kind} d, a, b;", kind, (kind, "u32")), lambda a, b, w=width: a >> min(b, w)),
        ]
        if width < 64:
            wide = f"{kind[0]}{2 * width}"
            cases += [
                (S(f"mul.wide.{kind} d, a, b;", wide, two), lambda a, b: a * b),
                (S(f"mad.wide.{kind} d, a, b, c;", wide, (*two, wide)), lambda a, b, c: a * b + c),
            ]
        if kind[0] == "s":
            cases += [
                (S(f"abs.{kind} d, a;", kind, one), abs),
                (S(f"neg.{kind} d, a;", kind, one), lambda a: -a),
            ]
        else:
            bits = f"b{width}"
            cases += [
                (S(f"and.{bits} d, a, b;", kind, two), lambda a, b: a & b),
                (S(f"or.{bits} d, a, b;", kind, two), lambda a, b: a | b),
                (S(f"xor.{bits} d, a, b;", kind, two), lambda a, b: a ^ b),
                (S(f"not.{bits} d, a;", kind, one), lambda a: ~a),
                (S(f"cnot.{bits} d, a;", kind, one), lambda a: int(a == 0)),
                (S(f"shl.{bits} d, a, b;", kind, (kind, "u32")), lambda a, b, w=width: a << min(b, w)),
            ]
        if width >= 32:
            cases += [
                (S(f"bfind.{kind} d, a;", "u32", one), top_bit),
                (
                    S(f"bfind.shiftamt.{kind} d, a;", "u32", one),
                    lambda a, w=width: wrap(32, -1) if top_bit(a) == wrap(32, -1) else w - 1 - top_bit(a),
                ),
                (S(f"bfe.{kind} d, a, b, c;", kind, (kind, "u32", "u32")), extract(width, kind[0] == "s")),
            ]
    for width in (32, 64):
        kind = f"u{width}"
        cases += [
            (S(f"popc.b{width} d, a;", "u32", (kind,)), lambda a: a.bit_count()),
            (S(f"clz.b{width} d, a;", "u32", (kind,)), lambda a, w=width: w - a.bit_length()),
            (S(f"brev.b{width} d, a;", kind, (kind,)), lambda a, w=width: int(f"{a:0{w}b}"[::-1], 2)),
        ]
    words = ("u32",) * 3
    cases += [
        (S("add.sat.s32 d, a, b;", "s32", ("s32", "s32")), lambda a, b: saturated(32, a + b)),
        (S("sub.sat.s32 d, a, b;", "s32", ("s32", "s32")), lambda a, b: saturated(32, a - b)),
        (S("and.b32 t, c, 0xFFFF; shr.u32 u, c, 16; bfi.b32 d, a, b, t, u;", "u32", words), insert),
        (S("prmt.b32 d, a, b, c;", "u32", words), permute),
        (S("lop3.b32 d, a, b, c, 0xE8;", "u32", words), lambda a, b, c: a & b | b & c | a & c),
        (S("lop3.b32 d, a, b, c, 0x1A;", "u32", words), lambda a, b, c: (a ^ c) & ~(a & b)),
        (S("shf.l.wrap.b32 d, a, b, c;", "u32", words), lambda a, b, c: (b << 32 | a) << (c & 31) >> 32),
        (S("shf.r.wrap.b32 d, a, b, c;", "u32", words), lambda a, b, c: (b << 32 | a) >> (c & 31)),
        (S("shf.l.clamp.b32 d, a, b, c;", "u32", words), lambda a, b, c: (b << 32 | a) << min(c, 32) >> 32),
        (S("shf.r.clamp.b32 d, a, b, c;", "u32", words), lambda a, b, c: (b << 32 | a) >> min(c, 32)),
        (
            S(
                "{ .reg .b32 x<2>, y<2>; mov.b64 {x0, x1}, a; mov.b64 {y0, y1}, b;"
                " add.cc.u32 x0, x0, y0; addc.u32 x1, x1, y1; mov.b64 d, {x0, x1}; }",
                "u64",
                ("u64", "u64"),
            ),
            lambda a, b: a + b,
        ),
        (
            S(
                "{ .reg .b32 x<2>, y<2>; mov.b64 {x0, x1}, a; mov.b64 {y0, y1}, b;"
                " sub.cc.u32 x0, x0, y0; subc.u32 x1, x1, y1; mov.b64 d, {x0, x1}; }",
                "u64",
                ("u64", "u64"),
            ),
            lambda a, b: a - b,
        ),
        (
            S("mad.lo.cc.u64 v, a, b, c; madc.hi.u64 d, a, b, 0;", "u64", ("u64",) * 3),
            lambda a, b, c: a * b + c >> 64,
        ),
        (S("mov.b32 t, {a, b}; mov.b32 {_, d}, t;", "u16", ("u16", "u16")), lambda a, b: b),
    ]
    comparisons: dict[str, Callable] = {
        "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b,
        "le": lambda a, b: a <= b, "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
    }  # fmt: skip
    for name, compare in comparisons.items():
        for kind in ("s16", "u32", "s32", "u64", "s64"):
            cases.append(
                (S(f"setp.{name}.{kind} p, a, b; selp.u32 d, 1, 0, p;", "u32", (kind, kind)), compare)
            )
    cases += [
        (S("setp.lo.u32 p, a, b; selp.u32 d, 1, 0, p;", "u32", ("u32",) * 2), comparisons["lt"]),
        (S("setp.hs.u32 p, a, b; selp.u32 d, 1, 0, p;", "u32", ("u32",) * 2), comparisons["ge"]),
        (
            S("setp.gt.s32 p, c, 0; setp.lt.and.s32 p|q, a, b, !p; selp.b32 t, 1, 0, p;"
              " selp.b32 u, 2, 0, q; or.b32 d, t, u;", "u32", ("s32",) * 3),
            lambda a, b, c: (1 if a < b else 2) if c <= 0 else 0,
        ),
        (S("set.le.u32.s32 d, a, b;", "u32", ("s32", "s32")), lambda a, b: -(a <= b)),
        (S("slct.u32.s32 d, a, b, c;", "u32", ("u32", "u32", "s32")), lambda a, b, c: a if c >= 0 else b),
    ]  # fmt: skip
    for to in ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"):
        for source in ("u16", "s16", "u32", "s32", "u64", "s64"):
            width = int(to[1:])
            low, high = (
                (0, (1 << width) - 1) if to[0] == "u" else (-(1 << (width - 1)), (1 << (width - 1)) - 1)
            )
            register = to if width > 8 else f"{to[0]}16"
            plain = (
                (lambda a, w=width: wrap(w, a))
                if to[0] == "u"
                else (lambda a, w=width: wrap(w, a) - (wrap(w, a) >> (w - 1) << w))
            )
            cases.append((S(f"cvt.{to}.{source} d, a;", register, (source,)), plain))
            given = np.iinfo(f"{'ui'[source[0] == 's']}{int(source[1:]) // 8}")
            if given.min < low or given.max > high:  # .sat is an error where it does nothing
                clamp = lambda a, lo=low, hi=high: max(lo, min(hi, a))  # noqa: E731
                cases.append((S(f"cvt.sat.{to}.{source} d, a;", register, (source,)), clamp))
    return cases


def root(value: Fraction) -> Fraction:
    """The square root, to more bits than any format has; a little more where it is not exact."""
    scaled = value.numerator * 4**200 // value.denominator
    found = math.isqrt(scaled)
    exact = found * found * value.denominator == value.numerator * 4**200
    return Fraction(found, 2**200) + (0 if exact else Fraction(1, 2**210))


def pairwise(kind: str, function: Callable) -> Callable:
    """Of packed numbers, both halves."""

    def both(*packed: int) -> int:
        halves = []
        for shift in (0, 16):
            halves.append(encode(kind, function(*(decode(kind, p >> shift & 0xFFFF) for p in packed))))
        return halves[0] | halves[1] << 16

    return both


def rounded(kind: str, value: Fraction) -> Fraction | float:
    return decode(kind, encode(kind, value))


def fused(a: Fraction, b: Fraction, c: Fraction) -> Fraction:
    return a * b + c


def flushed(value: Fraction) -> Fraction:
    return value if abs(value) >= Fraction(2) ** -126 else Fraction(0)


def float_cases() -> list[tuple[Snippet, Callable, str]]:
    S = Snippet
    cases = []
    for mode in ("rn", "rz", "rm", "rp"):
        one, two, three = ("f32",), ("f32",) * 2, ("f32",) * 3
        cases += [
            (S(f"add.{mode}.f32 d, a, b;", "f32", two), lambda a, b: a + b, mode),
            (S(f"sub.{mode}.f32 d, a, b;", "f32", two), lambda a, b: a - b, mode),
            (S(f"mul.{mode}.f32 d, a, b;", "f32", two), lambda a, b: a * b, mode),
            (S(f"fma.{mode}.f32 d, a, b, c;", "f32", three), lambda a, b, c: a * b + c, mode),
            (S(f"div.{mode}.f32 d, a, b;", "f32", two), lambda a, b: a / b, mode),
            (S(f"rcp.{mode}.f32 d, a;", "f32", one), lambda a: 1 / a, mode),
            (S(f"abs.f32 a, a; sqrt.{mode}.f32 d, a;", "f32", one), lambda a: root(abs(a)), mode),
            (S(f"cvt.{mode}.f32.f64 d, a;", "f32", ("f64",)), lambda a: a, mode),
            (S(f"cvt.{mode}.f16.f32 d, a;", "f16", one), lambda a: a, mode),
        ]
        for source in ("u16", "s16", "u32", "s32", "u64", "s64"):
            cases.append((S(f"cvt.{mode}.f32.{source} d, a;", "f32", (source,)), Fraction, mode))
            cases.append((S(f"cvt.{mode}.f16.{source} d, a;", "f16", (source,)), Fraction, mode))
        if mode in ("rn", "rz"):
            cases.append((S(f"cvt.{mode}.bf16.f32 d, a;", "bf16", one), lambda a: a, mode))
    cases += [
        (S("add.f64 d, a, b;", "f64", ("f64",) * 2), lambda a, b: a + b, "rn"),
        (S("mul.f64 d, a, b;", "f64", ("f64",) * 2), lambda a, b: a * b, "rn"),
        (S("fma.rn.f64 d, a, b, c;", "f64", ("f64",) * 3), lambda a, b, c: a * b + c, "rn"),
        (S("div.rn.f64 d, a, b;", "f64", ("f64",) * 2), lambda a, b: a / b, "rn"),
        (S("cvt.f64.f32 d, a;", "f64", ("f32",)), lambda a: a, "rn"),
        (S("cvt.f32.f16 d, a;", "f32", ("f16",)), lambda a: a, "rn"),
        (S("cvt.rn.f64.s64 d, a;", "f64", ("s64",)), Fraction, "rn"),
        (S("add.f16 d, a, b;", "f16", ("f16",) * 2), lambda a, b: a + b, "rn"),
        (S("mul.f16 d, a, b;", "f16", ("f16",) * 2), lambda a, b: a * b, "rn"),
        (S("fma.rn.f16 d, a, b, c;", "f16", ("f16",) * 3), lambda a, b, c: a * b + c, "rn"),
        (S("fma.rn.bf16 d, a, b, c;", "bf16", ("bf16",) * 3), lambda a, b, c: a * b + c, "rn"),
        (S("fma.rn.f16x2 d, a, b, c;", "u32", ("u32",) * 3), pairwise("f16", fused), "rn"),
        (S("fma.rn.bf16x2 d, a, b, c;", "u32", ("u32",) * 3), pairwise("bf16", fused), "rn"),
        (S("neg.f16x2 d, a;", "u32", ("u32",)), lambda a: a ^ 0x80008000, "rn"),
        (S("abs.bf16x2 d, a;", "u32", ("u32",)), lambda a: a & 0x7FFF7FFF, "rn"),
        (S("max.bf16x2 d, a, b;", "u32", ("u32",) * 2), pairwise("bf16", max), "rn"),
        (S("min.f16 d, a, b;", "f16", ("f16",) * 2), min, "rn"),
        (S("neg.f32 d, a;", "f32", ("f32",)), lambda a: -a, "rn"),
        (S("abs.f64 d, a;", "f64", ("f64",)), abs, "rn"),
        (S("copysign.f32 d, a, b;", "f32", ("f32",) * 2), lambda a, b: abs(b) if a > 0 else -abs(b), "rn"),
        (S("add.sat.f32 d, a, b;", "f32", ("f32",) * 2), lambda a, b: max(0, min(1, a + b)), "rn"),
        (
            S("fma.rn.ftz.f32 d, a, b, c;", "f32", ("f32",) * 3),
            lambda a, b, c: flushed(flushed(a) * flushed(b) + flushed(c)),
            "rn",
        ),
        (S("cvt.rn.relu.bf16.f32 d, a;", "bf16", ("f32",)), lambda a: max(a, Fraction(0)), "rn"),
        (S("slct.f32.f32 d, a, b, c;", "f32", ("f32",) * 3), lambda a, b, c: a if c >= 0 else b, "rn"),
        (S("fma.rn.f32 a, a, b, c; add.f32 d, a, a;", "f32", ("f32",) * 3),
         lambda a, b, c: 2 * rounded("f32", a * b + c), "rn"),
    ]  # fmt: skip
    for kind in ("f16", "bf16"):
        for mode in ("rn", "rz"):

            def pack(a: Fraction, b: Fraction, kind=kind, mode=mode) -> int:
                return encode(kind, a, mode) << 16 | encode(kind, b, mode)

            cases.append((S(f"cvt.{mode}.{kind}x2.f32 d, a, b;", "u32", ("f32", "f32")), pack, "rn"))
    integral: dict[str, Callable] = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}
    for mode, function in integral.items():
        cases.append(
            (S(f"cvt.{mode}.f32.f32 d, a;", "f32", ("f32",)), lambda a, f=function: Fraction(f(a)), "rn")
        )
        for to in ("u16", "s16", "u32", "s32", "u64", "s64"):
            bits = int(to[1:])
            low, high = (0, (1 << bits) - 1) if to[0] == "u" else (-(1 << (bits - 1)), (1 << (bits - 1)) - 1)
            for source in ("f32", "f64", "f16"):
                cases.append((
                    S(f"cvt.{mode}.{to}.{source} d, a;", to, (source,)),
                    lambda a, f=function, lo=low, hi=high: max(lo, min(hi, f(a))), "rn",
                ))  # fmt: skip
    return cases
