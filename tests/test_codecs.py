# SPDX-License-Identifier: Apache-2.0
"""The codecs: every byte of their wires, every number read from them, edge cases, errors, corrupt wires."""

from __future__ import annotations

import itertools
import math
import struct
from dataclasses import asdict, replace

import hypothesis
import hypothesis.strategies as st
import palmette
import pytest
import torch
from palmette import CastCodec, FixpointCodec, TahCodec, testing
from palmette.reference import codecs as reference
from palmette.reference.codecs import TahOptions

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    ((2, 5, 64), 8),
    ((4, 17, 72), 8),
    ((2, 3, 48), 16),
    ((2, 9, 96), 32),
    ((1, 10, 192), 64),
    ((1, 1, 128), 128),
    ((3, 7, 256), 256),
]
ALLOCATIONS, GATES = ("token", "tile", "none"), ("ratio", "range", "never", "always")
INF, NAN = math.inf, math.nan


def activations(*shape: int, dtype=torch.float32, outliers: float = 0.02) -> torch.Tensor:
    """Normal numbers, a few of them 30 times as large."""
    x = torch.randn(shape)
    return (x * torch.where(torch.rand(shape) < outliers, 30.0, 1.0)).to(dtype)


def encode(x: torch.Tensor, options: TahOptions) -> torch.Tensor:
    return palmette.tah_encode(x, **asdict(options))


def check(x: torch.Tensor, options: TahOptions) -> torch.Tensor:
    """Encodes and decodes, byte for byte as the reference does; what was decoded."""
    wire = encode(x, options)
    assert wire.shape == (palmette.tah_wire_size(x.shape, **asdict(options)),)
    assert torch.equal(wire, reference.tah_encode(x, options))
    decoded = palmette.tah_decode(wire, x.shape, dtype=x.dtype)
    assert torch.equal(decoded, reference.tah_decode(wire, x.dtype))
    return decoded


# ---- every byte


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize(("shape", "tile_size"), SHAPES, ids=str)
def test_tah(backend, shape, tile_size, allocation, gate):
    options = TahOptions(tile_size=tile_size, allocation=allocation, gate=gate)
    for dtype, bits, metadata in (
        (torch.float32, (3, 4), "fp16"),
        (torch.bfloat16, (2, 8), "fp32"),
        (torch.float16, (5, 7), "fp16"),
        (torch.float32, (6, 6), "fp32"),
    ):
        x = activations(*shape, dtype=dtype)
        check(x, replace(options, low_bits=bits[0], high_bits=bits[1], metadata=metadata))


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_number_of_bits(backend, bits):
    x = activations(2, 5, 128)
    for low in range(2, bits + 1):
        check(x, TahOptions(low_bits=low, high_bits=bits, high_ratio=0.5))


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 0.8, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("length", [1, 5, 10, 41])
def test_how_many_tokens_get_fewer_bits(backend, length, ratio):
    x = activations(2, length, 64)
    options = TahOptions(high_ratio=ratio)
    count = TahCodec(high_ratio=ratio).low_count(x.shape)
    assert count == math.floor(length * (1 - ratio) + 1e-9)
    assert {(5, 0.8): 1, (10, 0.8): 2, (5, 1.0): 0, (5, 0.0): 5}.get((length, ratio), count) == count
    check(x, options)


def test_long_samples(backend):
    """1,024 tokens: 204 of them get 3 bits."""
    x = activations(1, 1024, 64, dtype=torch.bfloat16)
    assert TahCodec().low_count(x.shape) == 204
    check(x, TahOptions())


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("tile_size", [8, 64, 256])
def test_tiles_that_are_special(backend, tile_size, gate):
    tile = torch.zeros(14, tile_size)
    tile[1] = 3.5  # constant
    tile[2] = -0.0
    tile[3, 0] = 7  # the pivot is in its place
    tile[4, -1] = -7
    tile[5, [1, 4]] = torch.tensor([2.0, -2.0])  # a tie: the first is the pivot
    tile[6, [2, 3]] = torch.tensor([1.0, -2.0])  # exactly twice
    tile[7, [2, 3]] = torch.tensor([1.0, 1.9999999])
    tile[8] = 1e-42 * torch.arange(tile_size)  # denormal numbers
    tile[9] = torch.linspace(-65504, 65504, tile_size)
    tile[10, 3] = 65504
    tile[11] = 1e-30
    tile[12] = torch.where(torch.arange(tile_size) % 2 == 0, 0.0, -0.0)
    tile[13] = torch.linspace(1.0, 1.0 + 1e-6, tile_size)
    for metadata, rounded in itertools.product(("fp16", "fp32"), (True, False)):
        options = TahOptions(
            tile_size=tile_size, gate=gate, metadata=metadata, rounded=rounded, allocation="none"
        )
        x = tile.clone()
        if metadata == "fp16" and gate in ("always", "range"):  # sums beyond 65,504
            x[[9, 10]] = 1.0
        decoded = check(x[None], options)
        assert torch.equal(decoded[0, 0], torch.zeros(tile_size))
        assert decoded[0, 1].allclose(tile[1], atol=1e-2)


