# SPDX-License-Identifier: Apache-2.0
"""Tree attention and sparse attention on a GPU, against what torch offers there; prints tables.

    python -m bench.gpu [--kinds tree,sparse] [--suite quick] [--only TEXT] [--flex] [--rounds 30]

Contenders take turns, so that all meet the same clocks, and between two calls more memory is written than the
L2 cache holds: in a model, the other layers do that. *call* is the median of CUDA events around a call: what
a stream sees, Python and launches included where the GPU waits for them. *kernels* is the sum of what torch's
profiler sees of the kernels themselves: what a captured graph would take. *of the bandwidth* is what must
move at least (K and V that somebody sees once, q, the output), over the time of the kernels, over what a copy
moves per second in the same run.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import palmette
import torch
import torch.nn.functional as F
from palmette.testing import assert_accurate

from bench import sparse_cases
from bench.cases import SUITES, Case, attention_cases, make_inputs
from bench.pages import table
from bench.peers import Contender, flex, ours, prepare, union_mask
from bench.sparse_cases import BLOCK, COMPRESSION, SELECTION, SIZES, SparseCase

DTYPE = "bfloat16"


class Timer:
    """Seconds of a call on a device."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        cache = torch.cuda.get_device_properties(device).L2_cache_size if self.cuda else 16 << 20
        self._evict = torch.empty(2, 2 * cache, dtype=torch.uint8, device=device)

    def evict(self) -> None:
        """Copies more memory than the cache holds: to the profiler no kernel."""
        self._evict[0].copy_(self._evict[1])

    def __call__(self, run: Callable[[], Any]) -> float:
        self.evict()
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


class Seconds(NamedTuple):
    """Of a contender: medians."""

    call: float
    kernels: float
    by_kernel: dict[str, float]


def kernel_seconds(run: Callable[[], Any], timer: Timer, rounds: int) -> dict[str, float]:
    """Seconds per call of each kernel that ``run`` launches, by name."""
    if not timer.cuda:
        return {"?": timer(run)}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(rounds):
            timer.evict()
            run()
        torch.cuda.synchronize()
    found: dict[str, float] = {}
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.name.startswith("Mem"):
            name = short_name(event.name)
            found[name] = found.get(name, 0.0) + event.time_range.elapsed_us() / 1e6 / rounds
    return found


def short_name(name: str) -> str:
    """``attend_kernel`` of the whole of its demangled name."""
    name = re.sub(r"\((?!anonymous).*", "", name.replace("(anonymous namespace)::", "").removeprefix("void "))
    return re.sub(r"<.*", "", name).rpartition("::")[2] or name


