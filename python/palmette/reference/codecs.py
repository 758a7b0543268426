# SPDX-License-Identifier: Apache-2.0
"""The codecs in plain PyTorch, to the byte: what every backend has to write, and to read.

All arithmetic is float32, one operation after the other, each rounded by itself: no fused multiply-add. So
the wires of all backends are the same bytes. docs/wire_format.md describes them.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from palmette.reference.hadamard import fwht

VERSION = 1
HEADER_BYTES = 64
SECTION_ALIGNMENT = 16
KINDS = {"tah": 1, "fixpoint": 2, "delta": 3}
ALLOCATIONS = {"none": 0, "token": 1, "tile": 2}
GATES = {"never": 0, "ratio": 1, "range": 2, "always": 3}
METADATA = {"fp16": 0, "fp32": 1}
GRIDS = {"ac-sgd": 0, "full-range": 1}
ENTROPY_LANES = 32
# log2(1 + f) / f on sqrt(1/2) <= 1 + f < sqrt(2), off by 2.2e-6 after multiplication with f
LOG2_COEFFICIENTS = (
    1.4427134990692139,
    -0.7211318612098694,
    0.4793480336666107,
    -0.3674899935722351,
    0.3221547603607178,
    -0.2065916359424591,
)


# ---- bits, sections, the checksum


def pack_bits(codes: Tensor, bits: int) -> bytes:
    """Code i in bits [i * bits, (i + 1) * bits), from the lowest of each byte on; then zeros."""
    if codes.numel() == 0:
        return b""
    exploded = (codes.reshape(-1, 1).numpy().astype(np.uint16) >> np.arange(bits, dtype=np.uint16)) & 1
    return np.packbits(exploded.astype(np.uint8).reshape(-1), bitorder="little").tobytes()


def unpack_bits(data: bytes, bits: int, count: int) -> Tensor:
    exploded = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")[: count * bits]
    weights = 1 << np.arange(bits)
    return torch.from_numpy((exploded.reshape(count, bits) * weights).sum(1).astype(np.int64))


def crc32c(data: bytes) -> int:
    """Castagnoli's polynomial, reflected; 0xE3069283 of b"123456789"."""
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = (byte >> 1) ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    crc = 0xFFFFFFFF
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def _padded(section: bytes) -> bytes:
    return section + bytes(-len(section) % SECTION_ALIGNMENT)


def _wire(
    kind: str, fields: Sequence[int], low: int, sizes: Sequence[int], sections: Sequence[bytes]
) -> Tensor:
    body = b"".join(map(_padded, sections))
    head = struct.pack(
        "<4sBB6BI3QQ", b"PLMT", VERSION, KINDS[kind], *fields, low, *sizes, HEADER_BYTES + len(body)
    )
    checksum = crc32c(head + body)
    return torch.tensor(list(head + struct.pack("<IIQ", checksum, 0, 0) + body), dtype=torch.uint8)


def _half_up(x: Tensor) -> Tensor:
    """float16 of numbers >= 0: below 2^-14, where it has less than its 11 bits, rounded up."""
    return torch.where(x < 2.0**-14, (x * 2.0**24).ceil() * 2.0**-24, x).half()


# ---- Hadamard tile quantization


@dataclass(frozen=True)
class TahOptions:
    """As for ``palmette.tah_encode``."""

    tile_size: int = 64
    low_bits: int = 3
    high_bits: int = 4
    high_ratio: float = 0.8
    threshold: float = 2.0
    allocation: str = "token"
    gate: str = "ratio"
    metadata: str = "fp16"
    rounded: bool = True


def log2(a: Tensor) -> Tensor:
    """Of positive normal float32; finite for 0 and denormal numbers too."""
    bits = a.view(torch.int32)
    exponent = (bits - 0x3F3504F3) >> 23
    f = (bits - (exponent << 23)).view(torch.float32) - 1.0
    p = torch.full_like(f, LOG2_COEFFICIENTS[-1])
    for c in reversed(LOG2_COEFFICIENTS[:-1]):
        p = p * f + torch.tensor(c, dtype=torch.float32)
    return p * f + exponent.float()


def _lane_sum(x: Tensor) -> Tensor:
    """[N, n] -> [N]: 32 running sums, then halves."""
    x = torch.nn.functional.pad(x, (0, -x.shape[1] % ENTROPY_LANES)).unflatten(1, (-1, ENTROPY_LANES))
    total = torch.zeros_like(x[:, 0])
    for i in range(x.shape[1]):
        total = total + x[:, i]
    while total.shape[1] > 1:
        half = total.shape[1] // 2
        total = total[:, :half] + total[:, half:]
    return total[:, 0]


