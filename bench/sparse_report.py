# SPDX-License-Identifier: Apache-2.0
"""Rows of sparse attention: what follows from their times, as lines and tables (bench/report.py)."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from bench.goals import SPARSE_DECODE_BYTES, SPARSE_GOALS, sparse_goal
from bench.jobs import Row

AGAINST_DENSE = ("forward", "training")
LINEAR_TOLERANCE = 0.2
_MEMORY = ("index_bytes", "plan_bytes", "selected_extra_bytes", "select_extra_bytes")
_SUMMED = ("index_bytes", "selected_extra_bytes", "select_extra_bytes")  # the plan is made in a call

Table = tuple[str, Sequence[str], list[list[str]]]


# ------------------------------------------------------------------------------------------------ evaluation


def evaluate(row: Row) -> dict[str, Any]:
    """``row["result"]``: ratio to the fastest of ``row["against"]``, and what else its group is held to."""
    if row["group"] == "memory":
        return _memory(row["table"])
    times = {name: t["ms"] for name, t in row["times"].items()}
    own = times[row["ours"]]
    best = min(row["against"], key=times.__getitem__)
    ratio, goal = times[best] / own, sparse_goal(row["group"], row["tokens"], row["group_size"])
    result: dict[str, Any] = {
        "ours_ms": own,
        "best_peer": best,
        "peer_ms": times[best],
        "ratio": ratio,
        "goal": goal,
        "met": goal is None or ratio >= goal,
        "gflops": {name: flops / times[name] / 1e6 for name, flops in row["work"].items()},
    }
    if row["group"] == "selected":
        result["rate"] = result["gflops"][row["ours"]] / result["gflops"][row["dense"]]
        result["rate_met"] = result["rate"] >= 1.0
    if row["group"] in AGAINST_DENSE:
        result["ideal"] = row["work"][best] / row["work"][row["ours"]]
    if row["group"] == "decode":
        result["fewer_bytes"] = row["bytes"]["dense"] / row["bytes"]["palmette"]
        result["bytes_met"] = result["fewer_bytes"] >= SPARSE_DECODE_BYTES
    return result


def _memory(table: list[dict[str, int]]) -> dict[str, Any]:
    """Linear: at every length, as many bytes per token as in the median, within a fifth."""
    per_token = [sum(entry[name] for name in _SUMMED) / entry["tokens"] for entry in table]
    typical = statistics.median(per_token)
    least, most = min(per_token) / typical, max(per_token) / typical
    text = (
        f"{typical:.0f} bytes per token from {_size(table[0]['tokens'])} to {_size(table[-1]['tokens'])} "
        f"tokens, {least - 1:+.0%} to {most - 1:+.0%} (goal within {LINEAR_TOLERANCE:.0%})"
    )
    met = least >= 1 - LINEAR_TOLERANCE and most <= 1 + LINEAR_TOLERANCE
    return {"text": text, "least": least, "most": most, "met": met}


# ----------------------------------------------------------------------------------------------------- lines


def _size(tokens: int) -> str:
    return f"{tokens // 1024}k"


def _goal(goal: float | None) -> str:
    return "–" if goal is None else f"{goal:g}x"


def _mark(met: bool) -> str:
    return "yes" if met else "NO"


def line(row: Row) -> str:
    """One row as text."""
    result = row["result"]
    if row["group"] == "memory":
        return f"{row['name']:50s} {result['text']}: {'ok' if result['met'] else 'NOT MET'}"
    text = (
        f"{row['name']:50s} {result['ours_ms']:9.2f} ms  {result['peer_ms']:9.2f} {result['best_peer']:24s} "
        f"{result['ratio']:6.2f}x of {_goal(result['goal']):5s} "
        f"{_mark(result['met']) if result['goal'] else '':3s}"
    )
    if "rate" in result:
        rates = ", ".join(f"{name} {value:.0f}" for name, value in result["gflops"].items())
        text += f"  GFLOP/s: {rates} {_mark(result['rate_met'])}"
    if "ideal" in result:
        text += f"  {result['ideal']:.2f}x fewer FLOPs"
    if "phases_ms" in row:
        text += "; ms: " + ", ".join(f"{name} {ms:.1f}" for name, ms in row["phases_ms"].items())
    if "fewer_bytes" in result:
        others = {n: t["ms"] for n, t in row["times"].items() if n not in (row["ours"], result["best_peer"])}
        text += f"  {result['fewer_bytes']:.1f}x fewer bytes; ms: "
        text += ", ".join(f"{name} {ms:.2f}" for name, ms in others.items())
    return text


# --------------------------------------------------------------------------------------------------- summary


def summary_lines(rows: list[Row]) -> list[tuple[str, str, bool]]:
    """(what, finding, whether the goal is met) per group and goal."""
    found = []
    for group, title in SPARSE_GOALS.items():
        mine = [row for row in rows if row["group"] == group]
        if group == "memory":
            found += [(title, row["result"]["text"], row["result"]["met"]) for row in mine]
            continue
        parts: dict[str, list[Row]] = {}
        for row in mine:
            if row["result"]["goal"] is not None:
                key = f"G={row['group_size']}" if group == "selected" else _size(row["tokens"])
                parts.setdefault(key, []).append(row)
        for key, part in parts.items():
            ratios = [row["result"]["ratio"] for row in part]
            text = f"median {statistics.median(ratios):.2f}x, least {min(ratios):.2f}x"
            text += f" (goal {part[0]['result']['goal']:g}x on each)"
            found.append((f"{title}, {key} ({len(part)})", text, all(row["result"]["met"] for row in part)))
        if group == "selected" and mine:
            rates = [row["result"]["rate"] for row in mine]
            text = f"median {statistics.median(rates):.2f}, least {min(rates):.2f} (goal 1 on each)"
            found.append(
                (f"selected attention: GFLOP/s over dense SDPA's ({len(mine)})", text, min(rates) >= 1)
            )
        if group == "decode" and mine:
            fewer = [row["result"]["fewer_bytes"] for row in mine]
            met = all(row["result"]["bytes_met"] for row in mine)
            text = f"at least {min(fewer):.1f}x (goal {SPARSE_DECODE_BYTES:g}x)"
            found.append((f"fewer bytes in a decoding step ({len(mine)})", text, met))
    return found


def tables(rows: list[Row]) -> Iterator[Table]:
    """Title, head and rows of a table per group."""
    makers = {"selected": _selected, "decode": _decode, "memory": _memory_table}
    for group, title in SPARSE_GOALS.items():
        mine = [row for row in rows if row["group"] == group]
        if mine:
            head, cells = makers.get(group, _against)(mine)
            yield title, head, cells


def _basic(row: Row) -> list[str]:
    r = row["result"]
    return [
        row["name"],
        f"{r['ours_ms']:.2f}",
        f"{r['peer_ms']:.2f} {r['best_peer']}",
        f"**{r['ratio']:.2f}x**",
        _goal(r["goal"]),
        _mark(r["met"]) if r["goal"] is not None else "",
    ]


_BASIC = ["case", "ours ms", "peer", "ratio", "goal", "met"]


def _selected(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    head = [*_BASIC, "blocks shared", "GFLOP/s", "query-outer", "dense", "dense ms"]
    return head, [
        [
            *_basic(row),
            f"{row['shared_blocks']:.0%}",
            f"{row['result']['gflops'][row['ours']]:.0f}",
            f"{row['result']['gflops'][row['result']['best_peer']]:.0f}",
            f"{row['result']['gflops'][row['dense']]:.0f}",
            f"{row['times'][row['dense']]['ms']:.0f}",
        ]
        for row in rows
    ]


def _against(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    names = list(dict.fromkeys(name for row in rows for name in row.get("phases_ms", {})))
    head = [*_BASIC, "fewer FLOPs", *(f"{name} ms" for name in names)]

    def cells(row: Row) -> list[str]:
        ideal = row["result"].get("ideal")
        parts = row.get("phases_ms", {})
        return [
            *_basic(row),
            "–" if ideal is None else f"{ideal:.2f}x",
            *(f"{parts[name]:.1f}" if name in parts else "–" for name in names),
        ]

    return head, [cells(row) for row in rows]


def _decode(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    names = list(dict.fromkeys(n for row in rows for n in row["times"] if n != row["ours"]))
    head = [*_BASIC, "fewer bytes", *(f"{name} ms" for name in names)]
    return head, [
        [
            *_basic(row),
            f"{row['result']['fewer_bytes']:.1f}x",
            *(f"{row['times'][n]['ms']:.2f}" if n in row["times"] else "–" for n in names),
        ]
        for row in rows
    ]


def _memory_table(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    head = ["tokens", "block_index MiB", "plan MiB", "selected_attention, extra MiB (plan included)"]
    head += ["select_blocks, extra MiB", "all, bytes per token"]
    return head, [
        [
            _size(entry["tokens"]),
            *(f"{entry[name] / 2**20:.2f}" for name in _MEMORY),
            f"{sum(entry[name] for name in _SUMMED) / entry['tokens']:.0f}",
        ]
        for row in rows
        for entry in row["table"]
    ]
