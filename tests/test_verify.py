# SPDX-License-Identifier: Apache-2.0
"""verify_greedy, and what verify_sample shares with it: trees, shapes, errors, tracing."""

from __future__ import annotations

import itertools
import math

import hypothesis
import hypothesis.strategies as st
import palmette
import pytest
import torch
import torch._dynamo.testing
from palmette import Tree, verify_greedy, verify_sample
from palmette.reference import verify as reference
from palmette.verify import token_tree_shape
from token_trees import DTYPES, assert_same, logits_for, token_tree, token_trees
from torch import Tensor


def test_golden_vectors_of_sglang(backend):
    """Its test of verify_tree_greedy: two requests of six candidates, here one forest of twelve nodes."""
    parent = [-1, 0, 1, 0, 3, 4, -1, 6, 7, 8, 6, 10]
    candidates = torch.tensor([0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12])
    target = [3, 18, 18, 4, 5, 18, 11, 18, 18, 18, 12, 18]
    logits = torch.ones(12, 20)
    for node, token in enumerate(target):
        logits[node, token] = 10
    accepted, num_accepted, bonus = verify_greedy(token_tree(parent), candidates, logits)
    # SGLang lists the root in accept_index and not in accept_token_num.
    roots = torch.tensor([[0], [6]])
    assert torch.cat([roots, accepted], dim=1).tolist() == [[0, 3, 4, 5], [6, 10, 11, -1]]
    assert num_accepted.tolist() == [3, 2]
    predicts = torch.full((12,), -1)
    for root, path, count, last in zip((0, 6), accepted.tolist(), num_accepted.tolist(), bonus, strict=True):
        nodes = [root, *path[:count]]
        predicts[nodes] = torch.tensor([*(int(candidates[node]) for node in nodes[1:]), int(last)])
    assert predicts.tolist() == [3, -1, -1, 4, 5, 18, 11, -1, -1, -1, 12, 18]


@hypothesis.given(drawn=token_trees(), seed=st.integers(0, 2**31), dtype=st.sampled_from(DTYPES))
def test_greedy_equals_the_reference(backend, drawn, seed, dtype):
    parent, tokens, vocab = drawn
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-2, 3, (len(parent), vocab), generator=generator).to(dtype)  # many ties
    draft = torch.tensor(tokens, dtype=torch.int32 if seed % 2 else torch.int64)
    got = verify_greedy(token_tree(parent), draft, logits)
    assert_same(got, reference.verify_greedy(parent, draft, logits))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("vocab", [1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 129, 1000])
def test_argmax_at_every_place(backend, dtype, vocab):
    if dtype == torch.float64 and backend != "scalar":
        pytest.skip("float64 runs on the scalar body")
    places = sorted({*range(min(vocab, 40)), *range(max(0, vocab - 40), vocab)})
    tree, draft = Tree([-1] * len(places), [1] * len(places)), torch.zeros(len(places), dtype=torch.int64)
    logits = -torch.rand(len(places), vocab)
    logits[torch.arange(len(places)), torch.tensor(places)] = 1.0
    assert verify_greedy(tree, draft, logits.to(dtype))[2].tolist() == places
    tied = torch.full((len(places), vocab), -torch.inf)
    for row, place in enumerate(places):
        tied[row, place:] = -5.0  # the first of many
    assert verify_greedy(tree, draft, tied.to(dtype))[2].tolist() == places


@pytest.mark.parametrize("value", [-math.inf, math.inf, -0.0, 1e4, -1e4])
def test_rows_of_one_value_pick_the_lowest_token(backend, value):
    tree = Tree([-1], [1])
    logits = torch.full((1, 37), value)
    if value == 0:
        logits[0, 5:] = 0.0  # equal to -0.0
    assert verify_greedy(tree, torch.zeros(1, dtype=torch.int64), logits)[2].tolist() == [0]


def test_infinite_logit_wins(backend):
    logits = torch.full((1, 50), -math.inf)
    logits[0, 33] = math.inf
    assert verify_greedy(Tree([-1], [1]), torch.tensor([0]), logits)[2].tolist() == [33]


def test_single_node(backend):
    accepted, num_accepted, bonus = verify_greedy(Tree([-1], [7]), torch.tensor([0]), logits_for([4]))
    assert accepted.shape == (1, 0)
    assert num_accepted.tolist() == [0]
    assert bonus.tolist() == [4]


@pytest.mark.parametrize("root_tokens", [0, 1, 50])
def test_root_of_any_length(backend, root_tokens):
    tree = token_tree([-1, 0, 1], root_tokens)
    accepted, num_accepted, bonus = verify_greedy(tree, torch.tensor([9, 3, 4]), logits_for([3, 4, 5]))
    assert accepted.tolist() == [[1, 2]]
    assert num_accepted.tolist() == [2]
    assert bonus.tolist() == [5]


