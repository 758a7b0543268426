# SPDX-License-Identifier: Apache-2.0
"""Shapes of token trees: generators, and readers of recorded ones. Plain Python: tests use them too.

A tree is ``(parent, num_tokens)``, as ``palmette.Tree`` takes it. Trees that were recorded from real runs are
read from ``$PALMETTE_TREE_TRACES`` or ``../shared/data/tree_traces``, where present; everywhere else
generators with the same statistics stand in, and ``has_traces`` tells which of the two a run used.
"""

from __future__ import annotations

import functools
import heapq
import json
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class TreeShape(NamedTuple):
    """Nodes in any order; parent -1 marks a root."""

    parent: tuple[int, ...]
    num_tokens: tuple[int, ...]


# ---------------------------------------------------------------------------------------------- regular trees


def chain(num_tokens: int) -> TreeShape:
    """One sequence."""
    return TreeShape((-1,), (num_tokens,))


def star(num_leaves: int, prompt: int, private: int) -> TreeShape:
    """A prompt with ``num_leaves`` branches of ``private`` tokens: few-shot, best-of-n."""
    return TreeShape((-1, *[0] * num_leaves), (prompt, *[private] * num_leaves))


def levels(nodes: Sequence[int], tokens: Sequence[int]) -> TreeShape:
    """A regular tree: ``nodes[i]`` nodes of ``tokens[i]`` tokens on level i, evenly among their parents."""
    parent = [-1] * nodes[0]
    num_tokens = [tokens[0]] * nodes[0]
    first = 0
    for above, count, length in zip(nodes, nodes[1:], tokens[1:], strict=False):
        start = len(parent)
        parent.extend(first + child * above // count for child in range(count))
        num_tokens.extend([length] * count)
        first = start
    return TreeShape(tuple(parent), tuple(num_tokens))


def token_tree(prompt: int, paths: Iterable[Sequence[int]]) -> TreeShape:
    """A draft's token tree below a prompt: node 1 is the last committed token, paths end in one more each."""
    number = {(): 1}
    parent, num_tokens = [-1, 0], [prompt, 1]
    for path in sorted(tuple(path) for path in paths):
        number[path] = len(parent)
        parent.append(number[path[:-1]])
        num_tokens.append(1)
    return TreeShape(tuple(parent), tuple(num_tokens))


# -------------------------------------------------------------------------------------------- irregular trees


def irregular(seed: int = 79) -> TreeShape:
    """Four levels, 79 nodes, 48 leaves and about 10,900 tokens, with uneven fan-out and lengths."""
    draw = random.Random(seed)
    parent, num_tokens = [-1], [1700]
    level = [0]
    for count in (6, 24, 48):
        # every node of the level above gets a child, the others go to chance
        parents = level + [draw.choice(level) for _ in range(count - len(level))]
        level = list(range(len(parent), len(parent) + count))
        parent.extend(sorted(parents))
        num_tokens.extend(draw.randint(12, 218) for _ in range(count))
    return TreeShape(tuple(parent), tuple(num_tokens))


def packed(num_tokens: int, prompt: int, depth: int, seed: int = 0) -> TreeShape:
    """A training batch packed into one tree: a prompt with ``depth`` levels of uneven branches below it.

    The levels share the remaining tokens evenly, so deeper levels have shorter nodes.
    """
    draw = random.Random(seed)
    parent, lengths = [-1], [prompt]
    level = [0]
    for left in range(depth, 0, -1):
        parents = [node for node in level for _ in range(draw.randint(2, 4))]
        level = list(range(len(parent), len(parent) + len(parents)))
        parent.extend(parents)
        room = (num_tokens - sum(lengths)) // left
        weights = [draw.uniform(0.5, 1.5) for _ in parents]
        share = [max(1, int(room * weight / sum(weights))) for weight in weights]
        share[-1] += room - sum(share)
        lengths.extend(share)
    lengths[-1] += num_tokens - sum(lengths)
    return TreeShape(tuple(parent), tuple(lengths))


# --------------------------------------------------------------------------------------------- recorded trees


def traces_directory() -> Path | None:
    """Where recorded trees are, or None."""
    named = os.environ.get("PALMETTE_TREE_TRACES")
    folder = Path(named) if named else Path(__file__).parents[2] / "shared" / "data" / "tree_traces"
    return folder if folder.is_dir() else None


def has_traces() -> bool:
    """Whether recorded trees are used, not generated ones."""
    return traces_directory() is not None


@functools.cache
def _recorded(name: str) -> Any:
    folder = traces_directory()
    if folder is None or not (folder / f"{name}.json").is_file():
        return None
    with open(folder / f"{name}.json", encoding="utf-8") as file:
        return json.load(file)


def draft_paths(size: int) -> list[list[int]]:
    """Paths of a Medusa token tree of ``size`` tokens, the committed one included.

    Recorded for 32, 64, 128 and 256; other sizes take the first paths, breadth first, of the next larger one.
    """
    for recorded_size in (32, 64, 128, 256):
        recorded = _recorded(f"medusa_tree_{recorded_size}")
        if recorded is not None and size <= recorded_size:
            paths: list[list[int]] = sorted(recorded["paths"], key=lambda path: (len(path), path))
            return paths[: size - 1]
    return likeliest_paths(size - 1)


def likeliest_paths(count: int, depth_decay: float = 0.6) -> list[list[int]]:
    """The likeliest paths, if child r of a node at depth d is right with chance depth_decay^d / 2^(r+1)."""
    paths: list[list[int]] = []
    heap: list[tuple[float, tuple[int, ...]]] = [(-0.5, (0,))]
    while heap and len(paths) < count:
        chance, path = heapq.heappop(heap)
        paths.append(list(path))
        heapq.heappush(heap, (chance * 0.5 * depth_decay ** len(path), (*path, 0)))
        heapq.heappush(heap, (chance * 0.5, (*path[:-1], path[-1] + 1)))
    return paths


class Thought(NamedTuple):
    """A node of a recorded run: it grows by one token in each of the steps [start, end]."""

    start: int
    end: int
    children: list[int]


def reasoning_run(task: str, index: int) -> list[Thought]:
    """A recorded tree-of-thought run of "sorting" or "set"; node 0 is the prompt, of ``-start`` tokens."""
    recorded = _recorded(f"{task}128ToT")
    if recorded is None:
        return list(_generated_run(task, index))
    return [Thought(*node) for node in recorded["trees"][index]]


def _generated_run(task: str, seed: int) -> Iterator[Thought]:
    # What the recorded runs have in common: ten thoughts at a time, of which one is expanded, nine or ten
    # rounds.
    draw = random.Random(f"{task}-{seed}")
    prompt, rounds, first, later, spread = (
        (1103, 10, 860, 365, 0.45) if task == "sorting" else (1610, 9, 81, 60, 0.3)
    )
    runs = [[-prompt, 0, []]]
    node, step = 0, 0
    for turn in range(rounds):
        median = first if turn == 0 else later
        ids = list(range(len(runs), len(runs) + 10))
        runs[node][2] = ids
        for _ in ids:
            # one thought in eight fails at once
            length = 1 if draw.random() < 0.12 else max(2, int(median * draw.lognormvariate(0, spread)))
            runs.append([step + 1, step + length, []])
        by_length = sorted(ids, key=lambda i: runs[i][1])
        node = by_length[draw.randint(3, 9) if task == "sorting" else draw.choice((9, 9, 8, 7))]
        step = runs[node][1]
    return (Thought(*run) for run in runs)


def snapshot(run: Sequence[Thought], step: int) -> TreeShape:
    """The live tree after the tokens of ``step``: thoughts that end later, and all above them."""
    above = {child: node for node, thought in enumerate(run) for child in thought.children}
    live: set[int] = set()
    for node, thought in enumerate(run):
        if node and thought.start <= step <= thought.end:
            while node not in live:
                live.add(node)
                node = above.get(node, node)
    order = sorted(live)
    number = {node: i for i, node in enumerate(order)}
    lengths = [-run[0].start if n == 0 else min(step, run[n].end) - run[n].start + 1 for n in order]
    return TreeShape(tuple(number.get(above.get(n, -1), -1) for n in order), tuple(lengths))


def reasoning(task: str, index: int, progress: float = 0.5) -> TreeShape:
    """A tree-of-thought at the step nearest to ``progress`` of its run in which at least five leaves live."""
    run = reasoning_run(task, index)
    last = max(thought.end for thought in run)

    def num_leaves(step: int) -> int:
        return sum(thought.start <= step <= thought.end for thought in run[1:])

    steps = sorted(range(1, last + 1), key=lambda step: abs(step - progress * last))
    return snapshot(run, next((step for step in steps if num_leaves(step) >= 5), steps[0]))
