# SPDX-License-Identifier: Apache-2.0
"""NSA's parts against their reference: shapes and lengths that break other implementations included."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from palmette import testing
from palmette._attend import attend, plan_tensors
from palmette._selection import plan_by_blocks, plan_by_tiles
from palmette.reference import sparse_attention as reference
from palmette.sparse_attention import (
    compress,
    compressed_attention,
    select_blocks,
    selected_attention,
    sliding_window_attention,
)
from torch import Tensor

# The smallest sizes that have every case; NSA's own are 32, 16, 64.
SIZES = {"kernel_size": 8, "kernel_stride": 4}
BLOCK = 16
LENGTHS = [1, 2, 3, 6, 7, 8, 9, 11, 15, 16, 17, 63, 64, 65, 100]
ATOL = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


class Case(NamedTuple):
    """Sequences of `tokens` tokens, the last `queries` of which are asked for."""

    q: Tensor
    k: Tensor
    v: Tensor
    queries: list[int]
    tokens: list[int]

    @property
    def cu_seqlens(self) -> Tensor:
        return indptr(self.queries)

    @property
    def cu_seqlens_k(self) -> Tensor:
        return indptr(self.tokens)

    def sequences(self):
        """q, k, v of each."""
        for b in range(len(self.tokens)):
            (q0, q1), (k0, k1) = (tuple(c[b : b + 2].tolist()) for c in (self.cu_seqlens, self.cu_seqlens_k))
            yield slice(q0, q1), slice(k0, k1)

    def to(self, dtype) -> Case:
        return self._replace(q=self.q.to(dtype), k=self.k.to(dtype), v=self.v.to(dtype))


def indptr(lengths: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype)


def make(
    tokens: list[int],
    queries: list[int] | None = None,
    *,
    q_heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    v_head_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    factor: float = 1.0,
) -> Case:
    queries = tokens if queries is None else queries
    q = factor * torch.randn(sum(queries), q_heads, head_dim)
    k = torch.randn(sum(tokens), kv_heads, head_dim)
    v = torch.randn(sum(tokens), kv_heads, v_head_dim or head_dim)
    return Case(q, k, v, list(queries), list(tokens)).to(dtype)


def random_blocks(case: Case, topk: int, block_size: int = BLOCK, seed: int = 0) -> Tensor:
    """Blocks that a query sees, in any number from none to topk."""
    draw = torch.Generator().manual_seed(seed)
    index = torch.full((case.k.shape[1], case.q.shape[0], topk), -1, dtype=torch.int32)
    for (rows, keys), _ in zip(case.sequences(), case.tokens, strict=True):
        n, tokens = rows.stop - rows.start, keys.stop - keys.start
        for h, i in itertools.product(range(case.k.shape[1]), range(n)):
            own = (tokens - n + i) // block_size
            count = int(torch.randint(0, min(topk, own + 1) + 1, (), generator=draw))
            chosen = torch.randperm(own + 1, generator=draw)[:count].sort().values
            index[h, rows.start + i, :count] = chosen.int()
    return index


def by_sequence(case: Case, function) -> tuple[Tensor, Tensor]:
    """out and lse of function(rows, keys) of every sequence."""
    results = [function(rows, keys) for rows, keys in case.sequences()]
    return torch.cat([out for out, _ in results]), torch.cat([lse for _, lse in results])


def expected_selected(case: Case, index: Tensor, block_size: int = BLOCK) -> tuple[Tensor, Tensor]:
    return by_sequence(
        case,
        lambda rows, keys: reference.selected_attention(
            case.q[rows], case.k[keys], case.v[keys], index[:, rows], block_size=block_size
        ),
    )


def selected(index: Tensor, block_size: int = BLOCK):
    def run(case: Case):
        return selected_attention(
            case.q,
            case.k,
            case.v,
            index,
            case.cu_seqlens,
            cu_seqlens_k=case.cu_seqlens_k,
            block_size=block_size,
            return_lse=True,
        )

    return run


def by_blocks(case: Case, index: Tensor, block_size: int = BLOCK) -> tuple[Tensor, Tensor]:
    """What selected_attention does with tensors that lie on a GPU."""
    plan = plan_by_blocks(case.q, case.k, case.v, index, case.cu_seqlens, case.cu_seqlens_k, None, block_size)
    return attend(case.q, case.k, case.v, plan_tensors(plan), item_query=plan[8])


def check_selected(case: Case, index: Tensor, block_size: int = BLOCK) -> tuple[Tensor, Tensor]:
    got = selected(index, block_size)(case)
    want = expected_selected(case.to(torch.float64), index, block_size)
    base = expected_selected(case, index, block_size)
    orders = [got]
    if testing.current_backend() in testing.EMULATORS:
        orders.append(by_blocks(case, index, block_size))
    for out, lse in orders:
        testing.assert_accurate(out, want[0], base[0], atol=ATOL[case.q.dtype], name="out")
        testing.assert_accurate(lse, want[1], base[1], atol=3e-6, name="lse")
    return got


# ---- selected attention


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_selected_attention_equals_the_reference(backend, tokens, dtype):
    case = make([tokens], dtype=dtype)
    check_selected(case, random_blocks(case, 4))


@pytest.mark.parametrize("group", [1, 2, 3, 5, 8, 16, 20])
def test_groups_of_any_size(backend, group):
    case = make([150], q_heads=2 * group, head_dim=24)
    check_selected(case, random_blocks(case, 5))


@pytest.mark.parametrize(
    ("head_dim", "v_head_dim"), [(40, 40), (64, 64), (80, 48), (96, 96), (100, 100), (128, 128), (192, 128)]
)
def test_head_dims(backend, head_dim, v_head_dim):
    case = make([70], head_dim=head_dim, v_head_dim=v_head_dim)
    check_selected(case, random_blocks(case, 3))


@pytest.mark.parametrize("queries", [[3, 0, 1, 40], [1, 1, 1, 1]])
def test_sequences_that_go_on(backend, queries):
    """Chunks of prefill and steps of decoding: queries are the last tokens of what is there."""
    case = make([50, 7, 1, 90], queries)
    check_selected(case, random_blocks(case, 4))


def test_an_empty_sequence_within_a_batch(backend):
    case = make([40, 0, 33])
    check_selected(case, random_blocks(case, 4))


def test_no_blocks_at_all(backend):
    case = make([40])
    index = torch.full((2, 40, 3), -1, dtype=torch.int32)
    out, lse = check_selected(case, index)
    assert (out == 0).all()
    assert (lse == -math.inf).all()


def test_all_queries_on_one_block(backend):
    case = make([600], q_heads=2, kv_heads=1)
    check_selected(case, torch.zeros(1, 600, 1, dtype=torch.int32))


def test_selecting_every_block_is_dense_attention(backend):
    case = make([100])
    blocks = -(-100 // BLOCK)
    index = torch.arange(blocks, dtype=torch.int32).expand(2, 100, blocks).contiguous()
    seen = torch.arange(blocks)[None, :] <= torch.arange(100)[:, None] // BLOCK
    for chosen in (index, torch.where(seen, index, -1)):  # blocks behind the query count for nothing
        out, _ = check_selected(case, chosen.contiguous())
        q, k, v = (x.transpose(0, 1)[None] for x in (case.q, case.k, case.v))
        dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        torch.testing.assert_close(out, dense[0].transpose(0, 1))


def test_packed_sequences_are_what_each_is_alone(backend):
    case = make([70, 5, 130])
    index = random_blocks(case, 4)
    out, lse = check_selected(case, index)
    for rows, keys in case.sequences():
        alone = selected_attention(
            case.q[rows],
            case.k[keys],
            case.v[keys],
            index[:, rows].contiguous(),
            indptr([rows.stop - rows.start]),
            block_size=BLOCK,
            return_lse=True,
        )
        assert torch.equal(alone[0], out[rows])
        assert torch.equal(alone[1], lse[rows])


@pytest.mark.parametrize("factor", [3.0, 30.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_queries(backend, factor, dtype):
    """Every row has a maximum of its own; one for all of them overflows (public FSA code at 3)."""
    case = make([130], dtype=dtype, factor=factor)
    out, _ = check_selected(case, random_blocks(case, 4))
    assert out.isfinite().all()


def test_strides(backend):
    base = make([90], head_dim=32)
    index = random_blocks(base, 4)
    want = check_selected(base, index)
    q = torch.randn(90, 2, 4, 32)[:, 1].copy_(base.q)
    k = torch.empty(2, 90, 48)[..., :32].transpose(0, 1).copy_(base.k)
    v = torch.empty(90, 2, 32, 2)[..., 1].copy_(base.v)
    got = check_selected(base._replace(q=q, k=k, v=v), index)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_out(backend):
    """The result goes where it is wanted, other strides included."""
    case = make([90])
    index, (k_cmp, v_cmp, ends) = random_blocks(case, 4), compressed(case)
    sizes = {"kernel_size": 8, "kernel_stride": 4}
    calls = [
        lambda **o: selected_attention(case.q, case.k, case.v, index, case.cu_seqlens, block_size=BLOCK, **o),
        lambda **o: sliding_window_attention(case.q, case.k, case.v, case.cu_seqlens, window=9, **o),
        lambda **o: compressed_attention(case.q, k_cmp, v_cmp, case.cu_seqlens, ends, **sizes, **o)[0],
    ]
    for call in calls:
        want = call()
        out = torch.full((want.shape[1], *want.shape[::2]), torch.nan, dtype=want.dtype).transpose(0, 1)
        assert call(out=out) is out
        assert torch.equal(out, want)
        with pytest.raises(ValueError, match="out must be"):
            call(out=out[1:])


def shifted(x: Tensor) -> tuple[Tensor, Tensor]:
    """A copy of x, and memory of its shape that begins a row later."""
    memory = torch.empty(x.numel() + x[0].numel())
    return memory[: x.numel()].view_as(x).copy_(x), memory[x[0].numel() :].view_as(x)


def test_out_that_shares_memory():
    case = make([12], q_heads=4, kv_heads=4)
    q, later = shifted(case.q)
    heads = torch.empty(12, 12, 16)
    for out, q_in, k_in in [
        (later, q, case.k),
        (case.k, case.q, case.k),
        (case.q, case.q, case.k),
        (torch.empty(999).as_strided((12, 4, 16), (4, 2, 1)), case.q, case.k),
        (torch.empty(12, 4, 16, requires_grad=True), case.q, case.k),
        (heads[:, 2:6], heads[:, :4].copy_(case.q), case.k),
    ]:
        with pytest.raises(ValueError, match=r"^out must"):
            sliding_window_attention(q_in, k_in, case.v, case.cu_seqlens, window=3, out=out)
    q, k, out = heads.split(4, 1)  # side by side
    q.copy_(case.q)
    k.copy_(case.k)
    want = sliding_window_attention(case.q, case.k, case.v, case.cu_seqlens, window=3)
    assert torch.equal(sliding_window_attention(q, k, case.v, case.cu_seqlens, window=3, out=out), want)


def gradients(case: Case, function, dout: Tensor, dlse: Tensor) -> list[Tensor]:
    inputs = [x.detach().clone().requires_grad_() for x in (case.q, case.k, case.v)]
    out, lse = function(case._replace(q=inputs[0], k=inputs[1], v=inputs[2]))
    seen = lse.isfinite()
    torch.autograd.backward([out, lse.masked_fill(~seen, 0.0)], [dout.to(out.dtype), dlse.to(lse.dtype)])
    return [x.grad for x in inputs]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("tokens", "queries", "group"),
    [([100], None, 2), ([70, 0, 5], None, 1), ([40, 90], [3, 90], 5), ([1, 2, 17], None, 16)],
)
def test_gradients_equal_the_reference(backend, tokens, queries, group, dtype):
    case = make(tokens, queries, q_heads=2 * group, v_head_dim=24, dtype=dtype)
    index = random_blocks(case, 4)
    douts = torch.randn(*case.q.shape[:2], 24), torch.randn(case.q.shape[:2])
    want = gradients(case.to(torch.float64), lambda c: expected_selected(c, index), *douts)
    base = gradients(case, lambda c: expected_selected(c, index), *douts)
    atol = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    orders = [selected(index)]
    if testing.current_backend() in testing.EMULATORS:
        orders.append(lambda c: by_blocks(c, index))
    for order in orders:
        for name, a, b, c in zip(("dq", "dk", "dv"), gradients(case, order, *douts), want, base, strict=True):
            testing.assert_accurate(a, b, c, factor=3.0, atol=atol, name=name)


@pytest.mark.skipif("emulated" not in testing.backends(), reason="the emulator is not there")
@pytest.mark.parametrize("group", [1, 3, 70])
def test_a_plan_by_blocks(monkeypatch, group):
    """Its launches, KV heads in turns, groups of more rows than a block has, blocks that do not exist."""
    case = make([90, 0, 40], q_heads=3 * group, kv_heads=3, dtype=torch.bfloat16)
    index = random_blocks(case, 4)
    index[0, 7] = torch.tensor([0, 1, 90, 2**31 - 1])
    valid = torch.where(index < 90, index, -1)
    douts = torch.randn_like(case.q), torch.randn(case.q.shape[:2])
    with testing.backend("emulated"):
        names = []
        with testing.recorded_launches(lambda launch: names.append(launch.name)):
            got = by_blocks(case, index)
            of_blocks = gradients(case, lambda c: by_blocks(c, index), *douts)
        assert {"attend", "attend_merge_blocks", "attend_dq", "attend_dq_add"} <= set(names)
        assert "attend_merge" not in names
        want = expected_selected(case.to(torch.float64), valid)
        base = expected_selected(case, valid)
        for a, b, c in zip(got, want, base, strict=True):
            testing.assert_accurate(a, b, c, atol=ATOL[torch.bfloat16])
        of_tiles = gradients(case, selected(valid), *douts)
        monkeypatch.setenv("PALMETTE_PARTIAL_BYTES", "1")
        with testing.recorded_launches(lambda launch: names.append(launch.name)):
            in_turns = by_blocks(case, index)
        assert names[-6:] == ["attend", "attend_merge_blocks"] * 3
        assert all(torch.equal(a, b) for a, b in zip(in_turns, got, strict=True))
        turned = gradients(case, lambda c: by_blocks(c, index), *douts)
        assert all(torch.equal(a, b) for a, b in zip(turned, of_blocks, strict=True))
    for a, b in zip(of_blocks, of_tiles, strict=True):
        torch.testing.assert_close(a, b, atol=5e-2, rtol=5e-2)


def test_a_plan_by_blocks_is_for_gpus(scalar_backend):
    case = make([40])
    with pytest.raises(ValueError, match="merge_row must be"):
        by_blocks(case, random_blocks(case, 3))


def test_rows_without_blocks_have_no_gradient(backend):
    case = make([40])
    index = random_blocks(case, 3)
    index[:, 7] = -1
    dq, dk, dv = gradients(case, selected(index), torch.ones_like(case.q), torch.zeros(case.q.shape[:2]))
    assert (dq[7] == 0).all()
    assert all(x.isfinite().all() for x in (dq, dk, dv))


def test_gradcheck(scalar_backend):
    case = make([37], q_heads=2, kv_heads=1, head_dim=5, dtype=torch.float64)
    index = random_blocks(case, 2)
    inputs = [x.requires_grad_() for x in (case.q, case.k, case.v)]

    def run(q, k, v):
        out, lse = selected_attention(q, k, v, index, case.cu_seqlens, block_size=BLOCK, return_lse=True)
        return out, lse.masked_fill(lse == -math.inf, 0.0)

    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("threads", [1, 2])
def test_bit_identical(backend, num_threads, threads):
    case = make([700, 300], q_heads=8)
    index = random_blocks(case, 6)
    douts = torch.randn_like(case.q), torch.randn(case.q.shape[:2])
    num_threads(1)
    want = gradients(case, selected(index), *douts)
    num_threads(threads)
    for _ in range(2):
        got = gradients(case, selected(index), *douts)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda i: i[0, 5].copy_(torch.tensor([1, 0, -1])),
            r"^block_index must be ascending .* got 0 after 1",
        ),
        (lambda i: i[1, 5].copy_(torch.tensor([1, 1, -1])), r"got 1 after 1 for query 5 and KV head 1$"),
        (
            lambda i: i[0, 5, 0].fill_(3),
            r"^block_index must be ascending within \[0, 3\) in every row .* got 3",
        ),
        (lambda i: i[0, 5, 0].fill_(-2), r"^block_index must be ascending .* got -2 after -1"),
    ],
)
def test_bad_blocks(change, message):
    case = make([40])
    index = torch.tensor([0, 1, -1], dtype=torch.int32).repeat(2, 40, 1)
    change(index)
    with pytest.raises(ValueError, match=message):
        selected_attention(case.q, case.k, case.v, index, case.cu_seqlens, block_size=BLOCK)


def test_tables_grow_with_the_blocks_that_are_chosen():
    """Public code needs N^2 / block_size entries, and for one block that all queries choose N of each."""

    def table_bytes(tokens: int, index: Tensor) -> int:
        case = make([tokens], q_heads=2, kv_heads=1, head_dim=8)
        plan = plan_by_tiles(case.q, case.k, case.v, index, case.cu_seqlens, case.cu_seqlens, None, 64)
        return sum(table.nbytes for table in plan)

    def last_blocks(tokens: int) -> Tensor:
        """The 16 up to a query's own; -1 on the right."""
        own = torch.arange(tokens)[:, None] // 64
        blocks = (own - 15).clamp(min=0) + torch.arange(16)
        return torch.where(blocks <= own, blocks, -1).int()[None]

    sizes = []
    for tokens in (8192, 16384, 32768):
        sizes.append(table_bytes(tokens, last_blocks(tokens)))
    assert sizes[1] < 2.1 * sizes[0]
    assert sizes[2] < 2.1 * sizes[1]
    assert sizes[2] < 2 * 32768 * 16 * 4  # the list of who chose what is half of it
    everyone = torch.zeros(1, 32768, 1, dtype=torch.int32)
    assert table_bytes(32768, everyone) < 32768 * 64