def entropy(x: Tensor) -> Tensor:
    """In bits, of |x| / sum |x| of each row: [N, n] float32 -> [N]. 0 for a row of zeros, inf on overflow."""
    a = x.abs()
    total, weighted = _lane_sum(a), _lane_sum(a * log2(a))
    result = log2(total) - weighted / total
    result = torch.where(total == 0, 0.0, result)
    return torch.where(result.isfinite(), result, torch.inf)


def low_rows(x: Tensor, options: TahOptions) -> tuple[Tensor, int]:
    """Which tokens [B, S], or tiles [B, S * C / G], get low_bits; how many of each sample."""
    batch, _, channels = x.shape
    size = channels if options.allocation == "token" else options.tile_size
    keys = entropy(x.reshape(-1, size)).reshape(batch, -1)
    count = math.floor(keys.shape[1] * (1 - options.high_ratio) + 1e-9)
    order = keys.argsort(dim=1, stable=True)
    low = torch.zeros_like(keys, dtype=torch.bool)
    return low.scatter(1, order[:, :count], True), count


def tah_encode(x: Tensor, options: TahOptions) -> Tensor:
    """The wire of x [B, S, C]."""
    o, (batch, length, channels) = options, x.shape
    x = x.float()
    size, per_token = o.tile_size, channels // o.tile_size
    tiles = x.reshape(-1, size)
    low, count = (None, 0) if o.allocation == "none" else low_rows(x, o)
    is_low = torch.zeros(tiles.shape[0], dtype=torch.bool)
    if low is not None:
        is_low = (
            low.repeat_interleave(per_token, 1).reshape(-1) if o.allocation == "token" else low.reshape(-1)
        )

    magnitude = tiles.abs()
    first, pivot = magnitude.max(1)
    pivot = (magnitude == first[:, None]).int().argmax(1)  # the first of equal ones
    rotated = tiles.clone()
    row = torch.arange(tiles.shape[0])
    rotated[row, pivot] = tiles[:, 0]
    rotated[:, 0] = tiles[row, pivot]
    rotated = fwht(rotated) * torch.tensor(1 / math.sqrt(size), dtype=torch.float32)
    raw_range, rotated_range = (t.amax(1) - t.amin(1) for t in (tiles, rotated))
    rest = magnitude.scatter(1, pivot[:, None], 0.0).amax(1)
    fired = {
        "never": torch.zeros_like(is_low),
        "always": torch.ones_like(is_low),
        "ratio": first >= rest * torch.tensor(o.threshold, dtype=torch.float32),
        "range": rotated_range < raw_range,
    }[o.gate]

    values = torch.where(fired[:, None], rotated, tiles)
    steps = torch.where(is_low, 2**o.low_bits - 1, 2**o.high_bits - 1).float()
    least = values.amin(1) + 0.0  # -0 becomes 0
    step = (values.amax(1) - least) / steps
    step = torch.where(step < 2.0**-126, 0.0, step)
    exact = least, step
    if o.metadata == "fp16":
        least, step = least.half().float(), _half_up(step).float()
    zero, scale = (least, step) if o.rounded else exact
    inverse = torch.where(scale < 2.0**-126, 0.0, 1 / scale)
    codes = ((values - zero[:, None]) * inverse[:, None]).clamp(torch.tensor(0.0), steps[:, None])
    codes = codes.round().to(torch.uint8)

    meta = torch.stack((least, step), 1)
    meta = meta.half() if o.metadata == "fp16" else meta
    packed = b"".join(
        pack_bits(tile, o.low_bits if small else o.high_bits)
        for tile, small in zip(codes, is_low.tolist(), strict=True)
    )
    width = size.bit_length() - 1
    sections = [
        b"" if low is None else pack_bits(low.to(torch.uint8), 1),
        b"" if o.gate in ("never", "always") else pack_bits(fired.to(torch.uint8), 1),
        b"" if o.gate == "never" else pack_bits(torch.where(fired, pivot, 0), width),
        meta.numpy().tobytes(),
        packed,
    ]
    fields = (width, o.low_bits, o.high_bits, ALLOCATIONS[o.allocation], GATES[o.gate], METADATA[o.metadata])
    return _wire("tah", fields, count, (batch, length, channels), sections)


