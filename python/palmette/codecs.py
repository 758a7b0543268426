# SPDX-License-Identifier: Apache-2.0
"""Codecs: what stages of a pipeline exchange, in a few bits per element.

A wire is a uint8 tensor whose size is known from the shape and the options, so that receivers have their
buffers before anything is sent; docs/wire_format.md describes it byte by byte. Every backend, CPU or GPU,
writes the same bytes and reads the same numbers.
"""

from __future__ import annotations

import math
import struct
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from palmette import _library
from palmette._checks import check_choice, check_dtype, check_number, check_shape
from palmette._codec_checks import (
    ENCODED,
    aligned,
    bytes_of_bits,
    check_apart,
    check_bits,
    check_encoded,
    check_message,
    check_sizes,
    decode_wire,
    is_int,
    memory_of,
    result_for,
    wire_for,
)

_ops = torch.ops.palmette

HEADER_BYTES = 64
_ALLOCATIONS = ("none", "token", "tile")
_GATES = ("never", "ratio", "range", "always")
_METADATA = ("fp16", "fp32")
_GRIDS = ("ac-sgd", "full-range")
# by WireStatus of csrc/codec/wire.h
_STATUS = (
    "",
    "x must be finite, got inf or nan in {place}",
    "metadata must be of a dtype that holds the ranges of x, got a larger one in {place}",
    "wire must be at least a header of 64 bytes, got fewer",
    "wire must be bytes that begin with PLMT, got others",
    "wire must be of version 1, got another",
    "wire must be of the decoder's kind, got another",
    "wire must be of known options, got others",
    "shape must be of the wire's shape, got another",
    "wire must be of the size that its header says, got another",
    "wire must be of the checksum that its header says, got another",
    "wire must be of as many rows of low_bits as its header says, got others",
    "wire must be of a known status, got another",
)


# ---- Hadamard tile quantization


def tah_encode(
    x: Tensor,
    *,
    tile_size: int = 64,
    low_bits: int = 3,
    high_bits: int = 4,
    high_ratio: float = 0.8,
    threshold: float = 2.0,
    allocation: str = "token",
    gate: str = "ratio",
    metadata: str = "fp16",
    rounded: bool = True,
    out: Tensor | None = None,
) -> Tensor:
    """Quantizes tiles of neighbouring channels, those with an outlier after a Hadamard transform.

    A tile is ``tile_size`` contiguous channels of one token. Where the gate fires, its largest magnitude is
    swapped to the front and the tile multiplied by a Hadamard matrix: the outlier becomes an offset that all
    elements share. Then the tile is quantized between its minimum and maximum with the bits of its token.

    Args:
        x: [..., S, C], at least two dimensions: samples of S tokens with C channels; float32, bfloat16 or
            float16. All elements are finite.
        tile_size: G, a power of two in [8, 256] that divides C.
        low_bits, high_bits: per element, 2 .. 8, low_bits at most high_bits.
        high_ratio: of tokens (or tiles) that get high_bits, in [0, 1]. Of each sample the lowest
            ``floor(n * (1 - high_ratio) + 1e-9)`` by entropy get low_bits, of equal ones the first.
        threshold: of ``gate="ratio"``, at least 1.
        allocation: ``"token"``: low_bits for the tokens whose magnitudes have the lowest entropy; ``"tile"``:
            the same for tiles; ``"none"``: high_bits for all.
        gate: ``"ratio"`` fires where the largest magnitude is at least ``threshold`` times the second;
            ``"range"`` where the transform makes the range of the tile smaller (*ours*: also with several
            outliers, at more work); ``"never"``, ``"always"``. The receiver does not need to know.
        metadata: dtype of a tile's zero point and step. ``"fp16"`` raises where they are beyond 65,504, and
            has multiples of 6e-8 only: for numbers below 1e-5 take ``"fp32"``, or scale them.
        rounded: codes refer to the zero point and step as they are sent. False: as they were before rounding
            to fp16, like the public code; the error is larger.
        out: uint8 [tah_wire_size(...)], contiguous; receives the wire.

    Returns:
        uint8 [tah_wire_size(x.shape, ...)]; ``out`` if it was given.

    Raises:
        ValueError: an option or shape does not fit; an element is not finite, a tile's range does not fit its
            metadata (the message names the place; on a GPU nobody waits to see, ``wire_status`` tells).

    Source: TAH-Quant (arXiv 2506.01352), sections 3.2 and 3.3; tiles instead of tokens: its second version.
    """
    codec = TahCodec(
        tile_size, low_bits, high_bits, high_ratio, threshold, allocation, gate, metadata, rounded
    )
    return codec.encode(x, out=out)


