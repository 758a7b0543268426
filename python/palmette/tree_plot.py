# SPDX-License-Identifier: Apache-2.0
"""Pictures of trees and of the plans that read them."""

from __future__ import annotations

import os
import tempfile
from bisect import bisect_right
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from palmette.tree import LENGTH, PARENT

if TYPE_CHECKING:
    from palmette.tree_plan import TreeAttentionPlan

_INK, _FAINT, _BRANCH, _QUERY = "#22313f", "#c9d1d9", "#8a97a5", "#e45756"
# One hue per task, two shades for neighbouring items.
_HUES = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#d67195", "#72b7b2", "#eeca3b", "#9d755d")


def plot_plan(plan: TreeAttentionPlan, path: str | PathLike[str]) -> None:
    """``TreeAttentionPlan.plot``.

    Above, the tree: nodes as bars over their tokens, depth-first, children below their parents; diamonds are
    queries. Below, the plan: every rectangle is an item, the keys that it reads times the queries that read
    them, coloured by task.
    """
    target = Path(path)
    if target.suffix not in (".svg", ".png"):
        raise ValueError(f"path must be a name that ends in .svg or .png, got {target.name!r}")
    plan.check_fresh()
    if plan.num_queries == 0:
        raise ValueError("plan must be of at least one query to be drawn, got 0")
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plan.plot needs matplotlib: pip install 'palmette[demo]' or pip install matplotlib"
        ) from error

    levels, bars = _bars(plan)
    queries = plan.num_queries
    tree_height = min(4.5, 0.9 + 0.28 * levels)
    plan_height = min(6.0, 1.4 + 0.09 * queries)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "palmette", "font.size": 9}):
        figure = Figure(
            figsize=(11, tree_height + plan_height + 0.6), layout="constrained", facecolor="white"
        )
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=[tree_height, plan_height])
        _draw_tree(above, plan, bars, levels)
        _draw_items(below, plan)
        _describe(figure, plan)
        _save(figure, target)


def _bars(plan: TreeAttentionPlan) -> tuple[int, list[tuple[int, int, int, int]]]:
    """Levels of the tree, and (start, length, level, level of the parent or -1) of every node with tokens."""
    tree = plan.tree
    parent, length, start = tree.nodes[PARENT].tolist(), tree.nodes[LENGTH].tolist(), tree.node_start.tolist()
    level: dict[int, int] = {-1: -1}
    bars = []
    for node in tree.order.tolist():
        above = level[parent[node]]
        level[node] = above + 1 if length[node] else above  # a node without tokens takes no room
        if length[node]:
            bars.append((start[node], length[node], level[node], above))
    return max(level.values()) + 1, bars


def _draw_tree(
    axes: Any, plan: TreeAttentionPlan, bars: list[tuple[int, int, int, int]], levels: int
) -> None:
    end, height = plan.tree.subtree_end.tolist(), 0.62
    # What hangs below a node sees all of it: a shade over the rest of its subtree, lines down to children.
    below = [(start, length, level) for start, length, level, _ in bars if end[start] > start + length]
    axes.barh(
        [level for _, _, level in below],
        [end[start] - start for start, _, _ in below],
        left=[start for start, _, _ in below],
        height=height,
        color=_FAINT,
        alpha=0.35,
        linewidth=0,
    )
    axes.hlines(
        [level for _, _, level in below],
        [start + length for start, length, _ in below],
        [end[start] for start, _, _ in below],
        color=_BRANCH,
        linewidth=0.6,
    )
    children = [(start, level, above) for start, _, level, above in bars if above >= 0]
    axes.vlines(
        [start for start, _, _ in children],
        [above for _, _, above in children],
        [level - height / 2 for _, level, _ in children],
        color=_BRANCH,
        linewidth=0.6,
    )
    axes.barh(
        [level for _, _, level, _ in bars],
        [length for _, length, _, _ in bars],
        left=[start for start, _, _, _ in bars],
        height=height,
        color=_INK,
        edgecolor="white",
        linewidth=0.4 if len(bars) < 400 else 0.0,
    )
    starts = [bar[0] for bar in bars]
    positions = plan.query[1, : plan.num_queries].tolist()
    rows = [bars[bisect_right(starts, position) - 1][2] for position in positions]
    size = 26 if len(rows) <= 64 else 12 if len(rows) <= 256 else 4
    _draw_queries(axes, positions, rows, size)
    axes.set_xlim(0, plan.tree.num_tokens)
    axes.set_ylim(levels - 0.4, -0.6)
    axes.set_yticks(range(levels) if levels <= 12 else [])
    axes.set_ylabel("level in the tree")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_queries(axes: Any, positions: Sequence[int], rows: Sequence[float], size: float) -> None:
    keys = [position + 0.5 for position in positions]
    style = {"color": _QUERY, "edgecolor": "white", "linewidth": 0.5}
    axes.scatter(keys, rows, marker="D", s=size, zorder=3, clip_on=False, **style)