def test_chain_of_depth_1000(backend):
    parent = list(range(-1, 1000))
    tokens = torch.arange(1001) % 17
    choice = torch.cat([tokens[1:], torch.tensor([2])])
    choice[700] = 18
    accepted, num_accepted, bonus = verify_greedy(token_tree(parent), tokens, logits_for(choice.tolist()))
    assert accepted.shape == (1, 1000)
    assert accepted[0, :700].tolist() == list(range(1, 701))
    assert (accepted[0, 700:] == -1).all()
    assert num_accepted.tolist() == [700]
    assert bonus.tolist() == [18]


@pytest.mark.parametrize("leaves", [1, 31, 32, 33, 63, 64, 65, 257])
def test_stars(backend, leaves):
    tokens = torch.arange(-1, leaves)
    logits = logits_for([leaves - 1, *[0] * leaves], vocab=300)
    accepted, num_accepted, bonus = verify_greedy(token_tree([-1] + [0] * leaves), tokens, logits)
    assert accepted.tolist() == [[leaves]]
    assert num_accepted.tolist() == [1]
    assert bonus.tolist() == [0]


def test_forest_of_unequal_depth_in_order_of_root_ids(backend):
    #        0 -> 4 -> 5          2 alone          3 -> 1
    parent = [-1, 3, -1, -1, 0, 4]
    tokens = torch.tensor([0, 6, 0, 0, 7, 8])
    accepted, num_accepted, bonus = verify_greedy(token_tree(parent), tokens, logits_for([7, 1, 2, 6, 8, 3]))
    assert accepted.tolist() == [[4, 5], [-1, -1], [1, -1]]
    assert num_accepted.tolist() == [2, 0, 1]
    assert bonus.tolist() == [3, 2, 1]


def test_the_lowest_of_equal_siblings_counts_even_if_a_higher_one_goes_further(backend):
    parent, tokens = [-1, 0, 0, 0, 2], torch.tensor([0, 5, 5, 5, 6])
    logits = logits_for([5, 6, 6, 6, 7])
    assert verify_greedy(token_tree(parent), tokens, logits)[0].tolist() == [[1, -1]]
    tree = token_tree(parent)
    tree.prune(1)
    accepted, num_accepted, bonus = verify_greedy(tree, tokens, logits)
    assert accepted.tolist() == [[2, 4]]
    assert (num_accepted.tolist(), bonus.tolist()) == ([2], [7])


def test_pruned_ids_are_ignored_whatever_they_hold(backend):
    tree = token_tree([-1, 0, 0, -1, 3, -1, 5])
    tree.prune(2)
    tree.prune(3)
    tokens = torch.tensor([-7, 4, -99, 10**9, -5, 10**6, 8])  # roots' are ignored, too
    logits = logits_for([4, 3, 0, 0, 0, 8, 2])
    logits[[2, 3, 4]] = math.nan
    accepted, num_accepted, bonus = verify_greedy(tree, tokens, logits)
    assert accepted.tolist() == [[1], [6]]
    assert (num_accepted.tolist(), bonus.tolist()) == ([1, 1], [3, 2])


def test_tree_that_grew(backend):
    tree = token_tree([-1])
    child = tree.branch(0, 2)
    tree.append(child, [1, 1])
    grandchild = tree.branch(2, 1)
    tree.append(grandchild, [1])
    accepted, _, bonus = verify_greedy(tree, torch.tensor([0, 1, 2, 3]), logits_for([2, 0, 3, 9]))
    assert accepted.tolist() == [[2, 3]]
    assert bonus.tolist() == [9]


def test_empty_forest(backend):
    tree = Tree([-1], [1])
    tree.prune(0)
    for verify in (verify_greedy, verify_sample):
        accepted, num_accepted, bonus = verify(tree, torch.tensor([0]), torch.zeros(1, 4))
        assert accepted.shape == (0, 0)
        assert num_accepted.shape == bonus.shape == (0,)


@pytest.mark.parametrize("layout", ["transposed", "padded", "expanded", "strided tokens"])
def test_strides(backend, layout):
    parent, tokens = [-1, 0, 0, 2], torch.tensor([0, 3, 5, 5])
    logits = logits_for([5, 1, 5, 5], vocab=65)
    if layout == "transposed":
        logits = logits.T.contiguous().T
    elif layout == "padded":
        padded = torch.full((8, 97), math.nan)
        padded[::2, :65] = logits
        logits = padded[::2, :65]
    elif layout == "expanded":
        logits = logits[:1].expand(4, 65)
    else:
        tokens = tokens.repeat_interleave(2)[::2]
    want = reference.verify_greedy(parent, tokens, logits)
    assert_same(verify_greedy(token_tree(parent), tokens, logits), want)
    probs = torch.softmax(logits * 100, dim=-1)
    assert_same(verify_sample(token_tree(parent), tokens, probs), want)


