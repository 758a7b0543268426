# SPDX-License-Identifier: Apache-2.0
"""merge_state and merge_states: accuracy, edge cases, invariants, gradients, compilation, bad input."""

from __future__ import annotations

import math

import hypothesis
import hypothesis.strategies as st
import palmette
import pytest
import torch
from palmette.reference import merge as reference
from palmette.testing import assert_accurate
from palmette.testing import backend as use_backend

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INF, NAN = math.inf, math.nan
merge_op = torch.ops.palmette.merge_states
pair_op = torch.ops.palmette.merge_state


def states(*shape, dtype=torch.float32, spread=3.0, empty=0.0):
    """Random (outs, lses); a share ``empty`` of the states is empty and holds NaN."""
    outs = torch.randn(*shape).to(dtype)
    lses = spread * torch.randn(*shape[:-1], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    hidden = torch.rand(lses.shape) < empty
    return outs.masked_fill(hidden[..., None], NAN), lses.masked_fill(hidden, -INF)


def plain(outs, lses, base2=False):
    """What one would write in PyTorch for dense states that are not empty, in the dtype of ``outs``."""
    weights = torch.softmax(lses * math.log(2.0) if base2 else lses, 1).to(outs.dtype)
    lse = torch.logsumexp(lses * math.log(2.0), 1) / math.log(2.0) if base2 else torch.logsumexp(lses, 1)
    return (weights[..., None] * outs).sum(1), lse


# ---------------------------------------------------------------------------------------------- accuracy


@pytest.mark.parametrize("base", ["e", "2"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [1, 3, 4, 8, 15, 16, 31, 64, 100, 128, 131, 256])
@pytest.mark.parametrize(("num_states", "num_heads"), [(1, 1), (2, 8), (3, 5), (65, 17)])
def test_dense_against_reference(backend, dtype, head_dim, num_states, num_heads, base):
    outs, lses = states(4, num_states, num_heads, head_dim, dtype=dtype)
    out, lse = palmette.merge_states(outs, lses, lse_base=base)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    want_out, want_lse = reference.merge_states(outs, lses, lse_base=base)
    plain_out, plain_lse = plain(outs, lses, base == "2")
    assert_accurate(out, want_out, plain_out, atol=1e-6, name="out")  # measured 2.4e-7 in float32
    assert_accurate(
        lse, want_lse, plain_lse, atol=2e-6, name="lse"
    )  # measured 9.5e-7: half an ulp at |lse| = 8..16


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counts", [[0], [1], [0, 3, 0, 1, 7, 0], [2] * 33, [130, 0, 1], []], ids=str)
def test_ragged_against_reference(backend, dtype, index, counts):
    outs, lses = states(sum(counts), 3, 24, dtype=dtype, empty=0.2)
    indptr = torch.tensor([0, *counts]).cumsum(0).to(index)
    out, lse = palmette.merge_states(outs, lses, indptr)
    want_out, want_lse = reference.merge_states(outs, lses, indptr)
    rounding = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    assert_accurate(out, want_out, atol=rounding, name="out")
    assert_accurate(lse, want_lse, atol=2e-6, name="lse")


def test_ragged_is_dense_when_rows_are_equal(backend):
    outs, lses = states(9, 4, 5, 40)
    dense = palmette.merge_states(outs, lses)
    indptr = torch.arange(0, 37, 4, dtype=torch.int32)
    ragged = palmette.merge_states(outs.flatten(0, 1), lses.flatten(0, 1), indptr)
    assert torch.equal(dense[0], ragged[0])
    assert torch.equal(dense[1], ragged[1])


def test_pair_is_dense_of_two(backend):
    outs, lses = states(9, 2, 5, 40, empty=0.3)
    pair = palmette.merge_state(outs[:, 0], lses[:, 0], outs[:, 1].clone(), lses[:, 1].clone())
    dense = palmette.merge_states(outs, lses)
    assert torch.equal(dense[0], pair[0])
    assert torch.equal(dense[1], pair[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided_inputs(backend, dtype):
    outs, lses = states(5, 3, 4, 20, dtype=dtype)
    want = palmette.merge_states(outs, lses)
    head_major = outs.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3)
    strided_last = outs.transpose(2, 3).contiguous().transpose(2, 3)
    state_major = lses.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    padded = torch.full((5, 3, 4, 32), NAN, dtype=dtype)[..., :20].copy_(outs)
    shifted = torch.empty(outs.numel() + 1, dtype=dtype)[1:].view(outs.shape).copy_(outs)
    for o in (head_major, strided_last, padded, shifted):
        got = palmette.merge_states(o, state_major)
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])
    expanded = outs[:, :1].expand(-1, 3, -1, -1)
    got = palmette.merge_states(expanded, lses)
    assert torch.equal(got[0], palmette.merge_states(expanded.contiguous(), lses)[0])


def test_pair_of_views_with_different_layouts(backend):
    outs, lses = states(6, 2, 4, 20)
    want = palmette.merge_states(outs, lses)
    a, b = outs[:, 0], outs[:, 1].permute(1, 0, 2).contiguous().permute(1, 0, 2)
    got = palmette.merge_state(a, lses[:, 0], b, lses[:, 1].t().contiguous().t())
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


# ---------------------------------------------------------------------------------------------- edge cases


@pytest.mark.parametrize("shape", [(0, 2, 3, 8), (2, 0, 3, 8), (2, 2, 0, 8), (2, 2, 3, 0)], ids=str)
def test_no_elements(backend, shape):
    outs, lses = states(*shape)
    out, lse = palmette.merge_states(outs, lses)
    want_out, want_lse = reference.merge_states(outs, lses)
    assert_accurate(out, want_out)
    assert_accurate(lse, want_lse)


def test_all_empty_is_zero_and_minus_inf(backend):
    for junk in (0.0, NAN, INF, -INF):
        outs = torch.full((2, 3, 5, 20), junk)
        out, lse = palmette.merge_states(outs, torch.full((2, 3, 5), -INF))
        assert torch.equal(out, torch.zeros(2, 5, 20))
        assert torch.equal(lse, torch.full((2, 5), -INF))


@pytest.mark.parametrize("junk", [NAN, INF, -INF, 6.0e4], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_is_the_identity_whatever_its_out_holds(backend, dtype, junk):
    outs, lses = states(7, 5, 33, dtype=dtype)
    empty_out, empty_lse = torch.full_like(outs, junk), torch.full_like(lses, -INF)
    for args in ((outs, lses, empty_out, empty_lse), (empty_out, empty_lse, outs, lses)):
        out, lse = palmette.merge_state(*args)
        assert torch.equal(out, outs)
        assert torch.equal(lse, lses)


@pytest.mark.parametrize("bad", [INF, NAN], ids=str)
def test_bad_lse_propagates_as_nan_to_its_row_only(backend, bad):
    outs, lses = states(3, 4, 19, 24)
    lses[1, 2, 17] = bad
    out, lse = palmette.merge_states(outs, lses)
    wrong = torch.zeros(3, 19, dtype=torch.bool)
    wrong[1, 17] = True
    assert torch.equal(lse.isnan(), wrong)
    assert torch.equal(out.isnan().all(-1), wrong)
    assert torch.equal(out.isnan().any(-1), wrong)


@pytest.mark.parametrize("base", ["e", "2"])
@pytest.mark.parametrize("level", [-200.0, 200.0, 1e4, -1e4, 1e30, -1e30])
def test_extreme_lse(backend, level, base):
    """DeFT's reduction starts its maximum at 0 and returns 0/0 when all logits are near -200."""
    outs, lses = states(3, 4, 5, 24)
    lses = lses + level
    out, lse = palmette.merge_states(outs, lses, lse_base=base)
    want_out, want_lse = reference.merge_states(outs, lses, lse_base=base)
    plain_out, plain_lse = plain(outs, lses, base == "2")
    assert_accurate(out, want_out, plain_out)
    assert_accurate(lse, want_lse, plain_lse, atol=abs(level) * 1e-7 + 2e-6)


def test_far_apart_states_keep_the_larger(backend):
    outs = torch.randn(1, 2, 1, 16)
    for gap in (50.0, 104.0, 150.0, 1e4):
        out, lse = palmette.merge_states(outs, torch.tensor([[[0.0], [-gap]]]))
        assert torch.allclose(out[0, 0], outs[0, 0, 0], atol=1e-6)
        assert lse.item() == 0.0


@pytest.mark.parametrize("place", [0, 31, 32, 69])
def test_the_largest_may_be_at_any_place(backend, place):
    outs, lses = states(2, 70, 3, 8)
    lses[:, place] = 1e4
    out, lse = palmette.merge_states(outs, lses)
    assert torch.equal(out, outs[:, place])
    assert torch.equal(lse, lses[:, place])


def test_one_state_is_copied_exactly(backend):
    for dtype in DTYPES:
        outs, lses = states(5, 1, 6, 40, dtype=dtype)
        out, lse = palmette.merge_states(outs, lses)
        assert torch.equal(out, outs[:, 0])
        assert torch.equal(lse, lses[:, 0])


def test_base_2_is_base_e_rescaled(backend):
    outs, lses = states(5, 3, 6, 40, empty=0.2)
    out, lse = palmette.merge_states(outs, lses)
    out2, lse2 = palmette.merge_states(outs, lses / math.log(2.0), lse_base="2")
    assert torch.allclose(out, out2, atol=2e-6)
    assert torch.allclose(lse, lse2 * math.log(2.0), atol=2e-6)


def test_merging_parts_of_attention_equals_attention(backend):
    """The reason for all this: softmax attention over split keys, merged, is attention over all keys."""
    q, k, v = torch.randn(6, 4, 32), torch.randn(50, 4, 32), torch.randn(50, 4, 20)
    logits = torch.einsum("qhd,khd->qhk", q, k) / math.sqrt(32)
    want = torch.einsum("qhk,khd->qhd", logits.double().softmax(-1), v.double())
    parts = [(0, 17), (17, 18), (18, 50)]
    outs = torch.stack(
        [torch.einsum("qhk,khd->qhd", logits[..., a:b].softmax(-1), v[a:b]) for a, b in parts], 1
    )
    lses = torch.stack([logits[..., a:b].logsumexp(-1) for a, b in parts], 1)
    out, lse = palmette.merge_states(outs, lses)
    assert_accurate(out, want, atol=2e-6)
    assert_accurate(lse, logits.double().logsumexp(-1), atol=2e-6)


# ---------------------------------------------------------------------------------------------- invariants


def drawn(seed, n, s, h, d):
    generator = torch.Generator().manual_seed(seed)
    outs = torch.randn(n, s, h, d, generator=generator)
    lses = 10 * torch.randn(n, s, h, generator=generator)
    hidden = torch.rand(n, s, h, generator=generator) < 0.25
    return outs.masked_fill(hidden[..., None], NAN), lses.masked_fill(hidden, -INF)


SHAPES = {
    "seed": st.integers(0, 10_000),
    "n": st.integers(1, 4),
    "s": st.integers(1, 9),
    "h": st.integers(1, 18),
    "d": st.integers(1, 70),
}


@hypothesis.given(**SHAPES)
def test_commutative(seed, n, s, h, d):
    outs, lses = drawn(seed, n, s, h, d)
    order = torch.randperm(s, generator=torch.Generator().manual_seed(seed))
    out, lse = palmette.merge_states(outs, lses)
    out_p, lse_p = palmette.merge_states(outs[:, order], lses[:, order])
    assert_accurate(out_p, out.double(), atol=2e-6)
    assert_accurate(lse_p, lse.double(), atol=4e-6)
    pair = palmette.merge_state(outs[:, 0], lses[:, 0], outs[:, -1], lses[:, -1])
    swapped = palmette.merge_state(outs[:, -1], lses[:, -1], outs[:, 0], lses[:, 0])
    assert_accurate(swapped[0], pair[0].double(), atol=1e-6)
    assert torch.equal(swapped[1], pair[1])


@hypothesis.given(cut=st.integers(0, 9), **SHAPES)
def test_associative(seed, n, s, h, d, cut):
    outs, lses = drawn(seed, n, s, h, d)
    cut = min(cut, s)
    left = palmette.merge_states(outs[:, :cut], lses[:, :cut])
    right = palmette.merge_states(outs[:, cut:], lses[:, cut:])
    out, lse = palmette.merge_state(*left, *right)
    want_out, want_lse = palmette.merge_states(outs, lses)
    assert_accurate(out, want_out.double(), atol=3e-6)
    assert_accurate(lse, want_lse.double(), atol=6e-6)


@hypothesis.given(**SHAPES)
def test_out_is_a_convex_combination(seed, n, s, h, d):
    outs, lses = drawn(seed, n, s, h, d)
    out, lse = palmette.merge_states(outs, lses)
    some = ~torch.isneginf(lses).all(1)
    low = outs.nan_to_num(INF).amin(1)
    high = outs.nan_to_num(-INF).amax(1)
    slack = 1e-5
    assert ((out >= low - slack) & (out <= high + slack))[some].all()
    assert (lse >= lses.amax(1) - slack).all()
    assert (lse <= lses.amax(1) + math.log(s) + slack).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bit_identical_for_any_number_of_threads(backend, num_threads, dtype):
    counts = torch.randint(0, 40, (300,))
    outs, lses = states(int(counts.sum()), 8, 72, dtype=dtype, empty=0.1)
    indptr = torch.cat((torch.zeros(1, dtype=torch.long), counts.cumsum(0)))
    dout, dlse = torch.randn(300, 8, 72).to(dtype), torch.randn(300, 8)
    results = []
    for threads in (1, 2, 3, 2, 1):
        num_threads(threads)
        out, lse = merge_op(outs, lses, indptr, False)
        grads = torch.ops.palmette.merge_states_backward(dout, dlse, outs, lses, indptr, out, lse, False)
        results.append((out, lse, *grads))
    for result in results[1:]:
        for got, want in zip(result, results[0], strict=True):
            assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0))


