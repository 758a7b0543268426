# SPDX-License-Identifier: Apache-2.0
"""compact_kv_: moves of KV rows in place that overlap in every way, against a copy of all sources."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import palmette
import pytest
import torch
from palmette import compact_kv_
from palmette.reference import verify as reference
from torch import Tensor

DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
)


pytestmark = pytest.mark.usefixtures("machine")


def caches(slots: int, heads: int = 2, dim: int = 3, v_dim: int = 5) -> tuple[Tensor, Tensor]:
    """Every element different."""
    k = torch.arange(slots * heads * dim, dtype=torch.float32).view(slots, heads, dim)
    return k, -1 - torch.arange(slots * heads * v_dim, dtype=torch.float32).view(slots, heads, v_dim)


def check(k: Tensor, v: Tensor, src: Tensor, dst: Tensor) -> None:
    wanted_k, wanted_v = k.clone(), v.clone()
    reference.compact_kv_(wanted_k, wanted_v, src, dst)
    compact_kv_(k, v, src, dst)
    assert torch.equal(k, wanted_k)
    assert torch.equal(v, wanted_v)


@st.composite
def moves(draw: st.DrawFn) -> tuple[int, list[int], list[int]]:
    """(slots, sources, destinations): any function from distinct destinations to sources."""
    slots = draw(st.integers(1, 24))
    dst = draw(st.lists(st.integers(0, slots - 1), unique=True, max_size=slots))
    kind = draw(st.sampled_from(["any", "permutation", "few sources"]))
    if kind == "permutation":
        return slots, draw(st.permutations(dst)), dst
    last = slots - 1 if kind == "any" else min(2, slots - 1)
    return slots, draw(st.lists(st.integers(0, last), min_size=len(dst), max_size=len(dst))), dst


@hypothesis.settings(max_examples=300)
@hypothesis.given(drawn=moves(), index=st.sampled_from([torch.int32, torch.int64]))
def test_equals_the_reference(drawn, index):
    slots, src, dst = drawn
    check(*caches(slots), torch.tensor(src, dtype=index), torch.tensor(dst, dtype=index))


@pytest.mark.parametrize(
    ("src", "dst"),
    [
        ([], []),
        ([3], [3]),
        ([0, 1, 2], [0, 1, 2]),
        ([5, 6, 7], [4, 5, 6]),  # a path moves down
        ([4, 5, 6], [5, 6, 7]),  # and up
        ([6, 5, 4], [7, 6, 5]),
        ([1, 0], [0, 1]),  # a swap
        ([1, 2, 0], [0, 1, 2]),
        ([1, 2, 0, 4, 3, 5], [0, 1, 2, 3, 4, 5]),  # two cycles and a row that stays
        ([1, 0, 0, 0, 1, 4], [0, 1, 2, 3, 4, 5]),  # a cycle with trees that read it
        ([0, 0, 0, 0], [4, 5, 6, 7]),
        ([0, 0, 0], [0, 1, 2]),  # the source stays, and is copied
        ([7, 2, 5], [0, 1, 2]),
    ],
)
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_patterns(src, dst, index):
    check(*caches(8), torch.tensor(src, dtype=index), torch.tensor(dst, dtype=index))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_move_bit_by_bit(dtype):
    raw = torch.randint(0, 2, (16, 3, 8 * torch.empty((), dtype=dtype).element_size()), dtype=torch.uint8)
    k = raw.view(dtype)  # for floats also denormals, and for bool only 0 and 1
    src, dst = torch.tensor([3, 4, 5, 0]), torch.tensor([4, 5, 3, 1])
    wanted = raw.clone()
    wanted[dst] = raw[src]
    compact_kv_(k, k.clone(), src, dst)
    assert torch.equal(k.view(torch.uint8), wanted)


def test_nan_payloads_survive():
    bits = torch.tensor([0x7FC01234, 0x7F800001, -0x3FEDCC], dtype=torch.int32)
    k = bits.view(torch.float32).view(3, 1, 1).clone()
    compact_kv_(k, k.clone(), torch.tensor([1, 2, 0]), torch.tensor([0, 1, 2]))
    assert k.view(torch.int32).flatten().tolist() == bits[[1, 2, 0]].tolist()


def test_k_and_v_of_different_dtypes():
    k, v = caches(6)
    check(k.half(), v.to(torch.int16), torch.tensor([1, 0]), torch.tensor([0, 1]))


@pytest.mark.parametrize(
    "layout", ["head-major", "padded", "every other slot", "interleaved", "reversed roles"]
)
def test_strides(layout):
    src, dst = torch.tensor([5, 6, 7, 0, 3]), torch.tensor([4, 5, 6, 3, 0])
    base = torch.randn(40, 6, 2, 16)
    if layout == "head-major":
        k, v = torch.randn(3, 10, 8).transpose(0, 1), torch.randn(3, 10, 4).transpose(0, 1)
    elif layout == "padded":
        k, v = base[:10, :3, 0, :5], base[20:30, 1:4, 1, 2:9]
    elif layout == "every other slot":
        k, v = base[::4, :3, 0], base[1::4, :, 1][:, ::2]
    elif layout == "interleaved":
        k, v = base[:10, :, 0], base[:10, :, 1]
    else:  # slots are the innermost of the outer dimensions
        k, v = base[0].new_zeros(2, 10, 16).normal_().transpose(0, 1), base[:10, :2, 0]
    before = base.clone()
    rows = torch.zeros_like(base, dtype=torch.bool)
    check(k, v, src, dst)
    if layout in ("padded", "every other slot", "interleaved"):  # nothing outside of the views moved
        for view in (k, v):
            torch.as_strided(rows, view.shape, view.stride(), view.storage_offset()).fill_(True)
        assert torch.equal(base[~rows], before[~rows])


@pytest.mark.parametrize("what", ["data", "slot stride", "head stride", "head"])
@pytest.mark.parametrize("multiple", [1, 2, 4, 8, 16])
def test_alignments(what, multiple):
    """Bytes at multiples of ``multiple`` and of nothing greater, because of one thing."""
    size = {"data": 64, "slot stride": 512, "head stride": 128, "head": 48}
    size[what] += multiple if multiple < 16 else 0
    base, regular = torch.randint(0, 256, (12_000,)).byte(), torch.randint(0, 256, (20, 3, 32)).byte()
    strides = (size["slot stride"], size["head stride"], 1)
    view = torch.as_strided(base, (20, 3, size["head"]), strides, size["data"])
    before, inside = base.clone(), torch.zeros_like(base)
    torch.as_strided(inside, view.shape, view.stride(), view.storage_offset()).fill_(1)
    src, dst = torch.randperm(20)[:15], torch.randperm(20)[:15]
    check(view, regular, src, dst)
    check(regular, view, src, dst)
    assert torch.equal(base[inside == 0], before[inside == 0])


@pytest.mark.parametrize(
    ("heads", "dim", "v_dim"),
    [(1, 1, 1), (0, 4, 4), (2, 0, 3), (2, 3, 0), (1, 64, 128), (3, 7, 1), (3, 701, 2048)],
)
def test_sizes(heads, dim, v_dim):
    check(*caches(9, heads, dim, v_dim), torch.tensor([8, 0, 1, 2]), torch.tensor([0, 1, 2, 8]))


def test_no_slots():
    nothing = torch.zeros(0, dtype=torch.int64)
    check(*caches(0), nothing, nothing)


@pytest.mark.parametrize("layout", ["token-major", "head-major"])
def test_many_rows_on_one_and_two_threads(num_threads, layout):
    """Enough bytes for every thread; one cycle through all slots is the longest dependence there is."""
    slots, results = 3000, []
    order = torch.randperm(slots)
    for threads in (1, 2, 3):
        num_threads(threads)
        k, v = caches(slots, 3, 40, 24)
        if layout == "head-major":
            k, v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (k, v))
        check(k, v, order, order.roll(1))
        results.append((k, v))
    assert all(torch.equal(a, b) for result in results for a, b in zip(results[0], result, strict=True))


def test_strided_indices():
    k, v = caches(8)
    check(k, v, torch.tensor([5, 9, 6, 9])[::2], torch.tensor([4, 5]))


def test_accepted_path_of_a_token_tree():
    """Drafts lie behind the prefix in depth-first order; the accepted ones move right behind it."""
    tree = palmette.Tree([-1, 0, 0, 2, 2, 4], [10, 1, 1, 1, 1, 1])
    k, v = caches(20)
    expected = k[torch.tensor([11, 13, 14])].clone()
    path = torch.tensor([2, 4, 5])
    compact_kv_(k, v, tree.node_start[path], torch.arange(10, 13))
    assert torch.equal(k[10:13], expected)


# ---- errors: nothing has moved when they are raised


def failing(src: list[int], dst: list[int], message: str) -> None:
    k, v = caches(8)
    before = k.clone(), v.clone()
    with pytest.raises(ValueError, match=message):
        compact_kv_(k, v, torch.tensor(src), torch.tensor(dst))
    assert torch.equal(k, before[0])
    assert torch.equal(v, before[1])


@pytest.mark.parametrize(
    ("src", "dst", "message"),
    [
        ([0, 1, 2], [5, 6, 5], "^dst_slots must be distinct, got 5 at 0 and 2$"),
        ([5, 1, 5], [5, 6, 5], "^dst_slots must be distinct, got 5 at 0 and 2$"),
        ([0, 8], [1, 2], r"^src_slots must be in \[0, 8\), got 8 at 1$"),
        ([-1, 3], [1, 2], r"^src_slots must be in \[0, 8\), got -1 at 0$"),
        ([0, 1, 2], [1, 2, 2**40], rf"^dst_slots must be in \[0, 8\), got {2**40} at 2$"),
        ([0], [-1], r"^dst_slots must be in \[0, 8\), got -1 at 0$"),
        ([0, 1], [2], r"^dst_slots must be \[n\] = \[2\], got \[1\]$"),
    ],
)
def test_bad_moves(src, dst, message):
    failing(src, dst, message)


K, V = torch.zeros(8, 2, 4), torch.zeros(8, 2, 6)
SRC, DST = torch.tensor([0]), torch.tensor([1])


POOL = torch.zeros(8 * 2 * 2 * 4)


@pytest.mark.parametrize(
    ("k_cache", "v_cache", "shared"),
    [
        (POOL.view(8, 2, 2, 4)[:, 0], POOL.view(8, 2, 2, 4)[:, 1], False),
        (POOL.view(8, 2, 2, 4)[:, :, 0], POOL.view(8, 2, 2, 4)[:, :, 1], False),
        (POOL.view(8, 2, 8)[..., :3], POOL.view(8, 2, 8)[..., 3:], False),
        (POOL.view(8, 2, 8)[..., :4], POOL.view(8, 2, 8)[..., 3:], True),
        (POOL.view(2, 2, 8, 4)[0].transpose(0, 1), POOL.view(2, 2, 8, 4)[1].transpose(0, 1), False),
        (POOL.view(2, 8, 8)[0].view(8, 2, 4), POOL.view(2, 8, 8)[1].view(8, 2, 4), False),
        (POOL.view(16, 2, 4)[:8], POOL.view(16, 2, 4)[4:12], True),
        (POOL.view(16, 2, 4)[8:], POOL.view(16, 2, 4)[1:9], True),
        (POOL.view(16, 2, 4)[::2], POOL.view(16, 2, 4)[1::2], False),
        (POOL.view(16, 2, 4)[:8], POOL.view(8, 2, 2, 4)[:, 0], True),
        (POOL.view(8, 4, 4)[:1, :2], POOL.view(8, 4, 4)[:1, 1:3], True),
        (POOL.view(8, 4, 4)[:1, :2], POOL.view(8, 4, 4)[:1, 2:], False),
    ],
)
def test_caches_of_one_pool(k_cache, v_cache, shared):
    slots = torch.tensor([0, 1]) % len(k_cache)
    moves = slots, slots
    if len(k_cache) == 1:
        moves = slots[:1], slots[:1]
    if shared:
        with pytest.raises(ValueError, match=r"^v_cache must be memory of its own, got some of k_cache's$"):
            palmette.compact_kv_(k_cache, v_cache, *moves)
    else:
        palmette.compact_kv_(k_cache, v_cache, *moves)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((K[0], V, SRC, DST), r"^k_cache must be \[slots, Hk, D\], got \[2, 4\]$"),
        ((K, V[None], SRC, DST), r"^v_cache must be \[slots, Hk, Dv\], got \[1, 8, 2, 6\]$"),
        ((K, V[:7], SRC, DST), r"^v_cache must be \[8, 2, Dv\] like k_cache, got \[7, 2, 6\]$"),
        ((K, V[:, :1], SRC, DST), r"^v_cache must be \[8, 2, Dv\] like k_cache, got \[8, 1, 6\]$"),
        ((K, K, SRC, DST), "^v_cache must be memory of its own, got some of k_cache's$"),
        (
            (K, V.transpose(1, 2)[:, :2], SRC, DST),
            "^v_cache must be contiguous in its last dimension, got strides",
        ),
        (
            (K[:1].expand(8, 2, 4), V, SRC, DST),
            "^k_cache must be free of rows that share memory, got stride 0 in",
        ),
        (
            (K, V[:, :1].expand(8, 2, 6), SRC, DST),
            "^v_cache must be free of rows that share memory, got stride 0",
        ),
        ((K, V, SRC.float(), DST), "^src_slots must be int32 or int64, got float32$"),
        ((K, V, SRC, DST[None]), r"^dst_slots must be \[n\], got \[1, 1\]$"),
        ((K, V.to("meta"), SRC, DST), "^v_cache must be on cpu, got meta$"),
        ((K, V, SRC.to("meta"), DST), "^src_slots must be on cpu, got meta$"),
        (
            (K.clone().requires_grad_(), V, SRC, DST),
            "^k_cache must not require gradients, got requires_grad=True$",
        ),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        compact_kv_(*arguments)


# ---- tracing


def opcheck_arguments() -> list[tuple[Tensor, ...]]:
    k, v = caches(8)
    return [
        (k, v, torch.tensor([5, 6, 7]), torch.tensor([4, 5, 6])),
        (
            k.half(),
            v.transpose(0, 1).contiguous().transpose(0, 1),
            torch.tensor([1, 0]).int(),
            torch.tensor([0, 1]).int(),
        ),
    ]


OPCHECK_CASES = {"compact_kv_": opcheck_arguments}


def test_compile_fullgraph():
    def step(k: Tensor, v: Tensor, src: Tensor, dst: Tensor) -> Tensor:
        k.mul_(2)
        compact_kv_(k, v, src, dst)
        return k.sum(-1) + v.sum(-1)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    src, dst = torch.tensor([5, 6, 7, 2]), torch.tensor([4, 5, 6, 7])
    (k, v), (other_k, other_v) = caches(8), caches(8)
    assert torch.equal(compiled(k, v, src, dst), step(other_k, other_v, src, dst))
    assert torch.equal(k, other_k)
    assert torch.equal(v, other_v)
