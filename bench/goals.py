# SPDX-License-Identifier: Apache-2.0
"""What the timings are held against.

"k times the peer" means min(k, 0.75 * peer / floor), and at least 1.0: nobody is asked to run faster than
three quarters of what the machine can do, and nobody may be slower than the best peer.
"""

from __future__ import annotations

from dataclasses import dataclass

HEADROOM = 0.75


@dataclass(frozen=True)
class Goal:
    """Of one group of cases.

    Attributes:
        title: Of the group in summaries.
        each: k of every case.
        median: k of the group's median; None: no goal of its own.
        floor: Fraction of the floor that every case is to reach; None: by the number of rows per key.
    """

    title: str
    each: float
    median: float | None = None
    floor: float | None = None


GOALS = {
    "chain": Goal("single chain", 1.7, floor=0.6),
    "star_small": Goal("stars of 1-16 leaves", 1.25, median=1.4, floor=0.6),
    "star_large": Goal("stars of 20-256 leaves", 1.35),
    "irregular": Goal("irregular trees", 1.8, median=2.3, floor=0.6),
    "medusa": Goal("Medusa token trees", 1.3),
    "fasttree": Goal("FastTree's grid", 1.0),
    "training": Goal("training, forward + backward", 2.5),
    "merge": Goal("merging states", 1.0),
    "prefix": Goal("updates on a shared prompt", 1.0, median=1.3),
}
MANY_ROWS = 64  # from here on a case is to reach FLOOR_MANY_ROWS of its floor, else FLOOR_FEW_ROWS
FLOOR_MANY_ROWS, FLOOR_FEW_ROWS = 0.75, 0.6

# Sparse attention: times the peer of the group, as they stand, without caps.
SPARSE_GOALS = {
    "selected": "selected attention / query-outer order",
    "forward": "NSA forward / dense causal SDPA",
    "training": "NSA forward + backward / dense causal SDPA",
    "decode": "NSA decoding step / dense decoding",
    "public": "NSA module forward / native-sparse-attention-pytorch",
    "public training": "NSA module forward + backward / native-sparse-attention-pytorch",
    "memory": "index and scratch memory",
}
SPARSE_BY_GROUP_SIZE = {1: 2.0, 4: 1.2}  # selected, by query heads per KV head
SPARSE_BY_TOKENS = {4096: 1.0, 8192: 1.7, 16384: 3.0, 32768: 4.5, 65536: 5.5}  # forward and training
SPARSE_DECODE, SPARSE_DECODE_BYTES = 4.0, 8.0
SPARSE_PUBLIC = 10.0


def sparse_goal(group: str, tokens: int, group_size: int) -> float | None:
    """The ratio peer / ours that a case of sparse attention is to reach; None: it is only reported."""
    if group == "selected":
        return SPARSE_BY_GROUP_SIZE.get(group_size)
    if group in ("forward", "training"):
        return SPARSE_BY_TOKENS.get(tokens)
    return SPARSE_DECODE if group == "decode" else SPARSE_PUBLIC


def wanted_ratio(k: float, peer_ms: float, floor_ms: float) -> float:
    """The ratio peer / ours that "k times" asks for."""
    return max(1.0, min(k, HEADROOM * peer_ms / floor_ms))


def wanted_fraction(group: str, rows_per_key: float) -> float:
    """The fraction of the floor that a case is to reach."""
    fixed = GOALS[group].floor
    if fixed is not None:
        return fixed
    return FLOOR_MANY_ROWS if rows_per_key >= MANY_ROWS else FLOOR_FEW_ROWS
