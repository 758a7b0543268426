# SPDX-License-Identifier: Apache-2.0
"""From times to tables: ratios, floors, goals, and one summary line per goal.

A row keeps what was measured; ``evaluate`` derives ``row["result"]`` from it and from the ceilings of the
run, so a saved run can be evaluated again: ``python -m bench --report FILE.json``.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from bench import codec_report, sparse_report
from bench.floors import Ceilings, Floor
from bench.goals import FLOOR_MANY_ROWS, GOALS, MANY_ROWS, wanted_fraction, wanted_ratio
from bench.jobs import Row
from bench.machine import headline

LINEAR_TOLERANCE = 0.2


# ------------------------------------------------------------------------------------------------- evaluation


def evaluate(row: Row, ceilings: Ceilings) -> Row:
    """A copy of a row with ``result``."""
    if "skipped" in row:
        return row
    judge: Callable[[Row, Ceilings], dict[str, Any]]
    judge = {"checks": _check, "model": _model, "sparse": _sparse, "codec": _codec}.get(
        row["kind"], _against_peers
    )
    return {**row, "result": judge(row, ceilings)}


def _against_peers(row: Row, ceilings: Ceilings) -> dict[str, Any]:
    own = row["times"][row["ours"]]["ms"]
    others = {name: t["ms"] for name, t in row["times"].items() if name != row["ours"]}
    best = min(others, key=others.__getitem__)
    floor = Floor.from_work(row["flops"], row["bytes"], ceilings)
    goal = GOALS[row["group"]]
    ratio = others[best] / own
    wanted = wanted_ratio(goal.each, others[best], floor.ms)
    fraction_goal = None
    if row["kind"] == "attention":
        fraction_goal = wanted_fraction(row["group"], row["rows_per_key"])
    return {
        "ours_ms": own,
        "best_peer": best,
        "peer_ms": others[best],
        "ratio": ratio,
        "goal": wanted,
        "goal_median": None if goal.median is None else wanted_ratio(goal.median, others[best], floor.ms),
        "met": ratio >= wanted,
        "floor_ms": floor.ms,
        "floor_walk_ms": floor.walk_ms,
        "fraction": floor.ms / own,
        "fraction_goal": fraction_goal,
        "bound": floor.bound,
    }


def _model(row: Row, _: Ceilings) -> dict[str, Any]:
    own = row["times"][row["ours"]]["ms"]
    ratios = {name: t["ms"] / own for name, t in row["times"].items() if name != row["ours"]}
    goals = {name: row["goals"][name] for name in ratios}
    return {
        "ours_ms": own,
        "ratios": ratios,
        "goals": goals,
        "met": all(ratios[n] >= goals[n] for n in goals),
    }


def _sparse(row: Row, _: Ceilings) -> dict[str, Any]:
    return sparse_report.evaluate(row)


def _codec(row: Row, _: Ceilings) -> dict[str, Any]:
    return codec_report.evaluate(row)


def _check(row: Row, ceilings: Ceilings) -> dict[str, Any]:
    """``row["check"]`` says what is checked; see bench_checks.py, which makes these rows."""
    check = row["check"]
    own = row["times"][row["ours"]]["ms"]
    if check["what"] == "linear":
        # time may grow by a fifth more, or less, than the work: the floor of the doubled prompt over that of
        # the single one
        floors = {name: Floor.from_work(*work, ceilings).ms for name, work in check["work"].items()}
        (small,) = (name for name in row["times"] if name != row["ours"])
        grown, wanted = own / row["times"][small]["ms"], floors[row["ours"]] / floors[small]
        met = abs(grown / wanted - 1) <= LINEAR_TOLERANCE
        return {"text": f"time grows {grown:.2f}x, work {wanted:.2f}x", "value": grown / wanted, "met": met}
    if check["what"] == "share":
        (part,) = (name for name in row["times"] if name != row["ours"])
        share = row["times"][part]["ms"] / own
        text = f"{share * own * 1e3:.0f} us, {share:.2%} of {own:.2f} ms (at most {check['limit']:.0%})"
        return {"text": text, "value": share, "met": share <= check["limit"]}
    extra, limit = check["extra_bytes"], check["limit_bytes"]
    text = f"{extra / 2**20:.2f} MiB beyond inputs and outputs (at most {limit / 2**20:.2f})"
    return {"text": text, "value": extra / limit, "met": extra <= limit}


# ------------------------------------------------------------------------------------------------------ lines


def ceilings_line(ceilings: Ceilings) -> str:
    shape = " x ".join(map(str, ceilings.gemm_shape))
    return (
        f"ceilings: fp32 GEMM {ceilings.gemm_gflops:.0f} GFLOP/s ({shape}), "
        f"read {ceilings.read_gbps:.1f} GB/s, head by head {ceilings.walk_gbps:.1f} GB/s"
    )


def _mark(met: bool) -> str:
    return "yes" if met else "NO"


def line(row: Row) -> str:
    """One row as text."""
    if "skipped" in row:
        return f"{row['name']:50s} not run: {row['skipped']}"
    result = row["result"]
    if row["kind"] == "checks":
        return f"{row['name']:50s} {result['text']}: {'ok' if result['met'] else 'NOT MET'}"
    if row["kind"] == "sparse":
        return sparse_report.line(row)
    if row["kind"] == "codec":
        return codec_report.line(row)
    if row["kind"] == "model":
        parts = [
            f"{name} {ratio:.2f}x (goal {result['goals'][name]}x)" for name, ratio in result["ratios"].items()
        ]
        return f"{row['name']:50s} {result['ours_ms']:8.1f} ms per step; {', '.join(parts)}"
    return (
        f"{row['name']:50s} {result['ours_ms']:8.2f} ms  {result['peer_ms']:8.2f} {result['best_peer']:18s} "
        f"{result['ratio']:5.2f}x of {result['goal']:.2f}x {_mark(result['met']):3s}  "
        f"floor {result['floor_ms']:7.2f} ms {result['fraction']:4.0%} {result['bound']}"
    )


# ---------------------------------------------------------------------------------------------------- summary


def _by_kind(result: dict[str, Any], kind: str) -> list[Row]:
    return [row for row in result["rows"] if row["kind"] == kind and "result" in row]


def _spread(values: Sequence[float]) -> str:
    return f"median {statistics.median(values):.2f}x, least {min(values):.2f}x"


def summary_lines(result: dict[str, Any]) -> list[tuple[str, str, bool]]:
    """(what, finding, whether the goal is met) per goal."""
    found: list[tuple[str, str, bool]] = []
    timed = [row for kind in ("attention", "training", "merge", "prefix") for row in _by_kind(result, kind)]
    for group, goal in GOALS.items():
        rows = [row for row in timed if row["group"] == group]
        if rows:
            found.append(
                (
                    f"{goal.title} ({len(rows)})",
                    *_group_finding([r["result"] for r in rows], goal.each, goal.median),
                )
            )
    if timed:
        slower = [row["name"] for row in timed if row["result"]["ratio"] < 1.0]
        text = f"least {min(row['result']['ratio'] for row in timed):.2f}x" + _names(slower)
        found.append(("nothing below 1.0x", text, not slower))
    found += _floor_findings(_by_kind(result, "attention"))
    for row in _by_kind(result, "model"):
        parts = [
            f"{r:.2f}x {name} (goal {row['result']['goals'][name]}x)"
            for name, r in row["result"]["ratios"].items()
        ]
        found.append((row["name"], "; ".join(parts), row["result"]["met"]))
    found += [
        (row["name"], row["result"]["text"], row["result"]["met"]) for row in _by_kind(result, "checks")
    ]
    found += sparse_report.summary_lines(_by_kind(result, "sparse"))
    found += codec_report.summary_lines(_by_kind(result, "codec"))
    return found


def _group_finding(results: list[dict[str, Any]], each: float, median: float | None) -> tuple[str, bool]:
    text = _spread([r["ratio"] for r in results])
    missed = sum(not r["met"] for r in results)
    capped = sum(r["goal"] < each for r in results)
    wanted = f"{each}x on each"
    met = not missed
    if median is not None:
        wanted = f"{median}x in the median, {wanted}"
        # the median case counts with its own cap: how far every case is from what the median asks of it
        met = met and statistics.median(r["ratio"] / r["goal_median"] for r in results) >= 1.0
        capped = sum(r["goal_median"] < median for r in results)
    text += f" (goal {wanted}"
    text += f"; lower in {capped} that the floor caps)" if capped else ")"
    return text + (f"; {missed} below their goal" if missed else ""), met


def _floor_findings(rows: list[Row]) -> Iterable[tuple[str, str, bool]]:
    def few(group: str) -> list[Row]:
        return [row for row in rows if row["group"] == group]

    many = [row for row in rows if row["result"]["fraction_goal"] == FLOOR_MANY_ROWS]
    others = [r for r in rows if r["group"] in ("star_large", "medusa", "fasttree") and r not in many]
    for title, part in (
        (f"{MANY_ROWS} or more query rows per key", many),
        ("fewer query rows per key", others),
        *((GOALS[group].title, few(group)) for group in ("chain", "irregular", "star_small")),
    ):
        if part:
            fractions = [row["result"]["fraction"] for row in part]
            bounds = [row["result"]["bound"] for row in part]
            goal = part[0]["result"]["fraction_goal"]
            text = f"median {statistics.median(fractions):.0%}, least {min(fractions):.0%} (goal {goal:.0%})"
            text += "; bound by "
            text += ", ".join(f"{b} {bounds.count(b)}" for b in ("compute", "memory") if b in bounds)
            yield f"of the floor: {title} ({len(part)})", text, min(fractions) >= goal


def _names(names: list[str]) -> str:
    return (
        ""
        if not names
        else ": " + ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    )


def summary(result: dict[str, Any]) -> str:
    """The summary as text."""
    lines = [headline(result["machine"]), ceilings_line(Ceilings(**result["ceilings"]))]
    lines += [f"{'ok ' if met else 'NOT'} {what}: {finding}" for what, finding, met in summary_lines(result)]
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------- Markdown


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(head)} |",
        "|" + "---|" * len(head),
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
    ]


def _escape(name: str) -> str:
    return name.replace("|", "\\|")


def markdown(result: dict[str, Any], name: str) -> str:
    """A report to read: summary, tables of every kind, plots."""
    lines = [
        f"# Benchmark results, {result['date']}",
        "",
        f"{headline(result['machine'])}. Suite `{result['suite']}`, "
        f"caches {result['caches']} before every call, {result['trees']} trees. "
        f"{ceilings_line(Ceilings(**result['ceilings']))}.",
        "",
        "How to read this: bench/README.md.",
        "",
    ]
    found = ((_escape(what), finding, _mark(met)) for what, finding, met in summary_lines(result))
    lines += _table(("goal", "result", "met"), found)
    titles = {
        "attention": "Attention",
        "training": "Training, forward + backward",
        "merge": "Merging states",
        "prefix": "Updates on a shared prompt, forward + backward",
    }
    for kind, title in titles.items():
        rows = _by_kind(result, kind)
        if rows:
            lines += [f"## {title}", "", *_peer_table(rows)]
            lines += [f"![ratios](./{name}-{kind}.png)", ""] if kind in ("attention", "training") else []
    if sparse := _by_kind(result, "sparse"):
        lines += ["## Sparse attention", ""]
        for title, head, cells in sparse_report.tables(sparse):
            lines += [f"### {title}", "", *_table(head, cells)]
        if any(row["group"] in sparse_report.AGAINST_DENSE for row in sparse):
            lines += [f"![speedup over dense attention](./{name}-sparse.png)", ""]
    for title, head, cells in codec_report.tables(_by_kind(result, "codec")):
        lines += [f"## {title}", "", *_table(head, cells)]
    not_run = [row for row in result["rows"] if "skipped" in row]
    if not_run:
        lines += [
            "## Not run",
            "",
            *_table(("case", "why"), ((_escape(r["name"]), r["skipped"]) for r in not_run)),
        ]
    return "\n".join(lines)


def _peer_table(rows: list[Row]) -> list[str]:
    names = list(dict.fromkeys(n for row in rows for n in row["times"] if n != row["ours"]))
    head = [
        "case",
        "ours ms",
        "best peer",
        "ratio",
        "goal",
        "met",
        "floor ms",
        "of the floor",
        "bound",
        *names,
    ]

    def cells(row: Row) -> list[str]:
        r = row["result"]
        peers = [f"{row['times'][n]['ms']:.2f}" if n in row["times"] else "–" for n in names]
        return [
            _escape(row["name"]),
            f"{r['ours_ms']:.2f}",
            f"{r['peer_ms']:.2f} {r['best_peer']}",
            f"**{r['ratio']:.2f}x**",
            f"{r['goal']:.2f}x",
            _mark(r["met"]),
            f"{r['floor_ms']:.2f}",
            f"{r['fraction']:.0%}",
            r["bound"],
            *peers,
        ]

    return _table(head, map(cells, rows))
