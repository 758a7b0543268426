# SPDX-License-Identifier: Apache-2.0
"""cvt; comparisons and selections."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .floats import ROUNDINGS, flush, narrow, saturate, widen
from .operands import Frame, Mask, Modifiers, Plain, apply, dtype_of, instruction, operands
from .syntax import TYPE_BITS, Instruction, Operand, Pair, PtxError

_TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
_FLOATS = ("f16", "bf16", "f32", "f64")
_ANY = ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64", *_FLOATS)


@instruction("cvt")
def _convert(frame: Frame, ins: Instruction, modifiers: Modifiers) -> Plain:
    rounding = modifiers.optional(*ROUNDINGS, *_TO_INTEGER, "rna")
    flushes, saturates, relu = (modifiers.flag(name) for name in ("ftz", "sat", "relu"))
    to = modifiers.type(*_ANY, "f16x2", "bf16x2", "tf32")
    if to in ("f16x2", "bf16x2", "tf32") or relu:
        if flushes or saturates:
            ins.fail("modifiers that do not go together")
        modifiers.type("f32")
        return _convert_single(frame, ins, to, rounding, relu)
    source_type = modifiers.type(*_ANY)
    d, a = operands(ins, 2)
    source = frame.source(a, source_type, widest=64)
    to_float, from_float = to in _FLOATS, source_type in _FLOATS
    if to_float and from_float:
        compute = _float_to_float(ins, to, source_type, rounding, flushes, saturates)
    elif to_float:
        compute = _integer_to_float(ins, to, source_type, rounding, flushes, saturates)
    elif from_float:
        compute = _float_to_integer(ins, to, source_type, rounding, flushes)
    else:
        if rounding or flushes:
            ins.fail("modifiers that do not go together")
        compute = _integer_to_integer(to, source_type, saturates)
    target, bits = frame.extending_target(d, to)

    def run(mask: Mask) -> None:
        np.copyto(target, compute(source).view(bits), where=mask)

    return run


Conversion = Callable[[np.ndarray], np.ndarray]


def _convert_single(frame: Frame, ins: Instruction, to: str, rounding: str | None, relu: bool) -> Plain:
    """From .f32 to a format of tensor cores, or to two values of one."""
    if to == "tf32":
        if rounding != "rna" or relu:
            ins.fail("only .rna.tf32 is supported")
        d, a = operands(ins, 2)

        def to_tf32(bits: np.ndarray) -> np.ndarray:
            rounded = bits + np.uint32(0x1000) & ~np.uint32(0x1FFF)
            return np.where(np.isnan(bits.view(np.float32)), np.uint32(0x7FFFFFFF), rounded)

        return apply(frame.target(d, "b32"), to_tf32, frame.source(a, "b32"))
    if rounding not in ("rn", "rz"):
        ins.fail(".rn or .rz is needed")
    pair = to.endswith("x2")
    d, *inputs = operands(ins, 3 if pair else 2)
    # the first operand goes to the upper half
    sources = [frame.source(operand, "f32") for operand in reversed(inputs)]

    def compute(*values: np.ndarray) -> np.ndarray:
        wide = np.stack(values, axis=1).astype(np.float64) if pair else values[0].astype(np.float64)
        if relu:
            wide = np.where(wide < 0, 0.0, wide)
        return narrow(to, wide, None, rounding)

    return apply(frame.target(d, to), compute, *sources)


def _float_to_float(
    ins: Instruction, to: str, source_type: str, rounding: str | None, flushes: bool, saturates: bool
) -> Conversion:
    integral = _TO_INTEGER.get(rounding or "")
    if rounding == "rna":
        ins.fail(".rna is for .tf32")
    # narrow formats need a mode, formats that hold every value must have none
    narrows = TYPE_BITS[to] < TYPE_BITS[source_type] or {to, source_type} == {"f16", "bf16"}
    if (rounding in ROUNDINGS) != narrows or (integral is not None and to != source_type):
        ins.fail("a rounding mode that does not go with the types")

    def compute(value: np.ndarray) -> np.ndarray:
        wide = widen(source_type, value)
        if flushes and source_type == "f32":
            wide = flush(wide, "f32")
        if integral is not None:
            wide = integral(wide)
        if saturates:
            wide = saturate(wide)
        result = narrow(to, wide, None, rounding if narrows and rounding else "rn")
        return flush(result, "f32").astype(np.float32) if flushes and to == "f32" else result

    return compute


def _integer_to_float(
    ins: Instruction, to: str, source_type: str, rounding: str | None, flushes: bool, saturates: bool
) -> Conversion:
    if rounding not in ROUNDINGS or flushes:
        ins.fail("one of .rn, .rz, .rm and .rp is needed, and no .ftz")
    if to == "f64":
        if rounding != "rn" and TYPE_BITS[source_type] == 64:
            ins.fail("only .rn.f64 is supported")
        return lambda value: saturate(value.astype(np.float64)) if saturates else value.astype(np.float64)

    def compute(value: np.ndarray) -> np.ndarray:
        exact = value.astype(np.longdouble)  # 64 bits of mantissa or more
        high = exact.astype(np.float64)
        low = (exact - high).astype(np.float64)
        return narrow(to, saturate(high) if saturates else high, None if saturates else low, rounding)

    return compute


def _float_to_integer(
    ins: Instruction, to: str, source_type: str, rounding: str | None, flushes: bool
) -> Conversion:
    if rounding not in _TO_INTEGER:
        ins.fail("one of .rni, .rzi, .rmi and .rpi is needed")
    integral = _TO_INTEGER[rounding]
    dtype = dtype_of(to)
    limits = np.iinfo(dtype)
    lowest, highest = float(limits.min), float(limits.max)  # the latter may be rounded up

    def compute(value: np.ndarray) -> np.ndarray:
        wide = widen(source_type, value)
        if flushes and source_type == "f32":
            wide = flush(wide, "f32")
        wide = integral(wide)
        inside = (wide > lowest) & (wide < highest)
        result = np.where(inside, wide, 0).astype(dtype)
        result = np.where(wide <= lowest, dtype.type(limits.min), result)
        return np.where(wide >= highest, dtype.type(limits.max), result)  # NaN stays 0

    return compute


def _integer_to_integer(to: str, source_type: str, saturates: bool) -> Conversion:
    dtype = dtype_of(to)
    if not saturates:
        return lambda value: value.astype(dtype)
    limits, given = np.iinfo(dtype), np.iinfo(dtype_of(source_type))
    low, high = max(limits.min, given.min), min(limits.max, given.max)
    return lambda value: np.clip(value, low, high).astype(dtype)


# ---- comparisons

_INTEGER_COMPARISONS: dict[str, np.ufunc] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
_FLOAT_COMPARISONS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    # false for NaN
    "eq": np.equal,
    "ne": lambda a, b: (a < b) | (a > b),
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    # true for NaN
    "equ": lambda a, b: ~((a < b) | (a > b)),
    "neu": np.not_equal,
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}


def _comparison(
    frame: Frame, ins: Instruction, modifiers: Modifiers, a: Operand, b: Operand, c: Operand | None
) -> tuple[Callable[[], np.ndarray], Callable[[], np.ndarray]]:
    """(a cmp b) op c, and !(a cmp b) op c; the destination's type, if any, has been taken."""
    compare = modifiers.one(*_FLOAT_COMPARISONS, *_INTEGER_COMPARISONS)
    combine = modifiers.optional("and", "or", "xor")
    flushes = modifiers.flag("ftz")
    kind = modifiers.type()
    if (combine is None) != (c is None):
        ins.fail("a third operand goes with .and, .or and .xor")
    x, y = frame.source(a, kind), frame.source(b, kind)
    floating = kind in _FLOATS
    table = _FLOAT_COMPARISONS if floating else _INTEGER_COMPARISONS
    unsigned_only, signless = ("lo", "ls", "hi", "hs"), ("eq", "ne")
    wrong = (kind[0] == "s" and compare in unsigned_only) or (kind[0] == "b" and compare not in signless)
    if compare not in table or (flushes and kind != "f32") or (wrong and not floating):
        ins.fail(f".{compare} of .{kind}")
    function = table[compare]
    if flushes:
        inner = function
        function = lambda p, q: inner(flush(p, "f32"), flush(q, "f32"))  # noqa: E731
    if kind == "bf16":
        raw = function
        function = lambda p, q: raw(widen("bf16", p), widen("bf16", q))  # noqa: E731
    if combine is None or c is None:
        return lambda: function(x, y), lambda: ~function(x, y)
    logic = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[combine]
    other = frame.predicate(c)
    return lambda: logic(function(x, y), other()), lambda: logic(~function(x, y), other())


