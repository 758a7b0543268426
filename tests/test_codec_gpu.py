# SPDX-License-Identifier: Apache-2.0
"""What is particular to csrc/codec's GPU kernels: schedules, bytes moved, status words for errors, and PTX.

What they write is in test_codecs.py and test_hadamard.py, for all backends.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import palmette
import ptx
import pytest
import torch
from palmette import FixpointCodec, testing
from palmette.reference import codecs as reference
from palmette.reference.codecs import TahOptions
from palmette.testing import RecordedLaunch
from ptx.replay import replays
from test_codecs import DTYPES, activations, encode, resealed
from torch import Tensor

EMULATORS = [name for name in testing.EMULATORS if name in testing.backends()]
needs_emulator = pytest.mark.skipif("emulated" not in EMULATORS, reason="the emulator is not built")
needs_check = pytest.mark.skipif("emulated_check" not in EMULATORS, reason="its check build is not built")

SCHEDULES = (("forward", 1), ("reverse", 1), ("random", 3))
HADAMARD_SIZES = (4, 64, 256, 512, 2048, 4096, 12, 40, 28 * 8, 12 * 32, 20 * 64, 28 * 128)


@pytest.mark.parametrize("name", EMULATORS)
@pytest.mark.parametrize("warp_size", [32, 64])
@pytest.mark.parametrize(("order", "seed"), SCHEDULES)
def test_schedules(name, order, seed, warp_size):
    x = activations(3, 41, 96)  # bitmaps whose words several samples share; codes that begin within words
    options = [
        TahOptions(tile_size=8, low_bits=2, high_bits=5, allocation="tile", gate="range"),
        TahOptions(tile_size=16, low_bits=2, high_bits=7),
        TahOptions(tile_size=32, high_bits=8, metadata="fp32", gate="always"),
    ]
    codec, m = FixpointCodec(5, (0, 1)), torch.randn(3, 41, 96).half()
    rows = [torch.randn(3, n) for n in HADAMARD_SIZES]
    want_rows = [palmette.hadamard_transform(row, 0.5) for row in rows]
    want_m = m.clone()
    want_delta = reference.delta_encode_(x.view(codec.groups(x.shape)), want_m.view(codec.groups(x.shape)), 5)
    with testing.backend(name), testing.emulator(order=order, seed=seed, warp_size=warp_size):
        for o in options:
            wire = encode(x, o)
            assert torch.equal(wire, reference.tah_encode(x, o))
            decoded = palmette.tah_decode(wire, x.shape)
            assert torch.equal(decoded, reference.tah_decode(wire))
        assert torch.equal(palmette.delta_encode_(x, m, bits=5), want_delta)
        assert torch.equal(m, want_m)
        for row, want in zip(rows, want_rows, strict=True):
            assert torch.equal(palmette.hadamard_transform(row, 0.5), want)


@pytest.mark.parametrize("offset", [1, 2, 7])
@needs_emulator
def test_memory_that_begins_anywhere(offset):
    """Kernels take multiples of 16 bytes; what begins elsewhere is copied."""

    def moved(t: Tensor) -> Tensor:
        return torch.empty(t.numel() + offset, dtype=t.dtype)[offset:].view(t.shape).copy_(t)

    x, m = moved(activations(2, 5, 64)), moved(torch.randn(2, 5, 64).bfloat16())
    codec = FixpointCodec(3, (1,))
    want_m = m.clone()
    want = [palmette.tah_encode(x), codec.encode(x), palmette.delta_encode_(x, want_m, bits=3)]
    with testing.backend("emulated"):
        tah, fixpoint, delta = (moved(torch.empty_like(wire)) for wire in want)
        palmette.tah_encode(x, out=tah)
        codec.encode(x, out=fixpoint)
        palmette.delta_encode_(x, m, bits=3, out=delta)
        assert torch.equal(m, want_m)
        for got, wanted in zip((tah, fixpoint, delta), want, strict=True):
            assert torch.equal(got, wanted)
        out = moved(torch.empty(2, 5, 64))
        assert torch.equal(palmette.tah_decode(tah, x.shape, out=out), reference.tah_decode(tah))
        palmette.hadamard_transform(x, 0.125, out=x)
    assert torch.equal(palmette.tah_decode(tah, x.shape), out)


@needs_emulator
def test_rows_that_do_not_fit_shared_memory():
    message = r"^x must be of rows that fit the 101376 bytes of shared memory, got 32768 elements$"
    with testing.backend("emulated"), testing.emulator(shared_limit=99 << 10):
        palmette.hadamard_transform(torch.randn(1, 20480))
        with pytest.raises(ValueError, match=message):
            palmette.hadamard_transform(torch.randn(1, 32768))


# ---- bytes


def read_and_written(name: str) -> tuple[int, int]:
    """In bytes; whole sectors of 32 each time."""
    traffic = testing.traffic(name)
    assert traffic.read_sectors * 32 == traffic.read
    assert traffic.write_sectors * 32 == traffic.written
    return traffic.read, traffic.written


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tile_size", [8, 16, 64, 256])
@pytest.mark.parametrize("allocation", ["token", "tile", "none"])
@needs_check
def test_tiles_are_read_twice_and_written_once(dtype, tile_size, allocation):
    """The entropy reads x, if bits differ, and so does the encoder. The checksum reads the wire."""
    x = activations(2, 16, 512, dtype=dtype)
    size_of_x = x.numel() * x.element_size()
    o = TahOptions(tile_size=tile_size, low_bits=3, high_bits=7, allocation=allocation, gate="range")
    tiles = x.numel() // tile_size
    bitmap = {"token": 32, "tile": tiles, "none": 0}[allocation] // 8
    with testing.backend("emulated_check"), testing.emulator(count_requests=True):
        wire = encode(x, o)
        assert read_and_written("x") == (size_of_x * (1 if allocation == "none" else 2), 0)
        traffic = testing.traffic("wire")
        # the bitmap is cleared, counted, and read again with the tiles; words that samples share are or-ed
        few = 256
        assert wire.numel() <= traffic.written + traffic.atomic <= wire.numel() + bitmap + few
        assert wire.numel() - 16 <= traffic.read <= wire.numel() + 2 * bitmap + tiles // 32 * 4 + few
        assert testing.shared_traffic().conflicts == {}

        palmette.tah_decode(wire, x.shape, dtype=dtype)
        assert read_and_written("out") == (0, size_of_x)
        traffic = testing.traffic("wire")
        headers = 64 * (33 + -(-x.numel() // (4 * 32 * 64)) * 4)
        # codes of small tiles begin within words, which two groups read then
        shared = 8 * (x.numel() // 256) if tile_size < 32 else 0
        twice = 2 * wire.numel() - 16
        assert traffic.written == 12
        assert twice - 64 <= traffic.read <= twice + 2 * bitmap + tiles // 32 * 4 + headers + shared
        assert testing.shared_traffic().conflicts == {}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "dims"), [((2, 16, 512), (0, 1)), ((16, 512), (1,)), ((8192,), (0,))])
@needs_check
def test_fixed_point_reads_twice_and_writes_once(dtype, shape, dims):
    x, m = activations(*shape, dtype=dtype), torch.zeros(shape, dtype=dtype)
    size_of_x, codec = x.numel() * x.element_size(), FixpointCodec(5, dims)
    with testing.backend("emulated_check"), testing.emulator(count_requests=True):
        wire = codec.encode(x)
        assert read_and_written("x") == (2 * size_of_x, 0)
        assert wire.numel() <= testing.traffic("wire").written <= wire.numel() + 64
        assert wire.numel() - 16 <= testing.traffic("wire").read <= wire.numel() + 64
        assert testing.shared_traffic().conflicts == {}
        codec.decode(wire, shape, dtype=dtype)
        assert read_and_written("out") == (0, size_of_x)
        assert testing.shared_traffic().conflicts == {}
        wire = palmette.delta_encode_(x, m, bits=5, scale_dims=dims)
        assert read_and_written("x") == (2 * size_of_x, 0)
        assert read_and_written("m") == (2 * size_of_x, size_of_x)
        palmette.delta_decode_(wire, m)
        assert read_and_written("m") == (size_of_x, size_of_x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [*HADAMARD_SIZES, 32768, 40960])
@needs_check
def test_rows_are_read_once_and_written_once(dtype, size):
    """From 8 elements on in whole sectors; no two lanes meet in a bank of shared memory."""
    x = torch.randn(16384 // size + 1, size).to(dtype)
    size_of_x = x.numel() * x.element_size()
    with testing.backend("emulated_check"), testing.emulator(count_requests=True):
        palmette.hadamard_transform(x)
        traffic = testing.traffic("x"), testing.traffic("out")
        assert testing.shared_traffic().conflicts == {}
    assert (traffic[0].read, traffic[0].written) == (size_of_x, 0)
    assert (traffic[1].read, traffic[1].written) == (0, size_of_x)
    for sectors in (traffic[0].read_sectors, traffic[1].write_sectors):
        assert sectors * 32 <= size_of_x * 1.1


# ---- a status in place of an error


def header_of(run: Callable[[], object]) -> Tensor:
    """The wire that a GPU would leave, of an encoder that raises here."""
    found: list[bytes] = []

    def look(launch: RecordedLaunch) -> None:
        if launch.name == "wire_finish":
            (wire,) = (m.after for m in launch.memory if m.name == "wire")
            assert wire is not None
            found.append(wire)

    with (
        testing.backend("emulated"),
        testing.recorded_launches(look),
        pytest.raises(ValueError, match="must be"),
    ):
        run()
    (wire,) = found
    return torch.tensor(list(wire), dtype=torch.uint8)


def decode_as_a_gpu(run: Callable[[Tensor], object], good: Tensor, bad: Tensor) -> str:
    """Reads a wire that the operator took for a good one; what its status says then."""
    wire = good.clone()

    def spoil(kernel: str) -> None:
        if kernel == "wire_check":
            ctypes.memmove(wire.data_ptr(), bad.data_ptr(), bad.numel())

    with testing.backend("emulated"), testing.recorded_launches(before=spoil):
        run(wire)
    assert torch.equal(wire[:52], bad[:52])
    assert torch.equal(wire[64:], bad[64:])
    return palmette.wire_status(wire)


@needs_emulator
def test_tiles_that_cannot_be_encoded():
    good = activations(2, 70, 128)
    for places, value, options, status in (
        ([(1, 60, 5), (0, 9, 64), (1, 0, 0)], math.nan, {}, "x must be finite, got inf or nan in tile 19"),
        ([(0, 69, 127)], -math.inf, {}, "x must be finite, got inf or nan in tile 139"),
        ([(1, 3, 3), (0, 33, 3)], -7e4, {"gate": "never"}, "metadata must be .* in tile 66"),
    ):
        x = good.clone()
        for place in places:
            x[place] = value
        wire = header_of(functools.partial(palmette.tah_encode, x, **options))
        assert not wire[:4].any()  # nobody takes it for a wire
        assert re.fullmatch(status, palmette.wire_status(wire))
        with pytest.raises(ValueError, match="wire must be bytes that begin with PLMT"):
            palmette.tah_decode(wire, x.shape)
        out = torch.zeros(x.shape)
        sent = palmette.tah_encode(good, **options)
        read = functools.partial(palmette.tah_decode, shape=x.shape, out=out)
        assert decode_as_a_gpu(read, sent, wire) == palmette.wire_status(wire)
        assert out.isnan().all()


@needs_emulator
def test_sums_of_a_tile_that_overflow():
    """Minima and maxima leave out NaN: in this tile's transform it is all that is not 0."""
    x = torch.tensor([1e38] * 8 + [-1e38] * 8 + [1e38] * 16).repeat(1, 3, 1)
    o = TahOptions(tile_size=32, metadata="fp32", gate="range")
    with testing.backend("emulated"):
        assert torch.equal(encode(x, o), reference.tah_encode(x, o))
        message = r"metadata must be of tiles whose range is below 3\.4e38, got fp32 for the tile of token 0"
        with pytest.raises(ValueError, match=message):
            encode(x, replace(o, gate="always"))


