# SPDX-License-Identifier: Apache-2.0
"""tests/ptx, the interpreter of PTX: what nvcc makes of csrc/gpu/ptx.cuh, every family of instructions, and
defects in the PTX, each of which must change results."""

from __future__ import annotations

import ctypes
import math
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import ptx
import pytest
import torch
from ptx import cases
from ptx.mutations import IGNORED_SOURCE_SIZE, MISSING_SYNCTHREADS

if ptx.find_nvcc() is None:
    pytest.skip("nvcc is not on the PATH, nor below CUDA_HOME", allow_module_level=True)

KERNELS = Path(ptx.__file__).parent / "kernels"
CSRC = Path(__file__).parent.parent / "csrc"
SCHEDULES = ("block", "forward", "reverse")
THREADS = 128
RNG = np.random.default_rng(1)


def text_of(name: str) -> str:
    return ptx.compile_ptx(KERNELS / f"{name}.cu", include=[CSRC])


@pytest.fixture(scope="module")
def control() -> ptx.Module:
    return ptx.Module(text_of("control"))


@pytest.fixture(scope="module")
def cooperate() -> ptx.Module:
    return ptx.Module(text_of("cooperate"))


class Launch:
    """Runs a kernel on arrays: those named out are written."""

    def __init__(self, module: ptx.Module, schedule: str = "block") -> None:
        self.gpu = ptx.Machine(module)
        self.schedule = schedule

    def __call__(self, kernel: str, *arguments, grid=1, block=THREADS, shared=0) -> ptx.Counters:
        packed = []
        for i, argument in enumerate(arguments):
            if isinstance(argument, np.ndarray):
                argument = self.gpu.buffer(argument, f"{kernel} {i}", writable=argument.flags.writeable)
            packed.append(argument)
        self.gpu.launch(kernel, grid, block, shared, self.gpu.pack(kernel, *packed), self.schedule)
        return self.gpu.counters


