# SPDX-License-Identifier: Apache-2.0
"""Bytes and FLOPs of selected attention on a GPU against NSA's and FSA's formulas.

    python -m bench.gpu_sparse [--tokens 16384] [--write docs/gpu.md]

Ours are counted in the plan that tensors on a GPU get, and in the plan by tiles that is the CPU's;
``counted_equals_formula`` holds the bytes of both against what the emulator counts. NSA (arXiv 2502.11089)
and FSA (arXiv 2508.18224) are the formulas of FSA's section 3: N tokens, T blocks of B_K keys, h query and
h_K KV heads, g = h / h_K, elements of two bytes. They count q, K, V, partial and final results, and neither
maxima and sums nor indices; no more do ours.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from palmette import testing
from palmette._selection import plan_by_blocks

from bench.pages import table, write_between
from bench.sparse_cases import BLOCK, TOPK, SparseCase, make_selection, shared_blocks

PROGRAM = "python -m bench.gpu_sparse"
GROUPS = (1, 2, 4, 8)
SELECTIONS = ("random", "real-like")
DTYPE = torch.bfloat16
TILE_ROWS, WARP_ROWS = 64, 16

Plan = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Traffic:
    """Per token, query head and channel of head_dim: bytes, and multiply-adds counted as two.

    Attributes:
        q, kv, partial_out, out: Bytes of q, of K and V, of partial results (written and read), of out.
        flops: Of the products with all rows of warps that have a row of the block.
        padding: Rows that are multiplied per row that chose the block.
    """

    q: float
    kv: float
    partial_out: float
    out: float
    flops: float
    padding: float

    @property
    def bytes(self) -> float:
        return self.q + self.kv + self.partial_out + self.out


def _tables(plan: Plan) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Items, their keys, tasks and listed queries of a plan, as many as it counts."""
    counts = plan[7]
    item, task, listed = plan[3].long()[: counts[2]], plan[4].long()[: counts[3]], plan[8].long()[: counts[9]]
    return item, plan[2].long()[item[:, 0], 1], task, listed


def _traffic(case: SparseCase, kv_keys: int, q_rows: int, named: int, multiplied: int, parts: int) -> Traffic:
    size, rows = DTYPE.itemsize, case.tokens * case.group_size
    return Traffic(
        size * q_rows / rows,
        2 * size * kv_keys / rows,
        2 * size * parts / rows,
        float(size),
        4 * multiplied / rows,
        multiplied / named,
    )


def by_blocks(case: SparseCase, plan: Plan) -> Traffic:
    """FSA's order: a task is a block and queries that chose it; every row leaves a partial result."""
    item, keys, _, _ = _tables(plan)
    rows = (item[:, 3] - item[:, 2]) * case.group_size
    padded = (rows + WARP_ROWS - 1) // WARP_ROWS * WARP_ROWS
    chosen = int(rows.sum())
    return _traffic(
        case, int(keys.sum()), chosen, int((rows * keys).sum()), int((padded * keys).sum()), chosen
    )


