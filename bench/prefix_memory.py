# SPDX-License-Identifier: Apache-2.0
"""``python -m bench.prefix_memory [--out FILE.md]``: memory and time of one update on a shared prompt.

Each contender runs in a process of its own: one update to touch everything, then one that is watched.
"resident" is how far the resident set's peak rises above what it was before; "tensors" is the same of what
PyTorch has allocated, from its profiler's records, in a further update. Weights and their gradients are there
before.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench.bench_shared_prefix import Case, Update, load_cut_model
from bench.machine import describe, headline
from bench.memory import peak_growth
from bench.pages import publish, table

CASE = Case(640, 128, 16)
CONTENDERS: dict[str, Callable[[Update], Callable[[], torch.Tensor]]] = {
    "dense batch": lambda update: update.dense(CASE.rollouts),
    "dense, one sequence at a time": lambda update: update.dense(1),
    "packed, 4-D tree mask": lambda update: update.packed(update.case.rollouts),
    **{
        f"palmette, {mode}, microbatches of {budget}": (
            lambda update, mode=mode, budget=budget: update.palmette(mode, budget)
        )
        for budget in (2048, 512)
        for mode in ("retain", "offload", "recompute")
    },
}


def _alive(run: Callable[[], object]) -> int:
    """Peak of what PyTorch has allocated during a call, above what it had before."""
    with torch.profiler.profile(
        profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]
    ) as profile:
        run()
    events = profile.profiler.kineto_results.events()
    records = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    total = peak = 0
    for _, size in records:
        total += size
        peak = max(peak, total)
    return peak


def measure(name: str) -> dict[str, float]:
    """Of one contender, in this process."""
    model, _ = load_cut_model()
    run = CONTENDERS[name](Update(CASE, model))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    run()
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    alive = _alive(run)
    return {"seconds": statistics.median(times), "alive": alive, "resident": peak_growth(run)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one)))
        return 0
    rows, dense = [], {"alive": 0.0, "resident": 0.0}
    for name in CONTENDERS:
        command = [sys.executable, "-m", "bench.prefix_memory", "--one", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
        got = json.loads(done.stdout.splitlines()[-1])
        dense = got if not rows else dense
        cells = [name]
        for key in ("alive", "resident"):
            cells += [f"{got[key] / 1e6:.0f}", f"{got[key] / dense[key] - 1:+.0%}"]
        rows.append([*cells, f"{got['seconds']:.2f}"])
        print(rows[-1], file=sys.stderr)
    header = ["", "tensors, MB", "over dense", "resident, MB", "over dense", "s"]
    text = f"{headline(describe())}\n\nPrompt {CASE.prefix}, {CASE.rollouts} rollouts of {CASE.suffix}.\n\n"
    text += table([header, *rows]) + "\n"
    publish(text, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
