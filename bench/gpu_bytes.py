# SPDX-License-Identifier: Apache-2.0
"""Bytes that attention reads on a GPU: the emulator's count against the plan's formula, on recorded trees.

    python -m bench.gpu_bytes [--every 100] [--write docs/gpu.md] [--plot docs/images/gpu-bytes.png]

For every ``--every``-th step of the recorded reasoning runs, and for the Medusa token trees, the GPU kernel
runs on the check build of the emulator, which counts what it reads of K and V; that must equal ``plan.io`` to
the byte. The table sums KV tokens over the sampled steps, as DeFT (arXiv 2404.00242) counts them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import palmette
import torch
from palmette import testing

from bench.pages import table, write_between
from bench.trees import TreeShape, draft_paths, has_traces, reasoning_run, snapshot, token_tree

PROGRAM = "python -m bench.gpu_bytes"
SPLITS = {"per sequence": "sequence", "node": "node", "flatten": "flatten", "auto": "auto"}
# What is counted by the emulator, small so that it takes minutes, and what the table is for: Llama 3 8B.
SMALL = {"num_q_heads": 2, "num_kv_heads": 1, "head_dim": 16}
LARGE = {"num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128}
DTYPE = torch.bfloat16

Queries = str | tuple[list[int], list[int]]


@dataclass
class Row:
    """Sums over the steps of one run, in KV tokens per KV head and bytes of partial states per layer."""

    name: str
    steps: int = 0
    unique: int = 0
    read: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    partial_bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))

    def add(self, shape: TreeShape, queries: Queries) -> None:
        tree = palmette.Tree(shape.parent, shape.num_tokens)
        self.steps += 1
        for name, split in SPLITS.items():
            plan = palmette.plan_tree_attention(tree, queries, split=split, target="gpu", **LARGE)
            io = plan.io
            self.read[name] += io.kv_tokens_read
            kv = io.kv_tokens_read * io.num_kv_heads * 2 * io.head_dim * DTYPE.itemsize
            self.partial_bytes[name] += io.bytes(DTYPE) - kv
        self.unique += io.kv_tokens_unique


def counted_equals_formula(shape: TreeShape, queries: Queries, splits: Iterable[str]) -> bool:
    """Runs the kernel and compares the bytes of K and V that it read with the plan's."""
    tree = palmette.Tree(shape.parent, shape.num_tokens)
    k, v = (torch.randn(sum(shape.num_tokens), 1, SMALL["head_dim"]).to(DTYPE) for _ in range(2))
    for split in splits:
        plan = palmette.plan_tree_attention(tree, queries, split=split, target="gpu", **SMALL)
        q = torch.randn(plan.num_queries, SMALL["num_q_heads"], SMALL["head_dim"]).to(DTYPE)
        with testing.backend("emulated_check"), torch.no_grad():
            palmette.tree_attention(q, k, v, plan)
        counted = testing.traffic("k").read + testing.traffic("v").read
        if counted != plan.io.kv_tokens_read * 2 * SMALL["head_dim"] * DTYPE.itemsize:
            print(f"{split}: {counted} bytes counted, {plan.io}", file=sys.stderr)
            return False
    return True


def runs(every: int) -> Iterator[tuple[str, Queries, list[TreeShape]]]:
    """Name, queries and trees of every run."""
    for task in ("sorting", "set"):
        for index in range(3):
            run = reasoning_run(task, index)
            last = max(thought.end for thought in run)
            yield f"{task} {index}", "leaves", [snapshot(run, step) for step in range(1, last + 1, every)]
    for size in (32, 64, 128, 256):
        shape = token_tree(1000, draft_paths(size))
        drafted = list(range(1, len(shape.parent)))  # all but the prompt
        yield f"Medusa {size}", (drafted, [0] * len(drafted)), [shape]


def bytes_table(rows: list[Row]) -> str:
    head = ["tree", "steps", "per sequence", "mask over the union", "node", "flatten", "auto"]
    head += ["saved, a read per block", "saved, real passes", "partial states (auto)"]
    lines = [head]
    for row in rows:
        tokens = [
            row.read["per sequence"],
            row.unique,
            row.read["node"],
            row.read["flatten"],
            row.read["auto"],
        ]
        partial = row.partial_bytes["auto"] / row.steps
        lines.append(
            [
                row.name,
                str(row.steps),
                *(f"{n / row.steps:,.0f}" for n in tokens),
                f"{1 - row.unique / row.read['per sequence']:.1%}",
                f"{1 - row.read['flatten'] / row.read['per sequence']:.1%}",
                f"{partial / 1e6:.2f} MB",
            ]
        )
    return table(lines)


def plot(rows: list[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 3.6), layout="constrained")
    width = 0.8 / len(SPLITS)
    for i, name in enumerate(SPLITS):
        places = [j + (i - (len(SPLITS) - 1) / 2) * width for j in range(len(rows))]
        axes.bar(places, [row.read[name] / row.steps for row in rows], width, label=name)
    axes.set_yscale("log")
    axes.set_ylabel("KV tokens read per step")
    axes.set_xticks(range(len(rows)), [row.name for row in rows], rotation=30, ha="right")
    axes.legend(ncols=len(SPLITS), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--every", type=int, default=100, help="steps from one sample to the next")
    parser.add_argument("--write", type=Path, help="a page with the marks")
    parser.add_argument("--plot", type=Path, help="a picture")
    parser.add_argument("--no-count", action="store_true", help="only the formula")
    arguments = parser.parse_args()
    if not arguments.no_count and "emulated_check" not in testing.backends():
        parser.error("the check build of the emulator is missing: make test builds it")
    rows, checked = [], 0
    for name, queries, shapes in runs(arguments.every):
        row = Row(name)
        for shape in shapes:
            if min(shape.num_tokens, default=0) < 1:
                continue
            row.add(shape, queries)
            if not arguments.no_count:
                if not counted_equals_formula(shape, queries, ("node", "flatten", "auto")):
                    return 1
                checked += 1
        rows.append(row)
        print(f"{name}: {row.steps} steps", file=sys.stderr, flush=True)
    source = "recorded" if has_traces() else "generated"
    note = f"{source} trees; {checked} steps x 3 splits counted by the emulator, all equal to the formula."
    text = f"{bytes_table(rows)}\n\n{note}"
    print(text)
    if arguments.write is not None:
        write_between(arguments.write, PROGRAM, "bytes", text)
    if arguments.plot is not None:
        plot(rows, arguments.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
