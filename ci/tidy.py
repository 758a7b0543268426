#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""clang-tidy over build/compile_commands.json: each file once, kernels with the flags of one body."""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GCC_ONLY = ("-fno-semantic-interposition", "-Wno-psabi")


def main() -> int:
    commands = json.loads((ROOT / "build" / "compile_commands.json").read_text())
    chosen: dict[str, dict[str, str]] = {}
    for entry in commands:
        name = os.path.relpath(entry["file"], ROOT)
        if name.endswith(".cu"):
            continue  # their checks are the compilers' and the emulator's
        if name.startswith("csrc/") and (name not in chosen or "palmette_avx2.dir" in entry["command"]):
            for flag in GCC_ONLY:
                entry["command"] = entry["command"].replace(flag, "")
            chosen[name] = entry
    database = ROOT / "build" / "tidy"
    database.mkdir(exist_ok=True)
    (database / "compile_commands.json").write_text(json.dumps(list(chosen.values())))

    def check(name: str) -> tuple[str, int, str]:
        command = ["clang-tidy", "--quiet", "-p", str(database), str(ROOT / name)]
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        noise = re.compile(
            r"^\d+ warnings? (and \d+ errors? )?generated\.$|^Suppressed |^Use -header-filter", re.M
        )
        errors = "\n".join(line for line in result.stderr.splitlines() if not noise.match(line))
        return name, result.returncode, (result.stdout + (errors if result.returncode else "")).strip()

    failed = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, status, text in pool.map(check, sorted(chosen)):
            if status or text:
                failed += 1
                print(f"{name}:\n{text}")
    print(f"clang-tidy: {len(chosen)} files, {failed} with findings")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
