# SPDX-License-Identifier: Apache-2.0
"""No body of the kernels leaks code into another.

The linker keeps one copy of a weak symbol (an inline function or template with external linkage). If that
copy came from the AVX-512 objects, every other body would run it and die of an illegal instruction on a
smaller CPU.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from palmette import _library

BUILD = Path(os.environ.get("PALMETTE_BUILD_DIR", Path(__file__).parent.parent / "build"))
OBJECTS = {
    isa: sorted(BUILD.glob(f"CMakeFiles/palmette_{isa}.dir/**/*.o"))
    for isa in ("scalar", "avx2", "avx2x16", "avx512")
}
PAIRS = [(isa, path) for isa, paths in OBJECTS.items() for path in paths]
SHARED = "WwVvu"  # weak function, weak object, unique global: nm's letters for what the linker merges

pytestmark = [
    pytest.mark.skipif(shutil.which("nm") is None, reason="nm (binutils) is not installed"),
    pytest.mark.skipif(not PAIRS, reason=f"no object files in {BUILD.name}/: not an editable installation"),
]


def symbols(path: Path, *options: str) -> list[tuple[str, str]]:
    text = subprocess.run(
        ["nm", "-C", *options, str(path)], capture_output=True, text=True, check=True
    ).stdout
    return [
        (kind, name)
        for _, kind, name in (line.split(maxsplit=2) for line in text.splitlines() if line.strip())
    ]


@pytest.mark.parametrize(("isa", "path"), PAIRS, ids=[f"{isa}-{p.parent.name}-{p.name}" for isa, p in PAIRS])
def test_no_shared_symbol_outside_the_namespace_of_the_body(isa, path):
    inside = f"palmette::{isa}::"
    shared = [name for kind, name in symbols(path, "--defined-only") if kind in SHARED and inside not in name]
    assert shared == []


def test_every_body_has_the_same_kernels():
    names = {isa: [p.name for p in paths] for isa, paths in OBJECTS.items() if paths}
    assert all(kernels == names["scalar"] for kernels in names.values())


def test_library_exports_nothing_of_its_own():
    own = [name for kind, name in symbols(_library.LIBRARY, "-D", "--defined-only") if "palmette" in name]
    assert own == []