def test_ties_of_entropy_go_to_the_first(backend):
    x = activations(1, 1, 64).expand(2, 10, 64)
    wire = check(x, TahOptions(high_ratio=0.5))
    assert torch.equal(wire[:, :5], wire[:, :1].expand(2, 5, 64))
    bitmap = palmette.tah_encode(x, high_ratio=0.5)[64:67]
    assert bitmap.tolist() == [0b00011111, 0b01111100, 0]


@pytest.mark.parametrize("allocation", ["token", "tile"])
def test_zeros_have_no_entropy(backend, allocation):
    """They are the first to get fewer bits."""
    x = activations(1, 10, 64)
    x[0, [3, 8]] = 0
    options = TahOptions(high_ratio=0.8, allocation=allocation)
    check(x, options)
    bitmap = encode(x, options)[64:66]
    assert bitmap.tolist() == [0b00001000, 0b01]


def test_tokens_whose_sums_overflow_keep_their_bits(backend):
    x = activations(1, 5, 64)
    x[0, 2] = 3e37
    x[0, 3] = 3.4e37 * torch.randn(64).sign()
    check(x, TahOptions(metadata="fp32", high_ratio=0.4, gate="never"))


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_all_tiles_fire_or_none(backend, share):
    x = torch.rand(1, 8, 128) + 0.9
    if share:
        x[..., ::64] = 50
    wire = encode(x, TahOptions())
    fired = wire[64 + 16 : 64 + 18]
    assert fired.tolist() == [255 * int(share)] * 2
    check(x, TahOptions())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_and_dimensions(backend, dtype):
    x = activations(64, 6, 3, dtype=dtype).permute(2, 1, 0)
    assert torch.equal(palmette.tah_encode(x), palmette.tah_encode(x.contiguous()))
    x = activations(2, 3, 5, 64, dtype=dtype)
    wire = palmette.tah_encode(x)
    assert torch.equal(wire, palmette.tah_encode(x.view(6, 5, 64)))
    assert palmette.tah_decode(wire, x.shape, dtype=dtype).shape == x.shape
    x = activations(5, 64, dtype=dtype)
    assert torch.equal(palmette.tah_encode(x), palmette.tah_encode(x[None]))


@pytest.mark.parametrize("shape", [(0, 4, 64), (2, 0, 64), (2, 4, 0), (2, 500, 0), (0, 64)])
def test_nothing(backend, shape):
    for codec in (TahCodec(), FixpointCodec(4), CastCodec()):
        wire = codec.encode(torch.empty(shape))
        assert wire.shape == (codec.wire_size(shape),)
        assert codec.decode(wire, shape).shape == shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads(backend, num_threads, dtype):
    x = activations(3, 90, 320, dtype=dtype)
    m = torch.zeros(3, 90, 320)
    codecs = (TahCodec(), TahCodec(allocation="tile", gate="range", tile_size=32), FixpointCodec(3))
    results = []
    for count in (1, 2, 5):
        num_threads(count)
        wires = [codec.encode(x) for codec in codecs]
        decoded = [codec.decode(wire, x.shape) for codec, wire in zip(codecs, wires, strict=True)]
        message = m.clone()
        wires.append(palmette.delta_encode_(x, message, bits=4))
        results.append([*wires, *decoded, message])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_all_backends_write_the_same_bytes():
    """And read each other's wires; a larger case than the reference takes."""
    x = activations(2, 130, 576, dtype=torch.bfloat16)
    names = [name for name in testing.backends() if name not in ("emulated_check", "cuda")]
    found = []
    for name in names:
        with testing.backend(name):
            wires = [TahCodec(gate=gate).encode(x) for gate in GATES] + [FixpointCodec(5).encode(x)]
            m = x.float() * 0.5
            wires.append(palmette.delta_encode_(x, m, bits=3))
            found.append([*wires, m, palmette.tah_decode(wires[0], x.shape)])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@hypothesis.given(
    st.integers(0, 2), st.integers(1, 12), st.integers(1, 4), st.integers(3, 6), st.integers(2, 8), st.data()
)
def test_any_options(backend, batch, length, tiles, log2, bits, data):
    options = TahOptions(
        tile_size=2**log2,
        low_bits=data.draw(st.integers(2, bits)),
        high_bits=bits,
        high_ratio=data.draw(st.floats(0, 1)),
        threshold=data.draw(st.sampled_from([1.0, 1.5, 2.0, 8.0])),
        allocation=data.draw(st.sampled_from(ALLOCATIONS)),
        gate=data.draw(st.sampled_from(GATES)),
        metadata=data.draw(st.sampled_from(["fp16", "fp32"])),
        rounded=data.draw(st.booleans()),
    )
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    x = activations(batch, length, tiles * 2**log2, outliers=data.draw(st.sampled_from([0.0, 0.02, 0.5])))
    if batch > 0:
        check(x, options)


