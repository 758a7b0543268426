# SPDX-License-Identifier: Apache-2.0
"""Index and scratch memory of sparse attention: ``python -m bench.sparse_memory TOKENS THREADS``.

Prints JSON: bytes of block_index and of the plan's tables, and how far the peak of the resident set grows in
a call beyond what it returns (the plan is part of that).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from unittest import mock

import torch

from bench.memory import peak_growth
from bench.sparse_cases import BLOCK, COMPRESSION, SELECTION, SparseCase, make_inputs, make_selection


def _growth(call: Callable[[], tuple[torch.Tensor, ...]]) -> int:
    """Beyond the results."""
    results: tuple[torch.Tensor, ...] = ()

    def run() -> None:
        nonlocal results
        results = call()

    return max(0, peak_growth(run) - sum(result.nbytes for result in results))


def measure(case: SparseCase) -> dict[str, int]:
    from palmette import sparse_attention as nsa

    inputs, index = make_inputs(case), make_selection(case)
    q, k, v, _ = inputs
    ends = case.cu_seqlens
    plans: list[int] = []
    plan_by_tiles = nsa.plan_by_tiles

    def counted(*args: object) -> tuple[torch.Tensor, ...]:
        tables = plan_by_tiles(*args)  # type: ignore[arg-type]
        plans.append(sum(table.nbytes for table in tables))
        return tables

    def selected() -> tuple[torch.Tensor, ...]:
        out, lse = nsa.selected_attention(q, k, v, index, ends, block_size=BLOCK, return_lse=True)
        return out, lse

    k_cmp, ends_cmp = nsa.compress(k, None, None, ends, **COMPRESSION)
    lse = torch.zeros(q.shape[:2])

    def select() -> tuple[torch.Tensor, ...]:
        return (nsa.select_blocks(q, k_cmp, lse, ends, ends_cmp, **COMPRESSION, **SELECTION),)

    with mock.patch.object(nsa, "plan_by_tiles", counted):
        extra = _growth(selected)
    return {
        "index_bytes": index.nbytes,
        "plan_bytes": plans[0],
        "selected_extra_bytes": extra,
        "select_extra_bytes": _growth(select),
    }


def main() -> None:
    tokens, threads = map(int, sys.argv[1:])
    torch.set_num_threads(threads)
    with torch.inference_mode():
        measure(SparseCase("memory", 2048, selection="random"))  # brings code pages, thread stacks, the like
        print(json.dumps(measure(SparseCase("memory", tokens, selection="random"))))


if __name__ == "__main__":
    main()
