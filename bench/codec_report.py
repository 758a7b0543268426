# SPDX-License-Identifier: Apache-2.0
"""Rows of codecs: ratios to every contender, as lines and tables (bench/report.py)."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from bench.jobs import Row

Table = tuple[str, Sequence[str], list[list[str]]]


def evaluate(row: Row) -> dict[str, Any]:
    """``row["result"]``: how many times as long each contender takes, and whether that is enough."""
    times = {name: t["ms"] for name, t in row["times"].items()}
    own = times[row["ours"]]
    ratios = {name: ms / own for name, ms in times.items() if name != row["ours"]}
    goals = {name: goal for name, goal in row["goals"].items() if goal is not None and name in ratios}
    return {
        "ours_ms": own,
        "ns_per_element": own * 1e6 / row["elements"],
        "ratios": ratios,
        "goals": goals,
        "missed": [name for name, goal in goals.items() if ratios[name] < goal],
        "met": all(ratios[name] >= goal for name, goal in goals.items()),
    }


def _ratio(result: dict[str, Any], name: str) -> str:
    text = f"{result['ratios'][name]:.2f}x"
    if name in result["goals"]:
        text += f" of {result['goals'][name]:.2f}x"
        text += " NO" if name in result["missed"] else ""
    return text


def line(row: Row) -> str:
    """One row as text."""
    result = row["result"]
    parts = ", ".join(f"{name} {_ratio(result, name)}" for name in result["ratios"])
    note = f"; {row['note']}" if "note" in row else ""
    return (
        f"{row['name']:58s} {result['ours_ms']:8.2f} ms {result['ns_per_element']:6.3f} ns/element  "
        f"{parts}{note}"
    )


def summary_lines(rows: list[Row]) -> list[tuple[str, str, bool]]:
    """(what, finding, whether the goal is met) per contender and goal."""
    found = []
    keys: dict[tuple[str, str, float], list[float]] = {}
    for row in rows:
        for name, goal in row["result"]["goals"].items():
            keys.setdefault((_group(row), name, goal), []).append(row["result"]["ratios"][name])
    for (group, name, goal), ratios in keys.items():
        text = f"median {statistics.median(ratios):.2f}x, least {min(ratios):.2f}x (goal {goal:.2f}x)"
        found.append((f"{group} / {name} ({len(ratios)})", text, min(ratios) >= goal))
    return found


def _group(row: Row) -> str:
    words = row["name"].removeprefix("codec ").split(",")[0].split()
    return " ".join(word for word in words if not word.isdigit())


def tables(rows: list[Row]) -> Iterator[Table]:
    """Title, head and rows of a table per kind of codec."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["name"].split()[1], []).append(row)
    for title, some in groups.items():
        names = list(dict.fromkeys(name for row in some for name in row["result"]["ratios"]))
        head = ["case", "ours ms", "ns per element", *names, "met"]
        yield (
            f"Codecs: {title}",
            head,
            [
                [
                    row["name"].removeprefix("codec ") + (f" ({row['note']})" if "note" in row else ""),
                    f"{row['result']['ours_ms']:.2f}",
                    f"{row['result']['ns_per_element']:.3f}",
                    *(
                        _ratio(row["result"], name) if name in row["result"]["ratios"] else "–"
                        for name in names
                    ),
                    "" if not row["result"]["goals"] else "yes" if row["result"]["met"] else "NO",
                ]
                for row in some
            ],
        )
