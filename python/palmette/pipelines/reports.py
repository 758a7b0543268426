# SPDX-License-Identifier: Apache-2.0
"""What the reports of pipelines share."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from palmette import __version__
from palmette.collect_env import collect


def machine() -> dict[str, str]:
    """What the numbers were measured on."""
    report = collect()
    return {
        "cpu": report["cpu"],
        "threads": str(torch.get_num_threads()),
        "body": report["body"],
        "torch": str(torch.__version__),
        "palmette": __version__,
    }


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, the first column to the left, the others to the right."""
    widths = [max(3, *(len(row[i]) for row in [header, *rows])) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([line(header), line(rule), *map(line, rows)])


def smoothed(values: Sequence[float], width: int) -> list[float]:
    """Means of the last ``width`` values, fewer at the beginning."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    begins = [max(0, end - width) for end in range(1, len(sums))]
    return [(sums[end] - sums[b]) / (end - b) for end, b in enumerate(begins, 1)]
