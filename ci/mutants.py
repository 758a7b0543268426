#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Breaks one line of the kernels at a time, and shows which test of the suite notices.

    ci/mutants.py [--only PATTERN] [--new] [--again] [--jobs N] [--write docs/dev/mutants.md]

The list is tests/mutants.toml. Sources are broken in a copy, build/mutants/source, and built there, those of
GPU kernels for the emulator, beside the libpalmette.so that ci/build.sh has made. First all tests of the list
run on kernels that are whole: they must pass. Results are kept in build/mutants/results.json after each one:
a run that was stopped goes on where it was; a result holds until a source or the mutant changes. A page keeps
what it says of mutants that were not run. Exits with 1 if a mutant survives.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench import pages  # noqa: E402

LIST = ROOT / "tests" / "mutants.toml"
LIBRARY = ROOT / "python" / "palmette" / "lib" / "libpalmette.so"
PLACE = ROOT / "build" / "mutants"
SOURCE, BUILD, BUILT, RESULTS = (PLACE / name for name in ("source", "build", "lib", "results.json"))
COPIED = ("CMakeLists.txt", "version.txt", "cmake/**/*", "csrc/**/*")
EMULATORS = ("emulated", "emulated_check")  # the other backends are bodies of the CPU, in libpalmette.so
KINDS = ("index", "mask", "barrier", "scale")
TIMEOUT = 300  # seconds of a test run; what takes longer hangs


@dataclass(frozen=True)
class Mutant:
    kernel: str
    kind: str
    change: str  # in words
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    backends: str = "emulated"

    @property
    def line(self) -> int:
        """Of the first character that changes."""
        pairs = enumerate(zip(self.old, self.new, strict=False))
        same = next((i for i, (a, b) in pairs if a != b), min(len(self.old), len(self.new)))
        text = (ROOT / self.file).read_text()
        return text.count("\n", 0, text.index(self.old) + same) + 1

    @property
    def name(self) -> str:
        return f"{self.kernel} {self.kind} {self.file.rpartition('/')[2]}:{self.line}"


@dataclass(frozen=True)
class Edit:
    """What the copy leaves out, so that it compiles in seconds."""

    file: str
    old: str
    new: str


def read_list() -> tuple[list[Mutant], list[Edit]]:
    content: dict[str, list[dict[str, Any]]] = tomllib.loads(LIST.read_text())
    mutants = [Mutant(**{**entry, "tests": tuple(entry["tests"])}) for entry in content["mutant"]]
    return mutants, [Edit(**entry) for entry in content["lighter"]]


def faults(mutants: list[Mutant], edits: list[Edit]) -> Iterator[str]:
    """What is wrong with the list."""
    places: list[tuple[str, str, str]] = [(f"{m.kernel} ({m.change})", m.file, m.old) for m in mutants]
    for name, file, old in places + [("lighter", e.file, e.old) for e in edits]:
        if (count := (ROOT / file).read_text().count(old)) != 1:
            yield f"{name}: {file} must have its text once, got {count} times:\n{old}"
    for m in mutants:
        if m.kind not in KINDS:
            yield f"{m.kernel} ({m.change}): kind must be one of {', '.join(KINDS)}, got {m.kind}"
        if m.old == m.new or not m.tests:
            yield f"{m.kernel} ({m.change}): changes nothing, or names no test"


