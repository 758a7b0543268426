# SPDX-License-Identifier: Apache-2.0
"""report.md, results.json and curves.png of a run; and of several runs one picture and one table.

python -m palmette.pipelines.train_rl.report DIRECTORY... --out DIRECTORY
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from ...integrations._extras import require
from ..long_runs import write_atomically, write_json
from ..reports import machine, smoothed, table
from .run import History, load_history
from .settings import Settings

PURPOSE = "palmette train-rl"
COLOURS = ("#1b6e4a", "#5b7db1", "#d98b2b", "#b0508c", "#888888")


def summary(settings: Settings, history: History) -> str:
    """What a run has come to, as a Markdown table."""
    updates = len(history.rewards)
    first = history.rewards[: max(1, updates // 10)]
    rows = [
        ["held-out accuracy before", f"{history.accuracy[0][1]:.1%}"],
        ["held-out accuracy after", f"{history.accuracy[-1][1]:.1%}"],
        ["best on the way", f"{max(share for _, share in history.accuracy):.1%}"],
        ["updates", str(updates)],
    ]
    if updates:
        rows += [
            ["mean reward, first tenth", f"{statistics.fmean(first):.2f}"],
            ["mean reward, last tenth", f"{_tail(history.rewards):.2f}"],
            [
                "groups with unequal rewards, last tenth",
                f"{_tail(history.informative):.0%}",
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
    figure_module = require("matplotlib.figure", PURPOSE, install="'palmette[demo]'")
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


def comparison(runs: Sequence[tuple[str, History]]) -> str:
    """A Markdown table of runs, with their mean and standard deviation where there are several."""
    columns = (
        ("before", lambda h: 100 * h.accuracy[0][1], "{:.1f}%"),
        ("after", lambda h: 100 * h.accuracy[-1][1], "{:.1f}%"),
        ("best on the way", lambda h: 100 * max(share for _, share in h.accuracy), "{:.1f}%"),
        ("updates", lambda h: len(h.rewards), "{:.0f}"),
        ("mean reward, last tenth", lambda h: _tail(h.rewards), "{:.2f}"),
        ("tokens per update", lambda h: statistics.fmean(h.tokens), "{:.0f}"),
        ("of a dense batch", lambda h: statistics.fmean(h.dense_tokens), "{:.0f}"),
        ("s per update, rollouts", lambda h: statistics.median(h.rollout_seconds), "{:.2f}"),
        ("s per update, training", lambda h: statistics.median(h.update_seconds), "{:.2f}"),
    )
    values = [[column(history) for _, column, _ in columns] for _, history in runs]
    rows = [
        [name, *(form.format(value) for value, (*_, form) in zip(row, columns, strict=True))]
        for (name, _), row in zip(runs, values, strict=True)
    ]
    if len(runs) > 1:
        spreads = [
            f"{form.format(statistics.fmean(column))} ± {form.format(statistics.stdev(column))}"
            for column, (*_, form) in zip(zip(*values, strict=True), columns, strict=True)
        ]
        rows.append(["mean ± standard deviation", *spreads])
    return table(("", *(name for name, _, _ in columns)), rows)


def _tail(values: Sequence[float]) -> float:
    return statistics.fmean(values[-max(1, len(values) // 10) :])


def main(arguments: Sequence[str] | None = None) -> int:
    """Compares runs of train-rl: writes comparison.md and curves.png; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m palmette.pipelines.train_rl.report")
    parser.add_argument("runs", nargs="+", type=Path, help="directories of train-rl, with an update at least")
    parser.add_argument("--out", type=Path, required=True, help="directory of comparison.md and curves.png")
    options = parser.parse_args(arguments)
    runs = []
    for directory in options.runs:
        try:
            history = load_history(directory)
            seed = json.loads((directory / "options.json").read_text())["seed"]
        except FileNotFoundError as error:
            print(f"runs must be directories of train-rl, got {directory} ({error})", file=sys.stderr)
            return 1
        if not history.rewards:
            print(f"runs must have updates, got {directory} without one", file=sys.stderr)
            return 1
        runs.append((f"seed {seed}", history))
    options.out.mkdir(parents=True, exist_ok=True)
    text = comparison(runs) + "\n"
    write_atomically(options.out / "comparison.md", lambda file: file.write_text(text))
    curves(runs, options.out / "curves.png")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