def test_tables_of_a_cache_grow_with_its_tokens():
    """Sequences with room between them: the blocks of each, not those of all for every one."""

    def table_bytes(sequences: int) -> int:
        tokens, room = 4096, 4200
        lengths, each = indptr([1] * sequences), indptr([tokens] * sequences)
        q, k = torch.zeros(sequences, 2, 8), torch.zeros(sequences * room, 1, 8)
        index = torch.arange(16, dtype=torch.int32).repeat(1, sequences, 1)
        plan = plan_by_tiles(q, k, k, index, lengths, each, torch.arange(sequences) * room, 64)
        return sum(table.nbytes for table in plan)

    assert table_bytes(64) < 4.5 * table_bytes(16)


@pytest.mark.parametrize(
    ("starts", "message"),
    [
        (torch.tensor([[0]]), r"k_starts must be \[B\] = \[1\], got \[1, 1\]"),
        (torch.tensor([0, 1]), r"k_starts must be \[B\] = \[1\], got \[2\]"),
        (torch.tensor([0.0]), "k_starts must be"),
        (torch.tensor([1]), "k_starts or cmp_starts must be such that sequence 0 has its 3 rows of 3, got 1"),
    ],
)
def test_bad_starts(starts, message):
    q = torch.zeros(3, 2, 8)
    with pytest.raises(ValueError, match=message):
        sliding_window_attention(q, q, q, indptr([3]), window=2, k_starts=starts)