# ---------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("base", ["e", "2"])
def test_gradcheck(scalar_backend, base):
    """float64 through the scalar kernels: the code that runs is the code that is checked."""
    outs = torch.randn(3, 4, 2, 5, dtype=torch.float64, requires_grad=True)
    lses = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda o, s: palmette.merge_states(o, s, lse_base=base), (outs, lses))
    indptr = torch.tensor([0, 3, 3, 4, 12])
    assert torch.autograd.gradcheck(
        lambda o, s: palmette.merge_states(o.flatten(0, 1), s.flatten(0, 1), indptr, lse_base=base)[:1],
        (outs, lses),
    )
    pair = [t[:, i].detach().requires_grad_() for i in (0, 2) for t in (outs, lses)]
    assert torch.autograd.gradcheck(lambda *args: palmette.merge_state(*args, lse_base=base), pair)


@pytest.mark.parametrize("base", ["e", "2"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [5, 64, 131])
def test_gradients_against_reference(backend, dtype, head_dim, base):
    outs, lses = states(6, 5, 9, head_dim, dtype=dtype, empty=0.25)
    lses[2] = -INF  # queries without any state
    dout, dlse = torch.randn(6, 9, head_dim).to(dtype), torch.randn(6, 9)

    def gradients(merge, outs, lses):
        outs, lses = outs.detach().requires_grad_(), lses.detach().requires_grad_()
        out, lse = merge(outs, lses)
        some = ~torch.isneginf(lse)
        loss = (out * dout.to(out.dtype)).sum() + (lse[some] * dlse.to(lse.dtype)[some]).sum()
        return torch.autograd.grad(loss, (outs, lses))

    got = gradients(lambda o, s: palmette.merge_states(o, s, lse_base=base), outs, lses)
    want = gradients(lambda o, s: reference.merge_states(o, s, lse_base=base), outs.double(), lses.double())
    rounding = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    assert_accurate(got[0], want[0], atol=rounding, name="douts")
    # out is rounded to the dtype before the backward reads it: sum_d |dout| |rounding of out| in 16 bits
    assert_accurate(got[1], want[1], atol=rounding * head_dim**0.5 * 3, name="dlses")
    empty = torch.isneginf(lses)
    assert (got[0][empty] == 0).all()
    assert (got[1][empty] == 0).all()


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_ragged_gradients_are_dense_ones(backend, index):
    outs, lses = states(6, 5, 3, 24, empty=0.25)
    dout, dlse = torch.randn(6, 3, 24), torch.randn(6, 3)
    counts = torch.tensor([5, 0, 1, 3, 5, 2])
    there = torch.arange(5) < counts[:, None]
    outs, lses = outs.masked_fill(~there[..., None, None], NAN), lses.masked_fill(~there[..., None], -INF)

    def gradients(outs, lses, *indptr):
        outs, lses = outs.detach().requires_grad_(), lses.detach().requires_grad_()
        out, lse = palmette.merge_states(outs, lses, *indptr)
        some = ~torch.isneginf(lse)
        return torch.autograd.grad((out * dout).sum() + (lse[some] * dlse[some]).sum(), (outs, lses))

    indptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(index)
    for dense, ragged in zip(gradients(outs, lses), gradients(outs[there], lses[there], indptr), strict=True):
        assert torch.equal(dense[there], ragged)


def test_gradient_through_out_or_lse_alone(backend):
    outs, lses = states(4, 3, 2, 16)
    for pick in (0, 1):
        grads = []
        for merge in (palmette.merge_states, reference.merge_states):
            o, s = outs.clone().requires_grad_(), lses.clone().requires_grad_()
            merge(o, s)[pick].sum().backward()
            grads.append((o.grad, s.grad))
        for got, want in zip(*grads, strict=True):
            if pick == 1 and want is None:
                want = torch.zeros_like(got)
            assert_accurate(got, want.double(), atol=3e-6)


# ---------------------------------------------------------------------------------------------- torch
# machinery


def merge_arguments(dtype=torch.float32, grad=True):
    outs, lses = states(4, 3, 2, 16, dtype=dtype)
    flat = (outs.flatten(0, 1), lses.flatten(0, 1), torch.tensor([0, 5, 5, 12], dtype=torch.int32))
    cases = [(outs, lses, None, False), (*flat, True)]
    for case in cases:
        for tensor in case[:2]:
            tensor.requires_grad_(grad)
    return cases


def pair_arguments(grad=True):
    outs, lses = states(4, 2, 2, 16)
    pair = [t[:, i].clone().requires_grad_(grad) for i in (0, 1) for t in (outs, lses)]
    return [(*pair, False), (*pair, True)]


def merge_backward_arguments():
    cases = []
    for args in merge_arguments(grad=False):
        out, lse = merge_op(*args)
        cases.append((torch.randn_like(out), torch.randn_like(lse), *args[:-1], out, lse, args[-1]))
    return cases


def pair_backward_arguments():
    cases = []
    for args in pair_arguments(grad=False):
        out, lse = pair_op(*args)
        cases.append((torch.randn_like(out), torch.randn_like(lse), *args[:-1], out, lse, args[-1]))
    return cases


# test_ops_contract.py runs torch.library.opcheck on these.
OPCHECK_CASES = {
    "merge_states": merge_arguments,
    "merge_states_backward": merge_backward_arguments,
    "merge_state": pair_arguments,
    "merge_state_backward": pair_backward_arguments,
}


def test_compile_fullgraph():
    def step(outs, lses, indptr):
        out, lse = palmette.merge_states(outs, lses)
        out, lse = palmette.merge_state(out * 2, lse + 1, out, lse, lse_base="2")
        ragged = palmette.merge_states(out, lse, indptr)
        return ragged[0].sum() + ragged[1].sum()

    outs, lses = (t.requires_grad_() for t in states(6, 3, 2, 16))
    indptr = torch.tensor([0, 1, 4, 6])
    want = torch.autograd.grad(step(outs, lses, indptr), (outs, lses))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(outs, lses, indptr), (outs, lses))
    for g, w in zip(got, want, strict=True):
        assert torch.allclose(g, w, atol=1e-6)


