# SPDX-License-Identifier: Apache-2.0
"""tree_attention, forward and backward, against float64 attention under the path mask."""

from __future__ import annotations

import copy
import pickle
import random
from typing import NamedTuple

import palmette
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from palmette import testing
from palmette.reference.attention import masked_attention
from palmette.reference.tree import Tree as ReferenceTree
from palmette.testing import assert_accurate
from strategies import forests, query_pairs

SPLITS = ("auto", "flatten", "node", "node_chunk", "sequence")
IRREGULAR = ([-1, 0, 0, 1, 1, 2, 2, 2, 5, -1, 9], [70, 5, 33, 1, 0, 17, 64, 2, 49, 3, 26])


class Case(NamedTuple):
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    plan: palmette.TreeAttentionPlan
    visible: torch.Tensor  # [Nq, N]
    rows: torch.Tensor  # [N]: the row of k of each depth-first token


def path_mask(parent, num_tokens, queries, window=None):
    tree = ReferenceTree(parent, num_tokens)
    mask = tree.path_mask()
    depth = mask.sum(dim=1) - 1
    if window is not None:
        mask &= depth[:, None] - depth[None, :] < window
    return mask[torch.tensor(tree.query_tokens(queries), dtype=torch.int64)]


def make_case(
    parent,
    num_tokens,
    queries="leaves",
    *,
    slots=None,
    q_heads=4,
    kv_heads=2,
    head_dim=32,
    v_head_dim=None,
    dtype=torch.float32,
    split="auto",
    block_len=None,
    window=None,
    head_major=False,
    spread=1.0,
):
    tree = palmette.Tree(parent, num_tokens, slots)
    plan = palmette.plan_tree_attention(
        tree,
        queries,
        num_q_heads=q_heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        split=split,
        block_len=block_len,
    )
    visible = path_mask(parent, num_tokens, queries, window)
    total = sum(num_tokens)
    pool = total if slots is None else max(slots, default=0) + 3
    v_head_dim = head_dim if v_head_dim is None else v_head_dim
    q = (torch.randn(len(visible), q_heads, head_dim) * spread).to(dtype)
    k, v = (torch.randn(pool, kv_heads, d).to(dtype) for d in (head_dim, v_head_dim))
    if head_major:
        k, v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (k, v))
    rows = torch.arange(total) if slots is None else torch.tensor(slots, dtype=torch.int64)
    return Case(q, k, v, plan, visible, rows)


def expected(case, dtype=torch.float64, **options):
    if "sinks" in options:
        options["sinks"] = options["sinks"].to(dtype)
    return masked_attention(
        case.q.to(dtype), case.k[case.rows].to(dtype), case.v[case.rows].to(dtype), case.visible, **options
    )


def check(case, *, window=None, **options):
    out, lse = palmette.tree_attention(
        case.q, case.k, case.v, case.plan, window=window, return_lse=True, **options
    )
    want_out, want_lse = expected(case, **options)
    base_out, base_lse = expected(case, case.q.dtype, **options)
    assert out.dtype == case.q.dtype
    assert lse.dtype == torch.float32
    assert_accurate(out, want_out, base_out, atol=2e-6, name="out")
    largest = want_lse[torch.isfinite(want_lse)].abs().max().item() if torch.isfinite(want_lse).any() else 0.0
    # the state is kept in units of log2: two more roundings of 2^-24 than in PyTorch; measured 1.0e-7
    assert_accurate(lse, want_lse, base_lse, atol=2e-6 + 2.4e-7 * largest, name="lse")


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("queries", ["leaves", "tokens", ([5, 0, 5, 10, 6, 5], [16, 69, 0, 25, 3, 16])])
def test_equals_the_reference(backend, split, queries):
    check(make_case(*IRREGULAR, queries, split=split, block_len=48))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("q_heads", "kv_heads"), [(1, 1), (3, 3), (4, 2), (6, 2), (5, 1), (16, 2), (32, 1)])
def test_heads_and_dtypes(backend, dtype, q_heads, kv_heads):
    check(make_case(*IRREGULAR, q_heads=q_heads, kv_heads=kv_heads, head_dim=64, dtype=dtype))