def test_starts_of_no_sequence():
    q, k = torch.zeros(0, 2, 8), torch.zeros(3, 2, 8)
    starts = torch.zeros(0, dtype=torch.int64)
    options = {"cu_seqlens_k": indptr([]), "k_starts": starts}
    assert sliding_window_attention(q, k, k, indptr([]), window=2, **options).shape == (0, 2, 8)


@pytest.mark.skipif("emulated_check" not in testing.backends(), reason="the check build is not there")
@pytest.mark.parametrize("order", ["by blocks", "by tiles"])
def test_gpu_kernel_moves_the_bytes_of_its_formula(order):
    """K and V once per task and block, q and partial results once per choice."""
    from bench.gpu_sparse import counted_equals_formula

    assert counted_equals_formula(4, order, tokens=300)


AMD = {"warp_size": 64, "shared_limit": 64 << 10}


@pytest.mark.skipif("emulated_check" not in testing.backends(), reason="the check build is not there")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_waves_of_64_lanes(dtype):
    """As some AMD GPUs have; no tensor cores, and little shared memory."""
    case = make([130, 40], q_heads=6, dtype=dtype)
    index = random_blocks(case, 4)
    with testing.backend("emulated_check"), testing.emulator(**AMD):
        check_selected(case, index)
        check_selection(case, init_blocks=0, local_blocks=0)
        douts = torch.randn(*case.q.shape), torch.randn(case.q.shape[:2])
        got = gradients(case, selected(index), *douts)
    want = gradients(case.to(torch.float64), lambda c: expected_selected(c, index), *douts)
    base = gradients(case, lambda c: expected_selected(c, index), *douts)
    for name, a, b, c in zip(("dq", "dk", "dv"), got, want, base, strict=True):
        testing.assert_accurate(a, b, c, factor=3.0, atol=1e-5 if dtype == torch.float32 else 2e-2, name=name)


