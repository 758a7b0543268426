# SPDX-License-Identifier: Apache-2.0
"""csrc/cpu/: every SIMD primitive of every body against float64 (numpy), through the module of tests/cpp."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import numpy as np
import pytest

BUILD = Path(os.environ.get("PALMETTE_BUILD_DIR", Path(__file__).parent.parent / "build"))
sys.path.insert(0, str(BUILD / "tests"))
try:
    primitives = importlib.import_module("palmette_primitives")
except ImportError:
    pytest.skip("tests/cpp is not built (make test builds it)", allow_module_level=True)
finally:
    sys.path.pop(0)

INF, NAN = np.float32(np.inf), np.float32(np.nan)
SPECIAL = np.array(
    [
        0.0,
        -0.0,
        1.0,
        -1.0,
        INF,
        -INF,
        NAN,
        1e-45,
        -1e-45,
        1.17549435e-38,
        3.4028235e38,
        -3.4028235e38,
        65504,
        65520,
    ],
    np.float32,
)


@pytest.fixture
def lanes(cpu_backend):
    return primitives.lanes(cpu_backend)


@pytest.fixture
def run(cpu_backend):
    def call(name, *inputs, size=None, dtype=None, n=None):
        inputs = [np.ascontiguousarray(x) for x in inputs]
        size = len(inputs[0]) if size is None else size
        guard = 16  # what lies behind the output must not be written
        out = np.full(size + guard, 77, dtype or inputs[0].dtype)
        primitives.run(cpu_backend, name, inputs, out, len(inputs[0]) if n is None else n)
        assert (out[size:] == 77).all()
        return out[:size]

    return call


def bits(x):
    return x.view({4: np.uint32, 2: np.uint16, 8: np.uint64}[x.itemsize])


def random(n, scale=1.0, seed=0):
    return (scale * np.random.default_rng(seed).standard_normal(n)).astype(np.float32)


def float_as_bf16(x):
    """Round to nearest even by integer arithmetic on float32; NaN becomes quiet."""
    u = bits(x).astype(np.uint64)
    rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16
    return np.where(np.isnan(x), (u >> 16) | 0x40, rounded).astype(np.uint16)


def ulps(got, want):
    """Error in units of the last place of the float32 nearest to ``want`` (float64)."""
    return np.abs(got.astype(np.float64) - want) / np.spacing(np.abs(want).astype(np.float32)).astype(
        np.float64
    )


def test_every_body_has_the_same_primitives(cpu_backend):
    assert primitives.names(cpu_backend) == primitives.names("scalar")


# ------------------------------------------------------------------------------------- loads and stores


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 100])
def test_load_and_store_with_tails(run, n):
    for x in (np.resize(SPECIAL, n), random(n)):
        assert (bits(run("copy", x)) == bits(x)).all()
        assert (
            run("copy64", x.astype(np.float64)).view(np.uint64) == x.astype(np.float64).view(np.uint64)
        ).all()


def test_load_n_fills_the_rest(run, lanes):
    for n in range(lanes + 1):
        x = random(lanes)
        got = run("load_n_fill", x, size=lanes, n=n)
        assert (got[:n] == x[:n]).all()
        assert (got[n:] == -3).all()


def test_splat(run, lanes):
    x = SPECIAL
    got = run("splat", x, size=len(x) * lanes, n=len(x) * lanes)
    assert (bits(got) == bits(np.repeat(x, lanes))).all()


# ------------------------------------------------------------------------------------- arithmetic


def test_fma(run, cpu_backend):
    a, b, c = random(1003, 3, 1), random(1003, 3, 2), random(1003, 3, 3)
    want = a.astype(np.float64) * b + c
    # one rounding where the compiler fuses; two on the baseline, and in avx2x16, which is compiled with less
    # optimisation
    fused = cpu_backend in ("avx2", "avx512")
    largest = np.maximum(np.abs(want), 0 if fused else np.abs(a.astype(np.float64) * b)).astype(np.float32)
    error = np.abs(run("fma", a, b, c) - want)
    assert (error <= (0.5 if fused else 1.0) * np.spacing(largest)).all()
    got = run("fma64", *(x.astype(np.float64) for x in (a, b, c)))
    np.testing.assert_allclose(got, want, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize(("name", "reference"), [("max", np.maximum), ("min", np.minimum)])
def test_max_and_min(run, name, reference):
    a, b = random(1003, 1, 1), random(1003, 1, 2)
    assert (run(name, a, b) == reference(a, b)).all()
    pairs = np.array([(x, y) for x in SPECIAL for y in SPECIAL if not np.isnan(y)], np.float32)
    first, second = pairs[:, 0].copy(), pairs[:, 1].copy()
    # a NaN in the first argument survives, which is what a running maximum needs
    np.testing.assert_array_equal(run(name, first, second), reference(first, second))


def test_select(run):
    a, b, c = random(1003, 1, 1), random(1003, 1, 2), random(1003, 1, 3)
    a[::7] = NAN
    assert (run("select", a, b, c) == np.where(a < b, c, np.float32(-1))).all()


# ------------------------------------------------------------------------------------- reductions


def test_any(run, lanes):
    x = -np.ones((lanes + 1, lanes), np.float32)
    x[np.arange(lanes), np.arange(lanes)] = 1
    got = run("any", x.ravel(), size=lanes + 1)
    assert (got == [1.0] * lanes + [0.0]).all()


def test_sum(run, lanes):
    x = random(64 * lanes).reshape(64, lanes)
    got = run("sum", x.ravel(), size=64)
    limit = np.log2(lanes) * np.finfo(np.float32).eps * np.abs(x).sum(1)
    assert (np.abs(got - x.astype(np.float64).sum(1)) <= limit).all()


def test_max_lane(run, lanes):
    x = random(64 * lanes).reshape(64, lanes)
    x[3, lanes - 1], x[4, 0], x[5] = INF, INF, -INF
    assert (run("max_lane", x.ravel(), size=64) == x.max(1)).all()


# ------------------------------------------------------------------------------------- functions


def softmax_range():
    dense = np.linspace(-87.3, 0, 200_001).astype(np.float32)
    return np.concatenate(
        [dense, -np.abs(random(50_000, 1e-3)), np.linspace(0, 88, 50_001).astype(np.float32)]
    )


def test_exp(run):
    x = softmax_range()
    error = ulps(run("exp", x), np.exp(x.astype(np.float64)))
    assert error.max() <= 2.0  # measured 1.2


def test_exp2(run):
    x = softmax_range()
    error = ulps(run("exp2", x), np.exp2(x.astype(np.float64)))
    assert error.max() <= 2.0  # measured 1.2


@pytest.mark.parametrize("name", ["exp", "exp2"])
def test_exp_at_the_edges(run, name):
    x = np.array(
        [0.0, -0.0, -INF, INF, NAN, -1e4, -3e38, -150.0, -89.0 if name == "exp" else -127.5, 3e38], np.float32
    )
    got = run(name, x)
    assert (got[:2] == 1).all()  # exactly: merging a single state copies it
    assert (got[[2, 5, 6, 7, 8]] == 0).all()  # exactly 0: a hidden key has no weight
    assert np.isposinf(got[[3, 9]]).all()
    assert np.isnan(got[4])
    monotone = run(name, np.linspace(-130, 130, 100_001).astype(np.float32))
    assert (monotone >= 0).all()
    assert (np.diff(monotone[np.isfinite(monotone)]) >= -1e-6 * monotone[np.isfinite(monotone)][1:]).all()


def test_exp64(run):
    x = np.linspace(-700, 100, 10_001)
    np.testing.assert_allclose(run("exp64", x), np.exp(x), rtol=1e-15)


@pytest.mark.parametrize("name", ["log", "log2"])
def test_logarithms(run, name):
    exact = getattr(np, name)
    x = np.concatenate(
        [np.geomspace(1e-37, 1e37, 20001), np.linspace(0.5, 2.0, 20001), np.linspace(1.0, 300.0, 20001)]
    ).astype(np.float32)
    assert ulps(run(name, x), exact(x.astype(np.float64))).max() <= 2.0
    edge = run(name, np.array([0.0, 1.0, INF, NAN], np.float32))
    assert edge[:3].tolist() == [-INF, 0.0, INF]
    assert np.isnan(edge[3])


def test_tanh(run):
    x = np.concatenate([np.linspace(-12, 12, 200_001), np.geomspace(1e-30, 1, 1000)]).astype(np.float32)
    assert ulps(run("tanh", x), np.tanh(x.astype(np.float64))).max() <= 4.0  # measured 1.6
    edge = run("tanh", np.array([0.0, INF, -INF, NAN, 1e30, -1e30], np.float32))
    np.testing.assert_array_equal(edge, np.array([0, 1, -1, NAN, 1, -1], np.float32))


# ------------------------------------------------------------------------------------- 16-bit formats

ALL_16 = np.arange(65536, dtype=np.uint16)


@pytest.mark.parametrize("name", ["load_bf16", "bf16_to_scalar"])
def test_every_bf16_widens_exactly(run, name):
    got = run(name, ALL_16, dtype=np.float32)
    assert (bits(got) == ALL_16.astype(np.uint32) << 16).all()


@pytest.mark.parametrize("name", ["load_fp16", "fp16_to_scalar"])
def test_every_fp16_widens_exactly(run, name):
    got = run(name, ALL_16, dtype=np.float32)
    want = ALL_16.view(np.float16).astype(np.float32)
    assert (np.isnan(got) == np.isnan(want)).all()
    number = ~np.isnan(want)
    assert (bits(got)[number] == bits(want)[number]).all()


def rounding_cases():
    """Random floats; every half and bfloat16, the midpoints between them, and the floats beside those."""
    halves = ALL_16.view(np.float16)[np.isfinite(ALL_16.view(np.float16))].astype(np.float32)
    brains = (ALL_16.astype(np.uint32) << 16).view(np.float32)
    brains = brains[np.isfinite(brains)]
    points = [SPECIAL, random(20_000), random(20_000, 1e-6), random(20_000, 1e5)]
    for grid in (np.unique(halves), np.unique(brains)):
        middle = (0.5 * grid[:-1].astype(np.float64) + 0.5 * grid[1:]).astype(np.float32)
        points += [grid, middle, np.nextafter(middle, INF), np.nextafter(middle, -INF)]
    return np.concatenate(points)


@pytest.mark.parametrize("name", ["store_bf16", "scalar_to_bf16"])
def test_bf16_rounds_to_nearest_even(run, name):
    x = rounding_cases()
    got = run(name, x, dtype=np.uint16)
    want = float_as_bf16(x)
    assert (got[~np.isnan(x)] == want[~np.isnan(x)]).all()
    assert (got[np.isnan(x)] & 0x7FFF > 0x7F80).all()


@pytest.mark.parametrize("name", ["store_fp16", "scalar_to_fp16"])
def test_fp16_rounds_to_nearest_even(run, name):
    x = rounding_cases()
    got = run(name, x, dtype=np.uint16)
    with np.errstate(over="ignore"):
        want = x.astype(np.float16).view(np.uint16)
    assert (got[~np.isnan(x)] == want[~np.isnan(x)]).all()
    assert (got[np.isnan(x)] & 0x7FFF > 0x7C00).all()


@pytest.mark.parametrize(("name", "quiet"), [("store_bf16", 0x0040), ("store_fp16", 0x0200)])
def test_every_kind_of_nan_stays_nan(run, name, quiet):
    payloads = np.array([0x7F800001, 0x7FC00000, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F80FFFF], np.uint32)
    x = np.resize(payloads, 64).view(np.float32)
    got = run(name, x, dtype=np.uint16)
    assert (got & quiet != 0).all()
    assert (got >> 15 == np.resize(payloads, 64) >> 31).all()


# ------------------------------------------------------------------------------------- granules


def granule(part, lanes):
    return {"1": 1, "2": 2, "quarter": lanes // 4, "half": lanes // 2, "all": lanes}[part]


PARTS = ["1", "2", "quarter", "half", "all"]


@pytest.mark.parametrize("part", PARTS)
def test_splat_granule(run, lanes, part):
    p = granule(part, lanes)
    x = random(8 * p)
    got = run(f"splat_granule_{part}", np.resize(x, 8 * lanes), size=8 * lanes)
    assert (got.reshape(8, lanes // p, p) == x.reshape(8, 1, p)).all()


@pytest.mark.parametrize("part", PARTS)
def test_sum_granule(run, lanes, part):
    p = granule(part, lanes)
    x = random(8 * lanes)
    got = run(f"sum_granule_{part}", x).reshape(8, lanes // p, p)
    want = x.astype(np.float64).reshape(8, lanes // p, p).sum(2, keepdims=True)
    np.testing.assert_allclose(got, np.broadcast_to(want, got.shape), atol=4e-6)
    assert (got == got[..., :1]).all()


@pytest.mark.parametrize("part", PARTS)
def test_transpose(run, lanes, part):
    p = granule(part, lanes)
    rows = lanes // p
    x = random(rows * lanes)
    got = run(f"transpose_{part}", x).reshape(rows, rows, p)
    assert (got == x.reshape(rows, rows, p).transpose(1, 0, 2)).all()


# ------------------------------------------------------------------------------------- the micro-kernel

MULTIPLY = {  # name: MR, NU, granule, along the rows, start
    "multiply_6x2_rows": (6, 2, "1", True, "zero"),
    "multiply_6x2_columns": (6, 2, "1", False, "scale"),
    "multiply_12x1_rows": (12, 1, "1", True, "load"),
    "multiply_6x1_granule_2": (6, 1, "2", True, "zero"),
    "multiply_4x1_granule_all": (4, 1, "all", True, "load"),
    "multiply_4x1_granule_half_columns": (4, 1, "half", False, "scale"),
}


@pytest.mark.parametrize("steps", [0, 1, 2, 7, 64])
@pytest.mark.parametrize("name", MULTIPLY)
def test_multiply_block(run, lanes, name, steps):
    mr, nu, part, along_row, start = MULTIPLY[name]
    p = granule(part, lanes)
    a, b = random(mr * steps * p + 1, seed=1), random(steps * nu * lanes + 1, seed=2)  # never an empty array
    c, scale = random(mr * nu * lanes, seed=3), random(nu * lanes, seed=4)
    got = run(name, a, b, c, scale, size=mr * nu * lanes, n=steps).reshape(mr, nu, lanes)
    a64, b64 = a[:-1].astype(np.float64), b[:-1].astype(np.float64).reshape(steps, nu, lanes)
    granules = a64.reshape(mr, steps, p) if along_row else a64.reshape(steps, mr, p).swapaxes(0, 1)
    repeated = np.tile(granules, (1, 1, lanes // p))  # [mr, steps, lanes]
    want = np.einsum("ikl,kul->iul", repeated, b64)
    before = c.astype(np.float64).reshape(mr, nu, lanes)
    if start == "load":
        want += before
    elif start == "scale":
        want += before * scale.astype(np.float64).reshape(nu, lanes)
    np.testing.assert_allclose(got, want, atol=1e-6 * (steps + 4))