def constant(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


def bf16(array: np.ndarray) -> np.ndarray:
    return torch.from_numpy(array.astype(np.float32)).bfloat16().view(torch.int16).numpy().view(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


# ---- tensor cores


def product(text: str, kernel: str, schedule: str = "block") -> tuple[float, ptx.Counters]:
    """The largest error of a 64x64x64 product, and the counters."""
    rng = np.random.default_rng(5)
    a, b = (rng.standard_normal((64, 64)).astype(np.float32) for _ in range(2))
    a, b = (x.astype(np.float16) if "fp16" in kernel else bf16(x) for x in (a, b))
    c = np.full((64, 64), np.nan, np.float32)
    counters = Launch(ptx.Module(text), schedule)(kernel, constant(a), constant(b), c, shared=8192)
    wide = [x.astype(np.float64) if "fp16" in kernel else from_bf16(x).astype(np.float64) for x in (a, b)]
    error = np.abs(c - wide[0] @ (wide[1].T if "transposed" in kernel else wide[1]))
    return float("inf") if np.isnan(error).any() else float(error.max()), counters


PRODUCTS = ("product_bf16", "product_bf16_transposed", "product_fp16", "product_with_conflicts")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kernel", PRODUCTS)
def test_products(kernel, schedule):
    error, _ = product(text_of("matmul"), kernel, schedule)
    assert error < 1e-5


@pytest.mark.parametrize("kernel", PRODUCTS)
def test_products_move_each_byte_once_and_collide_in_banks_only_where_they_should(kernel):
    _, counters = product(text_of("matmul"), kernel)
    a, b, c = (counters.buffers[f"{kernel} {i}"] for i in range(3))
    assert (a.bytes_read, b.bytes_read, c.bytes_written) == (64 * 64 * 2, 64 * 64 * 2, 64 * 64 * 4)
    assert (a.read_sectors, b.read_sectors, c.write_sectors) == (256, 256, 512)
    assert counters.executed("mma") == 4 * 4 * 8
    assert counters.executed("ldmatrix") == 4 * 4 * 5
    loads = [banks for name, banks in counters.shared.items() if name.startswith("ldmatrix")]
    assert sum(banks.minimum for banks in loads) == 4 * 4 * 5 * 4
    assert (sum(banks.conflicts for banks in loads) > 0) == (kernel == "product_with_conflicts")
    assert bool(counters.conflicts) == (kernel == "product_with_conflicts")


@pytest.mark.parametrize("kernel", PRODUCTS)
def test_no_defect_in_a_product_escapes(kernel):
    def passes(text: str) -> bool:
        return product(text, kernel, "forward")[0] < 1e-5

    tried = ptx.check_mutations(
        text_of("matmul"), kernel, passes, [*ptx.MUTATIONS, MISSING_SYNCTHREADS], most=3
    )
    seen = {name.split(" (")[0] for name in tried}
    expected = {m.name for m in ptx.MUTATIONS if m.name.startswith(("mma", "cp.async", "ldmatrix"))}
    if kernel == "product_bf16_transposed":
        expected = {
            name for name in expected if ".trans missing" not in name and "ldmatrix.trans" not in name
        }
    assert expected <= seen, expected - seen
    assert MISSING_SYNCTHREADS.name in seen


def attention(text: str, schedules: tuple[str, ...] = ("reverse",), queries: int = 70, n: int = 75) -> bool:
    """Whether attention to n keys is right to what bfloat16 can tell."""
    rng = np.random.default_rng(6)
    q, k, v = (bf16(rng.standard_normal((m, 64)) * 1.5) for m in (queries, n, n))
    wide_q, wide_k, wide_v = (torch.from_numpy(from_bf16(x)).double() for x in (q, k, v))
    want = torch.nn.functional.scaled_dot_product_attention(wide_q, wide_k, wide_v).numpy()
    for schedule in schedules:
        out = np.full((queries, 64), 0x7FC0, np.uint16)
        arguments = (constant(q), constant(k), constant(v), out, queries, n, math.log2(math.e) / 8)
        Launch(ptx.Module(text), schedule)("attention", *arguments, grid=2, shared=24576)
        if not np.allclose(from_bf16(out), want, 0.02, 0.01):
            return False
    return True


def test_attention():
    text = text_of("attention")
    assert attention(text, SCHEDULES)
    tried = ptx.check_mutations(text, "attention", attention, [*ptx.MUTATIONS, MISSING_SYNCTHREADS], most=3)
    seen = {name.split(" (")[0] for name in tried}
    expected = {m.name for m in [*ptx.MUTATIONS, MISSING_SYNCTHREADS] if not m.name.startswith("barrier")}
    assert expected == seen, expected ^ seen


# ---- instructions, one by one


INTEGER_CASES = cases.integer_cases()


@pytest.mark.parametrize(("snippet", "function"), INTEGER_CASES, ids=[s.body for s, _ in INTEGER_CASES])
def test_integer_instructions(snippet, function):
    rng = np.random.default_rng(2)
    inputs = [ptx.snippets.samples(kind, 96, rng) for kind in snippet.inputs]
    if snippet.body.startswith(("shr", "shl", "shf", "bfe", "bfind", "and.b32 t")):
        inputs[-1] %= inputs[-1].dtype.type(70)
        if len(inputs) == 3:
            inputs[1] = inputs[1] if "shf" in snippet.body else inputs[1] % inputs[1].dtype.type(70)
    if snippet.body.startswith("and.b32 t"):
        inputs = [*(ptx.snippets.samples("u32", 96, rng) for _ in range(2)), rng.integers(0, 40, 96) * 65537]
        inputs[2][::2] = rng.integers(0, 70, 48) + (rng.integers(0, 70, 48) << 16)
    want = ptx.snippets.scalars(snippet, inputs, function)
    assert (snippet.run(*inputs) == want).all()


FLOAT_CASES = cases.float_cases()


@pytest.mark.parametrize(("snippet", "function", "mode"), FLOAT_CASES, ids=[s.body for s, *_ in FLOAT_CASES])
def test_float_instructions(snippet, function, mode):
    rng = np.random.default_rng(3)
    inputs = [ptx.snippets.samples(kind, 96, rng) for kind in snippet.inputs]
    if "x2 d, a" in snippet.body and snippet.inputs[0] == "u32":  # packed, and finite
        kind = "bf16" if "bf16x2" in snippet.body else "f16"
        halves = [[ptx.snippets.samples(kind, 96, rng).astype(np.uint32) for _ in range(2)] for _ in inputs]
        inputs = [low | high << 16 for low, high in halves]
    if (
        snippet.body.startswith(("add", "sub", "fma"))
        and len({*snippet.inputs}) == 1
        and "x2" not in snippet.body
    ):
        inputs[1][:20] = inputs[0][:20] ^ inputs[0].dtype.type(3)  # of like size
        inputs[-1][20:30] = inputs[0][20:30] ^ inputs[0].dtype.type(1)
    want = ptx.snippets.scalars(snippet, inputs, function, mode)
    got = snippet.run(*inputs)
    zero = want << want.dtype.type(1) == 0  # the sign of an exact zero is not compared
    assert (np.where(zero, got << got.dtype.type(1), got) == np.where(zero, 0, want)).all()


def singles(*values: float) -> np.ndarray:
    return np.array(values, np.float32).view(np.uint32)


def test_approximations():
    x = np.linspace(0.01, 30, 128, dtype=np.float32)
    y = np.linspace(-5, 5, 128, dtype=np.float32)
    functions: dict[str, Callable] = {
        "ex2.approx.ftz.f32 d, b;": lambda a, b: np.exp2(b),
        "lg2.approx.f32 d, a;": lambda a, b: np.log2(a),
        "rcp.approx.ftz.f32 d, a;": lambda a, b: 1 / a,
        "sqrt.approx.f32 d, a;": lambda a, b: np.sqrt(a),
        "rsqrt.approx.f32 d, a;": lambda a, b: 1 / np.sqrt(a),
        "sin.approx.f32 d, b;": lambda a, b: np.sin(b),
        "cos.approx.f32 d, b;": lambda a, b: np.cos(b),
        "tanh.approx.f32 d, b;": lambda a, b: np.tanh(b),
        "div.approx.f32 d, b, a;": lambda a, b: b / a,
        "div.full.f32 d, b, a;": lambda a, b: b / a,
    }
    for body, function in functions.items():
        snippet = ptx.snippets.Snippet(body, "f32", ("f32", "f32"))
        got = snippet.run(x.view(np.uint32), y.view(np.uint32)).view(np.float32)
        np.testing.assert_allclose(got, function(x.astype(np.float64), y.astype(np.float64)), 1e-6, 1e-6)
        SNIPPETS.append(snippet)


INFINITY, NAN = math.inf, math.nan
SPECIAL_CASES = [
    ("min.f32 d, a, b;", (NAN, 1), 1),
    ("max.f32 d, a, b;", (1, NAN), 1),
    ("max.NaN.f32 d, a, b;", (1, NAN), NAN),
    ("min.f32 d, a, b;", (0.0, -0.0), -0.0),
    ("max.f32 d, a, b;", (-0.0, 0.0), 0.0),
    ("ex2.approx.ftz.f32 d, a;", (-INFINITY, 0), 0.0),
    ("ex2.approx.ftz.f32 d, a;", (-140, 0), 0.0),
    ("ex2.approx.f32 d, a;", (-140, 0), 2.0**-140),
    ("ex2.approx.f32 d, a;", (200, 0), INFINITY),
    ("lg2.approx.f32 d, a;", (0, 0), -INFINITY),
    ("rcp.approx.f32 d, a;", (-0.0, 0), -INFINITY),
    ("div.approx.f32 d, a, b;", (1, 2.0**127), 0.0),
    ("div.full.f32 d, a, b;", (2.0, 2.0**127), 2.0**-126),
    ("add.f32 d, a, b;", (INFINITY, -INFINITY), NAN),
    ("fma.rn.f32 d, a, b, 0f3F800000;", (INFINITY, 0), NAN),
    # between two numbers by less than float64 tells
    ("fma.rn.f32 d, a, a, b;", (1 + 2.0**-12, 2.0**-100), 1 + 2.0**-11 + 2.0**-23),
    ("fma.rn.f32 d, a, a, b;", (1 + 2.0**-12, -(2.0**-100)), 1 + 2.0**-11),
    ("fma.rn.f32 d, a, a, b;", (1 + 2.0**-12, 0), 1 + 2.0**-11),
    ("fma.rz.f32 d, a, b, a;", (-3e38, 3), -3.4028234663852886e38),
    ("mul.ftz.f32 d, a, b;", (1e-40, 1e10), 0.0),
    ("mul.sat.f32 d, a, b;", (NAN, 1), 0.0),
    ("cvt.rn.f16.f32 t, a; cvt.f32.f16 d, t;", (65520, 0), INFINITY),
    ("mov.b32 d, 0f40490FDB;", (0, 0), 3.1415927410125732),
    ("cvt.sat.f32.f32 d, a;", (-2, 0), 0.0),
    ("cvt.rna.tf32.f32 d, a;", (1 + 2.0**-11, 0), 1 + 2.0**-10),
]


@pytest.mark.parametrize(
    ("body", "values", "want"), SPECIAL_CASES, ids=[f"{b} {v}" for b, v, _ in SPECIAL_CASES]
)
def test_special_numbers(body, values, want):
    body = body.replace("f16.f32 t", "f16.f32 h").replace("f16 d, t", "f16 d, h")
    body = f"{{ .reg .b16 h; {body} }}"
    snippet = ptx.snippets.Snippet(body, "f32", ("f32", "f32"))
    SNIPPETS.append(snippet)
    got = snippet.run(*(singles(v) for v in values)).view(np.float32)[0]
    assert (
        np.isnan(got)
        if math.isnan(want)
        else (got == want and np.signbit(got) == (math.copysign(1, want) < 0))
    )


@pytest.mark.parametrize("to", ["s32", "u32", "s64", "u64"])
def test_floats_out_of_an_integers_range(to):
    bits = int(to[1:])
    low, high = (0, (1 << bits) - 1) if to[0] == "u" else (-(1 << (bits - 1)), (1 << (bits - 1)) - 1)
    snippet = ptx.snippets.Snippet(f"cvt.rzi.{to}.f32 d, a;", to, ("f32",))
    got = snippet.run(singles(NAN, INFINITY, -INFINITY, 1e30, -1e30, -0.5)).tolist()
    assert got == [cases.wrap(bits, v) for v in (0, high, low, high, low, 0)]


def test_comparisons_with_nan():
    a, b = singles(1, 1, 2, NAN, 1, NAN), singles(1, 2, 1, 1, NAN, NAN)
    ordered = {
        "eq": [1, 0, 0],
        "ne": [0, 1, 1],
        "lt": [0, 1, 0],
        "le": [1, 1, 0],
        "gt": [0, 0, 1],
        "ge": [1, 0, 1],
    }
    for name, results in ordered.items():
        for suffix, with_nan in (("", 0), ("u", 1)):
            body = f"setp.{name}{suffix}.f32 p, a, b; selp.u32 d, 1, 0, p;"
            snippet = ptx.snippets.Snippet(body, "u32", ("f32", "f32"))
            assert snippet.run(a, b).tolist() == [*results, *[with_nan] * 3], body
    for name, results in {"num": [1, 1, 1, 0, 0, 0], "nan": [0, 0, 0, 1, 1, 1]}.items():
        snippet = ptx.snippets.Snippet(
            f"setp.{name}.f32 p, a, b; selp.u32 d, 1, 0, p;", "u32", ("f32", "f32")
        )
        assert snippet.run(a, b).tolist() == results


SNIPPETS: list[ptx.snippets.Snippet] = []  # those of the tests above


@pytest.mark.skipif(shutil.which("ptxas") is None, reason="ptxas is not on the PATH")
def test_ptxas_accepts_what_the_tests_are_made_of(tmp_path):
    snippets = [s for s, *_ in [*INTEGER_CASES, *FLOAT_CASES]] + SNIPPETS
    text = ptx.snippets.HEADER + "".join(s.kernel(f"kernel{i}") for i, s in enumerate(snippets))
    source = tmp_path / "snippets.ptx"
    source.write_text(text)
    done = subprocess.run(
        ["ptxas", "-arch=sm_80", "-o", str(tmp_path / "out"), str(source)], capture_output=True, text=True
    )
    lines = text.splitlines()
    reported = [f"{line}: {lines[int(line) - 1]}" for line in re.findall(r"line (\d+)", done.stderr)]
    assert done.returncode == 0, (done.stderr, reported)


# ---- control flow and memory, as nvcc compiles them


@pytest.fixture(params=SCHEDULES)
def schedule(request) -> str:
    return request.param


def test_loops_of_different_lengths(control, schedule):
    n = 100
    start = np.arange(1, 129, dtype=np.int32)
    steps = np.full(128, -1, np.int32)
    counters = Launch(control, schedule)("collatz", constant(start), steps, n, grid=2, block=64)

    def collatz(value: int) -> int:
        return 0 if value == 1 else 1 + collatz(value // 2 if value % 2 == 0 else 3 * value + 1)

    want = [collatz(v) for v in range(1, n + 1)]
    assert (steps[:n] // 2 == want).all()
    # lanes have met again when they vote: each sees the vote of its own
    assert (steps[:n] % 2 == [count % 2 == 0 for count in want]).all()
    assert (steps[n:] == -1).all()
    assert counters.executed("vote.sync.ballot") >= 4


def test_calls(control, schedule):
    x = np.arange(-64, 64, dtype=np.int32)
    out, pairs = np.zeros(128, np.int32), np.zeros((128, 2))
    Launch(control, schedule)("calls", constant(x), out, pairs)
    i = np.arange(128)
    assert (out == np.where(i % 3 == 0, x * x, np.where(i % 3 == 1, x * x + 1, 2 * x + 1))).all()
    assert (pairs == np.stack([i, 2 * i], axis=1)).all()


def test_cases(control, schedule):
    rng = np.random.default_rng(4)
    x, before = rng.integers(-1, 10, 256).astype(np.int32), rng.integers(-1000, 1000, 256).astype(np.int32)
    out = before.copy()
    Launch(control, schedule)("cases", constant(x), out, grid=2)
    r = before.astype(np.int64)
    quotient = np.trunc(r / 7).astype(np.int64)
    results = [r * 3 + 1, r ^ 0x55, 100 - r, r + 100, r << 3, quotient, np.fmod(r, 11), r * r]
    assert (out == np.select([x == k for k in range(8)], results, 12345)).all()


class Settings(ctypes.Structure):
    _fields_ = (
        ("length", ctypes.c_int),
        ("scale", ctypes.c_float * 3),
        ("data", ctypes.c_uint64),
        ("flags", ctypes.c_ubyte * 5),
        ("step", ctypes.c_short),
    )


def test_structs_and_local_arrays(control, schedule):
    data, out = RNG.standard_normal(50).astype(np.float32), np.zeros(64, np.float32)
    launch = Launch(control, schedule)
    address = launch.gpu.buffer(constant(data), "data")
    settings = Settings(50, (1.0, 2.0, 0.5), address, (9, 8, 7, 6, 5), 3)
    launch("by_value", settings, out, 6, block=64)
    i, j = np.arange(64)[:, None], np.arange(16)
    local = np.zeros((64, 16), np.float32)
    local[:, (j * 5 + 6) % 16] = data[(i + j * 3) % 50]
    terms = np.take_along_axis(local, (j + i) % 16, 1).astype(np.float64) * np.where(j < 8, 1, -1)
    want = terms.sum(1) * np.array([1.0, 2.0, 0.5])[i[:, 0] % 3] + np.array([9, 8, 7, 6, 5])[i[:, 0] % 5]
    np.testing.assert_allclose(out, want, 1e-5, 1e-5)


def test_variables_keep_their_values(control, schedule):
    launch, i = Launch(control, schedule), np.arange(64)
    for launches in (8, 9):
        out = np.zeros(64, np.int32)
        address = launch.gpu.buffer(out, f"out {launches}", writable=True)
        launch("variables", address, block=64)
        want = np.array([3, 1, 4, 1, 5])[(63 - i) % 5] * (63 - i) - (i + 1) % 64
        want[1] = launches
        assert (out == want).all()


def test_widths(control, schedule):
    source, out = RNG.integers(0, 256, 128).astype(np.uint8), np.zeros(768 + 1024, np.uint8)
    Launch(control, schedule)("widths", constant(source), out, block=64)
    i = np.arange(64)
    assert (out[:64] == source[:64] + np.uint8(1)).all()
    assert (out[64:128].view(np.int8) == source[63 - i].view(np.int8) >> 1).all()
    assert (out[128:256].view(np.int16) == source.view(np.int16) * np.int16(3)).all()
    assert (out[256:768].view(np.int64) == source.view(np.int64)[i % 8] - i).all()
    quads = source.view(np.int32).reshape(-1, 4)[i % 4][:, ::-1].copy()
    quads[:, 3] += i.astype(np.int32)
    assert (out[768:].view(np.int32).reshape(-1, 4) == quads).all()


def test_what_memory_reports(control):
    source, out = np.zeros(128, np.int32), np.zeros(128, np.int32)
    with pytest.raises(
        ptx.PtxError, match=r"(?s)ld.global.*misaligned: read of 4 bytes at offset 2 of misaligned 0"
    ):
        Launch(control)("misaligned", constant(source), out, 2)
    with pytest.raises(
        ptx.PtxError, match=r"(?s)out of bounds: read of 4 bytes at offset 512 of copy 0, which has 512"
    ):
        Launch(control)("copy", constant(source), out, 4)
    launch = Launch(control)
    addresses = launch.gpu.buffer(source, "from"), launch.gpu.buffer(out, "to", writable=True)
    launch("copy", *addresses, 0)
    with pytest.raises(ptx.PtxError, match="out of bounds: read of 4 bytes at offset 512 of from"):
        launch("copy", *addresses, 1)  # the same program, of which most lanes are right
    with pytest.raises(ptx.PtxError, match="out of bounds: read of 4 bytes at offset -4 of copy 0"):
        Launch(control)("copy", constant(source), out, -1)
    with pytest.raises(
        ptx.PtxError, match="out of bounds: write of 4 bytes at offset 252 of copy 1, which has 254"
    ):
        Launch(control)("copy", constant(source), np.zeros(127, np.uint16), 0)
    with pytest.raises(ptx.PtxError, match="read-only: write of 4 bytes at offset 0 of copy 1"):
        Launch(control)("copy", constant(source), constant(out), 0)
    with pytest.raises(ptx.PtxError, match="address 0x0, which is near no buffer"):
        Launch(control)("copy", 0, out.copy(), 0)
    with pytest.raises(ptx.PtxError, match="wrong state space"):
        Launch(control)("copy", 0xA << 40 | 1024, out.copy(), 0, shared=4096)
    with pytest.raises(ptx.PtxError, match="16 bytes of parameters, the kernel has 20"):
        Launch(control).gpu.launch("copy", 1, 128, params=bytes(16))
    with pytest.raises(ptx.PtxError, match="129 threads"):
        Launch(ptx.Module(text_of("matmul"))).gpu.launch("product_fp16", 1, 129)
    with pytest.raises(ptx.PtxError, match="kernels have 'product'"):
        ptx.Module(text_of("matmul")).entry("product")


def test_arrays_at_addresses_of_their_own():
    """Wide accesses to what begins at no multiple of their size; other arrays at the same place."""
    module = entry(
        "ld.param.u64 o, [out]; mad.wide.u32 o, i, 16, o; ld.global.v4.u32 {a0, a1, a2, a3}, [o+8];"
        "add.u32 a3, a3, i; st.global.v4.u32 [o+8], {a3, a0, a1, a2}; isspacep.global p0, o; @!p0 trap; ret;"
    )
    gpu, address = ptx.Machine(module), 0x7F12_3456_7818
    assert (address + 8) % 16 == 0
    for start in (0, 1000):
        array = np.arange(start, start + 34, dtype=np.uint32)
        want = array[2:].reshape(8, 4)[:, [3, 0, 1, 2]] + np.arange(8)[:, None] * np.array([1, 0, 0, 0])
        assert gpu.buffer(array, "out", writable=True, address=address) == address
        gpu.launch("test", 1, 8, params=gpu.pack("test", address))
        assert (array[2:].reshape(8, 4) == want).all()
        assert gpu.counters.buffers["out"].bytes_written == 128
        with pytest.raises(ValueError, match="other overlaps out"):
            gpu.buffer(array.copy(), "other", address=address + 132)
        with pytest.raises(ptx.PtxError, match="out of bounds: read of 16 bytes at offset 136 of out"):
            gpu.launch("test", 1, 9, params=gpu.pack("test", address))
        gpu.forget()
    with pytest.raises(ptx.PtxError, match="near no buffer"):
        gpu.launch("test", 1, 8, params=gpu.pack("test", address))
    with pytest.raises(ValueError, match="no address of global memory"):
        gpu.buffer(np.zeros(4), "shared", address=0xA << 40)


def test_shared_memory_of_each_launch():
    out = np.zeros(64, np.uint32)
    module = entry(
        "mov.u32 a0, %dynamic_smem_size; mov.u32 a1, dynamic; add.u32 a1, a1, a0;"
        "st.shared.u32 [a1+-4], a0; ld.shared.u32 a2, [a1+-4]; st.global.u32 [o], a2; ret;"
    )
    declaration = ".extern .shared .align 16 .b8 dynamic[];"
    gpu = ptx.Machine(ptx.Module(module.text.replace(".visible", f"{declaration} .visible")))
    address = gpu.buffer(out, "out", writable=True)
    for size in (64, 4096, 32):
        gpu.launch("test", 1, 64, size, gpu.pack("test", address))
        assert (out == size).all()


def test_a_kernel_alone():
    text = text_of("control")
    module = ptx.Module(text)
    names = [f.name for f in module.functions.values() if f.entry]
    assert len(names) > 3
    for name in names:
        alone = ptx.Module(module.alone(name))
        assert [f.name for f in alone.functions.values() if f.entry] == [name]
        assert [i.text for i in alone.entry(name).body] == [i.text for i in module.entry(name).body]


def test_mutants_that_leave_the_path_are_noticed():
    """A kernel that repairs its result hides a defect, but it is seen doing so."""
    repairing = """
      .reg .f32 x; mov.u32 j, store; cvt.rn.f32.u32 x, i; mad.lo.u32 j, i, 4, j; st.shared.f32 [j], x;
      bar.sync 0;
      xor.b32 a0, i, 32; mov.u32 j, store; mad.lo.u32 j, a0, 4, j; ld.shared.f32 x, [j];
      setp.nan.f32 p0, x, x; @!p0 bra good;
      cvt.rn.f32.u32 x, a0;
      good: st.global.f32 [o], x; ret;"""
    text = entry(repairing, ".shared .align 16 .b8 store[256];").text

    def passes(mutant: str) -> bool:
        out = np.zeros(64, np.float32)
        Launch(ptx.Module(mutant), "forward")("test", out, block=64)
        return bool((out == (np.arange(64) ^ 32)).all())

    assert passes(re.sub(r"bar\.sync 0;", "", text))
    assert len(ptx.check_mutations(text, "test", passes, [MISSING_SYNCTHREADS])) == 1


# ---- threads that work together, as nvcc compiles them


def test_shuffles(cooperate, schedule):
    x, out = RNG.integers(0, 30, 64).astype(np.int32), np.zeros((64, 10), np.int32)
    Launch(cooperate, schedule)("shuffles", constant(x), out, block=64)
    for t in range(64):
        warp, lane = x[t // 32 * 32 :][:32], t % 32
        row = [
            warp[5],
            warp[lane // 8 * 8 + t * 7 % 8],
            warp[lane - 3] if lane >= 3 else warp[lane],
            warp[lane + 3] if lane % 16 < 13 else warp[lane],
            warp[lane ^ 9],
            warp.sum(),
            sum(1 << i for i in range(32) if warp[i] % 2),
            (17 in warp) * 2 + 1,
            warp.max(),
            sum(1 << i for i in range(32) if warp[i] % 4 == warp[lane] % 4),
        ]
        assert (out[t].view(np.uint32) == np.array(row, np.int64)).all()


def test_parts_of_warps(cooperate, schedule):
    x, out = RNG.integers(0, 1000, 64).astype(np.int32), np.zeros(64, np.int32)
    Launch(cooperate, schedule)("parts", constant(x), out, block=64)
    t = np.arange(64)
    odd = x.reshape(2, 32)[:, 1::2].sum(1)[t // 32]
    assert (out == x[t ^ 15] + np.where(t % 2, x[t ^ 2] + odd, 0)).all()


def test_a_lane_that_does_not_come(cooperate, schedule):
    with pytest.raises(
        ptx.PtxError, match=r"(?s)deadlock.*31 threads from 0 to 31 at .*shfl.*1 threads from 9 to 9 .*bar"
    ):
        Launch(cooperate, schedule)("lost_lane", np.zeros(32, np.int32), block=32)


def test_votes_of_a_block(cooperate, schedule):
    for x in (np.arange(96), np.full(96, 9), np.zeros(96)):
        out = np.zeros((96, 3), np.int32)
        Launch(cooperate, schedule)("votes_of_a_block", constant(x.astype(np.int32)), out, block=96)
        assert (out == [(x > 3).sum(), (x > 3).all(), (x > 3).any()]).all()


def produce_and_consume(text: str, schedule: str) -> bool:
    rounds = 5
    x, out = np.arange(rounds * 64, dtype=np.int32) ** 2, np.zeros(64, np.int32)
    Launch(ptx.Module(text), schedule)("produce_and_consume", constant(x), out, rounds, shared=256)
    want = (x.reshape(rounds, 64) + np.arange(rounds)[:, None]).sum(0)[::-1]
    return bool((out == want).all())


def pairs_of_warps(text: str, schedule: str) -> bool:
    out, i = np.zeros(128, np.int32), np.arange(128)
    Launch(ptx.Module(text), schedule)("pairs_of_warps", out, shared=512)
    return bool((out == (i // 64 * 64 + (i + 37) % 64) ** 2).all())


@pytest.mark.parametrize("kernel", [produce_and_consume, pairs_of_warps])
def test_named_barriers(kernel):
    text = text_of("cooperate")
    for schedule in SCHEDULES:
        assert kernel(text, schedule)
    tried = ptx.check_mutations(
        text, kernel.__name__, lambda mutant: all(kernel(mutant, schedule) for schedule in SCHEDULES), most=20
    )
    assert len(tried) >= 4


def test_atomics(cooperate, schedule):
    n = 256
    x = RNG.integers(0, 1000, n).astype(np.int32)
    ints, floats, longs = np.zeros(16, np.int32), np.zeros(3, np.float32), np.zeros(1, np.uint64)
    ints[2] = 10**6
    old = np.zeros(n, np.int32)
    counters = Launch(cooperate, schedule)(
        "atomics", constant(x), ints, floats, longs, old, 8, grid=2, shared=8
    )
    assert ints[:4].tolist() == [x.sum(), x.max(), x.min(), np.bitwise_or.reduce(x)]
    if schedule != "reverse":  # each thread takes the turn after the one before it
        assert ints[4:6].tolist() == [n, n - 1]
    assert (ints[8:] == np.bincount(x % 8, minlength=8)).all()
    assert (floats == np.bincount(np.arange(n) % 3) * 0.5).all()
    assert longs[0] == int(x.sum()) << 33
    assert (np.sort(old.reshape(2, 128)) == np.sort(np.arange(128) % 5)).all()
    assert counters.buffers["atomics 3"].bytes_written == n * 8


ATOMIC_CASES: dict[str, Callable[[int, int], int]] = {
    "add.u32": lambda old, b: old + b,
    "add.u64": lambda old, b: old + b,
    "min.s32": min,
    "max.s64": max,
    "min.u32": min,
    "and.b32": lambda old, b: old & b,
    "or.b64": lambda old, b: old | b,
    "xor.b32": lambda old, b: old ^ b,
    "exch.b64": lambda old, b: b,
    "inc.u32": lambda old, b: 0 if old >= b else old + 1,
    "dec.u32": lambda old, b: b if old == 0 or old > b else old - 1,
}


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize("operation", ATOMIC_CASES)
def test_atomic_operations(operation, space):
    """All lanes but every third on one number, one after the other."""
    kind = operation.split(".")[1].replace("b", "u")
    bits = int(kind[1:])
    registers = f".reg .b{bits} x, y; .reg .b64 z; .shared .align 8 .b8 store[8];"
    place = "mov.u64 z, store;" if space == "shared" else "ld.param.u64 z, [out]; add.u64 z, z, 1024;"
    body = f"""
      mul.lo.u32 j, i, 40503; and.b32 j, j, 127; sub.u32 j, j, 30; cvt.{kind}.s32 x, j;
      {place} mov.b{bits} y, 77; st.{space}.b{bits} [z], y; bar.sync 0;
      rem.u32 a0, i, 3; setp.ne.u32 p0, a0, 0; mov.b{bits} y, 5;
      @p0 atom.{space}.{operation} y, [z], x;
      @!p0 red.{space}.{operation} [z], x;
      st.global.b32 [o], y; ld.{space}.b{bits} y, [z]; st.global.b32 [o+512], y; ret;"""
    out = np.zeros(512, np.uint32)
    Launch(entry(body, registers))("test", out, block=64)
    value, want = 77, np.full(64, 5, np.uint32)
    for first in (False, True):  # atom of all lanes, then red
        for i in range(64):
            b = (i * 40503 & 127) - 30
            if (i % 3 == 0) == first:
                if not first:
                    want[i] = value & 0xFFFFFFFF
                b = b if kind[0] == "s" else cases.wrap(bits, b)
                value = ATOMIC_CASES[operation](value, b)
                value = value if kind[0] == "s" else cases.wrap(bits, value)
    assert (out[:64] == want).all()
    assert out[128] == value & 0xFFFFFFFF


def copies(text: str, schedule: str = "block", sizes: np.ndarray | None = None) -> bool:
    sizes = RNG.integers(0, 17, 64).astype(np.uint32) if sizes is None else sizes
    source, out = RNG.integers(1, 255, (128, 16)).astype(np.uint8), np.zeros((128, 16), np.uint8)
    Launch(ptx.Module(text), schedule)(
        "copies", constant(source), constant(sizes), out, block=64, shared=2048
    )
    want = source.copy()
    want[:64] *= np.arange(16) < sizes[:, None]
    return bool((out.reshape(2, 64, 16) == want.reshape(2, 64, 16)[:, ::-1]).all())


def test_asynchronous_copies(schedule):
    text = text_of("cooperate")
    for size in (0, 4, 16):
        assert copies(text, schedule, np.full(64, size, np.uint32))
    with pytest.raises(ptx.PtxError, match="copies 17 bytes to 16"):
        copies(text, schedule, np.full(64, 17, np.uint32))
    tried = ptx.check_mutations(
        text,
        "copies",
        lambda mutant: copies(mutant, schedule),
        [*ptx.MUTATIONS, IGNORED_SOURCE_SIZE, *([MISSING_SYNCTHREADS] if schedule != "block" else [])],
    )
    assert len(tried) >= 8


def test_a_copy_that_is_never_waited_for(cooperate):
    with pytest.raises(ptx.PtxError, match=r"(?s)cp.async.cg.*64 threads, the first is 0, exit before"):
        Launch(cooperate)("never_waited_for", constant(np.zeros((64, 4), np.int32)), block=64, shared=1024)


def numbers(text: str) -> bool:
    x = (RNG.standard_normal(96) * 20).astype(np.float32)
    x[:3] = -200, 127.5, -126.5
    powers, packed = np.zeros(96, np.float32), np.zeros(96, np.uint32)
    Launch(ptx.Module(text))("numbers", constant(x), powers, packed, block=96)
    exact = np.exp2(x.astype(np.float64))
    exact[exact < 2.0**-126] = 0
    close = np.allclose(powers, exact, 1e-6, 0)
    return close and bool((packed == (bf16(np.roll(x, -1)).astype(np.uint32) << 16 | bf16(x))).all())


def test_numbers():
    assert ptx.check_mutations(text_of("cooperate"), "numbers", numbers) == ["cvt: operands swapped"]


# ---- what nvcc does not make of these kernels


def entry(body: str, registers: str = "") -> ptx.Module:
    return ptx.Module(
        f"{ptx.snippets.HEADER}.visible .entry test(.param .u64 out) {{ .reg .b32 i, j, a<4>; .reg .b64 o; "
        f".reg .pred p<2>; {registers} ld.param.u64 o, [out]; mov.u32 i, %tid.x; mad.wide.u32 o, i, 4, o; "
        f"{body} }}"
    )


def run_entry(body: str, registers: str = "", block: int = 64, schedule: str = "block") -> np.ndarray:
    out = np.zeros(block, np.uint32)
    Launch(entry(body, registers), schedule)("test", out, block=block)
    return out


def test_branch_tables(schedule):
    body = """
      and.b32 j, i, 3;
      list: .branchtargets first, second, second, third;
      brx.idx j, list;
      first: mov.u32 a0, 10; bra.uni done;
      second: add.u32 a0, i, 20; bra.uni done;
      third: mov.u32 a0, 30;
      done: st.global.u32 [o], a0; ret;"""
    i = np.arange(64)
    assert (run_entry(body, schedule=schedule) == np.select([i % 4 == 0, i % 4 == 3], [10, 30], i + 20)).all()


def test_guards_scopes_and_partial_warps(schedule):
    body = """
      setp.lt.u32 p0, i, 40;
      mov.u32 a0, 1;
      @p0 mov.u32 a0, 2;
      { .reg .b32 a<2>; mov.u32 a1, 100; add.u32 a0, a1, i; @!p0 bra skip; mov.u32 j, a0; skip: }
      @!p0 mov.u32 j, 7;
      add.u32 a0, a0, j;
      vote.sync.ballot.b32 a1, p0, 0xFFFFFFFF;
      @p0 bar.warp.sync 0xFFFFFFFF;
      shl.b32 a1, a1, 8;
      xor.b32 a0, a0, a1;
      st.global.u32 [o], a0; exit;"""
    i = np.arange(45, dtype=np.uint32)
    low = np.where(i < 40, i + 102, 8).astype(np.uint32)
    ballot = np.where(i < 32, 0xFFFFFFFF, 0xFF).astype(np.uint32)
    # lanes 40 to 44 never come to bar.warp.sync, which the others wait at until these have exited
    assert (run_entry(body, block=45, schedule=schedule) == low ^ ballot << np.uint32(8)).all()


def test_fragments_of_both_shapes_of_mma():
    """m16n8k8 and movmatrix; nothing of ldmatrix is used, only the positions that the manual gives."""
    rng = np.random.default_rng(9)
    for k in (8, 16):
        a, b = rng.integers(-4, 5, (16, k)).astype(np.float16), rng.integers(-4, 5, (k, 8)).astype(np.float16)
        left, right, out = (
            np.zeros((32, k // 2), np.float16),
            np.zeros((32, k // 4), np.float16),
            np.zeros((32, 4), np.float32),
        )
        for lane in range(32):
            group, thread = lane // 4, lane % 4
            # a0 a1: this row; a2 a3: 8 rows below; a4 to a7: 8 columns on
            left[lane] = [
                a[group + 8 * (i // 2 % 2), thread * 2 + i % 2 + 8 * (i // 4)] for i in range(k // 2)
            ]
            right[lane] = [b[thread * 2 + i % 2 + 8 * (i // 2), group] for i in range(k // 4)]
        v = k // 4
        a_registers = ", ".join(f"a{i}" for i in range(v))
        b_registers = "{b0, b1}" if k == 16 else "{b0}"
        load_b = "ld.global.v2.b32 {b0, b1}, [o];" if k == 16 else "ld.global.b32 b0, [o];"
        module = ptx.Module(f"""{ptx.snippets.HEADER}
          .visible .entry test(.param .u64 a, .param .u64 b, .param .u64 d) {{
          .reg .b32 i, a<4>, b<2>; .reg .f32 d<4>; .reg .b64 o;
          mov.u32 i, %tid.x; ld.param.u64 o, [a]; mad.wide.u32 o, i, {k}, o;
          ld.global.v{v}.b32 {{{a_registers}}}, [o];
          ld.param.u64 o, [b]; mad.wide.u32 o, i, {k // 2}, o; {load_b}
          mov.f32 d0, 0f3F800000; mov.f32 d1, d0; mov.f32 d2, d0; mov.f32 d3, d0;
          mma.sync.aligned.m16n8k{k}.row.col.f32.f16.f16.f32
            {{d0, d1, d2, d3}}, {{{a_registers}}}, {b_registers}, {{d0, d1, d2, d3}};
          ld.param.u64 o, [d]; mad.wide.u32 o, i, 16, o; st.global.v4.f32 [o], {{d0, d1, d2, d3}}; ret; }}""")
        Launch(module)("test", constant(left), constant(right), out, block=32)
        want = a.astype(np.float32) @ b.astype(np.float32) + 1
        for lane in range(32):
            rows, columns = (
                [lane // 4, lane // 4, lane // 4 + 8, lane // 4 + 8],
                [lane % 4 * 2, lane % 4 * 2 + 1] * 2,
            )
            assert (out[lane] == want[rows, columns]).all()


def test_ldmatrix_and_movmatrix():
    body = """
      mov.u32 j, store; shl.b32 a0, i, 4; add.u32 j, j, a0;
      shl.b32 a0, i, 16; add.u32 a1, a0, 0x10000;  // halves 2 i and 2 i + 1 in words
      mad.lo.u32 a2, i, 8, 0;
      INIT
      bar.warp.sync -1;
      LOAD
      st.global.u32 [o], a0; ret;"""
    writes = []
    for word in range(4):
        writes.append(
            f"add.u32 a3, a2, {2 * word}; add.u32 a1, a3, 1; shl.b32 a1, a1, 16; or.b32 a1, a1, a3;"
            f"st.shared.u32 [j+{4 * word}], a1;"
        )
    lane = np.arange(32, dtype=np.uint32)
    row, column = lane // 4, lane % 4 * 2
    plain = row * 8 + column | (row * 8 + column + 1) << 16
    transposed = column * 8 + row | ((column + 1) * 8 + row) << 16
    loads = {
        "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {a0}, [j];": plain,
        "ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {a0}, [j];": transposed,
        "ldmatrix.sync.aligned.m8n8.x2.shared.b16 {a1, a0}, [j];": plain + 0x00400040,
        "ldmatrix.sync.aligned.m8n8.x4.shared::cta.b16 {a1, a2, a3, a0}, [j];": plain + 3 * 0x00400040,
    }
    single = "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {a0}, [j];"
    loads[f"{single} movmatrix.sync.aligned.m8n8.trans.b16 a0, a0;"] = transposed
    for load, want in loads.items():
        text = body.replace("INIT", "\n".join(writes)).replace("LOAD", load)
        assert (run_entry(text, ".shared .align 16 .b8 store[512];", block=32) == want).all(), load


UNKNOWN = [
    "bogus.u32 a0, i;",
    "add.bogus.u32 a0, i, i;",
    "add.u32.ftz a0, i, i;",
    "add.u32 a0, i;",
    "add.u32 a0, i, missing;",
    "add.u64 a0, i, i;",
    "ld.global.v3.u32 a0, [o];",
    "ld.global.v2.u32 {a0, a1, a2}, [o];",
    "ld.bogus.u32 a0, [o];",
    "cp.async.cg.shared.global [i], [o], 8;",
    "cp.async.bulk.wait_group 0;",
    "setp.lo.s32 p0, i, i;",
    "cvt.f32.f64 a0, o;",
    "cvt.rn.f32.f32 a0, i;",
    "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {a0}, {a0}, {a0}, {a0};",
    "mma.sync.aligned.m16n8k8.row.col.f32.f16.bf16.f32 {a0, a1, a2, a3}, {a0, a1}, {a0}, {a0, a1, a2, a3};",
    "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {a0, a1}, [i];",
    "shfl.bfly.b32 a0, i, 1, 31;",
    "mov.u32 a0, %clock;",
    "bra nowhere;",
    "atom.global.mul.u32 a0, [o], i;",
    "tex.2d.v4.f32.s32 {a0, a1, a2, a3}, [o, {i}];",
    "call unknown;",
    "prmt.b32.f4e a0, i, i, i;",
]


@pytest.mark.parametrize("text", UNKNOWN)
def test_what_is_not_known_raises_with_its_line(text):
    with pytest.raises(ptx.PtxError, match=rf"line 4: {re.escape(text.rstrip(';'))}"):
        run_entry(f"{text} ret;")


DEFECTS = {
    "and.b32 j, i, 1; setp.eq.u32 p0, j, 0; @p0 bar.sync 1, 64; ret;": None,
    "setp.lt.u32 p0, i, 32; @p0 bar.sync 1, 64; ret;": "deadlock.*barrier 1: warps \\[0\\] of 64 threads",
    "bar.sync 16; ret;": "barrier 16 does not exist",
    "bar.sync 1, 40; ret;": "40 threads are no number of warps",
    "bar.sync i; ret;": "the lanes of a warp name different barriers",
    "bar.arrive 1, 128; bar.arrive 1, 128; ret;": "arrives twice",
    "setp.lt.u32 p0, i, 32; @p0 bar.arrive 1, 64; @!p0 bar.sync 1, 96; ret;": "where others arrived with",
    "shfl.sync.idx.b32 a0, i, 0, 31, 1; ret;": "not in its own member mask",
    "and.b32 j, i, 1; add.u32 j, j, -2; vote.sync.any.pred p0, p1, j; ret;": "own member mask",
    "setp.eq.u32 p0, i, 5; @p0 exit; mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
    "{a0, a1, a2, a3}, {a0, a1}, {a0}, {a0, a1, a2, a3}; ret;": "lanes of the warp have exited",
    "setp.eq.u32 p0, i, 5; @p0 bra away; ldmatrix.sync.aligned.m8n8.x1.shared.b16 {a0}, [store]; "
    "away: bar.sync 0; ret;": "deadlock",
    "div.u32 a0, i, i; ret;": "division by zero",
    "trap; ret;": "executed",
    "again: bra again;": "does not end",
    "ld.shared.u32 a0, [0]; ret;": "out of bounds|near",
    "st.shared.u32 [1026], i; ret;": "misaligned",
    "mov.u32 j, 7; .reg .b32 k; list: .branchtargets there; brx.idx j, list; there: ret;": "index 7",
}


@pytest.mark.parametrize("body", DEFECTS)
def test_defects(body, schedule, monkeypatch):
    monkeypatch.setattr(ptx.block, "LIMIT", 1000)
    if DEFECTS[body] is None:  # the other lanes exit, and are not waited for
        run_entry(body, schedule=schedule)
        return
    with pytest.raises(ptx.PtxError, match=f"(?s){DEFECTS[body]}"):
        run_entry(body, ".shared .align 16 .b8 store[64];", schedule=schedule)


def test_threads_that_have_exited_are_not_waited_for(schedule):
    """The first warp comes to the barrier, the second one and lane 3 do not."""
    body = """
      setp.eq.u32 p0, i, 3; @p0 exit;
      setp.lt.u32 p0, i, 32; @p0 bar.sync 0;
      st.global.u32 [o], i; ret;"""
    assert (run_entry(body, schedule=schedule) == np.where(np.arange(64) == 3, 0, np.arange(64))).all()


def test_what_is_not_written_is_poison():
    assert (run_entry("mov.u32 j, store; ld.shared.u32 a0, [j+4]; st.global.u32 [o], a0; ret;",
                      ".shared .align 16 .b8 store[64];") == 0xFFFFFFFF).all()  # fmt: skip
    assert (run_entry("add.u32 a0, a1, 0; st.global.u32 [o], a0; ret;") == 0xFFFFFFFF).all()


def test_wavefronts():
    """Words that share a bank take a wavefront each, except where lanes read the same word."""

    def conflicts(access: str, stride: int) -> tuple[int, int]:
        body = f"mov.u32 j, store; mad.lo.u32 j, i, {stride}, j; {access}; ret;"
        launch = Launch(entry(body, ".shared .align 16 .b8 store[16384]; .reg .b64 w;"))
        ((_, banks),) = launch("test", np.zeros(32, np.uint32), block=32).shared.items()
        assert banks.requests == 1
        return banks.wavefronts, banks.minimum

    word, double, quad = (
        "ld.shared.u32 a0, [j]",
        "st.shared.u64 [j], w",
        "ld.shared.v4.u32 {a0, a1, a2, a3}, [j]",
    )
    assert [conflicts(word, s) for s in (0, 4, 8, 12, 128)] == [(1, 1), (1, 1), (2, 1), (1, 1), (32, 1)]
    assert [conflicts(double, s) for s in (8, 16, 24, 256)] == [(2, 2), (4, 2), (2, 2), (32, 2)]
    assert [conflicts(quad, s) for s in (16, 32, 48, 128, 144)] == [(4, 4), (8, 4), (4, 4), (32, 4), (4, 4)]
