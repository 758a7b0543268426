# SPDX-License-Identifier: Apache-2.0
"""Tree attention on a GPU, against what torch offers there; prints a table.

    python -m bench.gpu [--suite quick] [--only TEXT] [--flex] [--rounds 30]

Contenders take turns, so that all meet the same clocks, and between two calls more memory is written than the
L2 cache holds: in a model, the other layers do that. Times are medians of CUDA events around a call, launches
included, as a stream sees them. *of the bandwidth* is what must move at least (K and V that somebody sees
once, q, the output), over the time, over what a copy moves per second in the same run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from palmette.testing import assert_accurate

from bench.cases import SUITES, Case, attention_cases, make_inputs
from bench.pages import table
from bench.peers import flex, ours, prepare, union_mask

DTYPE = "bfloat16"


class Timer:
    """Seconds of a call on a device."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        cache = torch.cuda.get_device_properties(device).L2_cache_size if self.cuda else 16 << 20
        self._evict = torch.empty(2 * cache, dtype=torch.uint8, device=device)

    def __call__(self, run: Callable[[], Any]) -> float:
        self._evict.zero_()
        if not self.cuda:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def bandwidth(timer: Timer, device: torch.device, rounds: int) -> float:
    """Bytes per second that a copy reads and writes."""
    size = 1 << 30 if timer.cuda else 1 << 26
    source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    seconds = statistics.median(timer(lambda: target.copy_(source)) for _ in range(rounds))
    return 2 * size / seconds


def race(case: Case, timer: Timer, device: torch.device, rounds: int, with_flex: bool) -> dict[str, float]:
    """Median seconds by contender."""
    made = make_inputs(case)
    inputs = made._replace(q=made.q.to(device), k=made.k.to(device), v=made.v.to(device))  # slots: the host's
    prepared = prepare(case, inputs)
    contenders = [ours(case, inputs), union_mask(prepared), *([flex(prepared)] if with_flex else [])]
    want = contenders[0].read(contenders[0].run()).double()
    for contender in contenders[1:]:  # the first calls also compile and warm up
        assert_accurate(contender.read(contender.run()), want, atol=3e-2, name=contender.name)
    times: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for _ in range(rounds):
        for contender in contenders:
            times[contender.name].append(timer(contender.run))
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--suite", choices=SUITES, default="quick")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases with TEXT in their names")
    parser.add_argument("--flex", action="store_true", help="compile flex_attention too")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--device", default="cuda", help="cpu: to try this program out")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU")
    timer = Timer(device)
    rate = bandwidth(timer, device, arguments.rounds)
    name = torch.cuda.get_device_name(device) if timer.cuda else "CPU"
    print(f"{name}, torch {torch.__version__}, {DTYPE}, a copy moves {rate / 1e9:,.0f} GB/s")
    rows: list[list[str]] = []
    for case in attention_cases(arguments.suite):
        if case.dtype == DTYPE or arguments.only not in case.name:
            continue  # there is the same in float32, of which DTYPE is made here
        found = race(replace(case, dtype=DTYPE), timer, device, arguments.rounds, arguments.flex)
        mine = found["palmette"]
        best = min(seconds for peer, seconds in found.items() if peer != "palmette")
        if not rows:
            rows.append(
                ["case", *(f"{peer}, µs" for peer in found), "best peer / palmette", "of the bandwidth"]
            )
        share = case.num_bytes() / mine / rate
        rows.append(
            [
                case.name.replace("|", "/"),
                *(f"{s * 1e6:,.1f}" for s in found.values()),
                f"{best / mine:.2f}",
                f"{share:.0%}",
            ]
        )
        print(f"{case.name}: {best / mine:.2f}", file=sys.stderr, flush=True)
    if not rows:
        parser.error(f"no case of {arguments.suite} has {arguments.only!r} in its name")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
