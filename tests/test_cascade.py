# SPDX-License-Identifier: Apache-2.0
"""cascade_attention: levels of shared keys against attention to the concatenated keys."""

from __future__ import annotations

import itertools
import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch._dynamo.testing
from palmette import cascade_attention, testing
from palmette.reference import cascade as reference_cascade
from torch import Tensor

Level = tuple[Tensor, Tensor, Tensor, Tensor]


def indptr(lengths: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype)


def level(
    q_lengths: list[int],
    kv_lengths: list[int],
    heads: int = 2,
    dim: int = 16,
    v_dim: int = 16,
    dtype: torch.dtype = torch.float32,
) -> Level:
    total = sum(kv_lengths)
    k = torch.randn(total, heads, dim).to(dtype)
    v = torch.randn(total, heads, v_dim).to(dtype)
    return k, v, indptr(q_lengths), indptr(kv_lengths, torch.int64)


def cast(levels: list[Level], dtype: torch.dtype) -> list[Level]:
    return [(k.to(dtype), v.to(dtype), q_indptr, kv_indptr) for k, v, q_indptr, kv_indptr in levels]


def check(q: Tensor, levels: list[Level], scale: float | None = None, factor: float = 2.0) -> None:
    """Error at most `factor` times that of the reference in the same dtype."""
    got, lse = cascade_attention(q, levels, scale=scale, return_lse=True)
    assert got.dtype == q.dtype
    assert lse.dtype == (torch.float64 if q.dtype == torch.float64 else torch.float32)
    want, want_lse = reference_cascade.cascade_attention(q.double(), cast(levels, torch.float64), scale=scale)
    base, base_lse = reference_cascade.cascade_attention(q, levels, scale=scale)
    testing.assert_accurate(got, want, base, factor=factor, name="out")
    testing.assert_accurate(lse, want_lse, base_lse, factor=factor, atol=3e-6, name="lse")


# Per level: queries per group, keys per group. The last level is causal.
SHAPES = {
    "one level": [([2, 3], [5, 4])],
    "shared prompt": [([6], [40]), ([1] * 6, [3, 1, 4, 1, 5, 9])],
    "three levels": [([12], [200]), ([5, 7], [33, 60]), ([2, 3, 4, 1, 2], [2, 8, 4, 5, 2])],
    "five levels": [([8], [7]), ([8], [1]), ([3, 5], [10, 49]), ([3, 1, 4], [2, 0, 6]), ([1] * 8, [1] * 8)],
    "a level without keys": [([4], [9]), ([2, 2], [0, 0]), ([1] * 4, [3, 0, 2, 1])],
    "queries that see nothing": [([1, 3], [0, 4]), ([1, 3], [0, 2])],
    "more queries than keys": [([4, 5], [2, 3])],
    "groups without queries": [([0, 5, 0], [4, 3, 2]), ([2, 0, 3], [2, 7, 5])],
    "chunked prefill": [([150], [300]), ([70, 80], [90, 80])],
    "long": [([20], [5000]), ([1] * 20, [48] * 20)],
    "no queries": [([0], [5]), ([], [])],
}


def make(
    name: str, *, heads: int = 2, dim: int = 16, v_dim: int = 16, dtype: torch.dtype = torch.float32
) -> list[Level]:
    return [level(q, kv, heads, dim, v_dim, dtype) for q, kv in SHAPES[name]]


def queries(name: str, heads: int = 4, dim: int = 16, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(sum(SHAPES[name][0][0]), heads, dim).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SHAPES)
def test_equals_attention_to_the_concatenated_keys(backend, name, dtype):
    check(queries(name, dtype=dtype), make(name, dtype=dtype))


@pytest.mark.parametrize(("num_q_heads", "num_kv_heads"), [(1, 1), (4, 4), (16, 1), (32, 8), (9, 3)])
@pytest.mark.parametrize(("dim", "v_dim"), [(64, 64), (24, 40), (65, 1), (1, 65)])
def test_heads_and_head_dims(backend, num_q_heads, num_kv_heads, dim, v_dim):
    check(
        queries("three levels", num_q_heads, dim),
        make("three levels", heads=num_kv_heads, dim=dim, v_dim=v_dim),
    )


