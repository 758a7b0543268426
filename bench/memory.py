# SPDX-License-Identifier: Apache-2.0
"""Memory of a call beyond its inputs and outputs: ``python -m bench.memory CASE THREADS``.

Prints the growth of the resident set's peak during the first call of that size. The peak is reset before it,
through /proc/self/clear_refs (Linux); inputs, output and plan are in place by then.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from bench import trees
from bench.cases import Case, attention_cases, make_inputs

_STATUS = Path("/proc/self/status")


def _status(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no {field}")


def return_freed_memory() -> None:
    """To the system."""
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def peak_growth(call: Callable[[], object]) -> int:
    """How far the resident set's peak rises above what it was before, during a call whose result is kept."""
    return_freed_memory()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    kept = call()
    growth = max(0, _status("VmHWM") - before)
    del kept
    return growth


def extra_bytes(case: Case) -> int:
    """Peak of the resident set during a call, over what was resident before it."""
    import palmette

    def call(case: Case) -> tuple[object, ...]:
        tree = palmette.Tree(case.tree.parent, case.tree.num_tokens)
        nodes = (
            tuple(torch.tensor(part) for part in zip(*case.queries, strict=True))
            if isinstance(case.queries, tuple)
            else case.queries
        )
        plan = palmette.plan_tree_attention(
            tree,
            nodes,
            num_q_heads=case.num_q_heads,
            num_kv_heads=case.num_kv_heads,
            head_dim=case.head_dim,
        )
        inputs = make_inputs(case)
        return inputs, plan, torch.zeros(*inputs.q.shape[:2], inputs.v.shape[2], dtype=inputs.q.dtype)

    # a call on three tokens brings code pages, thread stacks and the like
    tiny = replace(case, tree=trees.star(2, 1, 1), queries="leaves")
    with torch.inference_mode():
        inputs, plan, out = call(tiny)
        for _ in range(3):
            palmette.tree_attention(*inputs[:3], plan, out=out)
        inputs, plan, out = call(case)
        return peak_growth(lambda: palmette.tree_attention(*inputs[:3], plan, out=out))


def main() -> None:
    name, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    (case,) = (case for case in attention_cases("full") if case.name == name)
    print(extra_bytes(case))


if __name__ == "__main__":
    main()
