# SPDX-License-Identifier: Apache-2.0
"""A codec whose messages are changes of what both ends have stored: the wire of AQ-SGD.

Source: AQ-SGD (arXiv 2206.01299), algorithm 1.
"""

from __future__ import annotations

import contextlib
import math
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from palmette._checks import check_device, check_dtype, check_shape
from palmette._codec_checks import ALIGNMENT, ENCODED, aligned
from palmette.codecs import Codec, FixpointCodec, delta_decode_, delta_encode_

from .activation_store import ActivationStore, Entry, Visit, parts_of, sample_ids

_ROUND = b"PLMS"
_ROUND_HEADER = struct.Struct("<4sIII")


@dataclass(frozen=True)
class _Round:
    """Samples of a microbatch that are all different; positions are those in the microbatch."""

    visit: Visit
    delta: slice  # of the wire: what changed of the hits
    full: slice  # the misses, in the store's dtype
    identity: bytes  # ids and lengths


@dataclass(frozen=True)
class DeltaPlan:
    """What a microbatch's wire will hold, and its size.

    Attributes:
        shape: Of the tensor.
        wire_size: Bytes.
        room: Bytes of the longest wire that any content of the stores could give.
    """

    shape: tuple[int, ...]
    wire_size: int
    room: int
    rounds: tuple[_Round, ...]
    serial: int