def by_tiles(case: SparseCase, plan: Plan) -> Traffic:
    """A task is a tile of 64 rows; it fetches a block once, and keeps its results to itself."""
    item, keys, task, listed = _tables(plan)
    group = case.group_size
    sizes = item[:, 3] - item[:, 2]
    owner = torch.repeat_interleave(torch.arange(len(item)), sizes)
    begin = torch.repeat_interleave(task[:, 2], task[:, 1] - task[:, 0])[owner]
    first, last = (listed - begin) * group, (listed - begin) * group + group - 1
    warps = torch.cat([owner * 64 + first // WARP_ROWS, owner * 64 + last // WARP_ROWS]).unique()
    multiplied = int((WARP_ROWS * keys[warps // 64]).sum())
    named = int((sizes * group * keys).sum())
    return _traffic(case, int(keys.sum()), case.tokens * group, named, multiplied, 0)


def block_plan(index: torch.Tensor, tokens: int, group: int) -> Plan:
    """What ``selected_attention`` makes for tensors on a GPU."""
    q, k = torch.empty(tokens, group, 1), torch.empty(tokens, 1, 1)
    ends = torch.tensor([0, tokens], dtype=torch.int32)
    return plan_by_blocks(q, k, k, index, ends, ends, None, BLOCK)


def tile_plan(index: torch.Tensor, tokens: int, group: int) -> Plan:
    """Tiles of so many queries as a block of a GPU has rows for."""
    ends = torch.tensor([0, tokens], dtype=torch.int32)
    most = max(1, TILE_ROWS // group)
    blocks = tokens // BLOCK + 1
    plan: Plan = torch.ops.palmette.plan_selection(
        index, ends, ends, tokens, BLOCK, most, most, blocks, index.numel(), tokens // most + 1, None
    )
    return plan


ORDERS: dict[str, tuple[Callable[..., Plan], Callable[..., Traffic]]] = {
    "by blocks": (block_plan, by_blocks),
    "by tiles": (tile_plan, by_tiles),
}


def ours(case: SparseCase, index: torch.Tensor, order: str) -> Traffic:
    """Of the first KV head."""
    make, count = ORDERS[order]
    return count(case, make(index[:1].contiguous(), case.tokens, case.group_size))


def nsa(group: int) -> tuple[float, float]:
    """Bytes and FLOPs in the units of ``Traffic``: rows of a token's group are padded to 8 heads."""
    return 2 * (BLOCK * TOPK + group + 8) / group, 32 * BLOCK * TOPK / group


def fsa(group: int) -> tuple[float, float]:
    """Likewise; partial results are written and read once per block."""
    return (6 + 2 / group) * (1 + TOPK), BLOCK * TOPK * (4 + 2 / group)


def counted_equals_formula(group: int, order: str, tokens: int = 1536) -> bool:
    """Runs the kernels on the emulator and compares the bytes that they moved with those by the plan."""
    case = SparseCase("selected", tokens, group, 1, 16, "bfloat16", selection="random")
    index = make_selection(case)
    torch.manual_seed(0)
    q = torch.randn(case.tokens, group, 16).to(DTYPE)
    k, v = (torch.randn(case.tokens, 1, 16).to(DTYPE) for _ in range(2))
    plan = ORDERS[order][0](index, case.tokens, group)
    with testing.backend("emulated_check"), torch.no_grad():
        torch.ops.palmette.attend(q, k, v, *plan[:8], None, 0.25, 0.0, 0, plan[8])
    names = ("q", "k", "v", "out") + (("partial_out",) if order == "by blocks" else ())
    moved = {name: testing.traffic(name) for name in names}
    sums = {name: t.read + t.written for name, t in moved.items()}
    counted = {"kv": sums.pop("k") + sums.pop("v"), "partial_out": 0, **sums}
    mine = ours(case, index, order)
    wanted = {name: round(getattr(mine, name) * case.tokens * group * 16) for name in counted}
    if counted != wanted:
        print(f"g = {group}, {order}: {counted} bytes counted, {wanted} by the plan", file=sys.stderr)
    return counted == wanted


HEAD = (
    "g, choices, shared with the query before, bytes: NSA, FSA, by blocks, by tiles, FSA / NSA, "
    "by blocks / NSA, by tiles / NSA, FLOP: NSA, FSA, by blocks, by tiles, "
    "rows multiplied per row: by blocks, by tiles"
)


def rows_of(tokens: int) -> list[list[str]]:
    lines = [HEAD.split(", ")]
    for selection in SELECTIONS:
        for group in GROUPS:
            case = SparseCase("selected", tokens, group, 1, 128, "bfloat16", selection=selection)
            index = make_selection(case)
            mine = [ours(case, index, order) for order in ORDERS]
            (nsa_bytes, nsa_flops), (fsa_bytes, fsa_flops) = nsa(group), fsa(group)
            numbers = [fsa_bytes, *(t.bytes for t in mine)]
            lines.append(
                [str(group), selection, f"{shared_blocks(index[:, :4096]):.0%}"]
                + [f"{x:,.0f}" for x in (nsa_bytes, *numbers)]
                + [f"{x / nsa_bytes:.3f}" for x in numbers]
                + [f"{x:,.0f}" for x in (nsa_flops, fsa_flops, *(t.flops for t in mine))]
                + [f"{t.padding:.2f}" for t in mine]
            )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--write", type=Path, help="a page with the marks")
    parser.add_argument("--no-count", action="store_true", help="only the formula")
    arguments = parser.parse_args()
    if not arguments.no_count:
        if "emulated_check" not in testing.backends():
            parser.error("the check build of the emulator is missing: make test builds it")
        if not all(counted_equals_formula(group, order) for group in GROUPS for order in ORDERS):
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