def tah_decode(
    wire: Tensor, shape: Sequence[int], *, dtype: torch.dtype = torch.float32, out: Tensor | None = None
) -> Tensor:
    """What ``tah_encode`` has written.

    Args:
        wire: uint8 [tah_wire_size(shape, ...)]; it knows its options.
        shape: of the tensor that was encoded.
        dtype: float32, bfloat16 or float16, whatever the tensor had.
        out: of shape and dtype, contiguous; receives the result.

    Returns:
        A tensor of shape and dtype; ``out`` if it was given.

    Raises:
        ValueError: the wire is cut off, altered, of another version, kind or shape; nothing has been written
            then. On a GPU nobody waits to see: the result is NaN, and ``wire_status`` tells why.
    """
    return decode_wire(_ops.tah_decode, wire, shape, dtype, out)


def tah_wire_size(shape: Sequence[int], **options: Any) -> int:
    """Bytes of ``tah_encode``'s wire for a tensor of this shape.

    Raises:
        ValueError: an option or the shape does not fit.
    """
    return TahCodec(**options).wire_size(shape)


# ---- fixed point


def fixpoint_encode(
    x: Tensor,
    *,
    bits: int,
    scale_dims: Sequence[int] = (0, 1),
    grid: str = "ac-sgd",
    out: Tensor | None = None,
) -> Tensor:
    """Quantizes to a symmetric grid with one fp16 scale, the largest magnitude, per slice.

    Args:
        x: float32, bfloat16 or float16, at least one dimension. All elements are finite.
        bits: per element, 2 .. 8.
        scale_dims: dimensions that share a scale, neighbouring ones. Default: one scale per channel of
            [B, S, C].
        grid: ``"ac-sgd"``: levels ``-2^(bits-1) .. 2^(bits-1) - 1`` times ``m / 2^(bits-1)``, so the positive
            maximum m decodes to 7/8 m at 4 bits. ``"full-range"`` (*ours*): ``-(2^(bits-1) - 1) ..
            2^(bits-1) - 1`` times ``m / (2^(bits-1) - 1)``, which holds both ends, and zero.
        out: uint8 [fixpoint_wire_size(...)], contiguous; receives the wire.

    Returns:
        uint8 [fixpoint_wire_size(x.shape, bits=bits, scale_dims=scale_dims)]; ``out`` if it was given.

    Raises:
        ValueError: an option or shape does not fit; an element is not finite or its magnitude beyond 65,504
            (the message names the place; on a GPU ``wire_status`` tells).

    Scales are multiples of 6e-8: scale gradients that are smaller.

    Source: AC-SGD (arXiv 2206.01299), section 4 and its public code: gradients of activations.
    """
    return FixpointCodec(bits, scale_dims, grid).encode(x, out=out)


def fixpoint_decode(
    wire: Tensor, shape: Sequence[int], *, dtype: torch.dtype = torch.float32, out: Tensor | None = None
) -> Tensor:
    """What ``fixpoint_encode`` has written; arguments, result and errors as for ``tah_decode``."""
    return decode_wire(_ops.fixpoint_decode, wire, shape, dtype, out)


def fixpoint_wire_size(shape: Sequence[int], *, bits: int, scale_dims: Sequence[int] = (0, 1)) -> int:
    """Bytes of ``fixpoint_encode``'s wire for a tensor of this shape."""
    return FixpointCodec(bits, scale_dims).wire_size(shape)


# ---- deltas