def test_levels_may_have_different_numbers_of_heads():
    shapes = SHAPES["three levels"]
    levels = [level(q, kv, heads) for (q, kv), heads in zip(shapes, (1, 2, 4), strict=True)]
    check(queries("three levels"), levels)


def test_scale_and_float64(scalar_backend):
    levels = cast(make("three levels"), torch.float64)
    q = queries("three levels", dtype=torch.float64)
    for scale in (None, 0.7, -1.0, 0.0):
        got, lse = cascade_attention(q, levels, scale=scale, return_lse=True)
        want, want_lse = reference_cascade.cascade_attention(q, levels, scale=scale)
        torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
        torch.testing.assert_close(lse, want_lse, atol=1e-12, rtol=0)


@pytest.mark.parametrize("offset", [-200.0, 200.0])
def test_logits_far_from_zero(backend, offset):
    levels = make("three levels")
    q = queries("three levels")
    q[..., 0] = 1.0
    for k, _, _, _ in levels:
        k[..., 0] = 4 * offset  # scale is 1/4
    check(q, levels)


def test_strides(backend):
    """Pools of other layouts are read in place."""
    shapes = SHAPES["three levels"]
    pool = torch.randn(700, 2, 2, 24)
    levels = []
    for i, (q_lengths, kv_lengths) in enumerate(shapes):
        total = sum(kv_lengths)
        k, v = pool[i : i + total, :, 0, :16], pool[::2][:total, :, 1, 4:20]
        if i == 1:
            k = k.transpose(0, 1).contiguous().transpose(0, 1)
        levels.append((k, v, indptr(q_lengths), indptr(kv_lengths)))
    check(torch.randn(4, 12, 16).transpose(0, 1), levels)


def test_one_level_is_causal_attention():
    k, v, q_indptr, kv_indptr = level([7], [7], heads=4)
    q = torch.randn(7, 4, 16)
    want = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in (q, k, v)), is_causal=True
    )[0].transpose(0, 1)
    torch.testing.assert_close(
        cascade_attention(q, [(k, v, q_indptr, kv_indptr)]), want, atol=2e-6, rtol=1e-5
    )


def test_rows_that_see_nothing_are_empty(backend):
    name = "queries that see nothing"
    out, lse = cascade_attention(queries(name), make(name), return_lse=True)
    assert (out[0] == 0).all()
    assert (lse[0] == -math.inf).all()
    assert torch.isfinite(lse[1:]).all()


def test_nan_where_nobody_looks_does_not_leak(backend):
    levels = make("groups without queries")
    q = queries("groups without queries")
    want = cascade_attention(q, levels)
    for k, v, q_indptr, kv_indptr in levels:
        for group in (q_indptr.diff() == 0).nonzero().flatten().tolist():
            k[kv_indptr[group] : kv_indptr[group + 1]] = math.nan
            v[kv_indptr[group] : kv_indptr[group + 1]] = math.nan
    assert torch.equal(cascade_attention(q, levels), want)
    # A causal level: the last key's value is seen by the last query alone.
    k, v, q_indptr, kv_indptr = level([4], [4])
    q = torch.randn(4, 4, 16)
    want = cascade_attention(q, [(k, v, q_indptr, kv_indptr)])
    v[3] = math.nan
    got = cascade_attention(q, [(k, v, q_indptr, kv_indptr)])
    assert torch.equal(got[:3], want[:3])
    assert got[3].isnan().all()