class DeltaCodec:
    """Sends how activations of samples have changed since their last visit; one end of an edge has one.

    In a microbatch, samples that are stored travel as a delta with one scale per channel over all of them,
    the others in full in the store's dtype. If an id comes again within a microbatch, it is as if a second
    microbatch followed: it is encoded against what the first occurrence has left.

    Both ends plan the same microbatches in the same order and then encode, or decode, them in that order;
    ``encode`` and ``decode`` do both at once. If one of them raises, the step is lost: the stores of both
    ends may differ from then on, until their tables are compared or a checkpoint is loaded.

    Args:
        store: this end's, for no other edge.
        bits: per element of a delta, 2 .. 8.
        grid: as for ``palmette.codecs.fixpoint_encode``.
        codec: for deltas, in the place of that fixed point: a ``TahCodec``, say. Its ``encode`` gets the
            deltas as [rows, C] in float32.

    Raises:
        ValueError: an option is out of range.

    Source: AQ-SGD (arXiv 2206.01299), algorithm 1 (bits 2 .. 4 forward in its experiments).
    """

    def __init__(
        self, store: ActivationStore, *, bits: int = 4, grid: str = "ac-sgd", codec: Codec | None = None
    ) -> None:
        if not isinstance(store, ActivationStore):
            raise ValueError(f"store must be an ActivationStore, got {type(store).__name__}")
        if codec is not None and not isinstance(codec, Codec):
            raise ValueError(f"codec must be a Codec or None, got {type(codec).__name__}")
        self.codec = FixpointCodec(bits, (0,), grid) if codec is None else codec
        self._fused = codec is None  # one operator encodes and updates
        self.store = store
        self.bits = bits
        self.grid = grid
        self._planned = 0
        self._done = 0

    def __repr__(self) -> str:
        """What both ends of an edge must agree on."""
        how = f"bits={self.bits}, grid={self.grid!r}" if self._fused else f"codec={self.codec!r}"
        return f"DeltaCodec({self.store!r}, {how})"

    def plan(
        self, ids: Iterable[int] | Tensor, shape: Sequence[int], *, lengths: Sequence[int] | None = None
    ) -> DeltaPlan:
        """Visits the samples of a microbatch; its wire has to be encoded, or decoded, after that.

        Args:
            ids: [B] sample ids, int64; the distinct ones are at most the store's capacity.
            shape: of the activations, [B, ..., C] with C = ``slot_shape[1]``; the product of the dimensions
                in between are T tokens, at most ``slot_shape[0]``.
            lengths: [B], the first tokens of each sample that count, 1 .. T; the receiver gets zeros for the
                rest. Default: all T.

        Raises:
            ValueError: ids, shape or lengths do not fit; the store is unchanged then.
        """
        samples = sample_ids(ids)
        tokens, channels = self.store.slot_shape
        if len(shape) < 2 or shape[-1] != channels or math.prod(shape[1:-1]) > tokens:
            raise ValueError(f"x must be [B, up to {tokens} tokens, {channels}], got {list(shape)}")
        if len(samples) != shape[0]:
            raise ValueError(f"ids must be [B] = [{shape[0]}], got [{len(samples)}]")
        width = math.prod(shape[1:-1])
        sizes = [width] * len(samples) if lengths is None else sample_ids(lengths)
        if len(sizes) != len(samples) or not all(1 <= size <= width for size in sizes):
            raise ValueError(f"lengths must be [{len(samples)}] numbers in [1, {width}], got {sizes}")
        groups = _occurrences(samples)
        if max(map(len, groups), default=0) > self.store.capacity:
            raise ValueError(f"distinct ids must be at most {self.store.capacity}, got {len(groups[0])}")

        rounds = []
        place = 0
        for group in groups:
            visit = self.store.visit([samples[i] for i in group], [sizes[i] for i in group])
            visit = Visit(*([(group[i], entry) for i, entry in part] for part in visit))
            start = place + _ROUND_HEADER.size
            rows = sum(entry.length for _, entry in visit.hits)
            end = start + (self.codec.wire_size((rows, channels)) if rows else 0)
            misses = sum(entry.length for _, entry in visit.misses)
            stop = end + misses * channels * self.store.dtype.itemsize
            identity = np.array([[samples[i], sizes[i]] for i in group], "<i8").tobytes()
            rounds.append(_Round(visit, slice(start, end), slice(end, stop), identity))
            place = aligned(stop)
        self._planned += 1
        room = len(samples) * (_ROUND_HEADER.size + self.codec.wire_size((0, channels)) + 2 * ALIGNMENT)
        room += len(samples) * width * channels * self.store.dtype.itemsize
        return DeltaPlan(tuple(shape), place, room, tuple(rounds), self._planned)

    def encode(
        self,
        x: Tensor,
        ids: Iterable[int] | Tensor | DeltaPlan,
        *,
        lengths: Sequence[int] | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """The wire of a microbatch; the store is what the receiver's will be.

        Args:
            x: float32, bfloat16 or float16, as for ``plan``. All elements that count are finite, also in the
                store's dtype.
            ids: of the samples, or what ``plan`` has returned for them.
            lengths: as for ``plan``; ignored with a plan.
            out: uint8 [wire_size], contiguous; receives the wire.

        Returns:
            uint8 [wire_size], on the device of x; ``out`` if it was given.

        Raises:
            ValueError: an argument does not fit, or an element is not finite.
        """
        check_dtype("x", x, ENCODED)
        plan = ids if isinstance(ids, DeltaPlan) else self.plan(ids, x.shape, lengths=lengths)
        check_shape("x", x, "the plan's shape", plan.shape)
        if out is None:
            out = torch.empty(plan.wire_size, dtype=torch.uint8, device=x.device)
        with self._undone_if_refused(plan, made=not isinstance(ids, DeltaPlan)):
            _check_wire("out", out, plan, x.device)
        self._take_turn(plan)
        samples = x.detach().reshape(*_row_shape(plan.shape))
        for part in plan.rounds:
            hits = [entry for _, entry in part.visit.hits]
            if hits:
                m = self.store.read(hits).to(x.device)
                rows = _gather(samples, part.visit.hits)
                wire = out[part.delta]
                if self._fused:
                    delta_encode_(rows, m, bits=self.bits, scale_dims=(0,), grid=self.grid, out=wire)
                else:
                    self.codec.encode(rows.float() - m.float(), out=wire)
                    self._add(wire, m)
                self.store.write(hits, m)
            full = out[part.full]
            if part.visit.misses:
                values = _gather(samples, part.visit.misses).to(self.store.dtype)
                if not bool(values.isfinite().all()):
                    raise ValueError(f"x must be finite in {self.store.dtype}, got NaN or infinity")
                full.view(self.store.dtype).copy_(values.view(-1))
                self.store.write([entry for _, entry in part.visit.misses], values)
            header = torch.frombuffer(bytearray(_round_header(part, full)), dtype=torch.uint8)
            out[part.delta.start - _ROUND_HEADER.size : part.delta.start].copy_(header)
            out[part.full.stop : aligned(part.full.stop)].zero_()
        return out

    def decode(
        self,
        wire: Tensor,
        ids: Iterable[int] | Tensor | DeltaPlan,
        shape: Sequence[int],
        *,
        lengths: Sequence[int] | None = None,
        dtype: torch.dtype = torch.float32,
        out: Tensor | None = None,
    ) -> Tensor:
        """What the receiver computes with: the stored values after the update.

        Args:
            wire: uint8 [wire_size], from ``encode``.
            ids, shape, lengths: as for ``plan``; or the plan instead of the ids.
            dtype: of the result.
            out: of shape and dtype, contiguous; receives the result.

        Returns:
            A tensor of shape and dtype; ``out`` if it was given.

        Raises:
            ValueError: the wire is altered, or the sender's samples are not these.
        """
        check_dtype("wire", wire, (torch.uint8,))
        plan = ids if isinstance(ids, DeltaPlan) else self.plan(ids, shape, lengths=lengths)
        with self._undone_if_refused(plan, made=not isinstance(ids, DeltaPlan)):
            _check_wire("wire", wire, plan, wire.device)
            if out is None:
                out = torch.empty(plan.shape, dtype=dtype, device=wire.device)
            check_dtype("out", out, (dtype,))
            check_shape("out", out, "shape", plan.shape)
            check_device("out", out, wire.device)
        self._take_turn(plan)
        samples = out.view(*_row_shape(plan.shape))
        for part in plan.rounds:
            header = wire[part.delta.start - _ROUND_HEADER.size : part.delta.start]
            if bytes(header.cpu().numpy()) != _round_header(part, wire[part.full]):
                raise ValueError(
                    f"wire must be as it was encoded, of these {len(part.visit.hits)} stored and "
                    f"{len(part.visit.misses)} new samples, got an altered one or one of others"
                )
            for found, values in (
                (part.visit.hits, self._updated(part, wire)),
                (part.visit.misses, wire[part.full].view(self.store.dtype).view(-1, plan.shape[-1])),
            ):
                entries = [entry for _, entry in found]
                self.store.write(entries, values)
                for (i, entry), rows in zip(
                    found, (rows for _, rows in parts_of(entries, values)), strict=True
                ):
                    samples[i, : entry.length].copy_(rows)
                    samples[i, entry.length :].zero_()
        return out

    def _updated(self, part: _Round, wire: Tensor) -> Tensor:
        m = self.store.read([entry for _, entry in part.visit.hits]).to(wire.device)
        if part.visit.hits and self._fused:
            delta_decode_(wire[part.delta], m)
        elif part.visit.hits:
            self._add(wire[part.delta], m)
        return m

    def _add(self, wire: Tensor, m: Tensor) -> None:
        """What both ends do with a delta."""
        moved = m.float() + self.codec.decode(wire, m.shape)
        most = torch.finfo(m.dtype).max  # a delta's rounding may lead beyond
        m.copy_(moved.clamp_(-most, most))

    @contextlib.contextmanager
    def _undone_if_refused(self, plan: DeltaPlan, *, made: bool) -> Iterator[None]:
        """A plan that was made for a call which is refused must not stand in the way of the next one."""
        try:
            yield
        except ValueError:
            if made:
                self._done = plan.serial
                self.store.invalidate(
                    [entry.sample for part in plan.rounds for _, entry in part.visit.misses]
                )
            raise

    def _take_turn(self, plan: DeltaPlan) -> None:
        if plan.serial != self._done + 1:
            raise ValueError(f"plans must be used once and in order, got {plan.serial} after {self._done}")
        self._done = plan.serial


def _row_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    return shape[0], math.prod(shape[1:-1]), shape[-1]


def _gather(samples: Tensor, found: Sequence[tuple[int, Entry]]) -> Tensor:
    if len(found) == samples.shape[0] and all(entry.length == samples.shape[1] for _, entry in found):
        return samples.flatten(0, 1)
    return torch.cat([samples[i, : entry.length] for i, entry in found])


def _round_header(part: _Round, full: Tensor) -> bytes:
    checksum = zlib.crc32(full.cpu().numpy().data, zlib.crc32(part.identity))
    return _ROUND_HEADER.pack(_ROUND, len(part.visit.hits), len(part.visit.misses), checksum)


def _occurrences(samples: Sequence[int]) -> list[list[int]]:
    """Positions of all first occurrences, of all second ones, and so on."""
    counts: dict[int, int] = {}
    groups: list[list[int]] = []
    for position, sample in enumerate(samples):
        count = counts[sample] = counts.get(sample, -1) + 1
        if count == len(groups):
            groups.append([])
        groups[count].append(position)
    return groups


def _check_wire(name: str, wire: Tensor, plan: DeltaPlan, device: torch.device) -> None:
    check_dtype(name, wire, (torch.uint8,))
    check_shape(name, wire, "[wire_size]", [plan.wire_size])
    check_device(name, wire, device)
    if not wire.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {list(wire.stride())}")