# ---- how good it is


def relative_error(x: torch.Tensor, **options) -> float:
    decoded = palmette.tah_decode(palmette.tah_encode(x, **options), x.shape)
    return float((decoded - x).norm() / x.norm())


@pytest.mark.parametrize("tile_size", [8, 64, 256])
def test_the_error_is_half_a_step(backend, tile_size):
    x = activations(3, 10, 256)
    for bits, gate in itertools.product((2, 4, 8), ("never", "ratio")):
        options = {
            "tile_size": tile_size,
            "allocation": "none",
            "high_bits": bits,
            "low_bits": 2,
            "gate": gate,
        }
        decoded = palmette.tah_decode(palmette.tah_encode(x, **options), x.shape)
        tiles, error = x.view(-1, tile_size), (decoded - x).view(-1, tile_size)
        step = (tiles.amax(1) - tiles.amin(1)) / (2**bits - 1)
        if gate == "never":  # rounding of the zero point and of the step, besides
            assert (error.abs().amax(1) <= 0.51 * step + tiles.abs().amax(1) * 2.0**-10).all()
        assert (error.norm(dim=1) <= 0.51 * step * tile_size**0.5 + tiles.norm(dim=1) * 2.0**-8).all()


def test_errors_by_the_number_of_outliers(backend):
    """Relative errors of 4-bit tiles of 64, as found for the public algorithm and for the range gate."""
    torch.manual_seed(1)
    found = {}
    for outliers in (0, 1, 2, 4):
        x = torch.randn(1, 600, 64)
        place = torch.rand(600, 64).argsort(1)[:, :outliers]
        x[0].scatter_(
            1, place, 60 * torch.randn(600, outliers).sign() * (1 + 0.1 * torch.rand(600, outliers))
        )
        found[outliers] = [
            relative_error(x, allocation="none", gate=gate) for gate in ("never", "ratio", "range", "always")
        ]
    never, ratio, by_range, always = zip(*found.values(), strict=True)
    assert 0.08 < never[0] < 0.1
    assert ratio[0] <= never[0] * 1.01
    assert ratio[1] == always[1] < 0.12 * never[1]
    assert ratio[2] > 0.9 * never[2]  # two outliers: the ratio gate does not fire
    assert by_range[2] < 0.3 * never[2]
    assert all(r <= n * 1.001 for r, n in zip(by_range, never, strict=True))


def test_codes_of_rounded_metadata_are_better(backend):
    """Where a tile is far from zero, fp16 moves its zero point by a good part of a step."""
    x = activations(1, 200, 64) + 100
    options = {"allocation": "none", "gate": "never", "high_bits": 8}
    errors = [relative_error(x, rounded=rounded, **options) for rounded in (True, False)]
    assert errors[0] < 0.95 * errors[1]


@pytest.mark.parametrize("size", [1e-5, 1e-6, 1e-7, 1e-8, 1e-12])
def test_small_numbers(backend, size):
    """fp16 has multiples of 6e-8 only: what comes back is off by about that at most."""
    x = size * torch.randn(1, 64, 64)
    for bits in (4, 8):
        decoded = check(x, TahOptions(allocation="none", gate="never", high_bits=bits))
        step = max(float((x.amax() - x.amin()) / (2**bits - 1)), 2.0**-24)
        assert (decoded - x).abs().max() <= 0.5 * step + 2.0**-25 + 2.0**-24
        fixed = palmette.fixpoint_decode(palmette.fixpoint_encode(x, bits=bits, grid="full-range"), x.shape)
        half = 2 ** (bits - 1) - 1
        bound = ((x.abs().amax((0, 1)) * 2**24).ceil() * 2.0**-24 / half).clamp(min=2.0**-24 / half) * 0.501
        assert ((fixed - x).abs().amax((0, 1)) <= bound).all()


# ---- fixed point and deltas

GROUPS = [
    ((2, 5, 64), (0, 1)),
    ((3, 4, 7), (1,)),
    ((6, 33), (1,)),
    ((5, 300), (0,)),
    ((4, 5, 3), (0, 1, 2)),
    ((2, 3, 4, 5), (1, 2)),
    ((2, 3, 4, 5), (-2, -1)),
    ((1,), (0,)),
    ((3, 70, 41), (0, 1)),
]


@pytest.mark.parametrize("grid", ["ac-sgd", "full-range"])
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize(("shape", "dims"), GROUPS, ids=str)
def test_fixpoint(backend, shape, dims, bits, grid):
    for dtype in DTYPES:
        x = activations(*shape, dtype=dtype)
        codec = FixpointCodec(bits, dims, grid)
        groups = codec.groups(shape)
        wire = palmette.fixpoint_encode(x, bits=bits, scale_dims=dims, grid=grid)
        assert wire.shape == (palmette.fixpoint_wire_size(shape, bits=bits, scale_dims=dims),)
        assert torch.equal(wire, reference.fixpoint_encode(x.view(groups), bits, grid))
        want = reference.fixpoint_levels(x.float().view(groups), bits, grid)[2].view(shape).to(dtype)
        assert torch.equal(palmette.fixpoint_decode(wire, shape, dtype=dtype), want)


