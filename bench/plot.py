# SPDX-License-Identifier: Apache-2.0
"""Bar charts of a run: how many times faster than the best peer, and which part of the floor."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt

from bench.goals import GOALS
from bench.machine import headline

_COLORS = dict(zip(GOALS, plt.get_cmap("tab10").colors, strict=False))


def plot(result: dict[str, Any], path: Path) -> None:
    """Writes ``path``-attention.png, -floor.png and -training.png, as far as there are rows."""
    for kind, suffix in (("attention", "attention"), ("attention", "floor"), ("training", "training")):
        rows = [row for row in result["rows"] if row["kind"] == kind and "result" in row]
        if rows:
            figure = _floor_bars(rows) if suffix == "floor" else _ratio_bars(rows)
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
