# SPDX-License-Identifier: Apache-2.0
"""report.md, results.json and curves.png of a run, or of several with other seeds."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path

from ...integrations._extras import require
from ..long_runs import write_atomically, write_json
from ..reports import machine, smoothed, table
from .run import History
from .settings import Settings

PURPOSE = "palmette train-rl"
COLOURS = ("#1b6e4a", "#5b7db1", "#d98b2b", "#b0508c", "#888888")


def summary(settings: Settings, history: History) -> str:
    """What a run has come to, as a Markdown table."""
    updates = len(history.rewards)
    tail = max(1, updates // 10)
    rows = [
        ["held-out accuracy before", f"{history.accuracy[0][1]:.1%}"],
        ["held-out accuracy after", f"{history.accuracy[-1][1]:.1%}"],
        ["best on the way", f"{max(share for _, share in history.accuracy):.1%}"],
        ["updates", str(updates)],
    ]
    if updates:
        rows += [
            ["mean reward, first tenth", f"{statistics.fmean(history.rewards[:tail]):.2f}"],
            ["mean reward, last tenth", f"{statistics.fmean(history.rewards[-tail:]):.2f}"],
            [
                "groups with unequal rewards, last tenth",
                f"{statistics.fmean(history.informative[-tail:]):.0%}",
            ],
            ["tokens per update", f"{statistics.fmean(history.tokens):.0f}"],
            ["of a dense batch", f"{statistics.fmean(history.dense_tokens):.0f}"],
            ["s per update, rollouts", f"{statistics.median(history.rollout_seconds):.2f}"],
            ["s per update, training", f"{statistics.median(history.update_seconds):.2f}"],
            ["updates behind, most", str(max(history.staleness))],
        ]
    how = f"{settings.prompts} problems of {settings.group} rollouts, seed {settings.seed}"
    if settings.eta:
        how += f", rollouts up to {settings.eta} updates behind"
    if settings.sampler != "uniform":
        how += f", problems chosen by {settings.sampler}"
    return f"{how}\n\n{table(('', ''), rows)}\n"


def write(settings: Settings, history: History, directory: Path) -> str:
    """Writes all files; returns the report."""
    here = machine()
    text = f"# train-rl\n\n{here['cpu']}, {here['threads']} threads, torch {here['torch']}\n\n"
    text += summary(settings, history)
    write_json(
        directory / "results.json",
        {"machine": here, "settings": dataclasses.asdict(settings), "history": dataclasses.asdict(history)},
    )
    curves([(f"seed {settings.seed}", history)], directory / "curves.png")
    write_atomically(directory / "report.md", lambda file: file.write_text(text))
    return text


def curves(runs: Sequence[tuple[str, History]], path: Path) -> None:
    """A picture of accuracies and rewards of runs, with their names."""
    figure_module = require("matplotlib.figure", PURPOSE, install="'palmette[train]'")
    figure = figure_module.Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (name, history), colour in zip(runs, COLOURS * len(runs), strict=False):
        updates, shares = zip(*history.accuracy, strict=True)
        left.plot(updates, [100 * share for share in shares], "o-", ms=3, lw=1.2, color=colour, label=name)
        means = smoothed(history.rewards, max(1, len(history.rewards) // 12))
        right.plot(range(1, len(means) + 1), means, lw=1.2, color=colour, label=name)
    left.set_title("held-out accuracy, greedy, %", fontsize=10)
    right.set_title("reward of rollouts, moving mean", fontsize=10)
    for panel in (left, right):
        panel.set_xlabel("updates")
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, fontsize=8)
    write_atomically(path, lambda file: figure.savefig(file, dpi=150, format="png"))