def test_compile_does_not_recompile_for_another_number_of_queries():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(palmette.merge_states, fullgraph=True, backend=counter, dynamic=True)
    for n in (7, 5, 9):  # all sizes differ: dynamic shapes start as equal where sizes are
        outs, lses = states(n, 3, 2, 16)
        assert torch.equal(compiled(outs, lses)[0], palmette.merge_states(outs, lses)[0])
    assert counter.frame_count == 1


# ---------------------------------------------------------------------------------------------- bad input

OUTS, LSES = torch.zeros(4, 3, 2, 8), torch.zeros(4, 3, 2)
FLAT_O, FLAT_L = torch.zeros(6, 2, 8), torch.zeros(6, 2)

BAD_STATES = [
    ("outs must be float32 or bfloat16 or float16 or float64, got int32", (OUTS.int(), LSES)),
    ("outs must be [N, S, H, Dv], got [6, 2, 8]", (FLAT_O, FLAT_L)),
    ("outs must be [nnz, H, Dv], got [4, 3, 2, 8]", (OUTS, LSES, torch.tensor([0, 4]))),
    ("lses must be float32, got bfloat16", (OUTS, LSES.bfloat16())),
    ("lses must be float64, got float32", (OUTS.double(), LSES)),
    ("lses must be [N, S, H] = [4, 3, 2], got [4, 2, 3]", (OUTS, LSES.transpose(1, 2))),
    ("lses must be [nnz, H] = [6, 2], got [5, 2]", (FLAT_O, FLAT_L[:5], torch.tensor([0, 6]))),
    ("lses must be on cpu, got meta", (OUTS, LSES.to("meta"))),
    ("indptr must be int32 or int64, got float32", (FLAT_O, FLAT_L, torch.tensor([0.0, 6.0]))),
    ("indptr must be [N + 1], got [0]", (FLAT_O, FLAT_L, torch.tensor([], dtype=torch.int32))),
    ("indptr must be [N + 1], got [1, 2]", (FLAT_O, FLAT_L, torch.tensor([[0, 6]]))),
    ("indptr must be on cpu, got meta", (FLAT_O, FLAT_L, torch.tensor([0, 6]).to("meta"))),
    ("indptr[0] must be 0, got 1", (FLAT_O, FLAT_L, torch.tensor([1, 6]))),
    ("indptr must be non-decreasing, got 3 after 5 at 2", (FLAT_O, FLAT_L, torch.tensor([0, 5, 3, 6]))),
    ("indptr[N] must be 6, the number of states, got 7", (FLAT_O, FLAT_L, torch.tensor([0, 7]))),
    (
        "indptr[N] must be 6, the number of states, got 5",
        (FLAT_O, FLAT_L, torch.tensor([0, 5], dtype=torch.int32)),
    ),
]