# ---- compression


@pytest.mark.parametrize("kind", ["mean", "weighted", "linear"])
@pytest.mark.parametrize("tokens", [[n] for n in LENGTHS] + [[30, 0, 7, 8, 41]])
def test_compress(kind, tokens):
    x = torch.randn(sum(tokens), 2, 6, dtype=torch.float64)
    position = torch.randn(2, 8, 6, dtype=torch.float64)
    weight = {
        "mean": None,
        "weighted": torch.randn(2, 8, dtype=torch.float64),
        "linear": torch.randn(2, 48, 5, dtype=torch.float64),
    }[kind]
    y, ends = compress(x, weight, position, indptr(tokens), **SIZES)
    want = torch.cat([reference.compress(part, weight, position, **SIZES) for part in x.split(tokens)])
    torch.testing.assert_close(y, want)
    counts = [reference.num_compressed(n, 8, 4) for n in tokens]
    assert torch.equal(ends, indptr(counts))
    y, _ = compress(x, weight, None, indptr(tokens), **SIZES)
    torch.testing.assert_close(
        y, torch.cat([reference.compress(part, weight, None, **SIZES) for part in x.split(tokens)])
    )


@pytest.mark.parametrize("size", [8, 31, 255])
@pytest.mark.parametrize("kind", ["mean", "weighted", "linear"])
def test_compress_adds_16_bits_in_float32(kind, size):
    """Sums of fp16 would overflow, sums of bf16 lose a digit per stride."""
    half = torch.full((2 * size, 1, 4), 3000.0, dtype=torch.float16)
    mean, _ = compress(half, None, None, indptr([2 * size]), kernel_size=size, kernel_stride=4)
    assert (mean == 3000).all()
    torch.manual_seed(0)
    x = (torch.randn(600, 2, 6) + 1).bfloat16()
    position = torch.randn(2, size, 6).bfloat16()
    weight = {"mean": None, "weighted": torch.rand(2, size), "linear": torch.rand(2, size * 6, 5)}[kind]
    weight = None if weight is None else (weight / size).bfloat16()
    y, _ = compress(x, weight, position, indptr([600]), kernel_size=size, kernel_stride=16)
    wide = [t if t is None else t.double() for t in (x, weight, position)]
    want = reference.compress(*wide, kernel_size=size, kernel_stride=16)
    assert ((y.double() - want).abs() <= want.abs() * 2**-8 + 1e-5).all()


