# SPDX-License-Identifier: Apache-2.0
"""The demo's table, its numbers as JSON, and its bar chart."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...integrations._extras import require
from ..reports import machine
from .workloads import MethodResult, WorkloadResult

HEADER = (
    "workload",
    "method",
    "attention ms/step",
    "ratio",
    "tokens/s",
    "ratio",
    "KV tokens/step",
    "redundancy",
    "",
)


def _number(value: float, digits: int) -> str:
    return "" if math.isnan(value) else f"{value:,.{digits}f}"


def table(results: Sequence[WorkloadResult]) -> str:
    """The results as a Markdown table; ratios are Palmette's advantage over the row's method."""
    lines = [HEADER]
    for result in results:
        ours = result.rows[0]
        for index, row in enumerate(result.rows):
            lines.append(
                (
                    result.name if index == 0 else "",
                    row.method,
                    _number(row.attention_ms, 1),
                    _number(_attention_ratio(row, ours), 2),
                    _number(row.tokens_per_s, 1),
                    _number(_rate_ratio(row, ours), 2),
                    _number(row.kv_tokens, 0),
                    f"{result.redundancy:.2f}" if index == 0 else "",
                    row.note,
                )
            )
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADER))]
    left = {0, 1, len(HEADER) - 1}

    def render(line: Sequence[str]) -> str:
        cells = [
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        return f"| {' | '.join(cells)} |"

    rule = [
        "-" * max(width, 3) if column in left else "-" * (max(width, 3) - 1) + ":"
        for column, width in enumerate(widths)
    ]
    return "\n".join([render(lines[0]), f"| {' | '.join(rule)} |", *map(render, lines[1:])])


def write(
    results: Sequence[WorkloadResult],
    directory: Path,
    model: str,
    seconds: float,
    options: Mapping[str, Any],
) -> str:
    """Write table.md, results.json and ratios.png; returns the table."""
    where = machine()
    text = table(results)
    notes = [
        f"{model}, float32, on {where['cpu']}, {where['threads']} threads ({where['body']}), "
        f"torch {where['torch']}, palmette {where['palmette']}; {seconds:.0f} s in all.",
        "",
        *(f"- {result.name}: {result.description}; {result.steps} steps." for result in results),
        "- ratio: the row's attention time over Palmette's, and Palmette's tokens/s over the row's.",
        "- Attention: one layer's on the same q, k, v, interleaved over all methods, median, times layers. "
        "KV tokens: read per layer and KV head. Each method keeps K and V in the layout that suits it.",
        "- All methods chose the same greedy tokens, but for the near ties below."
        if any(result.differences for result in results)
        else "- All methods chose the same greedy tokens.",
        *(
            f"- near tie, {result.name}: {difference}."
            for result in results
            for difference in result.differences
        ),
    ]
    (directory / "table.md").write_text(text + "\n\n" + "\n".join(notes) + "\n")
    content = {
        "model": model,
        "machine": where,
        "seconds": seconds,
        "options": dict(options),
        "workloads": [_without_nan(dataclasses.asdict(result)) for result in results],
    }
    (directory / "results.json").write_text(json.dumps(content, indent=2) + "\n")
    plot_ratios(results, directory / "ratios.png", f"{model}, {where['cpu']}, {where['threads']} threads")
    return text


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _attention_ratio(row: MethodResult, ours: MethodResult) -> float:
    return row.attention_ms / ours.attention_ms


def _rate_ratio(row: MethodResult, ours: MethodResult) -> float:
    return ours.tokens_per_s / row.tokens_per_s


def plot_ratios(results: Sequence[WorkloadResult], path: Path, title: str) -> None:
    """A bar chart: how many times faster Palmette is than each method, attention alone and whole steps."""
    require("matplotlib", "palmette demo")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=False)
    colours = ("#1b6e4a", "#d98b2b", "#5b7db1")
    for panel, (label, of_row) in zip(
        panels,
        (
            ("attention", _attention_ratio),
            ("tokens per second, end to end", _rate_ratio),
        ),
        strict=True,
    ):
        methods = [row.method for row in results[0].rows[1:]]
        width = 0.8 / len(methods)
        for place, method in enumerate(methods):
            values = [
                next(of_row(row, result.rows[0]) for row in result.rows if row.method == method)
                for result in results
            ]
            positions = [index + (place - (len(methods) - 1) / 2) * width for index in range(len(results))]
            bars = panel.bar(
                positions, values, 0.92 * width, label=f"over {method}", color=colours[place % 3]
            )
            panel.bar_label(bars, fmt="%.1f×", fontsize=8)
        panel.axhline(1.0, color="#888888", linewidth=0.8)
        panel.set_yscale("log")
        panel.set_yticks([1, 2, 5, 10, 20], ["1×", "2×", "5×", "10×", "20×"])
        panel.minorticks_off()
        panel.set_xticks(range(len(results)), [result.name for result in results])
        panel.set_title(f"Palmette's advantage: {label}", fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
        panel.margins(y=0.12)
    panels[0].legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=9, color="#555555")
    figure.savefig(path, dpi=150)