def test_one_and_two_threads_agree(num_threads, backend):
    q, levels = queries("long", 8), make("long")
    k = levels[0][0].requires_grad_()
    results = []
    for threads in (1, 2):
        num_threads(threads)
        out, lse = cascade_attention(q, levels, return_lse=True)
        results.append((out, lse, *torch.autograd.grad(out.sum() + lse.sum(), k)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@st.composite
def cascades(draw: st.DrawFn) -> list[tuple[list[int], list[int]]]:
    """Levels whose groups refine the ones above, or not: they need not nest."""
    num_queries = draw(st.integers(0, 30))
    shapes = []
    for _ in range(draw(st.integers(1, 5))):
        cuts = draw(st.lists(st.integers(0, num_queries), max_size=6).map(sorted))
        bounds = [0, *cuts, num_queries]
        q_lengths = [b - a for a, b in itertools.pairwise(bounds)]
        kv_lengths = draw(st.lists(st.integers(0, 60), min_size=len(q_lengths), max_size=len(q_lengths)))
        shapes.append((q_lengths, kv_lengths))
    return shapes


@hypothesis.given(
    shapes=cascades(), seed=st.integers(0, 1000), heads=st.sampled_from([(4, 2), (3, 3), (8, 1)])
)
def test_any_cascade(backend, shapes, seed, heads):
    torch.manual_seed(seed)
    levels = [level(q, kv, heads[1], 8, 12) for q, kv in shapes]
    check(torch.randn(sum(shapes[0][0]), heads[0], 8), levels)


# ---- gradients


def inputs_of(q: Tensor, levels: list[Level]) -> list[Tensor]:
    return [q, *(x for k, v, _, _ in levels for x in (k, v))]


@pytest.mark.parametrize(
    "name", ["one level", "three levels", "queries that see nothing", "a level without keys"]
)
def test_gradcheck(scalar_backend, name):
    levels = [(k[:, :, :3], v[:, :, :2], *rest) for k, v, *rest in cast(make(name), torch.float64)]
    q = queries(name, 4, 3, torch.float64)
    leaves = [x.contiguous().requires_grad_() for x in inputs_of(q, levels)]

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        pairs = zip(tensors[1::2], tensors[2::2], levels, strict=True)
        out, lse = cascade_attention(tensors[0], [(k, v, *rest[2:]) for k, v, rest in pairs], return_lse=True)
        return out, torch.where(lse == -math.inf, 0.0, lse)

    fast = name in ("three levels", "a level without keys")
    assert torch.autograd.gradcheck(function, leaves, atol=1e-6, fast_mode=fast)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name", ["shared prompt", "five levels", "chunked prefill", "more queries than keys"]
)
def test_gradients_against_the_reference(backend, name, dtype):
    q, levels = queries(name, dtype=dtype), make(name, dtype=dtype)
    dout = torch.randn(q.shape)
    visible = cascade_attention(q, levels, return_lse=True)[1] > -math.inf
    dlse = torch.randn(visible.shape)

    def gradients(function: object, to: torch.dtype) -> list[Tensor]:
        leaves = [x.to(to, copy=True).requires_grad_() for x in inputs_of(q, levels)]
        pairs = zip(leaves[1::2], leaves[2::2], levels, strict=True)
        out, lse = function(leaves[0], [(k, v, *rest[2:]) for k, v, rest in pairs])
        loss = (out * dout.to(to)).sum() + (torch.where(visible, lse, 0.0) * dlse).sum()
        return list(torch.autograd.grad(loss, leaves))

    got = gradients(lambda q, levels: cascade_attention(q, levels, return_lse=True), dtype)
    want = gradients(reference_cascade.cascade_attention, torch.float64)
    base = gradients(reference_cascade.cascade_attention, dtype)
    for i, (g, w, b) in enumerate(zip(got, want, base, strict=True)):
        testing.assert_accurate(g, w, b, factor=3.0, atol=2e-6, name=f"gradient {i}")


# ---- errors


def two_levels() -> tuple[Tensor, list[list[Tensor]]]:
    return torch.randn(5, 4, 16), [list(level([5], [7])), list(level([2, 3], [2, 6]))]


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        ((0, 2), torch.tensor([0, 4]), r"levels\[0\]: q_indptr must be 5 \(rows of q\) at its end, got 4"),
        (
            (1, 2),
            torch.tensor([0, 5]),
            r"levels\[1\]: kv_indptr must be \[B \+ 1\] like q_indptr = \[2\], got \[3\]",
        ),
        (
            (1, 2),
            torch.tensor([0, 6, 5]),
            r"levels\[1\]: q_indptr must be non-decreasing, got 5 after 6 at 2",
        ),
        ((1, 3), torch.tensor([1, 2, 8]), r"levels\[1\]: kv_indptr must be 0 at its begin, got 1"),
        (
            (1, 3),
            torch.tensor([0, 2, 7]),
            r"levels\[1\]: kv_indptr must be 8 \(rows of k\) at its end, got 7",
        ),
        ((1, 3), torch.tensor([0.0, 2, 8]), r"levels\[1\]: kv_indptr must be int32 or int64, got float32"),
        ((0, 2), torch.tensor([[0, 5]]), r"levels\[0\]: q_indptr must be \[B \+ 1\], got \[1, 2\]"),
        ((0, 2), torch.zeros(0, dtype=torch.int64), r"levels\[0\]: q_indptr must be \[B \+ 1\], got \[0\]"),
        (
            (0, 2),
            torch.zeros(2, dtype=torch.int64, device="meta"),
            r"levels\[0\]: q_indptr must be on cpu, got meta",
        ),
        ((1, 0), torch.zeros(8, 3, 16), r"levels\[1\]: v must be \[slots, Hk, Dv\] = \[8, 3, Dv\] like k"),
        ((0, 0), torch.zeros(7, 2, 8), r"levels\[0\]: head_dim of k must be q's 16, got 8"),
        ((0, 0), torch.zeros(7, 2, 16).half(), r"levels\[0\]: k must be float32, got float16"),
        ((1, 1), torch.zeros(8, 2, 17), r"levels\[1\]: head_dim of v must be 16 like levels\[0\]'s, got 17"),
        ((1, 1), torch.zeros(8, 2, 16, device="meta"), r"levels\[1\]: v must be on cpu, got meta"),
    ],
)
def test_bad_levels(place, change, message):
    q, levels = two_levels()
    levels[place[0]][place[1]] = change
    with pytest.raises(ValueError, match=f"^{message}"):
        cascade_attention(q, levels)