@needs_emulator
def test_slices_that_cannot_be_encoded():
    for place, value, status in (
        ((0, 3, 5), math.inf, "x must be finite, got inf or nan in slice 5"),
        ((1, 2, 6), 7e4, "metadata must be .* in slice 6"),
    ):
        x, m = torch.randn(2, 7, 48), torch.randn(2, 7, 48)
        x[place] = value
        x[1, 6, 9] = math.nan
        before = m.clone()
        wire = header_of(functools.partial(palmette.delta_encode_, x, m, bits=4))
        assert re.fullmatch(status, palmette.wire_status(wire))
        assert torch.equal(m, before)


CASES = [
    (0, "I", 1, "wire must be bytes that begin with PLMT"),
    (4, "B", 2, "wire must be of version 1"),
    (5, "B", 2, "wire must be of the decoder's kind"),
    (6, "B", 9, "wire must be of known options"),
    (7, "B", 1, "wire must be of known options"),
    (8, "B", 9, "wire must be of known options"),
    (9, "B", 3, "wire must be of known options"),
    (10, "B", 4, "wire must be of known options"),
    (11, "B", 2, "wire must be of known options"),
    (12, "I", 1, "wire must be of as many rows of low_bits"),
    (12, "I", 15, "wire must be of the size"),
    (12, "I", 100, "wire must be of as many rows of low_bits"),
    (16, "Q", 2, "shape must be of the wire's shape"),
    (24, "Q", 2**63, "shape must be of the wire's shape"),
    (32, "Q", 2**40, "shape must be of the wire's shape"),
    (40, "Q", 100, "wire must be of the size"),
    (64, "H", 0, "wire must be of as many rows of low_bits"),
    (64, "H", 0xFFFF, "wire must be of as many rows of low_bits"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("at", "form", "value", "status"), CASES)
@needs_emulator
def test_wires_that_lie(at, form, value, status, dtype):
    x = activations(1, 15, 16)
    wire = palmette.tah_encode(x, tile_size=8)
    out = torch.zeros(x.shape, dtype=dtype)
    read = functools.partial(palmette.tah_decode, shape=x.shape, dtype=dtype, out=out)
    assert decode_as_a_gpu(read, wire, resealed(wire, at, form, value)).startswith(status)
    assert out.isnan().all()
    assert decode_as_a_gpu(read, wire, wire) == ""
    assert torch.equal(out, reference.tah_decode(wire, dtype))


@needs_emulator
def test_slices_of_another_shape():
    """Of as many elements and bytes: the slices' sizes are not those of leading dimensions."""
    sent = FixpointCodec(4, (0,)).encode(torch.randn(6, 4))
    out = torch.zeros(6, 4)
    read = functools.partial(palmette.fixpoint_decode, shape=out.shape, out=out)
    for shape, scale_dims, status in (
        ((8, 3), (0,), "shape must be of the wire's shape"),
        ((4, 6), (0,), "shape must be of the wire's shape"),
        ((2, 3, 4), (0, 1), ""),
        ((6, 1, 4), (0,), ""),
    ):
        wire = FixpointCodec(4, scale_dims).encode(torch.randn(shape))
        found = decode_as_a_gpu(read, sent, wire)
        assert found.startswith(status)
        assert bool(found) == bool(status) == bool(out.isnan().all())


@needs_emulator
def test_flipped_bits():
    """Of every byte that the checksum is of: results are NaN, and a delta's m is as it was."""
    x = activations(1, 5, 16)
    m = torch.randn(1, 5, 16)
    codec = FixpointCodec(3)
    wires = [
        palmette.tah_encode(x, tile_size=8),
        codec.encode(x),
        palmette.delta_encode_(x, m.clone(), bits=3),
    ]
    out = torch.zeros(x.shape)
    for i, (kind, wire) in itertools.product(range(200), enumerate(wires)):
        if i >= wire.numel() or 52 <= i < 64:
            continue
        bad = wire.clone()
        bad[i] ^= 1 << (i % 8)
        if kind == 2:
            before = m.clone()
            assert decode_as_a_gpu(lambda w: palmette.delta_decode_(w, m), wire, bad) != ""
            assert torch.equal(m, before)
            continue
        decode = palmette.tah_decode if kind == 0 else palmette.fixpoint_decode
        out.zero_()
        status = decode_as_a_gpu(lambda w, decode=decode: decode(w, x.shape, out=out), wire, bad)
        assert "must be" in status
        assert out.isnan().all()


@needs_emulator
def test_an_old_status_does_not_count():
    wire = palmette.tah_encode(activations(1, 5, 16), tile_size=8)
    old = wire.clone()
    old[52], old[56] = 1, 7
    out = torch.zeros(1, 5, 16)
    assert decode_as_a_gpu(lambda w: palmette.tah_decode(w, out.shape, out=out), wire, old) == ""
    assert torch.equal(out, reference.tah_decode(wire))


# ---- what nvcc makes of them

needs_nvcc = pytest.mark.skipif(
    ptx.find_nvcc() is None, reason="nvcc is not on the PATH, nor below CUDA_HOME"
)
CSRC = Path(__file__).parent.parent / "csrc"
SOURCES = {"wire": "codec/kernel_wire_gpu.cu", "tah": "codec/kernel_tah_gpu.cu"}
SOURCES |= {name: f"codec/kernel_{name}_gpu.cu" for name in ("fixpoint", "hadamard")}


@functools.cache
def text_of(source: str) -> str:
    return ptx.compile_ptx(CSRC / source, include=[CSRC])


@functools.cache
def machine_of(source: str) -> ptx.Machine:
    return ptx.Machine(ptx.Module(text_of(source)))


@needs_nvcc
@pytest.mark.parametrize("source", SOURCES.values())
def test_nothing_is_fused_or_approximate(source):
    for word in ("fma.", "mad.rn", ".ftz", ".approx", "div.full"):
        assert word not in text_of(source)


@needs_nvcc
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@needs_emulator
def test_ptx_writes_the_same_bytes(dtype):
    """By an interpreter that knows nothing of the emulator."""
    element, same = {
        torch.float32: ("f", "f"),
        torch.bfloat16: ("NS0_4bf16E", "S3_"),
        torch.float16: ("NS0_4fp16E", "S3_"),
    }[dtype]
    message, hadamard = "", ""

    def choose(launch: RecordedLaunch) -> tuple[ptx.Machine, str]:
        names = {
            "wire_finish": "wire_sum_kernelILb0E",
            "wire_check": "wire_sum_kernelILb1E",
            "fixpoint_decode": f"fixpoint_decode_kernelI{element}Lb0E",
            "hadamard_transform": f"{hadamard}_kernelI{element}",
            **{f"fixpoint_{k}": f"fixpoint_{k}_kernelI{element}{message}" for k in ("magnitudes", "encode")},
            **{f"tah_{k}": f"tah_{k}_kernelI{element}" for k in ("entropy", "encode", "decode")},
        }
        name = names.get(launch.name, f"{launch.name}_kernel")
        return machine_of(SOURCES[launch.name.partition("_")[0]]), name

    x = activations(2, 10, 64, dtype=dtype)
    for o in (
        TahOptions(),
        TahOptions(tile_size=8, low_bits=2, high_bits=5, allocation="tile", gate="range"),
        TahOptions(tile_size=16, high_bits=7, metadata="fp32", gate="always", rounded=False),
    ):
        with replays(choose):
            wire = encode(x, o)
            decoded = palmette.tah_decode(wire, x.shape, dtype=dtype)
        assert torch.equal(wire, reference.tah_encode(x, o))
        assert torch.equal(decoded, reference.tah_decode(wire, dtype))
    for grid, dims in (("ac-sgd", (0, 1)), ("full-range", (2,))):
        codec = FixpointCodec(3, dims, grid)
        message = "NS1_9NoMessageE"
        with replays(choose):
            wire = codec.encode(x)
            decoded = codec.decode(wire, x.shape)
        message = same
        groups, m = codec.groups(x.shape), torch.randn(x.shape).to(dtype)
        want_m = m.clone()
        with replays(choose):
            delta = palmette.delta_encode_(x, m, bits=3, scale_dims=dims, grid=grid)
        assert torch.equal(wire, reference.fixpoint_encode(x.view(groups), 3, grid))
        assert torch.equal(delta, reference.delta_encode_(x.view(groups), want_m.view(groups), 3, grid))
        assert torch.equal(m, want_m)
    for size, kind in ((64, "_rows"), (24, "_small"), (1024, "")):
        hadamard, base = "hadamard" + kind, torch.randn(2, size).to(dtype)
        if size == 1024:
            element += "Li1E"
        with replays(choose):
            got = palmette.hadamard_transform(base, 0.3)
        assert torch.equal(got, palmette.hadamard_transform(base, 0.3))