@pytest.mark.parametrize("bits", range(2, 9))
def test_where_the_ends_of_the_grids_are(backend, bits):
    x = torch.tensor([[1.0, 0.0, -1.0]])
    half = 2 ** (bits - 1)
    decode = lambda grid: palmette.fixpoint_decode(  # noqa: E731
        palmette.fixpoint_encode(x, bits=bits, scale_dims=(0, 1), grid=grid), x.shape
    )
    assert decode("ac-sgd").tolist() == [[1 - 1 / half, 0, -1]]
    torch.testing.assert_close(decode("full-range"), x, atol=1e-7, rtol=0)


def test_channels_of_zeros_and_tiny_ones(backend):
    x = torch.randn(2, 3, 8)
    x[..., 1] = 0
    x[..., 2] *= 1e-9  # below what fp16 holds: the scale is its smallest number
    x[..., 3] *= 1e-42
    x[..., 4] = 65504 * x[..., 4].sign()
    for grid in ("ac-sgd", "full-range"):
        wire = palmette.fixpoint_encode(x, bits=8, grid=grid)
        assert torch.equal(wire, reference.fixpoint_encode(x.view(1, 6, 8), 8, grid))
        decoded = palmette.fixpoint_decode(wire, x.shape)
        assert torch.equal(decoded[..., 1], torch.zeros(2, 3))
        assert ((decoded - x).abs().amax((0, 1))[2:4] <= 2.0**-24 / 127).all()
        assert (decoded - x).abs().amax((0, 1))[4] <= 65504 / 127


def test_a_message_stays_within_its_dtype(backend):
    """Rounding may lead a float16 beyond 65,504; both ends stop there."""
    x = torch.tensor([[-65504.0, 0], [25200, 0]])
    sender = torch.tensor([[-60000.0, 0], [0, 0]]).half()
    receiver = sender.clone()
    wire = palmette.delta_encode_(x, sender, bits=4, scale_dims=(0,))
    palmette.delta_decode_(wire, receiver)
    assert sender[0, 0] == -65504
    assert torch.equal(sender, receiver)