def test_compress_has_deterministic_gradients():
    """Public code adds up the gradients of overlapping blocks by atomics."""
    x = torch.randn(203, 2, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 48, 5, dtype=torch.float64, requires_grad=True)
    position = torch.randn(2, 8, 6, dtype=torch.float64, requires_grad=True)

    def run(x, weight, position):
        return compress(x, weight, position, indptr([150, 53]), **SIZES)[0]

    want = torch.autograd.grad(run(x, weight, position).cos().sum(), (x, weight, position))
    for _ in range(10):
        got = torch.autograd.grad(run(x, weight, position).cos().sum(), (x, weight, position))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    small = [t.detach()[: 2 if i else 30].requires_grad_() for i, t in enumerate((x, weight, position))]
    assert torch.autograd.gradcheck(lambda x, w, p: compress(x, w, p, indptr([19, 11]), **SIZES)[0], small)


# ---- compressed attention, selection


def compressed(case: Case, kind: str = "mean"):
    k_cmp, ends = compress(case.k, None, None, case.cu_seqlens_k, **SIZES)
    v_cmp, _ = compress(case.v, None, None, case.cu_seqlens_k, **SIZES)
    return k_cmp, v_cmp, ends


def run_compressed(case: Case, k_cmp: Tensor, v_cmp: Tensor, ends: Tensor):
    return compressed_attention(
        case.q, k_cmp, v_cmp, case.cu_seqlens, ends, cu_seqlens_k=case.cu_seqlens_k, **SIZES
    )


def expected_compressed(case: Case, k_cmp: Tensor, v_cmp: Tensor, ends: Tensor):
    numbers = iter(range(len(case.tokens)))

    def run(rows, keys):
        b = next(numbers)
        part = slice(int(ends[b]), int(ends[b + 1]))
        return reference.compressed_attention(
            case.q[rows], k_cmp[part], v_cmp[part], keys.stop - keys.start, **SIZES
        )

    return by_sequence(case, run)