def _draw_items(axes: Any, plan: TreeAttentionPlan) -> None:
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator

    _, segments, items, tasks, _ = plan.counts[:5].tolist()
    segment, item = plan.segment[:segments].tolist(), plan.item[:items].tolist()
    for number, (item_begin, item_end, query_begin, query_end, partial, _) in enumerate(
        plan.task[:tasks].tolist()
    ):
        for shade in (0, 1):
            boxes = [
                Rectangle((lo, first), length, last - first)
                for segment_begin, segment_end, first, last in item[item_begin + shade : item_end : 2]
                for _, length, lo, _, _, _ in segment[segment_begin:segment_end]
            ]
            axes.add_collection(
                PatchCollection(
                    boxes,
                    facecolor=_HUES[number % len(_HUES)],
                    edgecolor="white",
                    linewidth=0.3 if items < 400 else 0.0,
                    alpha=(0.95, 0.65)[shade],
                )
            )
        if tasks <= 64 and partial >= 0:
            left = min(s[2] for s in segment[item[item_begin][0] : item[item_begin][1]])
            axes.plot(
                [left, left], [query_begin, query_end], color=_INK, linewidth=0.8, linestyle=(0, (2, 2))
            )
    positions = plan.query[1, : plan.num_queries].tolist()
    if plan.num_queries <= 300:
        _draw_queries(axes, positions, [row + 0.5 for row in range(len(positions))], size=10)
    axes.set_ylim(plan.num_queries, 0)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("keys, numbered depth-first")
    axes.set_ylabel("queries, by position")
    axes.spines[["top", "right"]].set_visible(False)


def _describe(figure: Any, plan: TreeAttentionPlan) -> None:
    tree, io = plan.tree, plan.io
    figure.suptitle(
        f"{tree.leaves.numel()} leaves, {tree.num_tokens:,} tokens, redundancy {tree.redundancy:.1f}",
        fontsize=12,
        color=_INK,
    )
    _, _, items, tasks, partials = plan.counts[:5].tolist()
    figure.supxlabel(
        f"{plan.split}: {items} items in {tasks} tasks (colours), {partials} partial states; "
        f"{io.kv_tokens_read:,} KV tokens read, {io.kv_tokens_per_sequence:,} per sequence",
        fontsize=9,
        color=_INK,
    )


def _save(figure: Any, target: Path) -> None:
    """Writes beside the target and renames: a reader never sees half a picture."""
    handle, name = tempfile.mkstemp(suffix=target.suffix, prefix=".plot-", dir=target.parent)
    os.close(handle)
    try:
        metadata = {"Date": None} if target.suffix == ".svg" else {}
        figure.savefig(name, dpi=150, metadata=metadata)
        Path(name).chmod(0o644)  # mkstemp is for secrets, a picture is not
        Path(name).replace(target)
    finally:
        Path(name).unlink(missing_ok=True)
