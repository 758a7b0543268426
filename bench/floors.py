# SPDX-License-Identifier: Apache-2.0
"""What this machine can do at best, measured in the run that uses it, and the time that follows for a case.

    floor = max(FLOPs / best fp32 GEMM rate, bytes / read bandwidth)

The GEMM is the faster of torch.mm (MKL, which keeps to AVX2 on processors of other makers) and oneDNN's.

Bandwidth is that of main memory: timings evict the caches first (``bench.measure``), as the other layers of a
model do. The pool [slots, Hk, D] can be read from end to end, so its bandwidth is the contiguous one; walking
one head at a time through it, a piece of head_dim every num_kv_heads * head_dim elements, is slower, and is
reported beside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

from bench.cases import Case

_GEMM_SHAPES = (
    *((n, n, n) for n in (1024, 1536, 2048)),
    *((rows, 128, keys) for rows in (256, 1024) for keys in (1024, 4096)),  # q k
    *((rows, keys, 128) for rows in (256, 1024) for keys in (1024, 4096)),  # p v
)
_POOL_HEADS, _POOL_DIM = 8, 128
_POOL_BYTES = 256 << 20


@dataclass(frozen=True)
class Ceilings:
    """Rates of one machine with the current number of threads.

    Attributes:
        gemm_gflops: Best fp32 GEMM rate, 1e9 FLOP/s.
        gemm_shape: m, k, n that reached it.
        read_gbps: Best contiguous read of main memory, 1e9 bytes/s.
        walk_gbps: Best read of one head after the other of a pool [slots, 8, 128] in fp32.
    """

    gemm_gflops: float
    gemm_shape: tuple[int, int, int]
    read_gbps: float
    walk_gbps: float

    def best(self, other: Ceilings) -> Ceilings:
        """The higher of two measurements, rate by rate."""
        faster = self if self.gemm_gflops >= other.gemm_gflops else other
        return Ceilings(
            faster.gemm_gflops,
            faster.gemm_shape,
            max(self.read_gbps, other.read_gbps),
            max(self.walk_gbps, other.walk_gbps),
        )

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True)
class Floor:
    """The least time that a case can take, and which limit sets it ("compute" or "memory")."""

    ms: float
    bound: str
    walk_ms: float  # the same with the bandwidth of walking head by head

    @classmethod
    def of(cls, case: Case, ceilings: Ceilings, *, flops: int | None = None) -> Floor:
        return cls.from_work(flops or case.flops, case.num_bytes(), ceilings)

    @classmethod
    def from_work(cls, flops: float, num_bytes: float, ceilings: Ceilings) -> Floor:
        compute = flops / ceilings.gemm_gflops / 1e6
        memory = num_bytes / ceilings.read_gbps / 1e6
        walk = num_bytes / ceilings.walk_gbps / 1e6
        return cls(max(compute, memory), "compute" if compute >= memory else "memory", max(compute, walk))


def _fastest(calls: Sequence[Callable[[], object]], seconds: float) -> list[float]:
    """Least time of each call, interleaved for about ``seconds``."""
    least = [float("inf")] * len(calls)
    for call in calls:
        call()
    stop = time.perf_counter() + seconds
    while True:
        for index, call in enumerate(calls):
            start = time.perf_counter()
            call()
            least[index] = min(least[index], time.perf_counter() - start)
        if time.perf_counter() > stop:
            return least


def _gemms(m: int, k: int, n: int) -> list[Callable[[], object]]:
    """One product of [m, k] and [k, n] by each library that torch has."""
    a, b, c = torch.randn(m, k), torch.randn(k, n), torch.empty(m, n)
    calls: list[Callable[[], object]] = [lambda: torch.mm(a, b, out=c)]
    onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if torch.backends.mkldnn.is_available() and onednn is not None:
        weight = b.t().contiguous()
        calls.append(lambda: onednn(a, weight, None, "none", [], ""))
    return calls


@torch.inference_mode()
def measure_ceilings(seconds: float = 3.0) -> Ceilings:
    """Measures the rates, in about ``seconds``; more time finds quieter moments of a shared machine."""
    shapes, calls = zip(*((shape, call) for shape in _GEMM_SHAPES for call in _gemms(*shape)), strict=True)
    times = _fastest(calls, seconds / 2)
    rates = [2 * m * k * n / time_ / 1e9 for (m, k, n), time_ in zip(shapes, times, strict=True)]
    best = max(range(len(rates)), key=rates.__getitem__)

    pool = torch.randn(_POOL_BYTES // 4 // _POOL_HEADS // _POOL_DIM, _POOL_HEADS, _POOL_DIM)
    rows = pool.view(-1, 4096)
    ones, row_ones, head_ones = torch.ones(4096), torch.ones(len(rows)), torch.ones(_POOL_DIM)

    def walk(read: Callable[[torch.Tensor], object]) -> None:
        for head in range(_POOL_HEADS):
            read(pool[:, head])

    contiguous = (pool.sum, lambda: torch.mv(rows, ones), lambda: torch.mv(rows.t(), row_ones))
    by_head = (
        lambda: walk(lambda x: x.sum(0)),
        lambda: walk(lambda x: x.sum(1)),
        lambda: walk(lambda x: torch.mv(x, head_ones)),
    )
    times = _fastest([*contiguous, *by_head], seconds / 2)
    read, walked = (_POOL_BYTES / min(part) / 1e9 for part in (times[:3], times[3:]))
    return Ceilings(rates[best], shapes[best], read, walked)