class Copy:
    """The sources, and the emulators built from them."""

    def __init__(self, edits: list[Edit], jobs: int) -> None:
        self.jobs = jobs
        self.texts = {
            str(path.relative_to(ROOT)): path.read_text()
            for pattern in COPIED
            for path in sorted(ROOT.glob(pattern))
            if path.is_file()
        }
        for edit in edits:
            self.texts[edit.file] = self.texts[edit.file].replace(edit.old, edit.new)
        self.digest = hashlib.sha256(json.dumps(self.texts).encode()).hexdigest()

    def restore(self) -> None:
        """Files that are the same keep their times: nothing that depends on them is compiled again."""
        for path in SOURCE.glob("**/*"):
            if path.is_file() and str(path.relative_to(SOURCE)) not in self.texts:
                path.unlink()
        for name, text in self.texts.items():
            path = SOURCE / name
            if not path.is_file() or path.read_text() != text:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)

    def configure(self) -> None:
        options = {
            "PALMETTE_EMULATOR": "ON",
            "PALMETTE_TEST_MODULE": "OFF",
            "PALMETTE_CUDA": "0",
            "PALMETTE_LIBRARY_DIR": BUILT,
            "Python_EXECUTABLE": sys.executable,
        }
        command = ["cmake", "-S", str(SOURCE), "-B", str(BUILD), "-G", "Ninja"]
        subprocess.run(
            [*command, *(f"-D{key}={value}" for key, value in options.items())],
            check=True,
            stdout=subprocess.DEVNULL,
        )

    def build(self, backends: str) -> subprocess.CompletedProcess[str]:
        targets = {
            f"palmette_{name}" if name in EMULATORS else "palmette_ops" for name in backends.split(",")
        }
        command = ["cmake", "--build", str(BUILD), "-j", str(self.jobs), "--target", *sorted(targets)]
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def library_for(backends: str) -> Path:
    """libpalmette.so in a folder that has these emulators and no others, which nobody builds now."""
    folder = PLACE / backends.replace(",", "+")
    folder.mkdir(exist_ok=True)
    names = backends.split(",")
    own = any(name not in EMULATORS for name in names)
    targets = [BUILT / f"libpalmette_{name}.so" for name in names if name in EMULATORS]
    for target in [BUILT / LIBRARY.name if own else LIBRARY, *targets]:
        if not (folder / target.name).is_symlink():
            (folder / target.name).symlink_to(target)
    return folder / LIBRARY.name


def run_tests(backends: str, tests: list[str], log: Path, timeout: int | None) -> tuple[str, str, str]:
    """(what happened, in which test, why). What: "passed", "failed", "ended: .." or "hangs"."""
    options = ["-x", "-v", "--tb=short", "-p", "no:cacheprovider", "--backends", backends]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT / "python"),
        "PALMETTE_LIBRARY": str(library_for(backends)),
    }
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *options, *tests],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(timeout)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            status = None
    output = log.read_text(errors="replace")
    started = re.findall(
        r"^(tests/[^:\n]+::.+?)(?: (?:PASSED|FAILED|SKIPPED|ERROR|Fatal) ?.*)?$", output, re.M
    )
    ended = re.findall(r"^(tests/[^:\n]+::.+?) (?:FAILED|ERROR)", output, re.M)
    reason = re.search(r"^E +(.+)$", output, re.M)
    why = reason[1] if reason else ""
    last = started[-1].strip() if started else ""
    if status == 0:
        return "passed", "", ""
    if status == 1 and ended:
        return "failed", ended[0], why
    if status is None:
        return "hangs", last, f"no result after {timeout} s"
    if status < 0:
        return f"ended: {signal.Signals(-status).name}", last, why
    raise RuntimeError(f"pytest exited with {status}; its output is in {log}")


def show_whole(copy: Copy, mutants: list[Mutant], results: dict[str, Any]) -> None:
    """All tests pass on kernels that are whole; those that were seen to are not run again."""
    for backends in sorted({m.backends for m in mutants}):
        key = f"whole {copy.digest} {backends}"
        seen: list[str] = results.setdefault(key, [])
        tests = sorted({test for m in mutants if m.backends == backends for test in m.tests} - set(seen))
        if not tests:
            continue
        print(f"whole kernels on {backends}: {len(tests)} tests", flush=True)
        if (done := copy.build(backends)).returncode:
            raise RuntimeError(f"the kernels do not compile:\n{done.stdout[-4000:]}")
        what, test, why = run_tests(backends, tests, PLACE / "whole.log", None)
        if what != "passed":
            raise RuntimeError(f"on whole kernels, {backends}: {what} {test} {why}")
        seen += tests
        keep(results)


def keep(results: dict[str, Any]) -> None:
    fresh = RESULTS.with_suffix(".new")
    fresh.write_text(json.dumps(results, indent=1))
    fresh.replace(RESULTS)


def key_of(copy: Copy, mutant: Mutant) -> str:
    """A result holds for these sources, whatever is said of the mutant in words."""
    content = asdict(mutant) | {"change": "", "kernel": "", "kind": ""}
    return hashlib.sha256((copy.digest + json.dumps(content)).encode()).hexdigest()