@pytest.mark.parametrize("grid", ["ac-sgd", "full-range"])
@pytest.mark.parametrize("message_dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "dims"), GROUPS, ids=str)
def test_deltas(backend, shape, dims, message_dtype, grid):
    sender = activations(*shape, dtype=message_dtype)
    receiver, want = sender.clone(), sender.clone()
    groups = FixpointCodec(4, dims, grid).groups(shape)
    for dtype in DTYPES:
        x = activations(*shape, dtype=dtype)
        wire = palmette.delta_encode_(x, sender, bits=4, scale_dims=dims, grid=grid)
        assert torch.equal(wire, reference.delta_encode_(x.view(groups), want.view(groups), 4, grid))
        version = receiver._version
        assert palmette.delta_decode_(wire, receiver) is receiver
        assert receiver._version > version
        assert torch.equal(sender, want)
        assert torch.equal(receiver, want)


@pytest.mark.parametrize(("bits", "rate"), [(2, 0.5), (3, 0.25), (4, 0.125)])
def test_constant_activations_are_approached_geometrically(backend, bits, rate):
    """|x - m_t| <= 2^(-(bits-1) t) |x|, but for the rounding of scales."""
    x = torch.randn(4, 8, 16)
    m = torch.zeros_like(x)
    bound = x.abs().amax((0, 1))
    for _ in range(4):
        palmette.delta_encode_(x, m, bits=bits)
        bound = bound * (rate + 2.0**-11)
        assert ((x - m).abs().amax((0, 1)) <= bound * 1.0001).all()


def test_a_thousand_updates_on_different_backends():
    names = [name for name in testing.backends() if name not in ("emulated_check", "cuda")]
    x = torch.randn(2, 6, 24)
    sender = x.half()
    receivers = [sender.clone() for _ in names]
    for step in range(1000):
        x = x + 0.05 * torch.randn(2, 6, 24)
        with testing.backend(names[step % len(names)]):
            wire = palmette.delta_encode_(x, sender, bits=3)
        for i, name in enumerate(names):
            if name != "emulated" or step % 20 == 0:  # the emulator is slow: the scalar body stands in for it
                with testing.backend(name):
                    palmette.delta_decode_(wire, receivers[i])
            else:
                with testing.backend("scalar"):
                    palmette.delta_decode_(wire, receivers[i])
    assert all(torch.equal(receiver, sender) for receiver in receivers)
    assert (sender - x).abs().max() < 0.5


# ---- wires that are not what they should be


def small_wires() -> list[tuple[str, torch.Tensor, tuple[int, ...]]]:
    x = activations(1, 3, 16)
    m = torch.zeros(1, 3, 16)
    return [
        ("tah", palmette.tah_encode(x, tile_size=8), (1, 3, 16)),
        ("tah", palmette.tah_encode(x, tile_size=16, allocation="none", gate="never"), (1, 3, 16)),
        ("fixpoint", palmette.fixpoint_encode(x, bits=3), (1, 3, 16)),
        ("delta", palmette.delta_encode_(x, m, bits=4), (1, 3, 16)),
    ]


def read(kind: str, wire: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
    if kind == "delta":
        return palmette.delta_decode_(wire, into)
    decode = palmette.tah_decode if kind == "tah" else palmette.fixpoint_decode
    return decode(wire, into.shape, dtype=into.dtype, out=into)


@pytest.mark.parametrize("case", range(4))
def test_every_flipped_byte_is_noticed(raising_backend, case):
    """All but the status of a GPU, which the checksum leaves out."""
    kind, wire, shape = small_wires()[case]
    out = torch.full(shape, 7.0)
    for i in range(wire.numel()):
        if 52 <= i < 64:
            continue
        bad = wire.clone()
        bad[i] ^= 1 << (i % 8)
        with pytest.raises(ValueError, match="wire must be"):
            read(kind, bad, out)
    assert torch.equal(out, torch.full(shape, 7.0))  # nothing was written


@pytest.mark.parametrize("case", range(4))
def test_cut_and_lengthened_wires(raising_backend, case):
    kind, wire, shape = small_wires()[case]
    out = torch.full(shape, 7.0)
    for size in (0, 1, 63, 64, 65, wire.numel() - 16, wire.numel() - 1):
        with pytest.raises(ValueError, match="wire must be"):
            read(kind, wire[:size].clone(), out)
    with pytest.raises(ValueError, match=f"wire must be {wire.numel()} bytes, as its header says"):
        read(kind, torch.cat([wire, wire[:16]]), out)
    assert torch.equal(out, torch.full(shape, 7.0))


def resealed(wire: torch.Tensor, at: int, form: str, value: int) -> torch.Tensor:
    """The wire with another value in its header, and the checksum that it should have then."""
    data = bytearray(wire.numpy().tobytes())
    struct.pack_into("<" + form, data, at, value)
    struct.pack_into("<I", data, 48, reference.crc32c(bytes(data[:48] + data[64:])))
    return torch.tensor(list(data), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("at", "form", "value", "message"),
    [
        (0, "I", 1, "wire must be bytes that begin with PLMT, got others"),
        (4, "B", 2, "wire must be of version 1, got version 2"),
        (5, "B", 2, "wire must be of tah_encode, got fixpoint_encode"),
        (5, "B", 9, "wire must be of tah_encode, got nobody"),
        (6, "B", 9, "wire must be of known options, got an unknown tile size"),
        (7, "B", 1, "wire must be of known options, got an unknown bits"),
        (7, "B", 5, "wire must be of known options, got an unknown bits"),
        (9, "B", 3, "wire must be of known options, got an unknown allocation"),
        (10, "B", 4, "wire must be of known options, got an unknown gate"),
        (11, "B", 2, "wire must be of known options, got an unknown metadata"),
        (12, "I", 1, "wire must be of 1 rows of low_bits, got 0|wire must be [0-9]+ bytes for its options"),
        (12, "I", 100, "wire must be of at most 3 rows of low_bits, got 100"),
        (16, "Q", 2, "shape must be of the wire's shape"),
        (24, "Q", 2**63, "shape must be of the wire's shape"),
        (32, "Q", 2**40, "shape must be of the wire's shape"),
        (40, "Q", 100, "wire must be 100 bytes, as its header says"),
    ],
)
def test_headers_that_lie(raising_backend, at, form, value, message):
    wire = palmette.tah_encode(activations(1, 3, 16), tile_size=8)
    out = torch.full((1, 3, 16), 7.0)
    with pytest.raises(ValueError, match=message):
        read("tah", resealed(wire, at, form, value), out)
    assert torch.equal(out, torch.full((1, 3, 16), 7.0))


def test_a_bitmap_of_another_count(raising_backend):
    """Codes lie where the bitmap says: it must say as much as there is."""
    wire = palmette.tah_encode(activations(1, 10, 16), tile_size=8)
    for bitmap in (0, 0xFFFF, 1):
        with pytest.raises(ValueError, match=r"wire must be of 2 rows of low_bits, got [0-9]+"):
            palmette.tah_decode(resealed(wire, 64, "H", bitmap), (1, 10, 16))


def test_another_shape_or_codec(raising_backend):
    wire = palmette.tah_encode(activations(2, 4, 64))
    for shape in ((2, 4, 128), (4, 2, 64), (8, 64), (2, 4, 32), (512,)):
        with pytest.raises(ValueError, match="shape must be"):
            palmette.tah_decode(wire, shape)
    with pytest.raises(ValueError, match="wire must be of fixpoint_encode, got tah_encode"):
        palmette.fixpoint_decode(wire, (2, 4, 64))
    wire = palmette.fixpoint_encode(torch.randn(2, 4, 64), bits=4)
    with pytest.raises(ValueError, match=r"shape must be of the wire's shape, \[1, 8, 64\]"):
        palmette.fixpoint_decode(wire, (2, 4, 32))
    for shape in ((4, 2, 64), (512,), (64, 8), (2, 256)):
        if shape != (4, 2, 64):
            with pytest.raises(ValueError, match="shape must be of the wire's shape"):
                palmette.fixpoint_decode(wire, shape)
        else:  # also 8 rows of 64
            assert palmette.fixpoint_decode(wire, shape).shape == shape
    with pytest.raises(ValueError, match="wire must be of delta_encode_, got fixpoint_encode"):
        palmette.delta_decode_(wire, torch.zeros(2, 4, 64))
    delta = palmette.delta_encode_(torch.randn(2, 3, 4), torch.zeros(2, 3, 4), bits=4)
    with pytest.raises(ValueError, match="m must be of the wire's shape"):
        palmette.delta_decode_(delta, torch.zeros(4, 6))


@pytest.mark.parametrize("seed", range(4))
def test_random_bytes_with_a_right_checksum(raising_backend, seed):
    """Whatever a wire says, reading it ends: with numbers or with an error. ci/fuzz.sh does more of this."""
    generator = torch.Generator().manual_seed(seed)
    kind, wire, shape = small_wires()[seed]
    for _ in range(100):
        bad = wire.clone()
        for _ in range(int(torch.randint(1, 4, (), generator=generator))):
            at = int(torch.randint(4, wire.numel(), (), generator=generator))
            bad[at] = int(torch.randint(0, 256, (), generator=generator))
        bad = resealed(bad, 0, "I", 0x544D4C50)
        try:
            read(kind, bad, torch.zeros(shape))
        except ValueError as error:
            assert " must be " in str(error)  # noqa: PT017


# ---- what cannot be encoded


@pytest.mark.parametrize("value", [INF, -INF, NAN])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite(raising_backend, dtype, value):
    x = torch.randn(2, 5, 128).to(dtype)
    x[1, 2, 70] = value
    x[1, 4, 3] = NAN
    message = rf"^x must be finite, got {value} at \[1, 2, 70\]$"
    out = torch.full((palmette.tah_wire_size(x.shape),), 3, dtype=torch.uint8)
    for gate in GATES:
        with pytest.raises(ValueError, match=message):
            palmette.tah_encode(x, gate=gate, out=out if gate == "ratio" else None)
    with pytest.raises(ValueError, match="wire must be"):  # nobody takes what is there for a wire
        palmette.tah_decode(out, x.shape)
    m = torch.zeros(2, 5, 128)
    x[1, 4, 3] = 0
    for call in (palmette.fixpoint_encode, lambda x, bits: palmette.delta_encode_(x, m, bits=bits)):
        with pytest.raises(ValueError, match=message):
            call(x, bits=4)
    assert torch.equal(m, torch.zeros(2, 5, 128))


def test_the_first_tile_is_named_whatever_is_wrong_with_it(raising_backend):
    x = torch.zeros(1, 4, 256)
    x[0, 1, 200], x[0, 2, 10] = NAN, 1e5
    with pytest.raises(ValueError, match=r"^x must be finite, got nan at \[0, 1, 200\]$"):
        palmette.tah_encode(x, gate="never")
    x[0, 1, 3] = -1e5
    with pytest.raises(ValueError, match=r"for the tile of token 1 of sample 0 at channel 0$"):
        palmette.tah_encode(x, gate="never")
    x[0, 1, 3] = x[0, 1, 200] = 0
    for gate in ("range", "always"):
        y = x.clone()
        y[0, 1, 130], y[0, 1, 131:140] = 3e38, -3e38  # sums overflow
        with pytest.raises(ValueError, match=r"for the tile of token 1 of sample 0 at channel 128$"):
            palmette.tah_encode(y, gate=gate, metadata="fp32")


def test_ranges_beyond_fp16(raising_backend):
    x = torch.randn(2, 3, 128)
    x[1, 2, 64] = -70000
    message = (
        "metadata must be fp32 where a tile's range is beyond 65504, got fp16 for the tile of token 2 of "
        "sample 1 at channel 64"
    )
    with pytest.raises(ValueError, match=message):
        palmette.tah_encode(x, gate="never")
    decoded = palmette.tah_decode(palmette.tah_encode(x, gate="never", metadata="fp32"), x.shape)
    assert abs(decoded[1, 2, 64] + 70000) < 10
    x[0, 0, 0], x[0, 0, 1] = 3e38, -3e38
    with pytest.raises(ValueError, match=r"metadata must be of tiles whose range is below 3\.4e38, got fp32"):
        palmette.tah_encode(x, metadata="fp32", gate="never")
    message = "x must be of magnitudes up to 65504, which fp16 scales hold, got more in slice 0, column 64"
    x[0, 0, :2] = 1
    with pytest.raises(ValueError, match=message):
        palmette.fixpoint_encode(x, bits=4)
    with pytest.raises(ValueError, match="x - m must be of magnitudes up to 65504"):
        palmette.delta_encode_(x, torch.zeros(2, 3, 128), bits=4)


# ---- arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile_size": 48}, r"tile_size must be a power of two in \[8, 256\], got 48"),
        ({"tile_size": 4}, r"tile_size must be a power of two in \[8, 256\], got 4"),
        ({"tile_size": 256}, "tile_size must be a divisor of the 128 channels of x, got 256"),
        ({"low_bits": 1}, r"low_bits must be an integer in \[2, 8\], got 1"),
        ({"high_bits": 9}, r"high_bits must be an integer in \[2, 8\], got 9"),
        ({"high_bits": 4.0}, r"high_bits must be an integer in \[2, 8\], got 4.0"),
        ({"low_bits": 5}, "low_bits must be at most high_bits = 4, got 5"),
        ({"high_ratio": 1.5}, r"high_ratio must be a number in \[0, 1\], got 1.5"),
        ({"high_ratio": NAN}, r"high_ratio must be a number in \[0, 1\], got nan"),
        ({"threshold": 0.5}, "threshold must be a number"),
        ({"allocation": "row"}, "allocation must be one of none, token, tile, got 'row'"),
        ({"gate": "no"}, "gate must be one of never, ratio, range, always, got 'no'"),
        ({"metadata": "fp8"}, "metadata must be one of fp16, fp32, got 'fp8'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        palmette.tah_encode(torch.randn(2, 3, 128), **options)
    with pytest.raises(ValueError, match=message):
        palmette.tah_wire_size((2, 3, 128), **options)


def test_bad_arguments():
    x = torch.randn(2, 3, 128)
    wire = palmette.tah_encode(x)
    for call, message in (
        (lambda: palmette.tah_encode(x[0, 0]), r"x must be \[\.\.\., S, C\], got \[128\]"),
        (lambda: palmette.tah_encode(x.double()), "x must be float32 or bfloat16 or float16, got float64"),
        (lambda: palmette.tah_encode(x, out=wire[1:]), r"out must be \[wire_size\]"),
        (lambda: palmette.tah_encode(x, out=wire.char()), "out must be uint8, got int8"),
        (lambda: palmette.tah_decode(wire.float(), x.shape), "wire must be uint8, got float32"),
        (lambda: palmette.tah_decode(wire, x.shape, dtype=torch.int32), "dtype must be float32"),
        (lambda: palmette.tah_decode(wire, x.shape, out=x[0]), "out must be shape"),
        (lambda: palmette.tah_decode(wire, x.shape, out=x.half()), "out must be float32, got float16"),
        (lambda: palmette.tah_decode(wire[::2], x.shape), "wire must be"),
        (lambda: palmette.fixpoint_encode(x, bits=4, scale_dims=(0, 2)), "scale_dims must be neighbouring"),
        (lambda: palmette.fixpoint_encode(x, bits=4, scale_dims=(3,)), "scale_dims must be dimensions of x"),
        (lambda: palmette.fixpoint_encode(x, bits=4, scale_dims=(1, 1)), "scale_dims must be dimensions"),
        (lambda: palmette.fixpoint_encode(x, bits=4, scale_dims=()), "scale_dims must be dimensions of x"),
        (lambda: palmette.fixpoint_encode(x, bits=1), r"bits must be an integer in \[2, 8\], got 1"),
        (lambda: palmette.fixpoint_encode(x, bits=4, grid="even"), "grid must be one of ac-sgd, full-range"),
        (lambda: palmette.delta_encode_(x, x[0], bits=4), "m must be the shape of x"),
        (lambda: palmette.delta_encode_(x, x.int(), bits=4), "m must be float32"),
        (lambda: palmette.delta_encode_(x, x.clone().requires_grad_(), bits=4), "m must not require"),
        (lambda: palmette.delta_encode_(x, torch.empty(2, 128, 3).mT, bits=4), "m must be contiguous"),
        (
            lambda: palmette.tah_encode(x, out=x.view(-1).view(torch.uint8)[: len(wire)]),
            "out must be other memory",
        ),
        (
            lambda: palmette.tah_decode(wire, (1, 1, 64), out=wire[:256].view(torch.float32).view(1, 1, 64)),
            "out must be",
        ),
        (lambda: palmette.delta_encode_(x, x, bits=4), "m must be other memory than x"),
        (lambda: palmette.tah_wire_size((-4, 64)), r"shape must be sizes of at least 0, got \(-4, 64\)"),
        (lambda: palmette.tah_decode(wire, 256), "shape must be sizes of at least 0, got 256"),
        (lambda: palmette.tah_encode(x, rounded=None), "rounded must be True or False, got None"),
        (
            lambda: palmette.fixpoint_encode(x, bits=4, scale_dims=0),
            "scale_dims must be dimensions of x, got 0",
        ),
        (
            lambda: CastCodec().encode(x[0, 0, :4], out=torch.empty(17, dtype=torch.uint8)[1:]),
            "out must be contiguous",
        ),
        (lambda: CastCodec(torch.int8), "dtype must be float32, bfloat16 or float16"),
        (lambda: CastCodec().decode(wire, x.shape), r"wire must be \[wire_size\]"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    "codec",
    [
        TahCodec(),
        TahCodec(tile_size=32, allocation="tile", gate="range"),
        FixpointCodec(6),
        CastCodec(torch.bfloat16),
    ],
)
def test_given_memory(backend, codec):
    x = activations(2, 5, 64)
    want = codec.encode(x)
    wire = torch.full((codec.wire_size(x.shape),), 0xA5, dtype=torch.uint8)
    assert codec.encode(x, out=wire) is wire
    assert torch.equal(wire, want)
    out = torch.empty(2, 5, 64)
    assert codec.decode(wire, x.shape, out=out) is out
    assert torch.equal(out, codec.decode(wire, x.shape))


@pytest.mark.parametrize("tokens", [16, 64])
@pytest.mark.parametrize(
    "codec",
    [TahCodec(gate="never", high_bits=3), TahCodec(high_bits=6), FixpointCodec(4), FixpointCodec(3)],
    ids=repr,
)
def test_nothing_behind_a_wire_is_written(backend, codec, tokens):
    """Also where codes end with the wire."""
    x = activations(1, tokens, 64)
    size = codec.wire_size(x.shape)
    memory = torch.full((size + 256,), 0xA5, dtype=torch.uint8)
    codec.encode(x, out=memory[:size])
    assert torch.equal(memory[:size], codec.encode(x))
    assert bool((memory[size:] == 0xA5).all())


def test_tensors_that_require_gradients_are_encoded_as_they_are():
    x = torch.randn(2, 3, 64, requires_grad=True)
    wire = palmette.tah_encode(x)
    assert not wire.requires_grad
    assert not palmette.tah_decode(wire, x.shape).requires_grad


def test_compiled():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def there_and_back(x):
        return palmette.tah_decode(palmette.tah_encode(2 * x), x.shape) + 1

    x = activations(2, 5, 64)
    want = palmette.tah_decode(palmette.tah_encode(2 * x), x.shape) + 1
    assert torch.equal(there_and_back(x), want)


@pytest.mark.parametrize("elements", [1, 7, 100, 2304, 150_001])
def test_the_checksum(backend, elements):
    assert reference.crc32c(b"123456789") == 0xE3069283
    wire = palmette.fixpoint_encode(torch.randn(1, elements, 1), bits=8)
    assert int.from_bytes(wire[48:52].numpy().tobytes(), "little") == reference.crc32c(
        wire[:48].numpy().tobytes() + wire[64:].numpy().tobytes()
    )


def test_status_words():
    """On the CPU what is wrong raises; the status is for GPUs."""
    wire = palmette.tah_encode(torch.randn(1, 2, 64))
    assert palmette.wire_status(wire) == ""
    for status, place, text in (
        (1, 7, "x must be finite, got inf or nan in tile 7"),
        (10, 0, "checksum"),
        (99, 0, ""),
    ):
        wire[52:64] = torch.tensor(list(struct.pack("<IQ", status, place)), dtype=torch.uint8)
        assert text in palmette.wire_status(wire)
        palmette.tah_decode(wire, (1, 2, 64))  # not part of the checksum
    with pytest.raises(ValueError, match="wire must be at least a header of 64 bytes"):
        palmette.wire_status(wire[:20])


def _opcheck_tah():
    x = torch.randn(2, 5, 64)
    wire = palmette.tah_encode(x)
    return x, wire


OPCHECK_CASES = {
    "tah_encode": lambda: [
        (torch.randn(2, 5, 64), 64, 3, 4, 1, 2.0, 1, 1, 0, True, torch.empty_like(_opcheck_tah()[1]))
    ],
    "tah_decode": lambda: [(_opcheck_tah()[1], torch.empty(2, 5, 64))],
    "fixpoint_encode": lambda: [
        (
            torch.randn(2, 5, 64),
            [1, 10, 64],
            4,
            0,
            torch.empty(FixpointCodec(4).wire_size((2, 5, 64)), dtype=torch.uint8),
        )
    ],
    "fixpoint_decode": lambda: [(FixpointCodec(4).encode(torch.randn(2, 5, 64)), torch.empty(2, 5, 64))],
    "delta_encode_": lambda: [
        (
            torch.randn(2, 5, 64),
            torch.zeros(2, 5, 64),
            [1, 10, 64],
            4,
            0,
            torch.empty(FixpointCodec(4).wire_size((2, 5, 64)), dtype=torch.uint8),
        )
    ],
    "delta_decode_": lambda: [
        (palmette.delta_encode_(torch.randn(2, 5, 64), torch.zeros(2, 5, 64), bits=4), torch.zeros(2, 5, 64))
    ],
}
