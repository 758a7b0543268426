# SPDX-License-Identifier: Apache-2.0
"""Arithmetic of floating-point numbers; and of integers, for the instructions that share a name."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import integers
from .floats import (
    ROUNDINGS,
    element,
    flush,
    fma_f32,
    fma_f64,
    narrow,
    quotient,
    root,
    saturate,
    two_sum,
    widen,
)
from .operands import Frame, Mask, Modifiers, Plain, apply, apply_ufunc, instruction, operands
from .syntax import TYPE_BITS, Instruction

FLOATS = ("f16", "bf16", "f16x2", "bf16x2", "f32", "f64")
Parts = tuple[np.ndarray, "np.ndarray | None"]  # high and low of floats.py


def is_integer(modifiers: Modifiers) -> bool:
    return not any(name in FLOATS for name in modifiers.left)


def _computed(
    frame: Frame,
    ins: Instruction,
    kind: str,
    compute: Callable[..., Parts],
    count: int,
    rounding: str = "rn",
    flushes: bool = False,
    saturates: bool = False,
) -> Plain:
    """An instruction by its definition: operands widened, computed, rounded once."""
    if kind == "f64" and rounding != "rn":
        ins.fail(f".{rounding}.f64 is not supported")
    d, *inputs = operands(ins, count + 1)
    sources = [frame.source(operand, kind) for operand in inputs]
    target = frame.target(d, kind)
    scalar = element(kind)

    def run(mask: Mask) -> None:
        values = [widen(kind, source) for source in sources]
        if flushes:
            values = [flush(value, scalar) for value in values]
        high, low = compute(*values)
        if flushes or saturates:
            # both act on the rounded result
            high, low = widen(kind, narrow(kind, high, low, rounding)), None
            high = flush(high, scalar) if flushes else high
            high = saturate(high) if saturates else high
        np.copyto(target, narrow(kind, high, low, rounding), where=mask)

    return run


def _sum(a: np.ndarray, b: np.ndarray) -> Parts:
    return two_sum(a, b)


def _difference(a: np.ndarray, b: np.ndarray) -> Parts:
    return two_sum(a, -b)


def _product(a: np.ndarray, b: np.ndarray) -> Parts:
    return a * b, None  # exact, for up to 24 bits each


def _fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> Parts:
    return two_sum(a * b, c)


@instruction("add", "sub", "mul")
def _add_sub_mul(frame: Frame, ins: Instruction, modifiers: Modifiers) -> Plain:
    if is_integer(modifiers):
        return (integers.integer_multiply if ins.name == "mul" else integers.integer_add)(
            frame, ins, modifiers
        )
    rounding = modifiers.optional(*ROUNDINGS) or "rn"
    flushes, saturates = modifiers.flag("ftz"), modifiers.flag("sat")
    kind = modifiers.type(*FLOATS)
    if kind == "f64" or (kind == "f32" and rounding == "rn" and not (flushes or saturates)):
        if rounding != "rn" or flushes or saturates:
            ins.fail("only .rn.f64 is supported")
        ufunc = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[ins.name]
        d, a, b = operands(ins, 3)
        return apply_ufunc(frame.target(d, kind), ufunc, frame.source(a, kind), frame.source(b, kind))
    compute = {"add": _sum, "sub": _difference, "mul": _product}[ins.name]
    return _computed(frame, ins, kind, compute, 2, rounding, flushes, saturates)


@instruction("fma", "mad")
def _fma(frame: Frame, ins: Instruction, modifiers: Modifiers) -> Plain:
    if is_integer(modifiers):
        if ins.name == "fma":
            ins.fail("fma of integers")
        return integers.integer_multiply(frame, ins, modifiers)
    rounding = modifiers.one(*ROUNDINGS)
    flushes, saturates = modifiers.flag("ftz"), modifiers.flag("sat")
    relu = modifiers.flag("relu")
    kind = modifiers.type(*FLOATS)
    if kind in ("f32", "f64") and rounding == "rn" and not (flushes or saturates or relu):
        d, *abc = operands(ins, 4)
        fma = fma_f32 if kind == "f32" else fma_f64
        return apply(frame.target(d, kind), fma, *(frame.source(operand, kind) for operand in abc))
    if relu:
        ins.fail(".relu is not supported")
    if kind == "f64":
        ins.fail("only .rn.f64 is supported")
    return _computed(frame, ins, kind, _fused, 3, rounding, flushes, saturates)


@instruction("div")
def _divide(frame: Frame, ins: Instruction, modifiers: Modifiers) -> Plain:
    if is_integer(modifiers):
        return integers.integer_divide(frame, ins, modifiers)
    how = modifiers.one("approx", "full", *ROUNDINGS)
    flushes = modifiers.flag("ftz")
    kind = modifiers.type("f32", "f64")
    if kind == "f64" or (how == "rn" and not flushes):
        if how != "rn" or flushes:
            ins.fail("only div.rn.f64 is supported")
        d, a, b = operands(ins, 3)
        return apply_ufunc(frame.target(d, kind), np.divide, frame.source(a, kind), frame.source(b, kind))

    def approximate(a: np.ndarray, b: np.ndarray) -> Parts:
        # a * (1 / b), where 1 / b is flushed for large b
        large = (np.abs(b) > 2.0**126) & np.isfinite(b)
        return np.where(large, np.where(np.isinf(a), np.nan, a * np.copysign(0.0, b)), a / b), None

    if how in ROUNDINGS:
        return _computed(frame, ins, kind, quotient, 2, how, flushes)
    return _computed(frame, ins, kind, approximate if how == "approx" else _quotient, 2, "rn", flushes)


def _quotient(a: np.ndarray, b: np.ndarray) -> Parts:
    return a / b, None


# ---- functions of one operand


def _approximation(function: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], Parts]:
    """Approximate instructions give the exact value, rounded: better than any GPU."""
    return lambda a: (function(a), None)


_FUNCTIONS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], tuple[str, ...]]] = {
    "ex2": (np.exp2, ("f32", "f16", "f16x2", "bf16", "bf16x2")),
    "lg2": (np.log2, ("f32",)),
    "sin": (np.sin, ("f32",)),
    "cos": (np.cos, ("f32",)),
    "tanh": (np.tanh, ("f32", "f16", "f16x2", "bf16", "bf16x2")),
    "rsqrt": (lambda a: 1 / np.sqrt(a), ("f32", "f64")),
}


@instruction(*_FUNCTIONS)
def _function(frame: Frame, ins: Instruction, modifiers: Modifiers) -> Plain:
    modifiers.one("approx")
    flushes = modifiers.flag("ftz")
    function, kinds = _FUNCTIONS[ins.name]
    kind = modifiers.type(*kinds)
    return _computed(frame, ins, kind, _approximation(function), 1, "rn", flushes)


@instruction("rcp", "sqrt")
def _reciprocal_or_root(frame: Frame, ins: Instruction, modifiers: Modifiers) -> Plain:
    how = modifiers.one("approx", *ROUNDINGS)
    flushes = modifiers.flag("ftz")
    kind = modifiers.type("f32", "f64")
    plain = np.sqrt if ins.name == "sqrt" else np.reciprocal
    if how == "approx" or kind == "f64":
        if how not in ("approx", "rn"):
            ins.fail("only .rn.f64 is supported")
        return _computed(frame, ins, kind, _approximation(plain), 1, "rn", flushes)
    exact = root if ins.name == "sqrt" else (lambda a: quotient(np.ones_like(a), a))
    return _computed(frame, ins, kind, exact, 1, how, flushes)


# ---- signs, extremes, classes


@instruction("abs", "neg")
def _sign(frame: Frame, ins: Instruction, modifiers: Modifiers) -> Plain:
    if is_integer(modifiers):
        return integers.integer_unary(frame, ins, modifiers)
    flushes = modifiers.flag("ftz")
    kind = modifiers.type(*FLOATS)
    if flushes:
        unary = np.abs if ins.name == "abs" else np.negative
        return _computed(frame, ins, kind, _approximation(unary), 1, "rn", True)
    d, a = operands(ins, 2)
    bits = f"b{TYPE_BITS[kind]}"
    source = frame.source(a, bits)
    sign = source.dtype.type(1 << (TYPE_BITS[element(kind)] - 1))
    if kind.endswith("x2"):
        sign |= sign << source.dtype.type(16)
    operation, constant = (np.bitwise_and, ~sign) if ins.name == "abs" else (np.bitwise_xor, sign)
    return apply_ufunc(
        frame.target(d, bits), operation, source, frame.block.constant(int(constant), source.dtype)
    )


@instruction("min", "max")
def _extreme(frame: Frame, ins: Instruction, modifiers: Modifiers) -> Plain:
    if is_integer(modifiers):
        return integers.integer_extreme(frame, ins, modifiers)
    flushes, propagates = modifiers.flag("ftz"), modifiers.flag("NaN")
    kind = modifiers.type(*FLOATS)
    smaller = ins.name == "min"
    # without .NaN, the other operand where one is NaN
    pick: np.ufunc = {
        (True, False): np.fmin,
        (False, False): np.fmax,
        (True, True): np.minimum,
        (False, True): np.maximum,
    }[smaller, propagates]

    def extreme(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        result = pick(a, b)
        equal = a == b  # +0 is larger than -0
        if equal.any():
            bits_a, bits_b = (v.view(f"u{v.dtype.itemsize}") for v in (a, b))
            both = (bits_a | bits_b if smaller else bits_a & bits_b).view(a.dtype)
            result = np.where(equal, both, result)
        return result

    if kind in ("f32", "f64") and not flushes:
        d, a, b = operands(ins, 3)
        return apply(frame.target(d, kind), extreme, frame.source(a, kind), frame.source(b, kind))
    return _computed(frame, ins, kind, lambda a, b: (extreme(a, b), None), 2, "rn", flushes)


@instruction("copysign")
def _copysign(frame: Frame, ins: Instruction, modifiers: Modifiers) -> Plain:
    kind = modifiers.type("f32", "f64")
    d, a, b = operands(ins, 3)  # the sign of a, the value of b
    return apply_ufunc(frame.target(d, kind), np.copysign, frame.source(b, kind), frame.source(a, kind))


@instruction("testp")
def _testp(frame: Frame, ins: Instruction, modifiers: Modifiers) -> Plain:
    which = modifiers.one("finite", "infinite", "number", "notanumber", "normal", "subnormal")
    kind = modifiers.type("f32", "f64")
    d, a = operands(ins, 2)
    smallest = np.finfo(kind.replace("f", "float")).tiny
    tests: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda x: ~np.isnan(x),
        "notanumber": np.isnan,
        "normal": lambda x: np.isfinite(x) & (np.abs(x) >= smallest),
        "subnormal": lambda x: (np.abs(x) < smallest) & (x != 0),
    }
    return apply(frame.target(d, "pred"), tests[which], frame.source(a, kind))