def tah_decode(wire: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """What tah_encode's wire holds, [B, S, C]; nothing is checked."""
    data = wire.numpy().tobytes()
    _, _, _, width, low_bits, high_bits, allocation, gate, metadata, _, *sizes, _ = struct.unpack_from(
        "<4sBB6BI3QQ", data
    )
    batch, length, channels = sizes
    size = 1 << width
    per_token = channels // size
    num_tiles = batch * length * per_token
    place = HEADER_BYTES

    def take(num_bytes: int) -> bytes:
        nonlocal place
        section = data[place : place + num_bytes]
        place += num_bytes + -num_bytes % SECTION_ALIGNMENT
        return section

    is_low = torch.zeros(num_tiles, dtype=torch.bool)
    if allocation == 1:
        is_low = (
            unpack_bits(take(-(-batch * length // 8)), 1, batch * length).bool().repeat_interleave(per_token)
        )
    elif allocation == 2:
        is_low = unpack_bits(take(-(-num_tiles // 8)), 1, num_tiles).bool()
    fired = torch.full((num_tiles,), gate == 3)
    if gate in (1, 2):
        fired = unpack_bits(take(-(-num_tiles // 8)), 1, num_tiles).bool()
    pivot = torch.zeros(num_tiles, dtype=torch.long)
    if gate != 0:
        pivot = unpack_bits(take(-(-num_tiles * width // 8)), width, num_tiles)
    kind = np.float32 if metadata else np.float16
    meta = np.frombuffer(take(2 * num_tiles * kind().nbytes), kind).reshape(-1, 2)
    zero, scale = torch.from_numpy(meta.astype(np.float32)).unbind(1)
    codes = torch.empty(num_tiles, size)
    for tile, small in enumerate(is_low.tolist()):
        bits = low_bits if small else high_bits
        codes[tile] = unpack_bits(data[place : place + size * bits // 8], bits, size).float()
        place += size * bits // 8
    values = zero[:, None] + codes * scale[:, None]
    back = fwht(values) * torch.tensor(1 / math.sqrt(size), dtype=torch.float32)
    row = torch.arange(num_tiles)
    swapped = back.clone()
    swapped[row, pivot] = back[:, 0]
    swapped[:, 0] = back[row, pivot]
    return torch.where(fired[:, None], swapped, values).to(dtype).reshape(batch, length, channels)


# ---- fixed point, and deltas


def _grid(absmax: Tensor, bits: int, grid: str) -> tuple[Tensor, int, int]:
    """The step of each scale, the least and the greatest level."""
    half = 2 ** (bits - 1)
    if grid == "ac-sgd":
        return absmax * torch.tensor(1 / half), -half, half - 1
    return absmax / (half - 1), -(half - 1), half - 1


def fixpoint_levels(x: Tensor, bits: int, grid: str) -> tuple[Tensor, Tensor, Tensor]:
    """x [P, R, Q]: absmax [P, Q] in fp16, levels [P, R, Q], and what they stand for."""
    absmax = _half_up(x.abs().amax(1)) if x.shape[1] else torch.zeros(x.shape[0], x.shape[2]).half()
    step, least, most = _grid(absmax.float(), bits, grid)
    inverse = torch.where(step < 2.0**-126, 0.0, 1 / step)
    levels = (x * inverse[:, None]).clamp(least, most).round() + 0.0
    return absmax, levels, levels * step[:, None]


def fixpoint_encode(x: Tensor, bits: int, grid: str, *, kind: str = "fixpoint") -> Tensor:
    """The wire of x [P, R, Q] with a scale for each of P x Q."""
    absmax, levels, _ = fixpoint_levels(x.float(), bits, grid)
    codes = (levels + 2 ** (bits - 1)).to(torch.uint8)
    sections = [absmax.numpy().tobytes(), pack_bits(codes, bits)]
    return _wire(kind, (0, bits, bits, GRIDS[grid], 0, 0), 0, x.shape, sections)


def delta_encode_(x: Tensor, m: Tensor, bits: int, grid: str = "ac-sgd") -> Tensor:
    """The wire of x - m, [P, R, Q]; m becomes what the receiver's becomes."""
    delta = x.float() - m.float()
    wire = fixpoint_encode(delta, bits, grid, kind="delta")
    moved = m.float() + fixpoint_levels(delta, bits, grid)[2]
    m.copy_(moved.clamp(-65504, 65504) if m.dtype == torch.float16 else moved)
    return wire
