# SPDX-License-Identifier: Apache-2.0
"""report.md, results.json, curves.png and speed.png."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...integrations._extras import require
from ..long_runs import write_atomically, write_json
from ..reports import machine, smoothed, table
from .run import Record, Run
from .settings import METHODS

PURPOSE = "palmette train-pipeline"
COLOURS = {
    "fp32": "#888888",
    "bf16": "#5b7db1",
    "plain": "#b0508c",
    "aq-sgd": "#d98b2b",
    "tah": "#1b6e4a",
    "tah-range": "#3f9a86",
    "tah-delta": "#6fb98f",
}


def last_epoch(record: Record, steps: int) -> float:
    """Mean training loss of the last epoch."""
    return statistics.fmean(record.losses[-steps:])


def speeds(run: Run) -> list[dict[str, Any]]:
    """A row for each method and rate.

    With c the seconds of a step without a limit (of fp32), m those that fp32's bytes take on the link, and r
    how many times fewer bytes the method sends: the step could be ``(c + m) / (c + m / r)`` times as fast.
    """
    fp32 = run.records["fp32"]
    compute = run.compute_seconds()
    rows = []
    for ratio, rate in zip(run.settings.ratios, run.rates(), strict=True):
        wire = fp32.steady_bytes * 8 / rate
        slow = statistics.median(fp32.timed[f"{rate:.0f}"])
        for method in run.methods:
            record = run.records[method]
            seconds = statistics.median(record.timed[f"{rate:.0f}"])
            fewer = fp32.steady_bytes / record.steady_bytes
            bound = (compute + wire) / (compute + wire / fewer)
            rows.append(
                {
                    "ratio": ratio,
                    "rate": rate,
                    "method": method,
                    "seconds": seconds,
                    "speedup": slow / seconds,
                    "fewer_bytes": fewer,
                    "bound": bound,
                    "of_bound": slow / seconds / bound,
                }
            )
    return rows


def _speed_table(run: Run, rows: list[dict[str, Any]]) -> str:
    header = ["", "bytes per step", "fewer", "no limit"]
    header += [f"{rate / 1e6:.3g} Mbit/s" for rate in run.rates()]
    header += [f"x fp32 at {rate / 1e6:.3g}" for rate in run.rates()]
    header += [f"of the bound at {rate / 1e6:.3g}" for rate in run.rates()]
    lines = []
    for method in run.methods:
        own = [row for row in rows if row["method"] == method]
        record = run.records[method]
        lines.append(
            [
                METHODS[method].title,
                f"{record.steady_bytes:,.0f}",
                f"{own[0]['fewer_bytes']:.2f}x",
                f"{statistics.median(record.timed['0']):.2f} s",
                *(f"{row['seconds']:.2f} s" for row in own),
                *(f"{row['speedup']:.2f}x" for row in own),
                *(f"{row['of_bound']:.0%}" for row in own),
            ]
        )
    return table(header, lines)


def _loss_table(run: Run) -> str:
    steps = run.settings.steps_per_epoch
    base, held = last_epoch(run.records["fp32"], steps), run.records["fp32"].held_out[-1]
    lines = []
    for method in run.methods:
        record = run.records[method]
        loss = last_epoch(record, steps)
        lines.append(
            [
                METHODS[method].title,
                f"{record.losses[0]:.4f}",
                f"{loss:.4f}",
                f"{loss / base - 1:+.2%}",
                f"{record.held_out[0]:.4f}",
                f"{record.held_out[-1]:.4f}",
                f"{record.held_out[-1] / held - 1:+.2%}",
            ]
        )
    header = (
        "",
        "first step",
        "last epoch",
        "over fp32",
        "held out, before",
        "held out, after",
        "over fp32",
    )
    return table(header, lines)


def markdown(run: Run) -> str:
    """The report."""
    settings, where = run.settings, machine()
    name = "SmolLM2-135M-Instruct" if run.model is None else Path(run.model).name
    cut = "" if settings.layers is None else f", cut to {settings.layers} layers"
    rows = speeds(run)
    times = ", ".join(f"{ratio:g}" for ratio in settings.ratios)
    about = (
        f"{name}{cut}, fine-tuned on Python's documentation in float32 with AdamW; two stages of one thread "
        f"each, GPipe with {settings.microbatches} microbatches. {settings.samples} samples of "
        f"{settings.context} tokens, {settings.batch} to a step, {settings.epochs} epochs of "
        f"{settings.steps_per_epoch} steps. {where['cpu']}, body {where['body']}, torch {where['torch']}, "
        f"palmette {where['palmette']}."
    )
    link = (
        f"The link: {run.link.description}. Its rates are such that the bytes of a step in float32 take "
        f"{times} times as long as a step computes ({run.compute_seconds():.2f} s). The papers' GPUs have "
        f"ratios between a quarter and 16 at 100 to 500 Mbit/s."
    )
    timed = (
        f"Medians of {settings.timed} steps (of 5 without a limit). The bound is (c + m) / (c + m / r): c "
        f"seconds of computing, m seconds of fp32's bytes on the link, r times fewer bytes. What hides "
        f"behind computing makes more of it than 100%."
    )
    return "\n\n".join(
        [
            "# Training over a slow link",
            about,
            link,
            "## Seconds per step",
            timed,
            _speed_table(run, rows),
            "## Losses",
            "Nats per token. All methods see the same samples in the same order.",
            _loss_table(run) + "\n",
        ]
    )


def write(run: Run, directory: Path) -> str:
    """Writes everything; returns the report."""
    text = markdown(run)
    write_atomically(directory / "report.md", lambda file: file.write_text(text))
    write_json(
        directory / "results.json",
        {
            "settings": dataclasses.asdict(run.settings),
            "machine": machine(),
            "link": run.link.description,
            "compute_seconds": run.compute_seconds(),
            "speeds": speeds(run),
            "records": {method: dataclasses.asdict(record) for method, record in run.records.items()},
        },
    )
    _curves(run, directory / "curves.png")
    _bars(run, directory / "speed.png")
    return text


def _figure(width: float, panels: int) -> tuple[Any, Sequence[Any]]:
    matplotlib = require("matplotlib", PURPOSE, install="'palmette[demo]'")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, panels, figsize=(width, 3.6), constrained_layout=True, squeeze=False)
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return figure, axes[0]


def _curves(run: Run, path: Path) -> None:
    figure, (by_step, by_time) = _figure(10, 2)
    slowest = f"{min(run.rates()):.0f}"
    for method in run.methods:
        record = run.records[method]
        line = smoothed(record.losses, run.settings.steps_per_epoch)
        style = {"label": METHODS[method].title, "color": COLOURS[method], "linewidth": 1.5}
        by_step.plot(range(1, len(line) + 1), line, **style)
        each = statistics.median(record.timed[slowest])
        by_time.plot([each * (i + 1) / 60 for i in range(len(line))], line, **style)
    by_step.set(xlabel="step", ylabel="loss, nats per token (mean of an epoch)")
    by_time.set(xlabel=f"minutes at {float(slowest) / 1e6:.3g} Mbit/s (steps of the last epoch)")
    by_time.legend(frameon=False, fontsize=8)
    write_atomically(path, lambda file: figure.savefig(file, dpi=120, format="png"))


def _bars(run: Run, path: Path) -> None:
    figure, (axis,) = _figure(10, 1)
    rows = speeds(run)
    width = 0.8 / len(run.methods)
    for i, method in enumerate(run.methods):
        own = [row for row in rows if row["method"] == method]
        places = [place + (i - (len(run.methods) - 1) / 2) * width for place in range(len(own))]
        axis.bar(
            places, [row["speedup"] for row in own], width, color=COLOURS[method], label=METHODS[method].title
        )
        if method != "fp32":
            axis.plot(places, [row["bound"] for row in own], "_", color="black", markersize=9)
    labels = [
        f"{rate / 1e6:.3g} Mbit/s\n(m = {ratio:g} c)"
        for rate, ratio in zip(run.rates(), run.settings.ratios, strict=True)
    ]
    axis.set_xticks(range(len(labels)), labels)
    axis.set_ylabel("steps per second, x fp32\n(-: bound by bytes)")
    axis.legend(frameon=False, fontsize=8)
    write_atomically(path, lambda file: figure.savefig(file, dpi=120, format="png"))