@pytest.mark.parametrize(
    ("tokens", "queries"),
    [*(([n], None) for n in LENGTHS), ([50, 0, 7, 90], [3, 0, 1, 90]), ([400, 333], [1, 200])],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compressed_attention(backend, tokens, queries, dtype):
    case = make(tokens, queries, dtype=dtype)
    parts = compressed(case)
    got = run_compressed(case, *parts)
    want = expected_compressed(case.to(torch.float64), parts[0].double(), parts[1].double(), parts[2])
    base = expected_compressed(case, *parts)
    testing.assert_accurate(got[0], want[0], base[0], atol=ATOL[dtype], name="out")
    testing.assert_accurate(got[1], want[1], base[1], atol=3e-6, name="lse")


def test_gradients_of_compressed_attention(backend):
    case = make([130, 9, 40])
    k_cmp, v_cmp, ends = compressed(case)

    def leaves(dtype):
        return [x.to(dtype).detach().requires_grad_() for x in (case.q, k_cmp, v_cmp)]

    def grads(function, inputs):
        out, _lse = function(case._replace(q=inputs[0]), inputs[1], inputs[2], ends)
        return torch.autograd.grad((out * torch.cos(out.detach())).sum(), inputs)

    got = grads(run_compressed, leaves(torch.float32))
    want = grads(expected_compressed, leaves(torch.float64))
    base = grads(expected_compressed, leaves(torch.float32))
    for name, a, b, c in zip(("dq", "dk", "dv"), got, want, base, strict=True):
        testing.assert_accurate(a, b, c, factor=3.0, atol=1e-5, name=name)


OPTIONS = {"block_size": BLOCK, "topk": 4, "init_blocks": 1, "local_blocks": 2}


def run_selection(case: Case, k_cmp: Tensor, lse: Tensor, ends: Tensor, **options) -> Tensor:
    return select_blocks(
        case.q,
        k_cmp,
        lse,
        case.cu_seqlens,
        ends,
        cu_seqlens_k=case.cu_seqlens_k,
        **SIZES,
        **(OPTIONS | options),
    )


def check_selection(case: Case, **options) -> Tensor:
    """The same blocks as the reference, but for scores that differ by rounding alone."""
    options = OPTIONS | options
    k_cmp, v_cmp, ends = compressed(case)
    _, lse = run_compressed(case, k_cmp, v_cmp, ends)
    got = run_selection(case, k_cmp, lse, ends, **options)
    assert got.dtype == torch.int32
    assert got.shape == (case.k.shape[1], case.q.shape[0], options["topk"])
    for b, (rows, keys) in enumerate(case.sequences()):
        tokens = keys.stop - keys.start
        scores = reference.block_scores(
            case.q[rows].double(),
            k_cmp[int(ends[b]) : int(ends[b + 1])].double(),
            tokens,
            block_size=BLOCK,
            **SIZES,
        )
        want = reference.select_blocks(scores, tokens, **options)
        mine = got[:, rows]
        assert torch.equal(mine < 0, want < 0)
        if want.numel():
            chosen = [scores.gather(2, x.clamp(min=0).long()).sort(2).values for x in (mine, want)]
            torch.testing.assert_close(*(c.masked_fill(want < 0, 0.0) for c in chosen), rtol=1e-4, atol=1e-6)
        valid = mine >= 0
        ascends = (mine[..., 1:] > mine[..., :-1]) | ~valid[..., 1:]
        assert ascends.all()
        if case.q.dtype == torch.float64:
            assert torch.equal(mine, want)
    return got


@pytest.mark.parametrize(
    ("tokens", "queries"),
    [*(([n], None) for n in LENGTHS), ([50, 0, 7, 190], [3, 0, 1, 190]), ([400, 333], [1, 200])],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_select_blocks(backend, tokens, queries, dtype):
    case = make(tokens, queries, dtype=dtype)
    check_selection(case)
    check_selection(case, init_blocks=0, local_blocks=0)  # what is close decides for itself


@pytest.mark.parametrize("group", [1, 3, 5, 8, 20])
def test_all_heads_of_a_group_decide(backend, group):
    """Public FSA code looks at the first head of a group only."""
    case = make([300], q_heads=2 * group)
    got = check_selection(case)
    if group > 1:
        first = case._replace(q=case.q[:, ::group].contiguous())
        assert not torch.equal(got, check_selection(first))


def test_select_blocks_in_float64(scalar_backend):
    check_selection(make([300, 77], dtype=torch.float64))


@pytest.mark.parametrize("topk", [1, 3, 7, 40])
@pytest.mark.parametrize("forced", [(0, 0), (1, 0), (0, 1), (1, 2), (2, 1), (3, 3)])
def test_forced_blocks(topk, forced):
    init, local = forced
    case = make([200])
    if topk < init + local:
        with pytest.raises(
            ValueError, match=f"topk must be at least init_blocks . local_blocks = {init + local}"
        ):
            check_selection(case, topk=topk, init_blocks=init, local_blocks=local)
        return
    got = check_selection(case, topk=topk, init_blocks=init, local_blocks=local)
    for i in range(200):
        own = i // BLOCK
        wanted = {j for j in range(own + 1) if j < init or j > own - local}
        for h in range(2):
            assert wanted <= set(got[h, i].tolist())


def test_of_equal_scores_the_lower_block_wins(backend):
    case = make([320])
    case.k.zero_()  # every compressed key gets the same attention
    got = check_selection(case, init_blocks=0, local_blocks=0, topk=3)
    # the first and the last block are overlapped by fewer compressed keys
    assert got[0, 319].tolist() == [1, 2, 3]
    assert got[0, 160].tolist() == [1, 2, 3]
    # better ones that come later drive out the highest of the equal ones
    case.q.fill_(1.0)
    case.k[9 * BLOCK : 10 * BLOCK] = 1.0  # compressed keys that reach into blocks 8 and 10 too
    got = check_selection(case, init_blocks=0, local_blocks=0, topk=5)
    assert got[0, 319].tolist() == [1, 2, 8, 9, 10]


def test_when_all_sizes_are_one_block_scores_are_probabilities():
    """Compression and selection blocks alike: the score of a block is its compressed probability."""
    case = make([300], q_heads=2)
    sizes = {"kernel_size": 4, "kernel_stride": 4}
    k_cmp, _ends = compress(case.k, None, None, case.cu_seqlens, **sizes)
    scores = reference.block_scores(case.q, k_cmp, 300, block_size=4, **sizes)
    seen = reference.sees_compressed(300, 300, 75, **sizes)
    logits = torch.einsum("qhd,nhd->hqn", case.q, k_cmp) * 0.25
    torch.testing.assert_close(
        scores, torch.softmax(logits.masked_fill(~seen, -math.inf), -1).nan_to_num(0.0)
    )


def test_weights_of_compressed_keys():
    """32, 16, 64: indices 4j - 1 .. 4j + 3 count 1, 2, 2, 2, 1 times (NSA, section 3.3.2)."""
    q, k_cmp = torch.zeros(320, 1, 4), torch.zeros(19, 1, 4)
    scores = reference.block_scores(q, k_cmp, 320, kernel_size=32, kernel_stride=16, block_size=64)
    torch.testing.assert_close(scores[0, 319] * 19, torch.tensor([7.0, 8.0, 8.0, 8.0, 7.0]))


@pytest.mark.parametrize("name", [n for n in testing.EMULATORS if n in testing.backends()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_selection_where_heads_do_not_fit(name, dtype):
    """In little shared memory, a group's queries come a few heads at a time."""
    case = make([300], q_heads=14, head_dim=64, dtype=dtype)
    k_cmp, v_cmp, ends = compressed(case)
    _, lse = run_compressed(case, k_cmp, v_cmp, ends)
    with testing.backend(name):
        want = run_selection(case, k_cmp, lse, ends)
        for limit in (40, 30, 26):
            with testing.emulator(shared_limit=limit << 10):
                assert torch.equal(run_selection(case, k_cmp, lse, ends), want)
        with (
            testing.emulator(shared_limit=8 << 10),
            pytest.raises(ValueError, match=r"^topk, head_dim and kernel_size must be such that a"),
        ):
            run_selection(case, k_cmp, lse, ends)
        for order in ({"order": "reverse"}, {"order": "random", "seed": 3}):
            with testing.emulator(**order):
                assert torch.equal(run_selection(case, k_cmp, lse, ends), want)


@pytest.mark.parametrize("threads", [1, 2])
def test_selection_is_bit_identical(backend, num_threads, threads):
    case = make([700, 300], q_heads=8)
    k_cmp, v_cmp, ends = compressed(case)
    _, lse = run_compressed(case, k_cmp, v_cmp, ends)
    num_threads(1)
    want = run_selection(case, k_cmp, lse, ends)
    num_threads(threads)
    assert torch.equal(run_selection(case, k_cmp, lse, ends), want)


def test_selection_is_that_of_each_sequence_alone(backend):
    case = make([200, 0, 90], [200, 0, 13])
    k_cmp, v_cmp, ends = compressed(case)
    _, lse = run_compressed(case, k_cmp, v_cmp, ends)
    got = run_selection(case, k_cmp, lse, ends)
    for b, (rows, keys) in enumerate(case.sequences()):
        part = slice(int(ends[b]), int(ends[b + 1]))
        alone = Case(case.q[rows], case.k[keys], case.v[keys], [case.queries[b]], [case.tokens[b]])
        index = run_selection(alone, k_cmp[part], lse[rows], indptr([part.stop - part.start]))
        assert torch.equal(index, got[:, rows])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_selection_of_what_is_not_finite(backend, value):
    """NaN is nobody's best; forced blocks stay, and other queries choose as before."""
    case = make([200])
    k_cmp, v_cmp, ends = compressed(case)
    _, lse = run_compressed(case, k_cmp, v_cmp, ends)
    want = run_selection(case, k_cmp, lse, ends)
    case.q[150, 0, 3] = value
    got = run_selection(case, k_cmp, run_compressed(case, k_cmp, v_cmp, ends)[1], ends)
    others = [i for i in range(200) if i != 150]
    assert torch.equal(got[:, others], want[:, others])
    assert {0, 150 // BLOCK, 150 // BLOCK - 1} <= set(got[0, 150].tolist())


# ---- windows


@pytest.mark.parametrize("window", [1, 2, 17, 64, 1000])
@pytest.mark.parametrize(("tokens", "queries"), [([150], None), ([50, 0, 7, 90], [3, 0, 1, 90]), ([1], None)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sliding_window_attention(backend, window, tokens, queries, dtype):
    case = make(tokens, queries, dtype=dtype)

    def expected(case):
        return by_sequence(
            case,
            lambda rows, keys: reference.sliding_window_attention(
                case.q[rows], case.k[keys], case.v[keys], window=window
            ),
        )

    got = sliding_window_attention(
        case.q,
        case.k,
        case.v,
        case.cu_seqlens,
        cu_seqlens_k=case.cu_seqlens_k,
        window=window,
        return_lse=True,
    )
    want, base = expected(case.to(torch.float64)), expected(case)
    testing.assert_accurate(got[0], want[0], base[0], atol=ATOL[dtype], name="out")
    testing.assert_accurate(got[1], want[1], base[1], atol=3e-6, name="lse")


# ---- errors


CASE = make([40])
INDEX = torch.tensor([0, 1, -1], dtype=torch.int32).repeat(2, 40, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda c: selected_attention(c.q, c.k, c.v, INDEX.long(), c.cu_seqlens, block_size=16),
            "^block_index must be int32, got int64$",
        ),
        (
            lambda c: selected_attention(c.q, c.k, c.v, INDEX[:1], c.cu_seqlens, block_size=16),
            r"^block_index must be \[Hk, Nq, n\] = \[2, 40, n\], got \[1, 40, 3\]$",
        ),
        (
            lambda c: selected_attention(c.q, c.k, c.v, INDEX, c.cu_seqlens, block_size=0),
            "^block_size must be an integer of at least 1, got 0$",
        ),
        (
            lambda c: selected_attention(c.q, c.k[:39], c.v[:39], INDEX, c.cu_seqlens, block_size=16),
            "^k must have q's 40 rows where cu_seqlens_k is not given, got 39$",
        ),
        (
            lambda c: selected_attention(
                c.q, c.k[:39], c.v[:39], INDEX, c.cu_seqlens, block_size=16, cu_seqlens_k=indptr([39])
            ),
            "^cu_seqlens_k must give a sequence at least its queries, got 39 tokens for 40 queries of seq",
        ),
        (
            lambda c: selected_attention(c.q, c.k, c.v, INDEX, indptr([39]), block_size=16),
            r"^cu_seqlens must be from 0 to 40 \(rows of q\), got 0 to 39$",
        ),
        (
            lambda c: compress(c.k, torch.zeros(2, 7), None, c.cu_seqlens, **SIZES),
            r"^weight must be \[Hk, kernel_size\] = \[2, 8\], got \[2, 7\]$",
        ),
        (
            lambda c: compress(c.k, None, None, indptr([30]), **SIZES),
            r"^cu_seqlens must be from 0 to 40 \(rows of x\), got 0 to 30$",
        ),
        (
            lambda c: compressed_attention(c.q, c.k[:5], c.v[:5], c.cu_seqlens, indptr([5]), **SIZES),
            "^cu_seqlens_cmp must give sequence 0 its 9 compressed keys, got 5$",
        ),
        (
            lambda c: select_blocks(
                c.q, c.k[:9], torch.zeros(40, 4), c.cu_seqlens, indptr([9]), **SIZES, block_size=18, topk=4
            ),
            "^block_size must be a multiple of kernel_stride 4, got 18$",
        ),
        (
            lambda c: select_blocks(
                c.q, c.k[:5], torch.zeros(40, 4), c.cu_seqlens, indptr([5]), **SIZES, block_size=16, topk=4
            ),
            "^cu_seqlens_cmp must be such that sequence 0 of 40 tokens has 9 compressed keys, got 5$",
        ),
        (
            lambda c: sliding_window_attention(c.q, c.k, c.v, c.cu_seqlens, window=0),
            "^window must be an integer of at least 1, got 0$",
        ),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(CASE)


def test_absurd_sizes():
    """What would overflow is refused before any kernel runs."""
    q, k_cmp, lse = torch.zeros(1, 2, 16), torch.zeros(2048, 1, 16), torch.zeros(1, 2)
    size = {"kernel_size": 1 << 20, "kernel_stride": 1 << 20, "block_size": 1 << 20, "topk": 16}
    lengths = indptr([1]), indptr([2048])
    with pytest.raises(ValueError, match=r"^cu_seqlens_k must begin with 0, got -2147483648$"):
        select_blocks(q, k_cmp, lse, *lengths, cu_seqlens_k=torch.tensor([-(2**31), 100]), **size)


@pytest.mark.parametrize("name", [n for n in testing.EMULATORS if n in testing.backends()])
@pytest.mark.parametrize("options", [{"topk": 1 << 20}, {"kernel_size": 1 << 26, "kernel_stride": 1}])
def test_what_no_shared_memory_holds(name, options):
    case = make([200], [1], q_heads=1, kv_heads=1)
    sizes = {"kernel_size": 2, "kernel_stride": 2, "block_size": 2, "topk": 4} | options
    k_cmp, ends = compress(
        case.k,
        None,
        None,
        case.cu_seqlens_k,
        kernel_size=sizes["kernel_size"],
        kernel_stride=sizes["kernel_stride"],
    )
    with testing.backend(name), pytest.raises(ValueError, match=r"^topk, head_dim and kernel_size must be"):
        select_blocks(
            case.q, k_cmp, torch.zeros(1, 1), case.cu_seqlens, ends, cu_seqlens_k=case.cu_seqlens_k, **sizes
        )


def test_sequences_may_share_rows(backend):
    """As in a cache whose prompt is stored once."""
    case = make([100], [2])
    index = random_blocks(case, 4)
    both = selected_attention(
        case.q,
        case.k,
        case.v,
        index,
        indptr([1, 1]),
        block_size=BLOCK,
        cu_seqlens_k=indptr([100, 100]),
        k_starts=torch.tensor([0, 0]),
    )
    for i in range(2):
        alone = selected_attention(
            case.q[i : i + 1],
            case.k,
            case.v,
            index[:, i : i + 1].contiguous(),
            indptr([1]),
            block_size=BLOCK,
            cu_seqlens_k=indptr([100]),
        )
        assert torch.equal(both[i : i + 1], alone)


# ---- invariants


@hypothesis.given(
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=4),
    group=st.integers(1, 5),
    topk=st.integers(1, 6),
    block_size=st.sampled_from([4, 16, 24, 64]),
    seed=st.integers(0, 1000),
)
def test_drawn_selections(lengths, group, topk, block_size, seed):
    torch.manual_seed(seed)
    case = make(lengths, q_heads=group, kv_heads=1, head_dim=8)
    check_selected(case, random_blocks(case, topk, block_size, seed), block_size)


# ---- operators


def selection_arguments() -> list[tuple[object, ...]]:
    case = make([40, 0, 21], [40, 0, 3])
    k_cmp, v_cmp, ends = compressed(case)
    _, lse = run_compressed(case, k_cmp, v_cmp, ends)
    lengths = case.cu_seqlens, ends, case.cu_seqlens_k
    return [(case.q, k_cmp, lse, *lengths, 8, 4, 16, 4, 1, 2, 0.25)]


def plan_arguments() -> list[tuple[object, ...]]:
    case = make([40, 0, 21], [40, 0, 3])
    index = random_blocks(case, 4)
    lengths = case.cu_seqlens, case.cu_seqlens_k
    starts = torch.tensor([30, 0, 0])
    return [
        (index, *lengths, 61, 16, 8, 8, 6, 40, 20, None),
        (index, *lengths, 80, 16, 4, 64, 6, 40, 40, starts),
    ]


def branches_arguments() -> list[tuple[object, ...]]:
    q, k_cmp, _, queries, keys, tokens, *sizes, scale = selection_arguments()[0]
    k = torch.randn(int(tokens[-1]), *k_cmp.shape[1:], dtype=q.dtype)
    gates = torch.rand(len(q), 3, q.shape[1], dtype=q.dtype)
    pairs = k_cmp, k_cmp, k, k, k, k
    return [(q, *pairs, gates, queries, keys, tokens, *sizes, 20, scale, 8, 64, None, None, None)]


OPCHECK_CASES = {
    "select_blocks": selection_arguments,
    "plan_selection": plan_arguments,
    "sparse_branches": branches_arguments,
}


def test_compiles(backend):
    """With the plan in the graph: nothing of it depends on values."""
    case = make([150], dtype=torch.float32)
    index = random_blocks(case, 4)

    def run(q, k, v, index):
        out = selected_attention(q, k, v, index, case.cu_seqlens, block_size=BLOCK)
        return out + sliding_window_attention(q, k, v, case.cu_seqlens, window=9)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    inputs = case.q, case.k, case.v
    torch.testing.assert_close(compiled(*inputs, index), run(*inputs, index))