@pytest.mark.parametrize(("message", "args"), BAD_STATES, ids=[case[0] for case in BAD_STATES])
def test_bad_states(message, args):
    with pytest.raises(ValueError) as error:
        palmette.merge_states(*args)
    assert str(error.value) == message


A, LA = torch.zeros(4, 2, 8), torch.zeros(4, 2)
BAD_PAIRS = [
    ("out_a must be float32 or bfloat16 or float16 or float64, got int64", (A.long(), LA, A, LA)),
    ("out_a must be [N, H, Dv], got [2, 8]", (A[0], LA, A, LA)),
    ("out_b must be float32, got float16", (A, LA, A.half(), LA)),
    ("out_b must be [N, H, Dv] = [4, 2, 8], got [4, 2, 7]", (A, LA, A[..., :7], LA)),
    ("lse_a must be float32, got float64", (A, LA.double(), A, LA)),
    ("lse_a must be [N, H] = [4, 2], got [4]", (A, LA[:, 0], A, LA)),
    ("lse_b must be float32, got float16", (A, LA, A, LA.half())),
    ("lse_b must be [N, H] = [4, 2], got [2, 4]", (A, LA, A, LA.t())),
    ("out_b must be on cpu, got meta", (A, LA, A.to("meta"), LA)),
]


