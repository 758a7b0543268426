# SPDX-License-Identifier: Apache-2.0
"""Defects put into PTX, one at a time: a test of a kernel that none of them escapes is worth something."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from .machine import executed_lines
from .parser import Module
from .syntax import PtxError


@dataclass(frozen=True)
class Mutation:
    """A replacement in the text of a kernel: everywhere at once, or at each place that matches in turn."""

    name: str
    pattern: str
    replacement: str | Callable[[re.Match[str]], str]
    sites: Literal["all", "each"] = "all"

    def apply(
        self, text: str, start: int, stop: int, lines: Container[int], most: int
    ) -> Iterator[tuple[str, str]]:
        """Names and texts of the mutants: of what is between `start` and `stop`, and in `lines`.

        Of more than `most` sites, some are taken that are spread evenly.
        """
        matches = [
            match
            for match in re.compile(self.pattern).finditer(text, start, stop)
            if text.count("\n", 0, match.start()) + 1 in lines
        ]
        if self.sites == "all":
            groups = [matches] if matches else []
        else:
            count = min(len(matches), most)
            groups = [[matches[i * len(matches) // count]] for i in range(count)]
        for group in groups:
            mutant = text
            for match in reversed(group):
                new = (
                    match.expand(self.replacement)
                    if isinstance(self.replacement, str)
                    else self.replacement(match)
                )
                mutant = mutant[: match.start()] + new + mutant[match.end() :]
            where = f" ({' '.join(group[0].group().split())})" if self.sites == "each" else ""
            yield self.name + where, mutant


_MMA = r"(mma\.sync\S*\s+\{[^}]*\},\s*)"
_A = r"\{(%\w+), (%\w+), (%\w+), (%\w+)\}"
_COPY = r"(cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], 16), (%\w+|\d+);"
_BARRIER = r"bar\.(sync|arrive) \t?(%\w+|\d+), (%\w+|\d+);"


# barrier n + 1 for warps of odd numbers: were it for all, a kernel may still be right
_OTHER_BARRIER = (
    r"{ .reg .b32 %mutant; mov.u32 %mutant, %warpid; and.b32 %mutant, %mutant, 1; "
    r"add.s32 %mutant, %mutant, \2; bar.\1 %mutant, \3; }"
)
_OTHER_COUNT = r"{{ .reg .b32 %mutant; add.s32 %mutant, \3, {}; bar.\1 \2, %mutant; }}"


def _one_more(match: re.Match[str]) -> str:
    return f"cp.async.wait_group {int(match[1]) + 1};"


_OTHER_LANE = (
    r"{ .reg .b32 %mutant; shl.b32 %mutant, \3, 1; and.b32 %mutant, %mutant, 31; \1\2, %mutant, \4; }"
)


# Every kernel that passes its test must fail it with any of these.
MUTATIONS = (
    Mutation("cvt: operands swapped", r"(cvt\.rn\.b?f16x2\.f32\s+%\w+), (%\w+), (%\w+);", r"\1, \3, \2;"),
    Mutation("ldmatrix: .trans missing", r"(ldmatrix\S*)\.trans", r"\1"),
    Mutation("ldmatrix: .trans added", r"(ldmatrix\.sync\.aligned\.m8n8\.x[124])(?=\.shared)", r"\1.trans"),
    Mutation(
        "ldmatrix: second and third result swapped",
        rf"(ldmatrix\S*\.x4\.shared\S*\s+){_A}",
        r"\1{\2, \4, \3, \5}",
    ),
    Mutation(
        "ldmatrix: results swapped in pairs", rf"(ldmatrix\S*\.x4\.shared\S*\s+){_A}", r"\1{\3, \2, \5, \4}"
    ),
    Mutation(
        "ldmatrix.trans: second and third result swapped",
        rf"(ldmatrix\S*\.x4\.trans\S*\s+){_A}",
        r"\1{\2, \4, \3, \5}",
    ),
    Mutation(
        "ldmatrix.trans: results swapped in pairs",
        rf"(ldmatrix\S*\.x4\.trans\S*\s+){_A}",
        r"\1{\3, \2, \5, \4}",
    ),
    Mutation("mma: a1 and a2 swapped", rf"{_MMA}{_A}", r"\1{\2, \4, \3, \5}"),
    Mutation("mma: a0, a1 and a2, a3 swapped", rf"{_MMA}{_A}", r"\1{\3, \2, \5, \4}"),
    Mutation("mma: b0 and b1 swapped", rf"({_MMA}{_A},\s*)\{{(%\w+), (%\w+)\}}", r"\1{\8, \7}"),
    Mutation("cp.async: waits for a group less", r"cp\.async\.wait_group (\d+);", _one_more, "each"),
    Mutation("cp.async: not waited for", r"cp\.async\.wait_group (\d+);", "", "each"),
    Mutation("cp.async: commit missing", r"cp\.async\.commit_group;", "", "each"),
    Mutation("cp.async: half of the source", _COPY, r"\1, 8;"),
    Mutation("barrier: another one", _BARRIER, _OTHER_BARRIER, "each"),
    Mutation("barrier: a warp more", _BARRIER, _OTHER_COUNT.format(32), "each"),
    Mutation("barrier: a warp less", _BARRIER, _OTHER_COUNT.format(-32), "each"),
    Mutation("barrier: missing", _BARRIER, "", "each"),
    Mutation(
        "shfl.bfly: another lane",
        r"(shfl\.sync\.bfly\.b32\s+)([^,;]+, [^,;]+), ([^,;]+), ([^;]+);",
        _OTHER_LANE,
        "each",
    ),
)

# These are seen by schedules "forward" and "reverse", and only where the barrier is needed.
MISSING_SYNCTHREADS = Mutation("__syncthreads() missing", r"bar\.sync\s+0;", "", "each")
# This one is seen where some copies have less than 16 bytes.
IGNORED_SOURCE_SIZE = Mutation("cp.async: all of the source", _COPY, r"\1;")


def _executed(text: str, kernel: str, lines: Container[int]) -> str:
    """The text of a kernel with traps in place of what is in other lines."""
    pieces, at, trapped = [], 0, False
    for ins in Module(text).entry(kernel).body:
        before = text[at : ins.position]
        trapped = trapped and ":" not in before  # no label, where one could come in
        if ins.line in lines:
            trapped = False
            continue
        at = text.index(";", ins.position) + 1
        pieces += [before, "" if trapped else "trap;", re.sub(r"[^\n]", "", text[ins.position : at])]
        trapped = True
    return "".join([*pieces, text[at:]])


def check_mutations(
    text: str,
    kernel: str,
    passes: Callable[[str], bool],
    mutations: Iterable[Mutation] = MUTATIONS,
    most: int = 8,
    equivalent: int = 0,
) -> list[str]:
    """Asserts that a kernel passes and that its mutants do not; returns the names of these.

    `passes` runs the kernel from PTX text, and says whether the results are right; PtxError says that they
    are not. Lines that it does not execute without mutation are left alone, and to come to one of them is
    wrong: a kernel that repairs what is not finite would hide what has not arrived. Exactly `equivalent`
    mutants must pass: those that compute the same as the kernel.
    """
    text = Module(text).alone(kernel)
    with executed_lines(text) as lines:
        assert passes(text), "the kernel fails without mutation"
    text = _executed(text, kernel, lines)
    function = Module(text).entry(kernel)
    assert function.start is not None
    tried, escaped = [], []
    for mutation in mutations:
        for name, mutant in mutation.apply(text, function.start, function.stop, lines, most):
            tried.append(name)
            try:
                if passes(mutant):
                    escaped.append(name)
            except PtxError:
                pass
    assert len(escaped) == equivalent, f"not seen: {escaped}, expected {equivalent}"
    return tried