@instruction("setp")
def _setp(frame: Frame, ins: Instruction, modifiers: Modifiers) -> Plain:
    d, a, b, *c = operands(ins, 3, 4)
    positive, negative = _comparison(frame, ins, modifiers, a, b, c[0] if c else None)
    if isinstance(d, Pair):
        p, q = frame.target(d.first, "pred"), frame.target(d.second, "pred")

        def run_both(mask: Mask) -> None:
            results = positive(), negative()  # p may be a source
            np.copyto(p, results[0], where=mask)
            np.copyto(q, results[1], where=mask)

        return run_both
    target = frame.target(d, "pred")

    def run(mask: Mask) -> None:
        np.copyto(target, positive(), where=mask)

    return run


@instruction("set")
def _set(frame: Frame, ins: Instruction, modifiers: Modifiers) -> Plain:
    d, a, b, *c = operands(ins, 3, 4)
    # the destination's type precedes the source's
    kind = modifiers.type("u32", "s32", "f32")
    positive, _ = _comparison(frame, ins, modifiers, a, b, c[0] if c else None)
    target = frame.target(d, "b32")
    true = np.uint32(0x3F800000 if kind == "f32" else 0xFFFFFFFF)

    def run(mask: Mask) -> None:
        np.copyto(target, np.where(positive(), true, np.uint32(0)), where=mask)

    return run


# ---- selections


@instruction("selp")
def _selp(frame: Frame, ins: Instruction, modifiers: Modifiers) -> Plain:
    kind = modifiers.type("b16", "b32", "b64", "u16", "u32", "u64", "s16", "s32", "s64", "f32", "f64")
    d, a, b, c = operands(ins, 4)
    x, y, target, chosen = (
        frame.source(a, kind),
        frame.source(b, kind),
        frame.target(d, kind),
        frame.predicate(c),
    )

    def run(mask: Mask) -> None:
        np.copyto(target, np.where(chosen(), x, y), where=mask)

    return run


@instruction("slct")
def _slct(frame: Frame, ins: Instruction, modifiers: Modifiers) -> Plain:
    flushes = modifiers.flag("ftz")
    kind = modifiers.type()
    selector = modifiers.type("s32", "f32")
    if kind == "pred" or (flushes and selector != "f32"):
        raise PtxError("modifiers that do not go together")
    d, a, b, c = operands(ins, 4)

    def select(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        return np.where((flush(z, "f32") if flushes else z) >= 0, x, y)  # NaN selects y

    return apply(
        frame.target(d, kind), select, frame.source(a, kind), frame.source(b, kind), frame.source(c, selector)
    )
