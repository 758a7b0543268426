# SPDX-License-Identifier: Apache-2.0
"""What the commands that run long share: directories of results, progress, and how they stop and go on."""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch

from ..integrations._extras import MissingExtraError, require

INTERRUPTED = 130  # the exit status of a program that SIGINT ended

Progress = Callable[[str, int, int], AbstractContextManager[Callable[[int, str], None]]]


class StoppedError(Exception):
    """Training was stopped before its end, as asked for; what it had is saved."""


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Have ``write`` make a file beside ``path``, and put it in its place once it is whole and on disk."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        write(temporary)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write JSON; the file is the old one or the new one at any time."""
    write_atomically(path, lambda file: file.write_text(json.dumps(content, indent=1) + "\n"))


def claim(directory: Path, options: dict[str, Any]) -> None:
    """Make a directory a run's, or see that it is.

    Raises:
        ValueError: it holds a run with other options, or something else.
    """
    options = json.loads(json.dumps(options))
    file = directory / "options.json"
    if file.exists():
        found = json.loads(file.read_text())
        differences = [
            f"{name}: {found.get(name)} there, {options.get(name)} now"
            for name in sorted({*options, *found})
            if found.get(name) != options.get(name)
        ]
        if differences:
            raise ValueError(
                f"--out must be a directory of a run with the same options, got {directory} "
                f"({'; '.join(differences)}): name another one, or remove it"
            )
        return
    begun = f".{file.name}.partial"  # of a process that was killed while it was here
    if directory.exists() and any(path.name != begun for path in directory.iterdir()):
        raise ValueError(f"--out must be a new or empty directory, or one of an earlier run, got {directory}")
    directory.mkdir(parents=True, exist_ok=True)
    write_json(file, options)


class Budget:
    """Steps that may still be taken before training stops as if it had been interrupted.

    Args:
        steps: How many; None for any number.
    """

    def __init__(self, steps: int | None) -> None:
        self.left = steps

    def take(self) -> None:
        """Count a step.

        Raises:
            StoppedError: there is none left.
        """
        if self.left is not None:
            if self.left == 0:
                raise StoppedError
            self.left -= 1


@contextmanager
def bar(title: str, total: int, done: int) -> Iterator[Callable[[int, str], None]]:
    """A progress bar of ``total`` steps that begins at ``done``."""
    tqdm = require("tqdm", "palmette", install="'palmette[train]'")
    with tqdm.tqdm(desc=title, total=total, initial=done, file=sys.stderr, dynamic_ncols=True) as shown:

        def tick(steps: int, note: str) -> None:
            shown.set_postfix_str(note, refresh=False)
            shown.update(steps)

        yield tick


def run_parser(name: str, description: str, *, quick: str, unit: str) -> argparse.ArgumentParser:
    """A parser of the options that all of them have.

    Args:
        name: of the command.
        description: of what it does.
        quick: what ``--quick`` does.
        unit: what ``--stop-after`` counts, for instance ``"steps"``.
    """
    parser = argparse.ArgumentParser(prog=f"python -m palmette {name}", description=description)
    parser.add_argument("--quick", action="store_true", help=f"{quick}: to see that all works")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(f"{name}-out"),
        help="where checkpoints and results go; a run that is there goes on (default: %(default)s)",
    )
    parser.add_argument(
        "--stop-after",
        type=int,
        metavar=unit.upper(),
        help=f"stop after so many more {unit}; the next call goes on",
    )
    return parser


def use_threads(count: int | None) -> None:
    """Has PyTorch take so many threads; None: as many as it would.

    Raises:
        ValueError: count is not positive.
    """
    if count is None:
        return
    if count < 1:
        raise ValueError(f"--threads must be positive, got {count}")
    torch.set_num_threads(count)


def keep_freed_memory() -> None:
    """Has the C library keep memory that is freed for what is allocated next.

    Every step frees its activations and allocates those of the next. By default glibc gives the pages back
    in between, and the next step waits until the kernel has cleared new ones: 4 to 11% of the time of an
    update of SmolLM2 on two cores. For the process's whole life; nothing happens where the C library is
    another one.
    """
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, -1)


def run_command(
    name: str,
    parse: Callable[[Sequence[str] | None], argparse.Namespace],
    run: Callable[[argparse.Namespace], int],
    arguments: Sequence[str] | None,
    errors: tuple[type[Exception], ...] = (),
) -> int:
    """Run ``python -m palmette NAME``; returns the exit status.

    Args:
        name: Of the command.
        parse: Its command line.
        run: What it does; returns the exit status.
        arguments: None: those of the process.
        errors: What is told in a sentence, besides OSError, ValueError and a missing package.
    """
    options = parse(arguments)
    told: tuple[type[Exception], ...] = (MissingExtraError, OSError, ValueError, *errors)
    try:
        return run(options)
    except (KeyboardInterrupt, StoppedError) as error:
        again = _without_stop(list(sys.argv[2:] if arguments is None else arguments))
        why = "stopped" if isinstance(error, StoppedError) else "interrupted"
        command = shlex.join(["python", "-m", "palmette", name, *again])
        print(f"\npalmette {name}: {why}; to go on: {command}", file=sys.stderr)
        return INTERRUPTED
    except told as error:
        print(f"palmette {name}: {error}", file=sys.stderr)
        return 1


def _without_stop(arguments: list[str]) -> list[str]:
    """The command line of the same run to its end."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if skip or argument.startswith("--stop-after="):
            skip = False
        elif argument == "--stop-after":
            skip = True
        else:
            kept.append(argument)
    return kept
