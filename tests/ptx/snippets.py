# SPDX-License-Identifier: Apache-2.0
"""Kernels around a few instructions; numbers of all formats, from bits and to bits, in exact arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from .machine import Machine
from .parser import Module
from .syntax import TYPE_BITS

HEADER = ".version 8.4\n.target sm_80\n.address_size 64\n"


@dataclass(frozen=True)
class Snippet:
    """Instructions that compute d from a, b and c, which have these types; p, q and t to u are free."""

    body: str
    result: str
    inputs: tuple[str, ...]

    def kernel(self, name: str) -> str:
        """As an entry, one element per thread."""
        pointers = [*"abc"[: len(self.inputs)], "d"]
        types = [*self.inputs, self.result]
        parameters = ", ".join(f".param .u64 pointer_{x}" for x in pointers)
        lines = [
            f".visible .entry {name}({parameters})",
            "{",
            ".reg .u32 i;",
            ".reg .u64 at;",
            ".reg .pred p, q;",
        ]
        lines += [f".reg .b{TYPE_BITS[t]} {x};" for x, t in zip(pointers, types, strict=True)]
        lines += [".reg .b32 t, u;", ".reg .b64 v, w;", "mov.u32 i, %tid.x;"]
        for x, t in zip(pointers, types, strict=True):
            if x == "d":
                lines.append(self.body)
            lines += [f"ld.param.u64 at, [pointer_{x}];", f"mad.wide.u32 at, i, {TYPE_BITS[t] // 8}, at;"]
            access = f"b{TYPE_BITS[t]}"
            lines.append(f"st.global.{access} [at], d;" if x == "d" else f"ld.global.{access} {x}, [at];")
        return "\n".join([*lines, "ret;", "}", ""])

    def run(self, *inputs: np.ndarray) -> np.ndarray:
        """By element of the inputs, which are arrays of bits."""
        gpu = Machine(Module(HEADER + self.kernel("snippet")))
        dtypes = [np.dtype(f"u{TYPE_BITS[t] // 8}") for t in (*self.inputs, self.result)]
        result = np.empty(len(inputs[0]), dtypes[-1])
        arrays = [x.astype(dtype) for x, dtype in zip(inputs, dtypes, strict=False)]
        pointers = [gpu.buffer(x, f"input {i}") for i, x in enumerate(arrays)]
        pointers.append(gpu.buffer(result, "result", writable=True))
        gpu.launch("snippet", 1, len(result), params=gpu.pack("snippet", *pointers))
        return result


# ---- numbers from bits and back

MANTISSA = {"f16": 10, "bf16": 7, "f32": 23, "f64": 52}
EXPONENT = {"f16": 5, "bf16": 8, "f32": 8, "f64": 11}


def decode(type_name: str, bits: int) -> int | float | Fraction:
    """The value; numbers that are finite are exact."""
    width = TYPE_BITS[type_name]
    if type_name not in MANTISSA:
        return bits - (1 << width) if type_name[0] == "s" and bits >> (width - 1) else bits
    m, e = MANTISSA[type_name], EXPONENT[type_name]
    sign, exponent, mantissa = bits >> (m + e), bits >> m & ((1 << e) - 1), bits & ((1 << m) - 1)
    if exponent == (1 << e) - 1:
        return math.nan if mantissa else (-math.inf if sign else math.inf)
    scale = max(exponent, 1) - (1 << (e - 1)) + 1 - m
    value = (mantissa + (1 << m if exponent else 0)) * Fraction(2) ** scale
    return -value if sign else value


def encode(type_name: str, value: int | float | Fraction, rounding: str = "rn") -> int:
    """The bits of a value, rounded if it has to be; NaN is encoded as all ones but the sign."""
    width = TYPE_BITS[type_name]
    if type_name not in MANTISSA:
        return int(value) & ((1 << width) - 1)
    m, e = MANTISSA[type_name], EXPONENT[type_name]
    if value != value:
        return (1 << (width - 1)) - 1
    sign = 1 << (width - 1) if value < 0 or (value == 0 and math.copysign(1, float(value)) < 0) else 0
    infinity = ((1 << e) - 1) << m
    if isinstance(value, float) and math.isinf(value):
        return sign | infinity
    magnitude = abs(Fraction(value))
    if magnitude == 0:
        return sign
    power = max(_floor_log2(magnitude), 2 - (1 << (e - 1)))
    exact = magnitude / Fraction(2) ** (power - m)  # in units of the last place
    units, rest = exact.numerator // exact.denominator, exact % 1
    up = {
        "rn": rest > Fraction(1, 2) or (rest == Fraction(1, 2) and units & 1 == 1),
        "rz": False,
        "rm": sign != 0 and rest > 0,
        "rp": sign == 0 and rest > 0,
    }[rounding]
    biased = power + (1 << (e - 1)) - 1
    bits = units + up + ((biased - 1) << m)  # the leading one of the mantissa adds the missing 1
    if bits >= infinity:
        bits = infinity if rounding == "rn" or rounding == ("rm" if sign else "rp") else infinity - 1
    return sign | bits


def _floor_log2(value: Fraction) -> int:
    guess = value.numerator.bit_length() - value.denominator.bit_length()
    return guess if Fraction(2) ** guess <= value else guess - 1


def scalars(
    snippet: Snippet, inputs: Sequence[np.ndarray], function: Callable[..., Any], rounding: str = "rn"
) -> np.ndarray:
    """What `function` makes of the values of each thread, as bits."""
    rows = zip(*(x.tolist() for x in inputs), strict=True)
    values = [
        encode(
            snippet.result,
            function(*(decode(t, x) for t, x in zip(snippet.inputs, row, strict=True))),
            rounding,
        )
        for row in rows
    ]
    return np.array(values, dtype=f"u{TYPE_BITS[snippet.result] // 8}")


def samples(type_name: str, count: int, rng: np.random.Generator) -> np.ndarray:
    """Bits of numbers of all magnitudes, which are finite."""
    width = TYPE_BITS[type_name]
    kind = np.dtype(f"u{width // 8}")
    if type_name not in MANTISSA:
        numbers = (
            rng.integers(0, 1 << width, count, dtype=kind, endpoint=False)
            if width < 64
            else rng.integers(0, (1 << 64) - 1, count, dtype=kind, endpoint=True)
        )
        numbers = numbers >> rng.integers(0, width, count).astype(kind)
        numbers[::3] = ~numbers[::3]
        top = 1 << (width - 1)
        edges = [0, 1, 2, top - 1, top, top + 1, (1 << width) - 1, (1 << width) - 2]
        numbers[: len(edges)] = edges
        return numbers
    m, e = MANTISSA[type_name], EXPONENT[type_name]
    exponents = rng.integers(0, (1 << e) - 1, count)
    near = (1 << (e - 1)) - 1 + rng.integers(-4, 5, count)
    exponents = np.where(np.arange(count) % 4 != 3, near, exponents).astype(np.uint64)
    mantissas = rng.integers(0, 1 << m, count).astype(np.uint64)
    mantissas[::5] &= np.uint64((1 << m) - (1 << (m // 2)))  # sums and products that are ties or exact
    signs = rng.integers(0, 2, count).astype(np.uint64)
    bits = signs << np.uint64(width - 1) | exponents << np.uint64(m) | mantissas
    return bits.astype(kind)
