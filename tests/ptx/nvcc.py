# SPDX-License-Identifier: Apache-2.0
"""Compiles CUDA to PTX. Results are kept, by a hash of all that they depend on."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
CACHE = Path(os.environ.get("PALMETTE_BUILD_DIR", ROOT / "build")) / "ptx"


@functools.cache
def find_nvcc() -> str | None:
    """nvcc on the PATH, or in the toolkit that CUDA_HOME or CUDA_PATH names."""
    homes = (os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH"))
    return shutil.which("nvcc") or next(
        filter(None, (shutil.which("nvcc", path=f"{h}/bin") for h in homes if h)), None
    )


@functools.cache
def _version(nvcc: str) -> str:
    return subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout


def _included(source: Path, directories: list[Path]) -> list[Path]:
    """The source and what it includes in quotes, directly or not."""
    found, left = [source], [source]
    while left:
        path = left.pop()
        for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(), re.M):
            places = (directory / name for directory in (path.parent, *directories))
            there = next((place for place in places if place.is_file()), None)
            if there is not None and there not in found:
                found.append(there)
                left.append(there)
    return found


def compile_ptx(
    source: str | Path,
    include: Iterable[str | Path] = (),
    defines: Mapping[str, str | int] | None = None,
    arch: str = "sm_80",
    options: Iterable[str] = (),
) -> str:
    """The PTX of a .cu file."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise FileNotFoundError("nvcc is not on the PATH")
    source, directories = Path(source), [Path(directory) for directory in include]
    flags = ["-ptx", f"-arch={arch}", "-O3", "-std=c++20", *options]
    flags += [f"-D{name}={value}" for name, value in (defines or {}).items()]
    digest = hashlib.sha256(repr((_version(nvcc), source.name, flags)).encode())
    for path in _included(source, directories):
        digest.update(path.name.encode() + path.read_bytes())
    CACHE.mkdir(parents=True, exist_ok=True)
    kept = CACHE / f"{source.stem}-{digest.hexdigest()[:24]}.ptx"
    if not kept.exists():
        partial = kept.with_suffix(f".{os.getpid()}")
        command = [
            nvcc,
            *flags,
            *(f"-I{directory}" for directory in directories),
            "-o",
            str(partial),
            str(source),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
        partial.replace(kept)
    return kept.read_text()