def caught_by(result: dict[str, str]) -> str:
    caught = f"`{result['test'].removeprefix('tests/')}`".replace("|", "\\|")
    if result["what"] == "passed":
        return "**nothing**"
    if result["what"] == "hangs":
        return f"{caught} (hangs)"
    if result["what"] != "failed":
        return f"{caught} (the process {result['what'].replace(':', ' with')})"
    return caught


def said(page: Path) -> dict[tuple[str, str, str], str]:
    """What a page says that caught each mutant, by kernel, kind and change."""
    rows = [line.strip("| ").split(" | ") for line in page.read_text().splitlines() if line.startswith("| ")]
    return {
        (kernel, kind, change): caught for kernel, kind, _, change, caught in (r for r in rows if len(r) == 5)
    }


def name_of(mutant: Mutant) -> tuple[str, str, str]:
    return mutant.kernel, mutant.kind, mutant.change


def table(mutants: list[Mutant], caught: dict[tuple[str, str, str], str]) -> str:
    rows = [["kernel", "kind", "place", "change", "caught by"]]
    for mutant in mutants:
        place = f"{mutant.file.removeprefix('csrc/')}:{mutant.line}"
        rows.append([mutant.kernel, mutant.kind, place, mutant.change, caught[name_of(mutant)]])
    return pages.table(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", help="a part of a mutant's name, or a pattern: 'attend_dq*', 'barrier'")
    parser.add_argument("--new", action="store_true", help="those that the page to be written does not have")
    parser.add_argument("--again", action="store_true", help="whatever has been found before")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="of the compiler")
    parser.add_argument("--write", type=Path, help="a page with the marks")
    arguments = parser.parse_args()
    mutants, edits = read_list()
    if wrong := list(faults(mutants, edits)):
        print("\n".join(wrong), file=sys.stderr)
        return 2
    if not LIBRARY.is_file():
        print(f"mutants: {LIBRARY} is missing: run ci/build.sh first", file=sys.stderr)
        return 2
    PLACE.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    copy = Copy(edits, arguments.jobs)
    only = arguments.only or ""
    chosen = [m for m in mutants if only in m.name or fnmatch(m.name, only)]
    written = {} if arguments.write is None else said(arguments.write)
    if arguments.new:
        chosen = [m for m in chosen if name_of(m) not in written]

    def known(mutant: Mutant) -> dict[str, str] | None:
        """One that survived is tried again: the tests may have become better."""
        result: dict[str, str] | None = results.get(key_of(copy, mutant))
        return result if result is not None and result["what"] != "passed" else None

    todo = [m for m in chosen if arguments.again or known(m) is None]
    if todo:
        copy.restore()
        copy.configure()
        show_whole(copy, todo, results)
    broken = 0
    for number, mutant in enumerate(todo, 1):
        print(f"[{number}/{len(todo)}] {mutant.name}: {mutant.change}", flush=True)
        text = copy.texts[mutant.file].replace(mutant.old, mutant.new)
        if text == copy.texts[mutant.file]:
            raise RuntimeError("the lighter copy does not have its text")
        (SOURCE / mutant.file).write_text(text)
        try:
            done = copy.build(mutant.backends)
            if done.returncode:
                broken += 1
                print(f"    does not compile:\n{done.stdout[-2000:]}", flush=True)
                continue
            log = PLACE / "mutant.log"
            what, test, why = run_tests(mutant.backends, list(mutant.tests), log, TIMEOUT)
        finally:
            copy.restore()
        results[key_of(copy, mutant)] = {"name": mutant.name, "what": what, "test": test, "why": why}
        keep(results)
        print(f"    {what} {test}\n    {why}", flush=True)

    found = [results.get(key_of(copy, m)) for m in mutants]
    survivors = [
        m for m, r in zip(mutants, found, strict=True) if m in chosen and r and r["what"] == "passed"
    ]
    for mutant in survivors:
        print(f"survives: {mutant.name}: {mutant.change}", file=sys.stderr)
    if arguments.write is not None:
        written |= {name_of(m): caught_by(r) for m, r in zip(mutants, found, strict=True) if r is not None}
        if missing := [m.name for m in mutants if name_of(m) not in written]:
            print(f"mutants: {len(missing)} have no result yet: {', '.join(missing)}", file=sys.stderr)
            return 2
        pages.write_between(arguments.write, "ci/mutants.py", "mutants", table(mutants, written))
    return 2 if broken else 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
