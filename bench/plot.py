# SPDX-License-Identifier: Apache-2.0
"""Charts of a run: how many times faster than the best peer, which part of the floor, and over context."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt

from bench.goals import GOALS, SPARSE_BY_TOKENS, SPARSE_GOALS
from bench.machine import headline
from bench.sparse_report import AGAINST_DENSE

_COLORS = dict(zip(GOALS, plt.get_cmap("tab10").colors, strict=False))


def plot(result: dict[str, Any], path: Path) -> None:
    """Writes ``path``-attention.png, -floor.png, -training.png and -sparse.png, as far as there are rows."""
    charts = {
        "attention": _ratio_bars,
        "floor": _floor_bars,
        "training": _ratio_bars,
        "sparse": _over_context,
    }
    for suffix, draw in charts.items():
        kind = "attention" if suffix == "floor" else suffix
        rows = [row for row in result["rows"] if row["kind"] == kind and "result" in row]
        if kind == "sparse":
            rows = [row for row in rows if row["group"] in AGAINST_DENSE]
        if rows:
            figure = draw(rows)
            figure.text(0.01, 0.002, headline(result["machine"]), fontsize=7, color="0.35")
            target = path.with_name(f"{path.name}-{suffix}.png")
            temporary = target.with_name(f".{target.name}.{os.getpid()}.png")
            figure.savefig(temporary, dpi=110)
            temporary.replace(target)
            plt.close(figure)


def _bars(rows: list[dict[str, Any]], values: list[float], label: str) -> tuple[Any, Any]:
    height = 1.1 + 0.17 * len(rows)
    figure, axes = plt.subplots(figsize=(9, height))
    places = range(len(rows))
    axes.barh(places, values, color=[_COLORS[row["group"]] for row in rows], height=0.72)
    axes.set_yticks(places, [row["name"] for row in rows], fontsize=7)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel(label, fontsize=8)
    axes.tick_params(axis="x", labelsize=7)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    groups = dict.fromkeys(row["group"] for row in rows)
    handles = [plt.Rectangle((0, 0), 1, 1, color=_COLORS[group]) for group in groups]
    axes.legend(
        handles,
        [GOALS[group].title for group in groups],
        fontsize=7,
        frameon=False,
        loc="lower center",
        bbox_to_anchor=(0.3, 1.0),
        ncols=4,
    )
    figure.subplots_adjust(left=0.36, right=0.97, top=1 - 0.5 / height, bottom=0.6 / height)
    return figure, axes


def _ratio_bars(rows: list[dict[str, Any]]) -> Any:
    ratios = [row["result"]["ratio"] for row in rows]
    figure, axes = _bars(rows, ratios, "times faster than the best peer; black mark: goal")
    axes.axvline(1.0, color="0.3", linewidth=0.8)
    axes.plot([row["result"]["goal"] for row in rows], range(len(rows)), "|", color="black", markersize=6)
    for place, ratio in enumerate(ratios):
        axes.text(ratio + 0.02, place, f"{ratio:.2f}", va="center", fontsize=6)
    return figure


def _floor_bars(rows: list[dict[str, Any]]) -> Any:
    fractions = [100 * row["result"]["fraction"] for row in rows]
    figure, axes = _bars(rows, fractions, "% of the floor; black mark: goal")
    axes.plot(
        [100 * row["result"]["fraction_goal"] for row in rows],
        range(len(rows)),
        "|",
        color="black",
        markersize=6,
    )
    for place, (row, fraction) in enumerate(zip(rows, fractions, strict=True)):
        axes.text(fraction + 0.5, place, f"{fraction:.0f} {row['result']['bound']}", va="center", fontsize=6)
    axes.axvline(100, color="0.3", linewidth=0.8)
    return figure


def _over_context(rows: list[dict[str, Any]]) -> Any:
    """How many times faster than dense attention, over the length of the context."""
    figure, axes = plt.subplots(figsize=(7, 4.4))
    ticks = sorted({row["tokens"] for row in rows})
    lines: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        lines.setdefault((row["group"], row["heads"], row["compression"]), []).append(row)
    for (group, heads, compression), part in lines.items():
        part.sort(key=lambda row: row["tokens"])
        title = SPARSE_GOALS[group].partition(" /")[0]
        axes.plot(
            [row["tokens"] for row in part],
            [row["result"]["ratio"] for row in part],
            "o-" if group == "forward" else "s--",
            markersize=4,
            linewidth=1.3,
            label=f"{title}, heads {heads}, {compression}",
        )
    ideal = {row["tokens"]: row["result"]["ideal"] for row in rows}
    axes.plot(ticks, [ideal[n] for n in ticks], ":", color="0.5", label="fewer FLOPs")
    goals = {n: goal for n, goal in SPARSE_BY_TOKENS.items() if n in ticks}
    axes.plot(list(goals), list(goals.values()), "_", color="black", markersize=14, label="goal")
    axes.axhline(1.0, color="0.3", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(ticks, [f"{n // 1024}k" for n in ticks])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.set_xlabel("tokens", fontsize=8)
    axes.set_ylabel("times faster than dense causal SDPA", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.legend(fontsize=7, frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    return figure
