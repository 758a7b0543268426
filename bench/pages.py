# SPDX-License-Identifier: Apache-2.0
"""Tables that programs write into the pages of docs/."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


def table(rows: Sequence[Sequence[str]]) -> str:
    """Markdown; the first row is the head."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def replace(target: Path, text: str) -> None:
    """The file is the old one or the new one at any time."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(target)


def publish(text: str, target: Path | None) -> None:
    """Prints a page, and writes it where it is wanted."""
    print(text)
    if target is not None:
        replace(target, text)


def write_between(page: Path, program: str, mark: str, text: str) -> None:
    """Puts text between a page's marks, ``<!-- mark: begin (program) -->`` and ``<!-- mark: end -->``.

    Raises:
        ValueError: the page has no such marks.
    """
    begin, end = f"<!-- {mark}: begin ({program}) -->", f"<!-- {mark}: end -->"
    before, opened, rest = page.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not opened or not closed:
        raise ValueError(f"{page} must have the marks {begin} and {end}")
    replace(page, f"{before}{begin}\n{text}\n{end}{after}")