def test_nan_in_a_visited_row_raises_and_elsewhere_does_not(raising_backend):
    parent, tokens = [-1, 0, 0, 2], torch.tensor([0, 3, 5, 5])
    logits = logits_for([5, 1, 5, 7], vocab=65)
    logits[1] = math.nan
    assert verify_greedy(token_tree(parent), tokens, logits)[0].tolist() == [[2, 3]]
    for place in (0, 31, 63, 64):
        bad = logits.clone()
        bad[2, place] = math.nan
        message = f"^target_logits must be free of NaN, got NaN at node 2, token {place}$"
        with pytest.raises(ValueError, match=message):
            verify_greedy(token_tree(parent), tokens, bad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_first_nan_is_named(raising_backend, dtype):
    for first in (0, 700, 5002):
        logits = torch.randn(1, 5003).to(dtype)
        logits[0, 3] = math.inf
        logits[0, torch.tensor([first, 5002])] = -math.nan  # as a number, less than everything
        logits[0, torch.tensor([min(first + 1, 5002), 4000 if first < 4000 else 5002])] = math.nan
        with pytest.raises(ValueError, match=f"got NaN at node 0, token {first}$"):
            verify_greedy(Tree([-1], [1]), torch.tensor([0]), logits)


def test_one_and_two_threads_agree(backend, num_threads):
    parent = [-1] * 50 + list(range(200))
    tokens = torch.randint(0, 3, (250,))
    logits, uniform_logits = torch.randn(250, 3), torch.randn(250, 3)
    results = []
    for threads in (1, 2):
        num_threads(threads)
        generator = torch.Generator().manual_seed(5)
        probs = torch.softmax(uniform_logits, -1)
        results.append(
            (
                *verify_greedy(token_tree(parent), tokens, logits),
                *verify_sample(token_tree(parent), tokens, probs, generator=generator),
            )
        )
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ---- shapes, errors, tracing


def test_given_shape(backend):
    parent, tokens = [-1, 0, -1], torch.tensor([0, 5, 0])
    tree, logits = token_tree(parent), logits_for([5, 2, 3])
    assert token_tree_shape(tree) == (2, 1)
    accepted, num_accepted, bonus = verify_greedy(tree, tokens, logits, shape=(2, 4))
    assert accepted.tolist() == [[1, -1, -1, -1], [-1, -1, -1, -1]]
    assert (num_accepted.tolist(), bonus.tolist()) == ([1, 0], [2, 3])
    probs = torch.softmax(logits * 100, dim=-1)
    assert_same(verify_sample(tree, tokens, probs, shape=(2, 4)), (accepted, num_accepted, bonus))
    with pytest.raises(ValueError, match=r"^num_roots must be 2, got 3$"):
        verify_greedy(tree, tokens, logits, shape=(3, 1))
    with pytest.raises(ValueError, match=r"^max_depth must be at least 1, got 0$"):
        verify_greedy(tree, tokens, logits, shape=(2, 0))


@pytest.mark.parametrize(
    ("num_tokens", "got"),
    [([1, 1, 2], "2 for node 2"), ([1, 0, 1], "0 for node 1"), ([5, 3, 0], "3 for node 1")],
)
def test_nodes_below_the_roots_hold_one_token(num_tokens, got):
    tree = Tree([-1, 0, 1], num_tokens)
    message = f"^num_tokens must be 1 for nodes below the roots, got {got}$"
    for call in (
        lambda: verify_greedy(tree, torch.zeros(3, dtype=torch.int64), torch.zeros(3, 5)),
        lambda: verify_sample(tree, torch.zeros(3, dtype=torch.int64), torch.full((3, 5), 0.2)),
        lambda: token_tree_shape(tree),
    ):
        with pytest.raises(ValueError, match=message):
            call()


TOKENS_3 = torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("draft", "logits", "message"),
    [
        (
            TOKENS_3,
            torch.zeros(3, 5, dtype=torch.int64),
            "must be float32 or bfloat16 or float16 or float64, got",
        ),
        (TOKENS_3, torch.zeros(3), r"must be \[M, vocab\], got \[3\]"),
        (TOKENS_3, torch.zeros(4, 5), r"must be \[3, vocab\], a row per node id, got \[4, 5\]"),
        (TOKENS_3, torch.zeros(3, 0), r"must be \[3, vocab\], a row per node id, got \[3, 0\]"),
        (TOKENS_3.float(), torch.zeros(3, 5), "draft_tokens must be int32 or int64, got float32"),
        (TOKENS_3[None], torch.zeros(3, 5), r"draft_tokens must be \[M\], got \[1, 3\]"),
        (TOKENS_3[:2], torch.zeros(3, 5), r"draft_tokens must be \[3\], one per node id, got \[2\]"),
        (torch.tensor([0, 5, 0]), torch.zeros(3, 5), r"draft_tokens must be in \[0, 5\), got 5 at node 1"),
        (torch.tensor([0, 0, -1]), torch.zeros(3, 5), r"draft_tokens must be in \[0, 5\), got -1 at node 2"),
        (TOKENS_3, torch.zeros(3, 5, device="meta"), "draft_tokens must be on meta, got cpu"),
    ],
)
def test_bad_arguments(draft, logits, message):
    tree = token_tree([-1, 0, 0])
    for verify, name in ((verify_greedy, "target_logits"), (verify_sample, "target_probs")):
        named = message if message.startswith("draft_tokens") else f"{name} {message}"
        with pytest.raises(ValueError, match=f"^{named}"):
            verify(tree, draft, logits)