def delta_encode_(
    x: Tensor,
    m: Tensor,
    *,
    bits: int,
    scale_dims: Sequence[int] = (0, 1),
    grid: str = "ac-sgd",
    out: Tensor | None = None,
) -> Tensor:
    """Encodes ``x - m`` as ``fixpoint_encode`` does, and adds to m what the receiver will add to its own.

    Args:
        x: float32, bfloat16 or float16. All elements are finite.
        m: of x's shape, contiguous, any of the three dtypes, changed in place: ``m += decoded``, in float32,
            rounded once to m's dtype; as float16 it stays within 65,504.
        bits, scale_dims, grid, out: as for ``fixpoint_encode``.

    Returns:
        uint8 [fixpoint_wire_size(...)]. Sender and receiver hold the same m afterwards, to the bit, on any
        backends.

    Raises:
        ValueError: as for ``fixpoint_encode``; m is unchanged then.

    Source: AQ-SGD (arXiv 2206.01299), algorithm 1.
    """
    codec = FixpointCodec(bits, scale_dims, grid)
    groups = codec.groups(x.shape)
    check_encoded("x", x)
    check_message(m, x.shape, x.device)
    check_apart("m", m, "x", x)
    wire = wire_for(x, codec.wire_size(x.shape), out)
    check_apart("out", wire, "m", m)
    _library.call(_ops.delta_encode_.default, x.detach(), m, groups, bits, _GRIDS.index(grid), wire)
    return wire


def delta_decode_(wire: Tensor, m: Tensor) -> Tensor:
    """Adds to m what ``delta_encode_`` has added to the sender's.

    Args:
        wire: what ``delta_encode_`` returned.
        m: of the same shape and dtype as the sender's, and with the same values; changed in place.

    Returns:
        m, which is what the receiver computes with.

    Raises:
        ValueError: the wire is cut off, altered, or of another shape; m is unchanged then.
    """
    check_dtype("wire", wire, (torch.uint8,))
    check_message(m, m.shape, wire.device)
    check_apart("m", m, "wire", wire)
    _library.call(_ops.delta_decode_.default, wire, m)
    return m


def wire_status(wire: Tensor) -> str:
    """What a GPU found wrong with a wire that it wrote or read: empty if nothing. Waits for the GPU.

    On the CPU ``tah_encode`` and its kin raise the same as an error.
    """
    check_dtype("wire", wire, (torch.uint8,))
    if wire.dim() != 1 or wire.numel() < HEADER_BYTES:
        raise ValueError(f"wire must be at least a header of {HEADER_BYTES} bytes, got {list(wire.shape)}")
    header = bytes(wire[:HEADER_BYTES].cpu().tolist())
    status, place = struct.unpack_from("<IQ", header, 52)
    rows = "tile" if header[5] == 1 else "slice"
    return _STATUS[min(status, len(_STATUS) - 1)].format(place=f"{rows} {place}")


# ---- codecs as objects: what modules and pipelines take


class Codec(ABC):
    """A way to send tensors: a wire of known size, encoded on one side and decoded on the other.

    Subclasses have the three methods, and a ``repr`` that tells all options and nothing else: the two ends of
    a pipeline's edge compare it.
    """

    @abstractmethod
    def wire_size(self, shape: Sequence[int]) -> int:
        """Bytes of the wire of a tensor of this shape."""

    @abstractmethod
    def encode(self, x: Tensor, *, out: Tensor | None = None) -> Tensor:
        """uint8 [wire_size(x.shape)]."""

    @abstractmethod
    def decode(
        self,
        wire: Tensor,
        shape: Sequence[int],
        *,
        dtype: torch.dtype = torch.float32,
        out: Tensor | None = None,
    ) -> Tensor:
        """The tensor of shape and dtype that the wire holds."""