@pytest.mark.parametrize(("message", "args"), BAD_PAIRS, ids=[case[0] for case in BAD_PAIRS])
def test_bad_pair(message, args):
    with pytest.raises(ValueError) as error:
        palmette.merge_state(*args)
    assert str(error.value) == message


def test_bad_lse_base():
    for base in ("10", "E", 2, None):
        with pytest.raises(ValueError, match="lse_base must be 'e' or '2', got"):
            palmette.merge_states(OUTS, LSES, lse_base=base)
        with pytest.raises(ValueError, match="lse_base must be 'e' or '2', got"):
            palmette.merge_state(A, LA, A, LA, lse_base=base)


def test_float64_needs_the_scalar_backend(backend):
    if backend == "scalar":
        assert palmette.merge_states(OUTS.double(), LSES.double())[0].dtype == torch.float64
        return
    with pytest.raises(
        ValueError, match=r"outs must be .*float64 runs on the scalar backend only.*, got float64"
    ):
        palmette.merge_states(OUTS.double(), LSES.double())


RAW = [
    ("outs must be [N, S, H, Dv], got [6, 2, 8]", merge_op, (FLAT_O, FLAT_L, None, False)),
    (
        "outs must be float32 or bfloat16 or float16 or float64, got int64",
        merge_op,
        (OUTS.long(), LSES, None, False),
    ),
    ("lses must be float32, got float64", merge_op, (OUTS, LSES.double(), None, False)),
    ("lses must be [N, S, H] = [4, 3, 2], got [4, 3]", merge_op, (OUTS, LSES[..., 0], None, False)),
    ("indptr must be int32 or int64, got uint8", merge_op, (FLAT_O, FLAT_L, torch.zeros(2).byte(), False)),
    (
        "indptr must be non-decreasing, got -1 after 0 at 1",
        merge_op,
        (FLAT_O, FLAT_L, torch.tensor([0, -1]), False),
    ),
    ("out_b must be [N, H, Dv] = [4, 2, 8], got [3, 2, 8]", pair_op, (A, LA, A[:3], LA, False)),
    ("lse_b must be float32, got bfloat16", pair_op, (A, LA, A, LA.bfloat16(), False)),
]


@pytest.mark.parametrize(("message", "op", "args"), RAW, ids=[case[0] for case in RAW])
def test_raw_operator_checks_too(message, op, args):
    with pytest.raises(RuntimeError) as error:
        op(*args)
    assert str(error.value) == message


def test_raw_backward_checks_too():
    backward = torch.ops.palmette.merge_states_backward
    out, lse = torch.zeros(4, 2, 8), torch.zeros(4, 2)
    with pytest.raises(RuntimeError, match=r"dout must be \[N, H, Dv\] = \[4, 2, 8\], got \[4, 2, 7\]"):
        backward(out[..., :7], lse, OUTS, LSES, None, out, lse, False)
    with pytest.raises(RuntimeError, match="dlse must be float32, got float64"):
        backward(out, lse.double(), OUTS, LSES, None, out, lse, False)


def test_unknown_backend():
    with (
        pytest.raises(ValueError, match=r"backend must be one of .*scalar.*, got 'sse9'"),
        use_backend("sse9"),
    ):
        pass
