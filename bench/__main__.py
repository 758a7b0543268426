# SPDX-License-Identifier: Apache-2.0
"""``python -m bench``: runs the benchmarks, writes JSON, tables and plots to bench/results (README.md)."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from pathlib import Path

from bench.cases import SUITES
from bench.jobs import KINDS, Settings, run_job

MODULES = {
    "attention": "bench_tree_attention",
    "training": "bench_training",
    "merge": "bench_merge",
    "checks": "bench_checks",
    "model": "bench_model",
    "sparse": "bench_sparse",
    "codec": "bench_codecs",
    "prefix": "bench_shared_prefix",
}


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description="Measures Palmette against its peers."
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--suite", choices=SUITES, default="default", help="quick: a minute, default: ten, full: all"
    )
    size.add_argument("--quick", dest="suite", action="store_const", const="quick")
    size.add_argument("--full", dest="suite", action="store_const", const="full")
    parser.add_argument("--kinds", default=",".join(KINDS), help="of %(default)s, with commas between")
    parser.add_argument(
        "--only", action="append", default=[], metavar="TEXT", help="jobs with TEXT in their names"
    )
    parser.add_argument(
        "--flex", action="store_true", help="compile flex_attention as a peer, half a minute per case"
    )
    parser.add_argument(
        "--peer", action="append", default=[], metavar="MODULE:FUNCTION", help="a further peer for attention"
    )
    parser.add_argument("--warm", action="store_true", help="do not evict the caches before timed calls")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's)")
    parser.add_argument(
        "--name", help="results are bench/results/NAME.json and beside it (default: local/latest)"
    )
    parser.add_argument(
        "--direct", action="store_true", help="without pytest-benchmark, and without its JSON"
    )
    parser.add_argument("--report", type=Path, metavar="FILE.json", help="only evaluate a saved run again")
    options = parser.parse_args(argv)
    unknown = set(options.kinds.split(",")) - set(KINDS)
    if unknown:
        parser.error(f"--kinds must be of {', '.join(KINDS)}, got {', '.join(sorted(unknown))}")
    return options


def _report_again(file: Path) -> int:
    from bench import report
    from bench.floors import Ceilings
    from bench.session import write

    result = json.loads(file.read_text(encoding="utf-8"))
    result["rows"] = [report.evaluate(row, Ceilings(**result["ceilings"])) for row in result["rows"]]
    write(file.with_suffix(""), result)
    print(report.summary(result))
    return 0


def _run_direct(options: argparse.Namespace) -> int:
    from bench.session import Session

    settings = Settings(
        suite=options.suite,
        kinds=tuple(options.kinds.split(",")),
        only=tuple(options.only),
        with_flex=options.flex,
        more_peers=tuple(options.peer),
        cold=not options.warm,
    )
    session = Session(settings, threads=options.threads, name=options.name)
    start = time.monotonic()
    for kind in settings.kinds:
        for job in importlib.import_module(f"bench.{MODULES[kind]}").jobs(settings):
            session.add(run_job(job))
    if session.rows:
        session.finish()
    print(f"{len(session.rows)} rows in {time.monotonic() - start:.0f} s")
    return 0


def _run_pytest(options: argparse.Namespace) -> int:
    import pytest

    folder = Path(__file__).parent
    name = options.name or "local/latest"
    target = folder / "results" / f"{name}.pytest-benchmark.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    arguments = [str(folder / f"{MODULES[kind]}.py") for kind in options.kinds.split(",")]
    arguments += [
        "-q",
        "-s",
        "--no-header",
        "-p",
        "no:cacheprovider",
        "--benchmark-quiet",
        "--benchmark-disable-gc",
    ]
    arguments += [
        f"--benchmark-json={target}",
        f"--suite={options.suite}",
        f"--kinds={options.kinds}",
        f"--results={name}",
    ]
    arguments += [f"--only={text}" for text in options.only]
    arguments += [f"--peer={name}" for name in options.peer]
    arguments += [f"--{flag}" for flag in ("flex", "warm") if getattr(options, flag)]
    arguments += [] if options.threads is None else [f"--threads={options.threads}"]
    return int(pytest.main(arguments))


def main(argv: list[str] | None = None) -> int:
    options = _arguments(argv)
    if options.report:
        return _report_again(options.report)
    if options.direct:
        return _run_direct(options)
    try:
        import pytest_benchmark  # noqa: F401
    except ImportError:
        print("pytest-benchmark is not installed: running without it", file=sys.stderr)
        return _run_direct(options)
    return _run_pytest(options)


if __name__ == "__main__":
    sys.exit(main())