@dataclass(frozen=True)
class CastCodec(Codec):
    """Sends elements as they are, in another dtype: float32 is lossless, bfloat16 halves the bytes.

    Its wire has no header: it is the tensor's memory. Numbers beyond the dtype's range become infinite.
    """

    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if self.dtype not in ENCODED:
            raise ValueError(f"dtype must be float32, bfloat16 or float16, got {self.dtype}")

    def wire_size(self, shape: Sequence[int]) -> int:
        return math.prod(shape) * self.dtype.itemsize

    def encode(self, x: Tensor, *, out: Tensor | None = None) -> Tensor:
        check_encoded("x", x)
        wire = wire_for(x, self.wire_size(x.shape), out)
        memory_of("out", wire, self.dtype).copy_(x.detach().reshape(-1))
        return wire

    def decode(
        self,
        wire: Tensor,
        shape: Sequence[int],
        *,
        dtype: torch.dtype = torch.float32,
        out: Tensor | None = None,
    ) -> Tensor:
        check_dtype("wire", wire, (torch.uint8,))
        check_shape("wire", wire, "[wire_size]", [self.wire_size(shape)])
        result = result_for(wire, shape, dtype, out)
        return result.copy_(memory_of("wire", wire, self.dtype).view(tuple(shape)))


@dataclass(frozen=True)
class TahCodec(Codec):
    """Hadamard tile quantization; the options are ``tah_encode``'s.

    Raises:
        ValueError: an option is out of range.
    """

    tile_size: int = 64
    low_bits: int = 3
    high_bits: int = 4
    high_ratio: float = 0.8
    threshold: float = 2.0
    allocation: str = "token"
    gate: str = "ratio"
    metadata: str = "fp16"
    rounded: bool = True

    def __post_init__(self) -> None:
        if not is_int(self.tile_size) or self.tile_size not in (8, 16, 32, 64, 128, 256):
            raise ValueError(f"tile_size must be a power of two in [8, 256], got {self.tile_size!r}")
        check_bits(high_bits=self.high_bits, low_bits=self.low_bits)
        if self.low_bits > self.high_bits:
            raise ValueError(f"low_bits must be at most high_bits = {self.high_bits}, got {self.low_bits}")
        check_number("high_ratio", self.high_ratio, 0, 1)
        check_number("threshold", self.threshold, 1, 2.0**100)
        if not isinstance(self.rounded, bool):
            raise ValueError(f"rounded must be True or False, got {self.rounded!r}")
        for name, names in (("allocation", _ALLOCATIONS), ("gate", _GATES), ("metadata", _METADATA)):
            check_choice(name, getattr(self, name), names)

    def _sizes(self, shape: Sequence[int]) -> tuple[int, int, int]:
        check_sizes(shape)
        if len(shape) < 2:
            raise ValueError(f"x must be [..., S, C], got {list(shape)}")
        if shape[-1] % self.tile_size:
            raise ValueError(
                f"tile_size must be a divisor of the {shape[-1]} channels of x, got {self.tile_size}"
            )
        return math.prod(shape[:-2]), shape[-2], shape[-1]

    def low_count(self, shape: Sequence[int]) -> int:
        """Tokens (or tiles) of each sample that get low_bits."""
        _, length, channels = self._sizes(shape)
        if self.allocation == "none":
            return 0
        rows = length if self.allocation == "token" else length * (channels // self.tile_size)
        return math.floor(rows * (1 - self.high_ratio) + 1e-9)

    def wire_size(self, shape: Sequence[int]) -> int:
        batch, length, channels = self._sizes(shape)
        per_token = channels // self.tile_size
        tiles, low = batch * length * per_token, batch * self.low_count(shape)
        width = self.tile_size.bit_length() - 1
        low_tiles = low * per_token if self.allocation == "token" else low
        bitmap = {"none": 0, "token": batch * length, "tile": tiles}[self.allocation]
        sections = (
            bytes_of_bits(bitmap),
            bytes_of_bits(tiles) if self.gate in ("ratio", "range") else 0,
            bytes_of_bits(tiles * width) if self.gate != "never" else 0,
            tiles * (4 if self.metadata == "fp16" else 8),
            self.tile_size // 8 * (low_tiles * self.low_bits + (tiles - low_tiles) * self.high_bits),
        )
        return HEADER_BYTES + sum(map(aligned, sections))

    def encode(self, x: Tensor, *, out: Tensor | None = None) -> Tensor:
        check_encoded("x", x)
        wire = wire_for(x, self.wire_size(x.shape), out)
        _library.call(
            _ops.tah_encode.default,
            x.detach(),
            self.tile_size,
            self.low_bits,
            self.high_bits,
            self.low_count(x.shape),
            float(self.threshold),
            _ALLOCATIONS.index(self.allocation),
            _GATES.index(self.gate),
            _METADATA.index(self.metadata),
            self.rounded,
            wire,
        )
        return wire

    def decode(
        self,
        wire: Tensor,
        shape: Sequence[int],
        *,
        dtype: torch.dtype = torch.float32,
        out: Tensor | None = None,
    ) -> Tensor:
        return tah_decode(wire, shape, dtype=dtype, out=out)


@dataclass(frozen=True)
class FixpointCodec(Codec):
    """Fixed point with a scale per slice; the options are ``fixpoint_encode``'s.

    Raises:
        ValueError: an option is out of range.
    """

    bits: int = 8
    scale_dims: Sequence[int] = (0, 1)
    grid: str = "ac-sgd"

    def __post_init__(self) -> None:
        check_bits(bits=self.bits)
        check_choice("grid", self.grid, _GRIDS)
        dims = self.scale_dims
        if not isinstance(dims, Sequence) or not dims or not all(map(is_int, dims)):
            raise ValueError(f"scale_dims must be dimensions of x, got {dims!r}")
        object.__setattr__(self, "scale_dims", tuple(dims))  # equal codecs have equal reprs

    def groups(self, shape: Sequence[int]) -> list[int]:
        """``[P, R, Q]``: x as that shape has P * Q scales, each for R elements."""
        check_sizes(shape)
        dims = sorted({d + len(shape) if d < 0 else d for d in self.scale_dims})
        if dims[0] < 0 or dims[-1] >= len(shape) or len(dims) != len(self.scale_dims):
            raise ValueError(f"scale_dims must be dimensions of x {list(shape)}, got {self.scale_dims}")
        if dims[-1] - dims[0] != len(dims) - 1:
            raise ValueError(f"scale_dims must be neighbouring dimensions, got {self.scale_dims}")
        return [
            math.prod(shape[: dims[0]]),
            math.prod(shape[dims[0] : dims[-1] + 1]),
            math.prod(shape[dims[-1] + 1 :]),
        ]

    def wire_size(self, shape: Sequence[int]) -> int:
        outer, inner, columns = self.groups(shape)
        codes = bytes_of_bits(outer * inner * columns * self.bits)
        return HEADER_BYTES + aligned(2 * outer * columns) + aligned(codes)

    def encode(self, x: Tensor, *, out: Tensor | None = None) -> Tensor:
        check_encoded("x", x)
        groups = self.groups(x.shape)
        wire = wire_for(x, self.wire_size(x.shape), out)
        grid = _GRIDS.index(self.grid)
        _library.call(_ops.fixpoint_encode.default, x.detach(), groups, self.bits, grid, wire)
        return wire

    def decode(
        self,
        wire: Tensor,
        shape: Sequence[int],
        *,
        dtype: torch.dtype = torch.float32,
        out: Tensor | None = None,
    ) -> Tensor:
        return fixpoint_decode(wire, shape, dtype=dtype, out=out)


@torch.library.register_fake("palmette::tah_encode")
def _tah_encode_fake(
    x: Tensor,
    tile_size: int,
    low_bits: int,
    high_bits: int,
    low_count: int,
    threshold: float,
    allocation: int,
    gate: int,
    metadata: int,
    rounded: bool,
    wire: Tensor,
) -> None:
    return None


@torch.library.register_fake("palmette::fixpoint_encode")
def _fixpoint_encode_fake(x: Tensor, groups: Sequence[int], bits: int, grid: int, wire: Tensor) -> None:
    return None


@torch.library.register_fake("palmette::delta_encode_")
def _delta_encode_fake(
    x: Tensor, m: Tensor, groups: Sequence[int], bits: int, grid: int, wire: Tensor
) -> None:
    return None


@torch.library.register_fake("palmette::tah_decode")
@torch.library.register_fake("palmette::fixpoint_decode")
@torch.library.register_fake("palmette::delta_decode_")
def _decode_fake(wire: Tensor, result: Tensor) -> None:
    return None