@pytest.mark.parametrize(
    ("head_dim", "v_head_dim"),
    [
        (1, 1),
        (2, 5),
        (8, 8),
        (20, 20),
        (33, 65),
        (64, 64),
        (80, 96),
        (96, 40),
        (128, 128),
        (192, 128),
        (256, 256),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_dims(backend, head_dim, v_head_dim, dtype):
    check(make_case(*IRREGULAR, head_dim=head_dim, v_head_dim=v_head_dim, dtype=dtype))
    check(
        make_case(
            *IRREGULAR, "tokens", head_dim=head_dim, v_head_dim=v_head_dim, dtype=dtype, head_major=True
        )
    )


@pytest.mark.parametrize("leaves", [1, 2, 3, 4, 5, 31, 32, 33, 63, 64, 65, 257])
@pytest.mark.parametrize("group", [1, 4])
def test_stars(backend, leaves, group):
    check(make_case([-1] + [0] * leaves, [130] + [7] * leaves, q_heads=2 * group, kv_heads=2))


def test_chain_of_depth_1000(backend):
    check(make_case([-1, *range(999)], [1] * 1000))
    check(make_case([-1, *range(999)], [1] * 1000, "tokens", head_dim=8))


@pytest.mark.parametrize("page", [1, 16, 24, 64])
@pytest.mark.parametrize("split", ["auto", "flatten"])
def test_paged_pools(backend, page, split):
    parent, num_tokens = IRREGULAR
    total = sum(num_tokens)
    pages = list(range(-(-total // page) + 2))
    random.Random(page).shuffle(pages)
    slots = [pages[i // page] * page + i % page for i in range(total)]
    check(make_case(parent, num_tokens, slots=slots, split=split))
    check(make_case(parent, num_tokens, "tokens", slots=slots, split=split, dtype=torch.bfloat16))


def test_two_tokens_may_share_a_slot(backend):
    check(make_case([-1, 0, 0], [4, 3, 3], slots=[0, 1, 2, 3, 4, 5, 6, 4, 5, 7]))


@pytest.mark.parametrize("window", [1, 2, 5, 48, 1000])
@pytest.mark.parametrize("queries", ["leaves", "tokens"])
@pytest.mark.parametrize("split", ["auto", "flatten", "sequence"])
def test_windows_follow_the_path(backend, window, queries, split):
    check(make_case(*IRREGULAR, queries, window=window, split=split), window=window)


@pytest.mark.parametrize("spread", [1.0, 0.01, 30.0])
def test_softcap_and_sinks(backend, spread):
    case = make_case(*IRREGULAR, q_heads=6, kv_heads=3, spread=spread)
    check(case, softcap=15.0)
    check(case, sinks=torch.randn(6) * 3)
    check(case, softcap=5.0, sinks=torch.tensor([-90.0, 90.0, 0.0, 1.0, -1e4, 2.0]), scale=0.3)


def test_partial_states(backend):
    """Queries in an order that is not that of positions, one of them with a single partial state."""
    parent, num_tokens = [-1, 0, 0, -1, 3], [1500, 4, 4, 900, 4]
    queries = ([4, 2, 1, 0, 3], [2, 3, 1, 100, 899])
    case = make_case(parent, num_tokens, queries)
    plan = palmette.plan_tree_attention(
        case.plan.tree, queries, num_q_heads=4, num_kv_heads=2, head_dim=32, target="gpu"
    )
    merge_ptr = plan.tensors[5][: len(case.q) + 1]
    assert merge_ptr.diff().tolist() == [1, 3, 3, 2, 2]
    case = case._replace(plan=plan)
    check(case)
    check(case, softcap=5.0, sinks=torch.tensor([-90.0, 2.0, 0.0, 5.0]))


def test_tasks_of_one_kv_head(backend):
    """The planner makes tasks of all KV heads; a plan may have some of one."""
    case = make_case(*IRREGULAR, split="flatten", block_len=48)
    *tables, task, merge_ptr, merge_row, counts = case.plan.tensors
    tasks = task[: counts[3]].repeat_interleave(2, dim=0)
    tasks[:, 5] = torch.arange(len(tasks)) % 2
    counts = counts.clone()
    counts[3] = len(tasks)
    results = []
    for plan in (case.plan.tensors, (*tables, tasks, merge_ptr, merge_row, counts)):
        inputs = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]
        out, lse = torch.ops.palmette.attend(*inputs, *plan, None, 0.2, 0.0, 0)
        torch.autograd.backward([out, lse], [torch.cos(out.detach()), torch.sin(lse.detach())])
        results.append((out, lse, *(x.grad for x in inputs)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)


def test_block_len_around_the_number_of_tokens(backend):
    parent, num_tokens = IRREGULAR
    for block_len in (1, 7, sum(num_tokens) - 1, sum(num_tokens), sum(num_tokens) + 1):
        for split in ("flatten", "node_chunk"):
            check(make_case(parent, num_tokens, split=split, block_len=block_len))


# ---- numbers


@pytest.mark.parametrize("level", [-200.0, 1e4, -1e4])
def test_logits_far_from_zero(backend, level):
    case = make_case(*IRREGULAR, q_heads=2, kv_heads=1)
    case.k[..., 0] = 1.0
    case.q[..., 0] = level * 32**0.5
    check(case)


def test_hidden_nan_does_not_leak(backend):
    case = make_case([-1, 0, 0, 0], [20, 6, 6, 6], ([1, 3], [5, 2]))
    unseen = ~case.visible.any(dim=0)
    case.k[unseen] = torch.nan
    case.v[unseen] = torch.inf
    out, lse = palmette.tree_attention(case.q, case.k, case.v, case.plan, return_lse=True)
    assert torch.isfinite(out).all()
    assert torch.isfinite(lse).all()


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_that_one_query_sees_stays_with_it(backend, split, value):
    case = make_case([-1, 0, 0, 0, 2], [20, 6, 6, 6, 3], "tokens", split=split, block_len=64, head_dim=16)
    case.v[22] = value  # seen by the tokens of node 1 from its third on
    out = palmette.tree_attention(case.q, case.k, case.v, case.plan)
    sees = case.visible[:, 22]
    assert torch.isfinite(out[~sees]).all()
    assert not torch.isfinite(out[sees]).any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_single_hidden_nan_does_not_leak(backend, value):
    case = make_case([-1, 0, 0, 0], [20, 6, 6, 6], "tokens", head_dim=16)
    case.v[22, :, 5] = value  # seen by the tokens of node 1 from its third on
    out = palmette.tree_attention(case.q, case.k, case.v, case.plan)
    reached = torch.zeros_like(out, dtype=torch.bool)
    reached[case.visible[:, 22], :, 5] = True
    assert torch.equal(~torch.isfinite(out), reached)


def test_nan_logit_reaches_its_own_query_only(backend):
    case = make_case([-1, 0, 0], [50, 6, 6])
    case.q[1, 2, 3] = torch.nan
    out, lse = palmette.tree_attention(case.q, case.k, case.v, case.plan, return_lse=True)
    bad = torch.zeros(2, 4, dtype=torch.bool)
    bad[1, 2] = True
    assert torch.equal(torch.isnan(lse), bad)
    assert torch.equal(torch.isnan(out).all(-1), bad)
    assert torch.equal(torch.isnan(out).any(-1), bad)


# ---- invariance


def run(case, **options):
    return palmette.tree_attention(case.q, case.k, case.v, case.plan, return_lse=True, **options)


@pytest.mark.parametrize("queries", ["leaves", "tokens"])
@pytest.mark.parametrize(("q_heads", "kv_heads", "dim"), [(32, 8, 64), (3, 1, 64), (4, 4, 24)])
def test_bit_identical_for_any_number_of_threads(backend, num_threads, queries, q_heads, kv_heads, dim):
    parent = [-1] + [0] * 9 + [3] * 5
    num_tokens = [3000] + [40] * 14 if queries == "leaves" else [100] + [12] * 14
    case = make_case(parent, num_tokens, queries, q_heads=q_heads, kv_heads=kv_heads, head_dim=dim)
    if queries == "leaves" and kv_heads == 1:
        assert case.plan.io.partial_states > 0  # the merge of partial states is among what is compared
    results = []
    for threads in (1, 2, 3, 1):
        num_threads(threads)
        inputs = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]
        out, lse = palmette.tree_attention(*inputs, case.plan, return_lse=True)
        torch.autograd.backward([out, lse], [torch.cos(out.detach()), torch.sin(lse.detach())])
        results.append((out, lse, *(x.grad for x in inputs)))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_a_chain_is_causal_attention(backend):
    case = make_case([-1, 0, 1], [13, 50, 7], "tokens", q_heads=4, kv_heads=4, head_dim=64)
    out, _ = run(case)
    q, k, v = (x.transpose(0, 1)[None] for x in (case.q, case.k, case.v))
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(out, want[0].transpose(0, 1), atol=2e-6, rtol=1e-5)


def test_order_of_siblings_does_not_matter(backend):
    one = make_case([-1, 0, 0, 0], [30, 4, 5, 6])
    order = [0, 3, 1, 2]  # node i of the other tree is node order[i] of this one
    starts = {0: 0, 1: 30, 2: 34, 3: 39}
    rows = torch.cat([torch.arange(starts[n], starts[n] + [30, 4, 5, 6][n]) for n in order])
    other_tree = palmette.Tree([-1, 0, 0, 0], [30, 6, 4, 5])
    plan = palmette.plan_tree_attention(other_tree, num_q_heads=4, num_kv_heads=2, head_dim=32)
    out = palmette.tree_attention(one.q[[2, 0, 1]], one.k[rows], one.v[rows], plan)
    torch.testing.assert_close(out, run(one)[0][[2, 0, 1]], atol=2e-6, rtol=1e-5)


@given(
    st.data(),
    st.sampled_from(SPLITS),
    st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    st.sampled_from([None, 1, 4]),
)
def test_any_forest(data, split, heads, window):
    forest = data.draw(forests(min_root_tokens=1))
    queries = data.draw(st.one_of(st.sampled_from(["leaves", "tokens"]), query_pairs(forest)))
    block_len = data.draw(st.integers(1, 40))
    case = make_case(
        forest.parent,
        forest.num_tokens,
        queries,
        slots=forest.slots,
        q_heads=heads[0],
        kv_heads=heads[1],
        head_dim=8,
        split=split,
        block_len=block_len,
        window=window,
    )
    check(case, window=window)


# ---- gradients


def gradients(function, inputs, douts):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outs = function(*leaves)
    torch.autograd.backward(outs, [d.to(o.dtype) for d, o in zip(douts, outs, strict=True)])
    return [x.grad for x in leaves]


def check_gradients(case, *, sinks=None, window=None, **options):
    inputs = [case.q, case.k, case.v] + ([] if sinks is None else [sinks])
    douts = [torch.randn(*case.q.shape[:2], case.v.shape[2]), torch.randn(case.q.shape[:2])]

    def ours(q, k, v, *sinks):
        extra = {"sinks": sinks[0]} if sinks else {}
        return palmette.tree_attention(q, k, v, case.plan, window=window, return_lse=True, **options, **extra)

    def reference(q, k, v, *sinks):
        extra = {"sinks": sinks[0]} if sinks else {}
        return masked_attention(q, k[case.rows], v[case.rows], case.visible, **options, **extra)

    got = gradients(ours, inputs, douts)
    want = gradients(reference, [x.double() for x in inputs], douts)
    base = gradients(reference, inputs, douts)
    for name, a, b, c in zip(("dq", "dk", "dv", "dsinks"), got, want, base, strict=False):
        # a bf16 result is rounded by up to 2^-9 of it; plain PyTorch's own error may be smaller by luck
        atol = 1e-5 if case.q.dtype == torch.float32 else 2e-2
        assert_accurate(a, b, c, factor=3.0, atol=atol, name=name)


@pytest.mark.parametrize("queries", ["leaves", "tokens", ([5, 0, 5, 10], [16, 69, 0, 25])])
@pytest.mark.parametrize("options", [{}, {"softcap": 4.0}, {"window": 9}, {"sinks": True, "scale": 0.2}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("split", ["auto", "sequence"])
def test_gradients_equal_the_reference(backend, queries, options, dtype, split):
    options = dict(options)
    parent, num_tokens = IRREGULAR
    case = make_case(
        parent,
        num_tokens,
        queries,
        slots=list(range(sum(num_tokens)))[::-1],
        q_heads=6,
        kv_heads=2,
        window=options.get("window"),
        dtype=dtype,
        split=split,
        v_head_dim=24,
    )
    if options.pop("sinks", False):
        options["sinks"] = torch.randn(6)
    check_gradients(case, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("head_dim", "v_head_dim"), [(33, 65), (96, 40), (136, 200), (256, 24)])
def test_gradients_of_head_dims(backend, head_dim, v_head_dim, dtype):
    """GPU kernels compute 64 or 128 columns of a gradient at a time."""
    check_gradients(make_case(*IRREGULAR, head_dim=head_dim, v_head_dim=v_head_dim, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_where_a_node_ends_within_rows(backend, dtype):
    """Row 127 is the last of whole tiles of rows, and the first that does not see the second node."""
    options = {"q_heads": 1, "kv_heads": 1, "split": "flatten", "block_len": 500, "dtype": dtype}
    check_gradients(make_case([-1, 0, 0], [10, 117, 20], "tokens", **options))


def test_gradients_of_more_than_128_tasks(backend):
    """As many are looked through at a time on a GPU for those that hold a key."""
    case = make_case([-1] + [0] * 140, [3] + [1] * 140, q_heads=64, kv_heads=1, head_dim=8)
    plan = palmette.plan_tree_attention(
        case.plan.tree, num_q_heads=64, num_kv_heads=1, head_dim=8, target="gpu"
    )
    assert int(plan.counts[3]) > 128
    check_gradients(case._replace(plan=plan))


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"window": 4}, {"sinks": True}])
@pytest.mark.parametrize("queries", ["leaves", "tokens", ([2, 0, 1, 2], [1, 3, 0, 0])])
def test_gradcheck(scalar_backend, options, queries):
    options = dict(options)
    tree = palmette.Tree([-1, 0, 0, 1], [5, 3, 2, 1], slots=[3, 1, 0, 2, 4, 10, 9, 8, 7, 6, 5])
    plan = palmette.plan_tree_attention(
        tree, queries, num_q_heads=4, num_kv_heads=2, head_dim=3, split="flatten", block_len=4
    )
    shapes = [(plan.num_queries, 4, 3), (12, 2, 3), (12, 2, 2)]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    if options.pop("sinks", False):
        inputs.append(torch.randn(4, dtype=torch.float64, requires_grad=True))

    def function(q, k, v, *sinks):
        extra = {"sinks": sinks[0]} if sinks else {}
        return palmette.tree_attention(q, k, v, plan, return_lse=True, **options, **extra)

    assert torch.autograd.gradcheck(function, inputs)


def test_gradient_of_lse_alone_and_of_out_alone(backend):
    case = make_case(*IRREGULAR)
    q = case.q.clone().requires_grad_()
    out, lse = palmette.tree_attention(q, case.k, case.v, case.plan, return_lse=True)
    (both,) = torch.autograd.grad(out.sum() + lse.sum(), q, retain_graph=True)
    (from_out,) = torch.autograd.grad(out.sum(), q, retain_graph=True)
    (from_lse,) = torch.autograd.grad(lse.sum(), q)
    torch.testing.assert_close(from_out + from_lse, both)


def test_a_query_that_sees_nothing(backend):
    """No tree has one, but other plans may: here the only item shows nothing to its query."""
    slots, query = torch.arange(4, dtype=torch.int32), torch.tensor([[0], [0], [0], [0]], dtype=torch.int32)
    segment = torch.tensor([[0, 4, 5, 1, 9, 5]], dtype=torch.int32)  # lo 5 > position 0
    item, task = (
        torch.tensor([[0, 1, 0, 1]], dtype=torch.int32),
        torch.tensor([[0, 1, 0, 1, -1, -1]], dtype=torch.int32),
    )
    counts = torch.tensor([1, 1, 1, 1] + [0] * 12, dtype=torch.int32)
    merge_ptr, merge_row = torch.zeros(2, dtype=torch.int32), torch.zeros(0, dtype=torch.int32)
    plan = (slots, query, segment, item, task, merge_ptr, merge_row, counts)
    q, k, v = (torch.randn(n, 2, 8, requires_grad=True) for n in (1, 4, 4))
    out, lse = torch.ops.palmette.attend(q, k, v, *plan, None, 1.0, 0.0, 0)
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.isneginf(lse).all()
    for gradient in torch.autograd.grad(out.sum(), (q, k, v)):
        assert torch.equal(gradient, torch.zeros_like(gradient))
    out, lse = torch.ops.palmette.attend(q, k, v, *plan, torch.tensor([1.0, -2.0]), 1.0, 0.0, 0)
    assert torch.equal(out, torch.zeros_like(out))
    torch.testing.assert_close(lse, torch.tensor([[1.0, -2.0]]))


def test_an_item_that_shows_nothing_before_one_that_does(backend):
    """Both have keys of one tile, with one query between them."""
    slots, query = torch.arange(8, dtype=torch.int32), torch.zeros(4, 1, dtype=torch.int32)
    segment = torch.tensor([[0, 4, 5, 1, 9, 5], [4, 4, 0, 0, 9, 0]], dtype=torch.int32)
    item = torch.tensor([[0, 1, 0, 1], [1, 2, 0, 1]], dtype=torch.int32)
    task = torch.tensor([[0, 2, 0, 1, -1, -1]], dtype=torch.int32)
    counts = torch.tensor([1, 2, 2, 1] + [0] * 12, dtype=torch.int32)
    merge_ptr, merge_row = torch.zeros(2, dtype=torch.int32), torch.zeros(0, dtype=torch.int32)
    plan = (slots, query, segment, item, task, merge_ptr, merge_row, counts)
    visible = torch.tensor([[False] * 4 + [True] * 4])
    q, k, v = (torch.randn(n, 2, 8, requires_grad=True) for n in (1, 8, 8))
    out, _ = torch.ops.palmette.attend(q, k, v, *plan, None, 1.0, 0.0, 0)
    want, _ = masked_attention(q, k, v, visible, scale=1.0)
    torch.testing.assert_close(out, want)
    dout = torch.randn_like(out)
    got = torch.autograd.grad(out, (q, k, v), dout)
    torch.testing.assert_close(got, torch.autograd.grad(want, (q, k, v), dout))


# ---- the function


def test_out(backend):
    case = make_case(*IRREGULAR)
    want, want_lse = run(case)
    buffer = torch.full((*case.q.shape[:2], 64), torch.nan)[..., ::2].contiguous()
    out, lse = run(case, out=buffer)
    assert out is buffer
    assert torch.equal(out, want)
    assert torch.equal(lse, want_lse)


def test_strides_as_they_come(backend):
    case = make_case(*IRREGULAR, head_dim=32)
    want, _ = run(case)
    wide = torch.randn(len(case.k), 2, 3, 32)
    wide[:, :, 1], wide[:, :, 2] = case.k, case.v
    q = torch.randn(*case.q.shape[:2], 64)
    q[..., 32:] = case.q
    out = palmette.tree_attention(q[..., 32:], wide[:, :, 1], wide[:, :, 2], case.plan)
    assert torch.equal(out, want)
    transposed = case.q.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(palmette.tree_attention(transposed, case.k, case.v, case.plan), want)
    shifted = [torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for x in (case.q, case.k, case.v)]
    assert torch.equal(palmette.tree_attention(*shifted, case.plan), want)


def test_a_plan_that_grows(backend):
    """One plan over a decoding loop: every step equals a fresh plan."""
    pool = 400
    free = list(range(pool))
    random.Random(1).shuffle(free)
    tree = palmette.Tree([-1, 0, 0], [40, 1, 1], [free.pop() for _ in range(42)])
    options = {"num_q_heads": 6, "num_kv_heads": 2, "head_dim": 16}
    plan = palmette.plan_tree_attention(tree, **options)
    k, v = torch.randn(pool, 2, 16), torch.randn(pool, 2, 16)
    for step in range(60):
        leaves = tree.leaves.tolist()
        if step % 7 == 3:
            children = tree.branch(leaves[step % len(leaves)], 2).tolist()
            tree.append(children, [1, 1], [free.pop(), free.pop()])
        elif step % 11 == 10 and len(leaves) > 2:
            free += tree.prune(leaves[0]).tolist()
        else:
            tree.append(leaves, [1] * len(leaves), [free.pop() for _ in leaves])
        plan.update()
        q = torch.randn(plan.num_queries, 6, 16)
        fresh = palmette.plan_tree_attention(tree, **options)
        out = palmette.tree_attention(q, k, v, plan)
        assert torch.equal(out, palmette.tree_attention(q, k, v, fresh))


# ---- bad input


def good():
    return make_case([-1, 0, 0], [6, 2, 2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: {"q": c.q.double()}, "k must be float64, got float32"),
        (lambda c: {"q": c.q.long()}, "q must be float32 or bfloat16 or float16 or float64, got int64"),
        (lambda c: {"v": c.v.half()}, "v must be float32, got float16"),
        (lambda c: {"q": c.q[0]}, "q must be \\[Nq, Hq, D\\], got \\[4, 32\\]"),
        (lambda c: {"k": c.k[..., :8]}, "head_dim of k must be q's 32, got 8"),
        (
            lambda c: {"v": c.v[:5]},
            "v must be \\[slots, Hk, Dv\\] = \\[10, 2, Dv\\] like k, got \\[5, 2, 32\\]",
        ),
        (lambda c: {"v": c.v[..., :0]}, "head_dim of v must be positive, got 0"),
        (lambda c: {"q": c.q[:, :3]}, "heads of q must be a positive multiple of k's 2, got 3"),
        (lambda c: {"q": c.q.repeat(1, 2, 1)}, "heads of q must be the plan's 4, got 8"),
        (
            lambda c: {"q": c.q[:1]},
            "q must be \\[2, Hq, D\\], one row per query of the plan, got \\[1, 4, 32\\]",
        ),
        (lambda c: {"k": c.k[:9], "v": c.v[:9]}, "slots must be in \\[0, 9\\) \\(the rows of k\\), got 9"),
        (lambda c: {"softcap": -1.0}, "softcap must be a number in \\[0, 1e\\+30\\], got -1.0"),
        (lambda c: {"softcap": float("inf")}, "softcap must be a number in .* got inf"),
        (lambda c: {"scale": float("nan")}, "scale must be a number in .* got nan"),
        (lambda c: {"scale": "1"}, "scale must be a number in .* got '1'"),
        (lambda c: {"window": 0}, "window must be an integer of at least 1, got 0"),
        (lambda c: {"window": 2.5}, "window must be an integer of at least 1, got 2.5"),
        (lambda c: {"window": True}, "window must be an integer of at least 1, got True"),
        (lambda c: {"plan": None}, "plan must be a TreeAttentionPlan, got NoneType"),
        (lambda c: {"q": [1.0]}, "q must be a tensor, got list"),
        (lambda c: {"sinks": torch.zeros(3)}, "sinks must be \\[Hq\\] = \\[4\\], got \\[3\\]"),
        (lambda c: {"sinks": torch.zeros(4).half()}, "sinks must be float32, got float16"),
        (
            lambda c: {"out": torch.empty(2, 4, 8)},
            "out must be \\[Nq, Hq, Dv\\] = \\[2, 4, 32\\], got \\[2, 4, 8\\]",
        ),
        (lambda c: {"out": torch.empty(2, 4, 32).half()}, "out must be float32, got float16"),
        (
            lambda c: {"out": torch.empty(1, 4, 32).expand(2, 4, 32)},
            "out must have memory of its own for every element, got strides \\(0, 32, 1\\)",
        ),
        (
            lambda c: {"q": c.q.clone().requires_grad_(), "out": torch.empty(2, 4, 32)},
            "out must be None where gradients are wanted",
        ),
        (lambda c: {"k": c.k.to("meta")}, "k must be on cpu, got meta"),
    ],
)
def test_bad_arguments(change, message):
    case = good()
    arguments = {"q": case.q, "k": case.k, "v": case.v, "plan": case.plan} | change(case)
    with pytest.raises(ValueError, match=message):
        palmette.tree_attention(**arguments)


def test_a_window_longer_than_any_path():
    case = good()
    assert torch.equal(run(case, window=2**32 + 3)[0], run(case)[0])


def test_logits_far_below_zero(backend):
    case = make_case([-1], [6])  # one tile, so that all logits are equal, whatever their rounding
    q, k = torch.full_like(case.q, -1e15), torch.full_like(case.k, 1e15)
    check(case._replace(q=q, k=k))


def test_a_plan_updated_before_backward_is_noticed():
    case = good()
    q = case.q.clone().requires_grad_()
    out = palmette.tree_attention(q, case.k, case.v, case.plan)
    case.plan.tree.append([1], [1])
    case.plan.update()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_out_is_a_new_version():
    case = good()
    buffer = torch.zeros(2, 4, 32)
    weight = torch.ones(2, 4, 32, requires_grad=True)
    product = (weight * buffer).sum()
    palmette.tree_attention(case.q, case.k, case.v, case.plan, out=buffer)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_no_second_derivative():
    case = good()
    q = case.q.clone().requires_grad_()
    out = palmette.tree_attention(q, case.k, case.v, case.plan)
    (grad,) = torch.autograd.grad(out.pow(2).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_of_a_plan_know_when_they_are_stale(clone):
    case = good()
    plan = clone(case.plan)
    assert torch.equal(palmette.tree_attention(case.q, case.k, case.v, plan), run(case)[0])
    plan.tree.append([1], [1])
    assert plan.tree.version == case.plan.tree.version + 1
    with pytest.raises(ValueError, match="plan must be of its tree's version"):
        palmette.tree_attention(case.q, case.k, case.v, plan)


def test_a_stale_plan():
    case = good()
    case.plan.tree.append([1], [1])
    with pytest.raises(ValueError, match=r"plan must be of its tree's version .*plan\.update"):
        run(case)


def test_float64_needs_the_scalar_body():
    case = good()
    best = testing.backends()[0]
    if best == "scalar":
        pytest.skip("this machine has the scalar body only")
    with testing.backend(best), pytest.raises(ValueError, match="float64 runs on the scalar backend only"):
        palmette.tree_attention(case.q.double(), case.k.double(), case.v.double(), case.plan)


@pytest.mark.parametrize(
    ("index", "row", "value", "message"),
    [
        (0, (3,), 99, "slots must be in"),
        (0, (3,), -1, "slots must be in"),
        (1, (0, 0), 7, "query must be an index into q's 2 rows, got 7"),
        (2, (0, 1), 10**6, "segment must be within"),
        (3, (0, 1), 10**6, "item must be within"),
        (3, (0, 3), 10**6, "item must be within"),
        (4, (0, 3), 10**6, "task must be within"),
        (4, (0, 5), 2, "task must be of a KV head below 2, got 2"),
        (7, (1,), 10**6, "counts must be within the capacity of segment"),
    ],
)
def test_the_operator_checks_the_plan(index, row, value, message):
    """Plans are tensors that anyone can build: no index may lead a kernel out of its arrays."""
    case = good()
    plan = [t.clone() for t in case.plan.tensors]
    plan[index][row] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.palmette.attend(case.q, case.k, case.v, *plan, None, 1.0, 0.0, 0)


# ---- operators and compilation


def _attend_cases():
    cases = []
    for queries, dtype in (("leaves", torch.float32), ("tokens", torch.float64), ("leaves", torch.bfloat16)):
        case = make_case([-1, 0, 0], [6, 2, 3], queries, dtype=dtype, head_dim=8)
        sinks = torch.randn(4, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        q, k, v = (x.clone().requires_grad_() for x in (case.q, case.k, case.v))
        cases.append((q, k, v, *case.plan.tensors, sinks.requires_grad_(), 0.3, 0.0, 0))
        cases.append((q, k, v, *case.plan.tensors, None, 0.3, 2.0, 3))
    return cases


def _attend_out_cases():
    case = make_case([-1, 0, 0], [6, 2, 3], head_dim=8)
    out, lse = torch.empty_like(case.q), torch.empty(case.q.shape[:2])
    return [(case.q, case.k, case.v, *case.plan.tensors, None, 0.3, 0.0, 0, out, lse)]


def _attend_backward_cases():
    case = make_case([-1, 0, 0], [6, 2, 3], head_dim=8)
    out, lse = run(case, scale=0.3)
    tail = (case.q, case.k, case.v, out, lse, *case.plan.tensors)
    return [
        (torch.randn_like(out), torch.randn_like(lse), *tail, None, 0.3, 0.0, 0),
        (torch.randn_like(out), None, *tail, torch.zeros(4), 0.3, 0.0, 0),
    ]


OPCHECK_CASES = {
    "attend": _attend_cases,
    "attend_out": _attend_out_cases,
    "attend_backward": _attend_backward_cases,
}


def test_compile_fullgraph():
    case = make_case(*IRREGULAR)
    compiled = torch.compile(palmette.tree_attention, fullgraph=True, backend="aot_eager")
    inputs = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]
    out, lse = compiled(*inputs, case.plan, return_lse=True)
    want, want_lse = run(case)
    assert torch.equal(out, want)
    assert torch.equal(lse, want_lse)
    got = torch.autograd.grad(out.sum(), inputs)
    plain = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]
    wanted = torch.autograd.grad(palmette.tree_attention(*plain, case.plan).sum(), plain)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_a_growing_tree_recompiles_only_when_capacity_grows():
    torch._dynamo.reset()
    compilations = 0

    def count(graph, inputs):
        nonlocal compilations
        compilations += 1
        return graph.forward

    compiled = torch.compile(palmette.tree_attention, fullgraph=True, backend=count)
    tree = palmette.Tree([-1, 0, 0], [40, 1, 1], range(42))
    plan = palmette.plan_tree_attention(tree, num_q_heads=4, num_kv_heads=2, head_dim=16)
    k, v, q = torch.randn(1000, 2, 16), torch.randn(1000, 2, 16), torch.randn(2, 4, 16)
    capacities = set()
    with torch.no_grad():
        for step in range(120):
            out = compiled(q, k, v, plan)
            assert torch.equal(out, palmette.tree_attention(q, k, v, plan))
            capacities.add(tuple(t.shape for t in plan.tensors))
            tree.append([1, 2], [1, 1], [42 + 2 * step, 43 + 2 * step])
            plan.update()
    assert len(capacities) < 8
    assert compilations <= len(capacities)