def test_other_bad_arguments():
    q, levels = two_levels()
    with pytest.raises(
        ValueError, match=r"^levels must hold at least one \(k, v, q_indptr, kv_indptr\), got none$"
    ):
        cascade_attention(q, [])
    with pytest.raises(
        ValueError, match=r"^levels\[1\] must be \(k, v, q_indptr, kv_indptr\), got 3 entries$"
    ):
        cascade_attention(q, [levels[0], levels[1][:3]])
    with pytest.raises(ValueError, match=r"^levels\[0\]: q must be \[Nq, Hq, D\], got \[5, 64\]$"):
        cascade_attention(q.flatten(1), levels)
    with pytest.raises(
        ValueError, match=r"^levels\[0\]: heads of q must be a positive multiple of k's 2, got 3$"
    ):
        cascade_attention(q[:, :3], levels)


# ---- tracing


def test_compile_fullgraph():
    def step(q: Tensor, *tensors: Tensor) -> Tensor:
        out, lse = cascade_attention(q * 2, [tensors[:4], tensors[4:8], tensors[8:]], return_lse=True)
        return out.sin().sum() + lse.sum()

    levels = make("three levels")
    q = queries("three levels").requires_grad_()
    tensors = [x for item in levels for x in item]
    tensors[0].requires_grad_()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    want = torch.autograd.grad(step(q, *tensors), (q, tensors[0]))
    got = torch.autograd.grad(compiled(q, *tensors), (q, tensors[0]))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


def test_compile_does_not_recompile_when_the_keys_grow():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(cascade_attention, fullgraph=True, backend=counter, dynamic=True)
    frames = []
    for num_keys in (40, 50, 64, 300):
        q, levels = torch.randn(6, 4, 16), [level([6], [num_keys]), level([3, 3], [9, num_keys])]
        torch.testing.assert_close(compiled(q, levels), cascade_attention(q, levels))
        frames.append(counter.frame_count)
    assert frames == frames[:1] * 4
