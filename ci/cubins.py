#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""What the compiler made of the CUDA kernels: registers, spills, instructions; from libpalmette_cuda.so.

    ci/cubins.py [--write docs/gpu.md]

Prints a table, or writes it between the marks in a page; fails when a kernel spills or misses the
instructions that it was written for. Needs cuobjdump and nvdisasm (on PyPI: nvidia-cuda-cuobjdump,
nvidia-cuda-nvdisasm) and c++filt.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench import pages  # noqa: E402

LIBRARY = ROOT / "python" / "palmette" / "lib" / "libpalmette_cuda.so"
SHOWN = ("HMMA", "LDSM", "LDGSTS", "FFMA", "MUFU", "SHFL")
SPILLS = ("STL", "LDL")  # stores to and loads from local memory


@dataclass
class Kernel:
    name: str
    arch: str
    registers: int = 0
    stack: int = 0
    instructions: Counter[str] = field(default_factory=Counter)

    @property
    def spills(self) -> int:
        return sum(self.instructions[name] for name in SPILLS)

    def faults(self) -> list[str]:
        wrong = [f"{self.spills} spills"] if self.spills or self.stack else []
        if "<Tensor" in self.name:
            wanted = ("HMMA", "LDSM", "LDGSTS")
        elif "<Scalar" in self.name:
            wanted = ("FFMA", "LDGSTS")
        else:
            wanted = ()
        return wrong + [f"no {name}" for name in wanted if not self.instructions[name]]


def tools() -> str | None:
    """PATH with cuobjdump and nvdisasm on it, or None."""
    places = [os.environ["PATH"]]
    places += [str(p.parent) for p in Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin/cuobjdump")]
    path = os.pathsep.join(places)
    wanted = ("cuobjdump", "nvdisasm", "c++filt")
    return path if all(shutil.which(name, path=path) for name in wanted) else None


def run(path: str, *command: str, text: str | None = None) -> str:
    environment = os.environ | {"PATH": path}
    program = shutil.which(command[0], path=path) or command[0]
    done = subprocess.run(
        [program, *command[1:]], input=text, capture_output=True, text=True, check=True, env=environment
    )
    return done.stdout


def read(library: Path, path: str) -> list[Kernel]:
    """Every kernel of every architecture in the library."""
    found: dict[tuple[str, str], Kernel] = {}
    arch = symbol = ""
    for line in run(path, "cuobjdump", "-res-usage", str(library)).splitlines():
        if match := re.match(r"arch = (\w+)", line):
            arch = match[1]
        elif match := re.match(r" Function (\S+):", line):
            symbol = match[1]
        elif match := re.search(r"REG:(\d+) STACK:(\d+)", line):
            found[symbol, arch] = Kernel(symbol, arch, int(match[1]), int(match[2]))
    for arch in sorted({arch for _, arch in found}):
        for line in run(path, "cuobjdump", "-sass", "-arch", arch, str(library)).splitlines():
            if match := re.match(r"\s+Function : (\S+)", line):
                symbol = match[1]
            elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9]+)", line):
                found[symbol, arch].instructions[match[1]] += 1
    names = run(path, "c++filt", text="\n".join(k.name for k in found.values())).splitlines()
    for kernel, name in zip(found.values(), names, strict=True):
        kernel.name = short(name)
    return sorted(found.values(), key=lambda k: (k.name, k.arch))


def short(name: str) -> str:
    """``attend_kernel<Tensor<bf16>, 128>`` of the whole signature."""
    name = re.sub(r"\((?!anonymous).*", "", name.replace("(anonymous namespace)::", "").removeprefix("void "))
    return re.sub(r"palmette::(gpu::)?|\((?:int|bool)\)", "", name)


def table(kernels: list[Kernel]) -> str:
    by_name: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        by_name.setdefault(kernel.name, []).append(kernel)
    archs = sorted({k.arch for k in kernels})
    head = ["kernel", *(f"registers {arch}" for arch in archs), "spills", *SHOWN]
    rows = [head]
    for name, builds in by_name.items():
        first = builds[0]
        counts = [str(first.instructions[i]) for i in SHOWN]
        rows.append(
            [f"`{name}`", *(str(k.registers) for k in builds), str(sum(k.spills for k in builds)), *counts]
        )
    return pages.table(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--library", type=Path, default=LIBRARY)
    parser.add_argument("--write", type=Path, help="a page with the marks")
    arguments = parser.parse_args()
    path = tools()
    if path is None:
        print("cubins: cuobjdump, nvdisasm or c++filt is missing", file=sys.stderr)
        return 2
    kernels = read(arguments.library, path)
    text = table(kernels)
    if arguments.write is None:
        print(text)
    else:
        pages.write_between(arguments.write, "ci/cubins.py", "cubins", text)
    faults = [f"{k.name} ({k.arch}): {', '.join(k.faults())}" for k in kernels if k.faults()]
    print("\n".join(faults), file=sys.stderr, end="\n" if faults else "")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
