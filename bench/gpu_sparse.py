# SPDX-License-Identifier: Apache-2.0
"""Bytes and FLOPs of selected attention on a GPU against NSA's and FSA's formulas.

    python -m bench.gpu_sparse [--tokens 65536] [--write docs/gpu.md]

Ours are counted in the plan: K and V of a block once for every tile of queries that chose it, q and out once;
and the 16 rows of every warp that has a row of the block. ``counted_equals_formula`` holds the first against
what the emulator counts. NSA (arXiv 2502.11089) and FSA (arXiv 2508.18224) are the formulas of FSA's
section 3: N tokens, T blocks of B_K keys, h query and h_K KV heads, g = h / h_K, elements of two bytes.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from palmette import testing

from bench.pages import table, write_between
from bench.sparse_cases import BLOCK, TOPK, SparseCase, make_selection, shared_blocks

PROGRAM = "python -m bench.gpu_sparse"
GROUPS = (1, 2, 4, 8)
SELECTIONS = ("random", "real-like")
DTYPE = torch.bfloat16
TILE_ROWS, WARP_ROWS = 64, 16


@dataclass(frozen=True)
class Traffic:
    """Per token, query head and channel of head_dim: bytes, and multiply-adds counted as two.

    Attributes:
        bytes: Of K, V, q, out and lse.
        kv_bytes: Of K and V.
        flops: Of the products with all rows of warps that have a row of the block.
        padding: Rows that are multiplied per row that chose the block.
    """

    bytes: float
    kv_bytes: float
    flops: float
    padding: float


def ours(case: SparseCase, index: torch.Tensor) -> Traffic:
    """Of a plan by tiles on a GPU, of the first KV head."""
    group, tokens = case.group_size, case.tokens
    plan = tile_plan(index[:1], tokens, group)
    item, task, counts, listed = plan[3].long(), plan[4].long(), plan[7], plan[8].long()
    item, task, listed = item[: counts[2]], task[: counts[3]], listed[: counts[9]]
    keys = plan[2].long()[item[:, 0], 1]
    sizes = item[:, 3] - item[:, 2]
    owner = torch.repeat_interleave(torch.arange(len(item)), sizes)
    begin = torch.repeat_interleave(task[:, 2], task[:, 1] - task[:, 0])[owner]
    first, last = (listed - begin) * group, (listed - begin) * group + group - 1
    warps = torch.cat([owner * 64 + first // WARP_ROWS, owner * 64 + last // WARP_ROWS]).unique()
    multiplied = int((WARP_ROWS * keys[warps // 64]).sum())
    named = int((sizes * group * keys).sum())
    kv = int(keys.sum()) * 2 * DTYPE.itemsize
    rows = tokens * group
    return Traffic(
        (kv + 2 * DTYPE.itemsize * rows) / rows + 4 / case.head_dim,
        kv / rows,
        4 * multiplied / rows,
        multiplied / named,
    )


def tile_plan(index: torch.Tensor, tokens: int, group: int) -> tuple[torch.Tensor, ...]:
    """Tiles of so many queries as a block of a GPU has rows for."""
    ends = torch.tensor([0, tokens], dtype=torch.int32)
    most = max(1, TILE_ROWS // group)
    blocks = tokens // BLOCK + 1
    plan: tuple[torch.Tensor, ...] = torch.ops.palmette.plan_selection(
        index, ends, ends, tokens, BLOCK, most, most, blocks, index.numel(), tokens // most + 1, None
    )
    return plan


def nsa(group: int) -> tuple[float, float]:
    """Bytes and FLOPs in the units of ``Traffic``: rows of a token's group are padded to 8 heads."""
    return 2 * (BLOCK * TOPK + group + 8) / group, 32 * BLOCK * TOPK / group


def fsa(group: int) -> tuple[float, float]:
    """Likewise; partial results are written and read once per block."""
    return (6 + 2 / group) * (1 + TOPK), BLOCK * TOPK * (4 + 2 / group)


def counted_equals_formula(group: int, tokens: int = 1536) -> bool:
    """Runs the kernel on the emulator and compares the bytes of K and V that it read with the plan's."""
    case = SparseCase("selected", tokens, group, 1, 16, "bfloat16", selection="random")
    index = make_selection(case)
    torch.manual_seed(0)
    q = torch.randn(case.tokens, group, 16).to(DTYPE)
    k, v = (torch.randn(case.tokens, 1, 16).to(DTYPE) for _ in range(2))
    with testing.backend("emulated_check"), torch.no_grad():
        torch.ops.palmette.attend(
            q, k, v, *(plan := tile_plan(index, case.tokens, group))[:8], None, 0.25, 0.0, 0, plan[8]
        )
    counted = testing.traffic("k").read + testing.traffic("v").read
    wanted = ours(case, index).kv_bytes * case.tokens * group * 16
    if counted != round(wanted):
        print(f"g = {group}: {counted} bytes counted, {wanted} by the plan", file=sys.stderr)
    return counted == round(wanted)


def rows_of(tokens: int) -> list[list[str]]:
    head = "g, choices, shared with the query before, bytes: NSA, FSA, ours, FSA / NSA, ours / NSA"
    head += ", FLOP: NSA, FSA, ours, rows multiplied per row"
    lines = [head.split(", ")]
    for selection in SELECTIONS:
        for group in GROUPS:
            case = SparseCase("selected", tokens, group, 1, 128, "bfloat16", selection=selection)
            index = make_selection(case)
            mine = ours(case, index)
            (nsa_bytes, nsa_flops), (fsa_bytes, fsa_flops) = nsa(group), fsa(group)
            numbers = [nsa_bytes, fsa_bytes, mine.bytes]
            lines.append(
                [str(group), selection, f"{shared_blocks(index[:, :4096]):.0%}"]
                + [f"{x:,.0f}" for x in numbers]
                + [f"{fsa_bytes / nsa_bytes:.3f}", f"{mine.bytes / nsa_bytes:.3f}"]
                + [f"{x:,.0f}" for x in (nsa_flops, fsa_flops, mine.flops)]
                + [f"{mine.padding:.2f}"]
            )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--write", type=Path, help="a page with the marks")
    parser.add_argument("--no-count", action="store_true", help="only the formula")
    arguments = parser.parse_args()
    if not arguments.no_count:
        if "emulated_check" not in testing.backends():
            parser.error("the check build of the emulator is missing: make test builds it")
        if not all(counted_equals_formula(group) for group in GROUPS):
            return 1
    note = f"N = {arguments.tokens:,}, T = {TOPK}, B_K = {BLOCK}, head_dim 128; "
    note += "per token, query head and channel."
    text = f"{table(rows_of(arguments.tokens))}\n\n{note}"
    print(text)
    if arguments.write is not None:
        write_between(arguments.write, PROGRAM, "sparse", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