def race(contenders: Sequence[Contender], timer: Timer, rounds: int) -> dict[str, Seconds]:
    """Times by contender; the first calls, which compile and warm up, are not among them."""
    times: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for contender in contenders:
        contender.run()
    for _ in range(rounds):
        for contender in contenders:
            times[contender.name].append(timer(contender.run))
    kernels = {c.name: kernel_seconds(c.run, timer, max(3, rounds // 3)) for c in contenders}
    return {
        name: Seconds(statistics.median(seconds), sum(kernels[name].values()), kernels[name])
        for name, seconds in times.items()
    }


def tree_race(
    case: Case, timer: Timer, device: torch.device, rounds: int, with_flex: bool
) -> dict[str, Seconds]:
    made = make_inputs(case)
    inputs = made._replace(q=made.q.to(device), k=made.k.to(device), v=made.v.to(device))  # slots: the host's
    prepared = prepare(case, inputs)
    contenders = [ours(case, inputs), union_mask(prepared), *([flex(prepared)] if with_flex else [])]
    want = contenders[0].read(contenders[0].run()).double()
    for contender in contenders[1:]:
        assert_accurate(contender.read(contender.run()), want, atol=3e-2, name=contender.name)
    return race(contenders, timer, rounds)


def tree_table(arguments: argparse.Namespace, timer: Timer, device: torch.device, rate: float) -> str:
    rows: list[list[str]] = []
    for case in attention_cases(arguments.suite):
        if case.dtype == DTYPE or arguments.only not in case.name:
            continue  # there is the same in float32, of which DTYPE is made here
        case = replace(case, dtype=DTYPE)
        found = tree_race(case, timer, device, arguments.rounds, arguments.flex)
        mine = found["palmette"]
        peers = [seconds for peer, seconds in found.items() if peer != "palmette"]
        if not rows:
            heads = [f"{peer}, {what}, µs" for peer in found for what in ("call", "kernels")]
            rows.append(["case", *heads, "best peer / palmette, call", "kernels", "of the bandwidth"])
        ratios = [min(p.call for p in peers) / mine.call, min(p.kernels for p in peers) / mine.kernels]
        cells = [f"{x * 1e6:,.1f}" for s in found.values() for x in (s.call, s.kernels)]
        share = case.num_bytes() / mine.kernels / rate
        rows.append([case.name.replace("|", "/"), *cells, *(f"{r:.2f}" for r in ratios), f"{share:.0%}"])
        detail = ", ".join(f"{k} {x * 1e6:.1f}" for k, x in mine.by_kernel.items())
        print(f"{case.name}: {ratios[0]:.2f} {ratios[1]:.2f}; {detail}", file=sys.stderr, flush=True)
    return table(rows) if rows else ""


# ---------------------------------------------------------------------------------------------------- sparse

SPARSE_SIZES = {"quick": (8192, 32768), "default": (8192, 16384, 32768, 65536)}
SPARSE_GROUPS = {"quick": (4, 16), "default": (1, 2, 4, 8, 16)}
SPARSE_HEADS, SPARSE_DIM = 32, 128


def sparse_contenders(case: SparseCase, device: torch.device, *, backward: bool) -> list[Contender]:
    """Dense causal attention, NSA's three branches without gates, and each of its operators."""
    q, k, v = (x.to(device).requires_grad_(backward) for x in sparse_cases.make_inputs(case)[:3])
    sizes = COMPRESSION
    ends = case.cu_seqlens
    k_cmp, cmp_ends = palmette.compress(k, None, None, ends, **sizes)
    v_cmp, _ = palmette.compress(v, None, None, ends, **sizes)
    k_cmp, v_cmp = (x.detach().requires_grad_(backward) for x in (k_cmp, v_cmp))
    dense = tuple(x.detach().transpose(0, 1)[None].contiguous().requires_grad_(backward) for x in (q, k, v))

    def compressed() -> tuple[torch.Tensor, torch.Tensor]:
        return palmette.compressed_attention(q, k_cmp, v_cmp, ends, cmp_ends, **sizes)

    lse = compressed()[1].detach()

    def select() -> torch.Tensor:
        return palmette.select_blocks(q, k_cmp, lse, ends, cmp_ends, **sizes, **SELECTION)

    index = select()

    def selected() -> torch.Tensor:
        return palmette.selected_attention(q, k, v, index, ends, block_size=BLOCK)

    def window() -> torch.Tensor:
        return palmette.sliding_window_attention(q, k, v, ends, window=SIZES["window_size"])

    def sdpa() -> torch.Tensor:
        return F.scaled_dot_product_attention(*dense, is_causal=True, enable_gqa=case.group_size > 1)

    def with_gradients(run: Callable[[], torch.Tensor], leaves: Sequence[torch.Tensor]) -> Callable[[], Any]:
        if not backward:
            return run
        dout = torch.randn_like(run())
        return lambda: torch.autograd.grad(run(), leaves, dout)

    made: list[tuple[str, Callable[[], Any]]] = [
        ("dense SDPA", with_gradients(sdpa, dense)),
        ("compressed", with_gradients(lambda: compressed()[0], (q, k_cmp, v_cmp))),
        ("select", select),
        ("selected", with_gradients(selected, (q, k, v))),
        ("window", with_gradients(window, (q, k, v))),
    ]
    return [Contender(name, run, lambda out: out) for name, run in made]


def sparse_table(arguments: argparse.Namespace, timer: Timer, device: torch.device) -> str:
    suite = "quick" if arguments.suite == "quick" else "default"
    rows: list[list[str]] = []
    for tokens in SPARSE_SIZES[suite]:
        for group in SPARSE_GROUPS[suite]:
            case = SparseCase("forward", tokens, SPARSE_HEADS, SPARSE_HEADS // group, SPARSE_DIM, dtype=DTYPE)
            for backward in (False, True):
                name = f"{tokens // 1024}k, g = {group}" + (", with gradients" if backward else "")
                if arguments.only not in name:
                    continue
                contenders = sparse_contenders(case, device, backward=backward)
                found = race(contenders, timer, max(3, arguments.rounds // 6))
                if not rows:
                    heads = [f"{c} {what}" for c in found for what in ("call", "kernels")]
                    rows.append(["ms", *heads, "dense / sum of ours, kernels"])
                mine = sum(s.kernels for c, s in found.items() if c != "dense SDPA")
                ratio = found["dense SDPA"].kernels / mine
                cells = [f"{x * 1e3:.3f}" for s in found.values() for x in (s.call, s.kernels)]
                rows.append([name, *cells, f"{ratio:.2f}"])
                detail = "; ".join(
                    f"{c}: " + ", ".join(f"{k} {x * 1e3:.3f}" for k, x in s.by_kernel.items())
                    for c, s in found.items()
                )
                print(f"{name}: {ratio:.2f}; {detail}", file=sys.stderr, flush=True)
    return table(rows) if rows else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kinds", default="tree,sparse", help="of attention; default: %(default)s")
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
    kinds = arguments.kinds.split(",")
    tables = [tree_table(arguments, timer, device, rate)] if "tree" in kinds else []
    tables += [sparse_table(arguments, timer, device)] if "sparse" in kinds else []
    if not any(tables):
        parser.error(f"no case of {arguments.suite} has {arguments.only!r} in its name")
    print("\n\n".join(filter(None, tables)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
