# SPDX-License-Identifier: Apache-2.0
"""Bytes of text that every Python has: the standard library's sources and the topics of its documentation."""

from __future__ import annotations

import hashlib
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .draws import generator_for

SEPARATOR = 256  # the token before each document
VOCAB_SIZE = 257

# not code that people wrote to be read: tests, generated tables, packages that were installed besides
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
_HELD_OUT = 16  # one document in so many


@dataclass(frozen=True)
class Corpus:
    """Text as tokens: bytes, and ``SEPARATOR`` before each document.

    Attributes:
        train, held_out: int16 [tokens]; a document is in one of them.
        documents: How many there are in each.
        digest: SHA-256 of both.
    """

    train: Tensor
    held_out: Tensor
    documents: tuple[int, int]
    digest: str

    def batch(self, step: int, batch: int, context: int, seed: int) -> Tensor:
        """Training windows of one step: a function of its arguments, so that a resumed run goes on exactly.

        Returns:
            int64 [batch, context + 1], each from a random place.
        """
        generator = generator_for("text", seed, step)
        starts = torch.randint(self.train.numel() - context, (batch,), generator=generator)
        return self.train[starts[:, None] + torch.arange(context + 1)].long()

    def held_out_windows(self, count: int, context: int) -> Tensor:
        """Evenly spread windows of the held-out text, int64 [count, context + 1].

        Raises:
            ValueError: the held-out text is shorter than a window.
        """
        room = self.held_out.numel() - context - 1
        if room < 0:
            raise ValueError(
                f"context must be less than the held-out text's {self.held_out.numel()} tokens, got {context}"
            )
        starts = torch.linspace(0, room, count, dtype=torch.float64).long()
        return self.held_out[starts[:, None] + torch.arange(context + 1)].long()


def documents() -> Iterator[tuple[str, bytes]]:
    """Name and text of each document, in a fixed order: sources by path, then topics by name."""
    root = Path(sysconfig.get_path("stdlib"))
    sources = sorted(
        (path.relative_to(root).as_posix(), path)
        for path in root.rglob("*.py")
        if not _SKIPPED.intersection(path.relative_to(root).parts)
    )
    for name, path in sources:
        yield name, path.read_bytes()
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield f"topic {name}", topics[name].encode()


def load_corpus(limit: int | None = None) -> Corpus:
    """Read the text and split it by document: the name of a document decides where it goes.

    Args:
        limit: Bytes to read, about; default: all.

    Returns:
        The corpus.

    Raises:
        ValueError: there is no text: a Python without its sources.
    """
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    total = 0
    for name, text in documents():
        if limit is not None and total >= limit and all(parts):
            break
        total += len(text)
        tokens = torch.empty(len(text) + 1, dtype=torch.int16)
        tokens[0] = SEPARATOR
        if text:
            tokens[1:] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        parts[zlib.crc32(name.encode()) % _HELD_OUT == 0].append(tokens)
    if not all(parts):
        raise ValueError("the standard library must be there as .py files, got a Python without them")
    train, held_out = (torch.cat(some) for some in parts)
    digest = hashlib.sha256(train.numpy().tobytes() + b"|" + held_out.numpy().tobytes()).hexdigest()
    return Corpus(train, held_out, (len(parts[0]), len(parts[1])), digest)


def as_text(tokens: Tensor) -> str:
    """Tokens [N] as text that a terminal can show: a separator is U+241E, what is not printable U+FFFD."""
    record = "\x1e"  # of ASCII, which has a picture of its own in Unicode
    shown = bytes(ord(record) if token == SEPARATOR else token for token in tokens.tolist())
    text = shown.decode("utf-8", errors="replace").replace(record, "\u241e")
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
