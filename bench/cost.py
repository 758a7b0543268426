# SPDX-License-Identifier: Apache-2.0
"""``python -m bench.cost``: measures the constants of csrc/plan/cost.h, on one thread.

One query with ``rows`` query heads per KV head stands for an item of ``rows`` rows, at head_dim 128 in fp32:

    per_key(rows)   the difference between prompts of 2,048 and 6,144 keys:
                    max(read, pack + lanes(rows) * key)
    fixed(rows)     the same keys as nodes of 48 and as nodes of 96, an item each: item + rows * row

Least squares over 16 to 128 rows give ``key`` and ``pack``; 1 to 8 rows give ``read``; what 8 rows, and
4 to 1, cost beyond 16 gives ``lanes``.
"""

from __future__ import annotations

import statistics
import time

import numpy as np
import palmette
import torch

from bench.machine import describe, headline
from bench.measure import Evictor, wake_threads

KV_HEADS, HEAD_DIM, ROUNDS = 8, 128, 15
SHORT, LONG = 2048, 6144
FULL_BLOCKS, SMALL_BLOCKS = (16, 32, 64, 128), (8, 4, 2, 1)
MIXED = tuple(16 + rows for rows in SMALL_BLOCKS)


class Bench:
    """Times single queries; every round runs all of them once, caches evicted."""

    def __init__(self) -> None:
        self.k = torch.randn(LONG, KV_HEADS, HEAD_DIM)
        self.v = torch.randn(LONG, KV_HEADS, HEAD_DIM)
        self.evict = Evictor()

    def plan(self, rows: int, nodes: int, length: int) -> palmette.TreeAttentionPlan:
        tree = palmette.Tree([*range(-1, nodes - 1)], [length] * nodes)
        heads = {"num_q_heads": rows * KV_HEADS, "num_kv_heads": KV_HEADS, "head_dim": HEAD_DIM}
        return palmette.plan_tree_attention(tree, split="auto" if nodes == 1 else "node", **heads)

    def ns_per_head(self, plans: dict[object, palmette.TreeAttentionPlan]) -> dict[object, float]:
        times: dict[object, list[float]] = {key: [] for key in plans}
        for turn in range(ROUNDS + 1):
            for key, plan in plans.items():
                q = torch.randn(1, plan.num_q_heads, HEAD_DIM)
                self.evict()
                start = time.perf_counter()
                palmette.tree_attention(q, self.k, self.v, plan)
                if turn:
                    times[key].append(time.perf_counter() - start)
        return {key: statistics.median(values) * 1e9 / KV_HEADS for key, values in times.items()}


@torch.inference_mode()
def measure() -> dict[str, float]:
    """The constants of cost.h, in ns and as ratios."""
    bench = Bench()
    wake_threads(0.2)
    all_rows = FULL_BLOCKS + MIXED + SMALL_BLOCKS
    times = bench.ns_per_head({(r, n): bench.plan(r, 1, n) for r in all_rows for n in (SHORT, LONG)})
    per_key = {r: (times[r, LONG] - times[r, SHORT]) / (LONG - SHORT) for r in all_rows}
    key, pack = np.polyfit(FULL_BLOCKS, [per_key[r] for r in FULL_BLOCKS], 1)
    read = statistics.mean(per_key[r] for r in SMALL_BLOCKS)
    result = {"key": float(key), "pack": float(pack), "read": read}
    for name, blocks in (("lanes8", (8,)), ("lanes4", (4, 2, 1))):
        result[name] = statistics.mean(per_key[16 + r] - per_key[16] for r in blocks) / float(key)
    fixed_rows = FULL_BLOCKS + SMALL_BLOCKS
    pieces = {(r, n): bench.plan(r, SHORT // n, n) for r in fixed_rows for n in (48, 96)}
    times = bench.ns_per_head(pieces)
    more = SHORT // 48 - SHORT // 96
    fixed = {r: (times[r, 48] - times[r, 96]) / more for r in fixed_rows}
    row, item = np.polyfit(fixed_rows, list(fixed.values()), 1)
    result |= {"item": float(item), "row": float(row)}
    result |= {f"per_key {r}": per_key[r] for r in all_rows}
    return result | {f"fixed {r}": fixed[r] for r in fixed_rows}


def main() -> None:
    torch.set_num_threads(1)
    result = measure()
    print(headline(describe()))
    for name, value in result.items():
        print(f"{name:14s} {value:8.2f}")


if __name__ == "__main__":
    main()
