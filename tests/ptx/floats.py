# SPDX-License-Identifier: Apache-2.0
"""Floating-point formats: exact widening, and rounding once, in every mode.

Results are carried as high + low in float64, high the nearest float64, low the sign of what it lacks.
"""

from __future__ import annotations

import ctypes
import ctypes.util

import numpy as np

ROUNDINGS = ("rn", "rz", "rm", "rp")
SMALLEST = {"f16": 2.0**-14, "f32": 2.0**-126, "f64": 2.0**-1022, "bf16": 2.0**-126}  # normal numbers


def element(type_name: str) -> str:
    """f16 of f16x2."""
    return type_name.removesuffix("x2")


def widen_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def widen(type_name: str, array: np.ndarray) -> np.ndarray:
    """Operands of a floating-point type as float64; packed types get a second axis, lower half first."""
    if type_name.endswith("x2"):
        array = np.ascontiguousarray(array).view(np.uint16).reshape(-1, 2)
    if type_name.startswith("bf16"):
        return widen_bf16(array).astype(np.float64)
    if type_name.startswith("f16"):
        return array.view(np.float16).astype(np.float64)
    return array.astype(np.float64)


def two_sum(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The sum, and what it lacks."""
    total = a + b
    part = total - a
    return total, _finite((a - (total - part)) + (b - part))


def two_product(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The product, and what it lacks (Dekker)."""
    product = a * b
    a_high, b_high = _upper_half(a), _upper_half(b)
    a_low, b_low = a - a_high, b - b_high
    return product, _finite(((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low)


def _upper_half(a: np.ndarray) -> np.ndarray:
    large = a * 134217729.0  # 2^27 + 1
    return large - (large - a)


def _finite(low: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(low), low, 0.0)


def quotient(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    q = a / b
    product, low = two_product(q, b)
    return q, _finite(((a - product) - low) / b)


def root(a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    s = np.sqrt(a)
    product, low = two_product(s, s)
    return s, _finite((a - product) - low)


def to_odd(high: np.ndarray, low: np.ndarray | None) -> np.ndarray:
    """Rounded to odd, so that rounding to a shorter format afterwards gives what one rounding would."""
    if low is None or not low.any():
        return high
    bits = high.view(np.int64)
    toward_zero = (low < 0) != (high < 0)
    return np.where(low != 0, (bits - toward_zero) | 1, bits).view(np.float64)


def narrow(
    type_name: str, high: np.ndarray, low: np.ndarray | None = None, rounding: str = "rn"
) -> np.ndarray:
    """The inverse of widen(), rounding once."""
    kind = element(type_name)
    if kind == "f64":
        assert low is None
        return high
    odd = to_odd(high, low)
    if kind == "bf16":
        result = _narrow_bf16(odd, rounding)
    else:
        result = _directed(odd, np.dtype(np.float32 if kind == "f32" else np.float16), rounding)
    if type_name.endswith("x2"):
        result = np.ascontiguousarray(result).view(np.uint32).reshape(-1)
    return result


def _directed(odd: np.ndarray, dtype: np.dtype, rounding: str) -> np.ndarray:
    nearest = odd.astype(dtype)
    if rounding == "rn":
        return nearest
    back = nearest.astype(np.float64)
    infinity = dtype.type(np.inf)
    if rounding == "rz":
        return np.where(np.abs(back) > np.abs(odd), np.nextafter(nearest, dtype.type(0)), nearest)
    if rounding == "rm":
        return np.where(back > odd, np.nextafter(nearest, -infinity), nearest)
    return np.where(back < odd, np.nextafter(nearest, infinity), nearest)


def _narrow_bf16(odd: np.ndarray, rounding: str) -> np.ndarray:
    # to float32 by truncation with a sticky last bit, which is rounding to odd again
    single = _directed(odd, np.dtype(np.float32), "rz")
    bits = single.view(np.uint32) | (single.astype(np.float64) != odd).astype(np.uint32)
    upper = bits >> np.uint32(16)
    rest = bits & np.uint32(0xFFFF)
    negative = upper >> np.uint32(15) == 1
    if rounding == "rn":
        up = (rest > 0x8000) | ((rest == 0x8000) & (upper & 1 == 1))
    else:
        up = (rest != 0) & {"rz": False, "rm": negative, "rp": ~negative}[rounding]
    return np.where(np.isnan(odd), 0x7FFF, upper + up).astype(np.uint16)


def flush(value: np.ndarray, kind: str) -> np.ndarray:
    """.ftz: subnormal numbers become zeros of their sign."""
    return np.where(np.abs(value) < SMALLEST[kind], np.copysign(0.0, value), value)


def saturate(value: np.ndarray) -> np.ndarray:
    """.sat: to [0, 1]; NaN becomes zero."""
    return np.where(value > 0, np.minimum(value, 1.0), 0.0)


def fma_f32(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Rounded once: the product of two float32 is exact in float64; the sum seldom needs more care."""
    total = np.multiply(a, b, dtype=np.float64)
    total += c
    half_way = (total.view(np.uint64) & np.uint64(0x1FFFFFFF)) == np.uint64(0x10000000)
    size = np.abs(total)
    size[size == 0] = 1  # exact
    if half_way.any() or np.fmin.reduce(size) < SMALLEST["f32"]:
        return narrow("f32", *two_sum(np.multiply(a, b, dtype=np.float64), c.astype(np.float64)))
    return total.astype(np.float32)


_libm = ctypes.CDLL(ctypes.util.find_library("m"))
_libm.fma.restype = ctypes.c_double
_libm.fma.argtypes = [ctypes.c_double] * 3


def fma_f64(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return np.array([_libm.fma(*abc) for abc in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)])
