# SPDX-License-Identifier: Apache-2.0
"""AQ-SGD: both ends of a pipeline's edge remember the activations of every sample, and only changes travel.

The sender and the receiver each have an ``ActivationStore`` with the same content. A sample that is new is
sent in full and stored; later the sender encodes what has changed since, both add the decoded change to what
they have, and the receiver computes with that. So the error of quantization shrinks while the model settles.

Everything that decides what travels (which samples are stored, which one is dropped for another) follows from
the sample ids alone, in the order of their visits; both ends know them, so both know the size of every wire
before it is sent.

Source: AQ-SGD (arXiv 2206.01299), algorithm 1; its public code keeps one file for each sample and side.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import operator
import os
import struct
import tempfile
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex

import numpy as np
import torch
from torch import Tensor

from palmette._checks import check_at_least, check_dtype
from palmette._codec_checks import ENCODED

from .long_runs import write_atomically

_SCRATCH = b"PLMTROWS"  # begins the mapped file, so that no other file is taken for one
_SNAPSHOT = b"PLMTSTO1"
_ROUND = b"PLMS"
_ROUND_HEADER = struct.Struct("<4sIII")
_ALIGNMENT = 16  # of a wire's sections


@dataclass(slots=True)
class Entry:
    """A stored sample. ``checksum`` is None from the visit that made it until its rows are written."""

    sample: int
    slot: int
    length: int
    checksum: int | None = None


class Visit(NamedTuple):
    """Distinct samples that were looked up together, by their positions in the list of ids.

    Attributes:
        hits: Stored with the same length.
        misses: New, or stored with another length; they have room now, and no rows yet.
    """

    hits: list[tuple[int, Entry]]
    misses: list[tuple[int, Entry]]


class ActivationStore:
    """The activations of samples, by sample id, in a memory-mapped file of slots of one size.

    A full store drops the sample whose last visit is the longest ago; a visit looks up its samples in the
    order of the list, the stored ones before the new ones. The file is scratch: its content is lost with the
    process, what lasts is what ``save`` has written. Use it from one thread; only ``prefetch`` may be called
    from others.

    Args:
        file: where the slots are: made here with its whole size on disk, so that a full disk shows now; a
            file that an earlier store has left is replaced. Default: an unnamed temporary file.
        capacity: samples that fit.
        slot_shape: ``(tokens, channels)`` of the longest sample.
        dtype: what activations are stored in: float16, bfloat16 or float32. Both ends compute with the
            stored values, so it is part of the result.

    Raises:
        ValueError: an argument is out of range.
        FileExistsError: ``file`` is not an activation store.
        OSError: the disk has not enough room.
    """

    def __init__(
        self,
        file: str | os.PathLike[str] | None = None,
        *,
        capacity: int,
        slot_shape: tuple[int, int],
        dtype: torch.dtype = torch.float16,
    ) -> None:
        check_at_least(1, capacity=capacity)
        if not isinstance(slot_shape, Sequence) or len(slot_shape) != 2:
            raise ValueError(f"slot_shape must be (tokens, channels), got {slot_shape!r}")
        check_at_least(1, tokens=slot_shape[0], channels=slot_shape[1])
        if dtype not in ENCODED:
            raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
        self.capacity = capacity
        self.slot_shape = (slot_shape[0], slot_shape[1])
        self.dtype = dtype
        self._row_bytes = slot_shape[1] * dtype.itemsize
        self._slot_bytes = slot_shape[0] * self._row_bytes
        self._map = _scratch_file(file, mmap.PAGESIZE + capacity * self._slot_bytes)
        rows = torch.frombuffer(self._map, dtype=dtype, offset=mmap.PAGESIZE)
        self._rows = rows.view(capacity, *self.slot_shape)
        self._entries: OrderedDict[int, Entry] = OrderedDict()  # the least recently visited first
        self._free = list(range(capacity - 1, -1, -1))

    def __repr__(self) -> str:
        """What both ends of an edge must agree on."""
        name = str(self.dtype).removeprefix("torch.")
        return f"ActivationStore(capacity={self.capacity}, slot_shape={self.slot_shape}, dtype={name})"

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, sample: object) -> bool:
        return sample in self._entries

    def __iter__(self) -> Iterator[int]:
        """Ids, the least recently visited first: in the order in which they would be dropped."""
        return iter(list(self._entries))

    def __getitem__(self, sample: int) -> Tensor:
        """A copy of what is stored: [length, channels], in the store's dtype.

        Raises:
            KeyError: it is not stored.
        """
        return self.read([self._entries[sample]])

    # ---- visits

    def visit(self, ids: Iterable[int] | Tensor, lengths: Sequence[int]) -> Visit:
        """Looks up samples, makes room for new ones, and notes that these were used last.

        The same visits in the same order leave two stores with the same samples and the same answers.

        Args:
            ids: distinct sample ids, int64; at most ``capacity``.
            lengths: tokens of each sample, 1 .. ``slot_shape[0]``.

        Raises:
            ValueError: ids or lengths do not fit; the store is unchanged then.
        """
        samples = sample_ids(ids)
        if len(set(samples)) != len(samples):
            raise ValueError(f"ids must be distinct, got {samples}")
        if len(samples) > self.capacity:
            raise ValueError(f"ids must be at most capacity = {self.capacity}, got {len(samples)}")
        if len(lengths) != len(samples):
            raise ValueError(f"lengths must be one per id, {len(samples)}, got {len(lengths)}")
        for length in lengths:
            if not 1 <= length <= self.slot_shape[0]:
                raise ValueError(f"lengths must be in [1, {self.slot_shape[0]}], got {length}")
        found = {sample: self._entries[sample] for sample in samples if sample in self._entries}
        for sample in found:
            self._entries.move_to_end(sample)
        visit = Visit([], [])
        for position, (sample, length) in enumerate(zip(samples, lengths, strict=True)):
            entry = found.get(sample)
            if entry is None:
                if not self._free:
                    self._drop(next(iter(self._entries)))
                slot = self._free.pop()
            elif entry.length == length:
                visit.hits.append((position, entry))
                continue
            else:
                slot = entry.slot
            # always a new entry: an earlier visit whose rows are still to be written has the old one
            self._entries[sample] = Entry(sample, slot, length)
            visit.misses.append((position, self._entries[sample]))
        return visit

    def read(self, entries: Sequence[Entry]) -> Tensor:
        """A copy of the rows of visited samples, one below the other: [rows, channels].

        Raises:
            ValueError: a sample has no rows, because a step failed between its visit and ``write``.
        """
        for entry in entries:
            if entry.checksum is None:
                raise ValueError(
                    f"sample {entry.sample} must be written before it is read, got a store that a failed "
                    f"step has left: load a checkpoint, or invalidate the sample at both ends"
                )
        rows = torch.empty(sum(entry.length for entry in entries), self.slot_shape[1], dtype=self.dtype)
        for entry, part in parts_of(entries, rows):
            part.copy_(self._rows[entry.slot, : entry.length])
        return rows

    def write(self, entries: Sequence[Entry], rows: Tensor) -> None:
        """Stores the rows of visited samples: [rows, channels], in the store's dtype, on any device."""
        for entry, part in parts_of(entries, rows):
            self._rows[entry.slot, : entry.length].copy_(part)
            entry.checksum = zlib.crc32(self._bytes(entry))

    def prefetch(self, ids: Iterable[int] | Tensor) -> None:
        """Asks the system to read the rows of these samples from disk, and does not wait for it.

        What is stored and which sample is dropped next stay as they are; ids that are not stored are ignored.
        """
        for sample in sample_ids(ids):
            entry = self._entries.get(sample)
            if entry is not None:
                start = self._start(entry)
                page = start - start % mmap.PAGESIZE
                end = start + entry.length * self._row_bytes
                self._map.madvise(mmap.MADV_WILLNEED, page, end - page)

    def _start(self, entry: Entry) -> int:
        return mmap.PAGESIZE + entry.slot * self._slot_bytes

    def _bytes(self, entry: Entry) -> memoryview:
        start = self._start(entry)
        return memoryview(self._map)[start : start + entry.length * self._row_bytes]

    def _drop(self, sample: int) -> None:
        self._free.append(self._entries.pop(sample).slot)

    # ---- what both ends compare

    def table(self) -> Tensor:
        """[n, 3] int64: id, length and checksum (-1: no rows yet) of each sample, as ``iter`` orders them."""
        rows = [
            (e.sample, e.length, -1 if e.checksum is None else e.checksum) for e in self._entries.values()
        ]
        return torch.tensor(rows, dtype=torch.int64).view(-1, 3)

    def digest(self, ids: Iterable[int] | Tensor | None = None) -> int:
        """64 bits that are equal for equal stores: samples, lengths, values, and the order of their use.

        Checksums of rows are computed as they are written, so this reads no rows.

        Args:
            ids: only of these samples, in this order, stored or not. Default: of all.
        """
        table = self.table().numpy()
        if ids is not None:
            stored = {row[0]: row for row in table.tolist()}
            rows = [stored.get(sample, (sample, 0, 0)) for sample in sample_ids(ids)]
            table = np.array(rows, np.int64).reshape(-1, 3)
        return int.from_bytes(
            hashlib.blake2b(table.astype("<i8").tobytes(), digest_size=8).digest(), "little"
        )

    def verify(self) -> list[int]:
        """Reads everything; returns the ids whose rows are not what was written."""
        return sorted(e.sample for e in self._entries.values() if e.checksum != zlib.crc32(self._bytes(e)))

    def invalidate(self, ids: Iterable[int] | Tensor) -> None:
        """Forgets these samples, so that their next visit sends them in full. Both ends have to."""
        for sample in sample_ids(ids):
            if sample in self._entries:
                self._drop(sample)

    def repair(self, table: Tensor) -> list[int]:
        """Makes this store equal to another one, which is given this one's table at the same time.

        Samples that differ are forgotten by both; the rest is dropped in the order of ids.

        Args:
            table: the other store's ``table()``.

        Returns:
            The ids that one of the stores or both had, and both have no more; ascending.
        """
        own, other = ({row[0]: row[1:] for row in t.tolist()} for t in (self.table(), table))
        differing = sorted(
            sample
            for sample in own.keys() | other.keys()
            if own.get(sample) != other.get(sample) or -1 in (own[sample][1], other[sample][1])
        )
        self.invalidate(differing)
        self._entries = OrderedDict(sorted(self._entries.items()))
        return differing

    # ---- checkpoints

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes everything to a file, which is the old one or the whole new one at any time.

        Raises:
            ValueError: a step is not finished, or has failed, so that a sample has no rows.
        """
        path = Path(path)
        for entry in self._entries.values():
            if entry.checksum is None:
                raise ValueError(f"the store must be between two steps, got no rows of sample {entry.sample}")
        options = {
            "capacity": self.capacity,
            "slot_shape": list(self.slot_shape),
            "dtype": str(self.dtype).removeprefix("torch."),
        }
        header = json.dumps(options).encode()
        table = self.table().numpy().astype("<i8").tobytes()
        head = struct.pack("<8sQQ", _SNAPSHOT, len(header), len(self._entries)) + header + table

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:
                file.write(head)
                file.write(struct.pack("<I", zlib.crc32(head)))
                for entry in self._entries.values():
                    file.write(self._bytes(entry))

        write_atomically(path, write)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, file: str | os.PathLike[str] | None = None
    ) -> ActivationStore:
        """The store that ``save`` has written, to the bit, also in the order of use.

        Args:
            path: what ``save`` has written; it is only read.
            file: of the new store's slots, as for the class.

        Raises:
            ValueError: the file is cut off, altered or something else.
        """
        with Path(path).open("rb") as saved:
            prefix = saved.read(24)
            if len(prefix) < 24 or prefix[:8] != _SNAPSHOT:
                raise ValueError(f"path must be a saved activation store, got {str(path)!r}")
            _, header_size, count = struct.unpack("<8sQQ", prefix)
            rest = os.fstat(saved.fileno()).st_size - 28
            if header_size + 24 * count > rest:
                raise ValueError(f"{str(path)!r} must be whole, got a file that is cut off")
            body = saved.read(header_size + 24 * count)
            if saved.read(4) != struct.pack("<I", zlib.crc32(prefix + body)):
                raise ValueError(f"{str(path)!r} must be as it was saved, got an altered header")
            options: dict[str, Any] = json.loads(body[:header_size])
            store = cls(
                file,
                capacity=options["capacity"],
                slot_shape=tuple(options["slot_shape"]),
                dtype=getattr(torch, options["dtype"]),
            )
            for sample, length, checksum in np.frombuffer(body[header_size:], "<i8").reshape(-1, 3).tolist():
                entry = store._entries[sample] = Entry(sample, store._free.pop(), length, checksum)
                if saved.readinto(store._bytes(entry)) != length * store._row_bytes:
                    raise ValueError(f"{str(path)!r} must be whole, got a file that is cut off")
            if saved.read(1):
                raise ValueError(f"{str(path)!r} must be as it was saved, got a longer file")
            altered = store.verify()
        if altered:
            raise ValueError(
                f"{str(path)!r} must be as it was saved, got altered rows of sample {altered[0]}"
            )
        return store


def sample_ids(ids: Iterable[int] | Tensor) -> list[int]:
    """Ids as integers, from a list or a one-dimensional tensor of int32 or int64."""
    if isinstance(ids, Tensor):
        check_dtype("ids", ids, (torch.int32, torch.int64))
        if ids.dim() != 1:
            raise ValueError(f"ids must be [B], got {list(ids.shape)}")
        result: list[int] = ids.tolist()
        return result
    samples = []
    for sample in ids:
        if not isinstance(sample, SupportsIndex) or isinstance(sample, bool):
            raise ValueError(f"ids must be 64-bit integers, got {sample!r}")
        samples.append(operator.index(sample))
        if not -(2**63) <= samples[-1] < 2**63:
            raise ValueError(f"ids must be 64-bit integers, got {sample!r}")
    return samples


def parts_of(entries: Sequence[Entry], rows: Tensor) -> Iterator[tuple[Entry, Tensor]]:
    return zip(entries, rows.split([entry.length for entry in entries]), strict=True)


def _scratch_file(file: str | os.PathLike[str] | None, size: int) -> mmap.mmap:
    """So many bytes of a new file, mapped. The file has its name only when it is whole."""
    if file is None:
        with tempfile.TemporaryFile() as unnamed:
            os.posix_fallocate(unnamed.fileno(), 0, size)
            return mmap.mmap(unnamed.fileno(), size)
    path = Path(file)
    try:
        with path.open("rb") as existing:
            if existing.read(len(_SCRATCH)) != _SCRATCH:
                raise FileExistsError(f"file must be new or an activation store, got {str(path)!r}")
    except FileNotFoundError:
        pass
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with temporary.open("w+b") as opened:
            os.posix_fallocate(opened.fileno(), 0, size)
            mapped = mmap.mmap(opened.fileno(), size)
        mapped[: len(_SCRATCH)] = _SCRATCH
        temporary.replace(path)  # a process that still has the old one mapped keeps it
    finally:
        temporary.unlink(missing_ok=True)
    return mapped