def test_float64_needs_the_scalar_body(backend):
    if backend == "scalar":
        pytest.skip("has float64")
    with pytest.raises(ValueError, match="float64 runs on the scalar backend only"):
        verify_greedy(token_tree([-1]), torch.tensor([0]), torch.zeros(1, 5, dtype=torch.float64))


def test_raw_operator_checks_uniforms():
    tree = token_tree([-1, 0])
    args = (tree.nodes, tree.counts, torch.tensor([0, 0]), torch.full((2, 4), 0.25))
    op = torch.ops.palmette.verify_sample
    for uniforms, message in (
        (torch.zeros(1, 2), "uniforms must be float64, got float32"),
        (
            torch.zeros(1, 1).double(),
            r"uniforms must be \[num_roots, max_depth \+ 1\] = \[1, 2\], got \[1, 1\]",
        ),
        (torch.ones(1, 2).double(), r"uniforms must be in \[0, 1\), got 1"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*args, uniforms, 1, 1)


def opcheck_arguments() -> list[tuple[object, ...]]:
    tree = token_tree([-1, 0, 0, 1, -1, 4])
    tree.prune(2)
    draft = torch.tensor([0, 1, 2, 3, 0, 1])
    return [
        (tree.nodes, tree.counts, draft, torch.randn(6, 9), 2, 2),
        (tree.nodes, tree.counts, draft.int(), torch.randn(6, 9).half(), 2, 5),
    ]


OPCHECK_CASES = {
    "verify_extent": lambda: [args[:2] for args in opcheck_arguments()[:1]],
    "verify_greedy": opcheck_arguments,
    "verify_sample": lambda: [
        (
            *args,
            torch.softmax(rows.float(), -1),
            torch.rand(num_roots, depth + 1, dtype=torch.float64),
            num_roots,
            depth,
        )
        for *args, rows, num_roots, depth in opcheck_arguments()
    ],
}


def test_compile_fullgraph():
    tree, draft = token_tree([-1, 0, 0, 1]), torch.tensor([0, 1, 2, 3])
    shape = token_tree_shape(tree)

    def step(logits: Tensor) -> tuple[Tensor, ...]:
        greedy = verify_greedy(tree, draft, logits, shape=shape)
        return *greedy, *verify_sample(tree, draft, torch.softmax(logits, dim=-1), shape=shape)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for scale, choice in itertools.product((1.0, 100.0), ([1, 3, 0, 4], [2, 0, 8, 4])):
        logits = scale * logits_for(choice)
        assert_same(compiled(logits)[:3], verify_greedy(tree, draft, logits))
        assert compiled(logits)[3].shape == (1, 2)
        if scale > 1:
            assert_same(compiled(logits)[3:], verify_greedy(tree, draft, logits))


def test_compiled_step_follows_a_tree_that_changes():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    tree = token_tree([-1, 0, 0])

    @torch.compile(fullgraph=True, backend=counter)
    def step(draft: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return verify_greedy(tree, draft, logits, shape=(1, 3))

    for choice in ([1, 5, 5], [2, 5, 5]):
        logits = logits_for(choice)
        assert_same(
            step(torch.tensor([0, 1, 2]), logits),
            verify_greedy(tree, torch.tensor([0, 1, 2]), logits, shape=(1, 3)),
        )
    assert counter.frame_count == 1
    tree.prune(2)
    assert step(torch.tensor([0, 1, 2]), logits_for([2, 5, 5]))[1].tolist() == [0]
    assert counter.frame_count == 1


def test_exported_from_the_package():
    assert palmette.verify_greedy is verify_greedy
    assert palmette.verify_sample is verify_sample
