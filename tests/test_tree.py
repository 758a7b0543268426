# SPDX-License-Identifier: Apache-2.0
"""Tree: numbering, changes against the reference, bad input."""

from __future__ import annotations

import random
import re

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from palmette.reference import tree as reference
from palmette.tree import Tree
from strategies import forests

ops = torch.ops.palmette


def assert_same(tree: Tree, want: reference.Tree) -> None:
    """Everything that a tree tells about itself, against the reference."""
    assert tree.num_nodes == len(want.parents)
    assert tree.num_tokens == len(want.slots())
    assert tree.node_start.tolist() == want.node_start()
    assert tree.order.tolist() == want.order()
    assert tree.leaves.tolist() == want.leaves()
    assert tree.roots.tolist() == want.children(-1)
    assert tree.slots.tolist() == want.slots()
    assert tree.redundancy == pytest.approx(want.redundancy(), rel=1e-12)
    lengths = [want.path_length(n) if alive else -1 for n, alive in enumerate(want.alive)]
    assert tree.path_lengths.tolist() == lengths
    for tensor in (tree.node_start, tree.leaves, tree.order, tree.slots, tree.path_lengths, tree.roots):
        assert tensor.dtype == torch.int32


@hypothesis.given(forests())
def test_against_reference(forest):
    tree, want = Tree(*forest), reference.Tree(*forest)
    assert_same(tree, want)
    assert tree.subtree_end.tolist() == want.subtree_end()
    for node in range(tree.num_nodes):
        assert tree.children(node).tolist() == want.children(node)
        assert tree.is_leaf(node) == (not want.children(node))
        assert tree.parent(node) == want.parents[node]
        assert tree.length(node) == forest.num_tokens[node]
        assert tree.path_length(node) == want.path_length(node)
        assert tree.path_slots(node).tolist() == want.path_slots(node)


@hypothesis.given(forests())
def test_intervals_are_paths(forest):
    """Query q sees key k exactly when k <= q < subtree_end[k]."""
    mask = reference.Tree(*forest).path_mask()
    end = Tree(*forest).subtree_end
    number = torch.arange(len(end))
    assert torch.equal(mask, (number <= number[:, None]) & (number[:, None] < end))


def change(tree: Tree, want: reference.Tree, rng: random.Random, next_slot: int) -> int:
    """One random change to both; returns the next free slot."""
    leaves = want.leaves()
    kind = rng.choice(["append", "append", "append", "branch", "prune", "root"])
    if tree.num_tokens > 200 and len(leaves) > 2:
        kind = "prune"
    if not leaves or (kind == "root" and len(want.children(-1)) < 3):
        assert tree.add_roots(1).tolist() == want.branch(-1, 1)
    elif kind == "branch" and len(want.order()) < 30:
        node, count = rng.choice(want.order()), rng.randint(1, 3)
        assert tree.branch(node, count).tolist() == want.branch(node, count)
    elif kind == "prune" and len(leaves) > 2:
        node = rng.choice(want.order())
        assert tree.prune(node).tolist() == want.prune(node)
    else:
        nodes = rng.sample(leaves, rng.randint(1, len(leaves)))
        counts = [rng.choice([0, 1, 1, 1, 5, 20]) for _ in nodes]
        slots = None if want.identity else list(range(next_slot, next_slot + sum(counts)))
        tree.append(nodes, counts, slots)
        want.append(nodes, counts, slots)
        next_slot += sum(counts)
    return next_slot


@pytest.mark.parametrize("identity", [False, True], ids=["slots", "identity"])
@pytest.mark.parametrize("seed", range(3))
def test_random_changes(identity, seed):
    rng = random.Random(seed)
    slots = None if identity else [7, 3, 5, 4]
    tree, want = Tree([-1, 0, 0], [2, 1, 1], slots), reference.Tree([-1, 0, 0], [2, 1, 1], slots)
    next_slot, version = 100, tree.version
    for _ in range(400):
        next_slot = change(tree, want, rng, next_slot)
        assert tree.version != version
        version = tree.version
        assert_same(tree, want)
    assert tree.subtree_end.tolist() == want.subtree_end()


def test_copy_is_independent():
    tree = Tree([-1, 0], [2, 1], [4, 5, 6])
    other = tree.copy()
    assert other.version == tree.version
    other.append([1], [1], [7])
    assert (tree.num_tokens, other.num_tokens) == (3, 4)
    assert tree.slots.tolist() == [4, 5, 6]


def test_branching_leaves_and_inner_nodes():
    tree = Tree([-1], [3])
    assert tree.branch(0, 2).tolist() == [1, 2]
    assert tree.branch(0, 1).tolist() == [3]
    tree.append(torch.tensor([3, 1]), torch.tensor([1, 2]))
    assert tree.node_start.tolist() == [0, 3, 5, 5]
    assert tree.leaves.tolist() == [1, 2, 3]
    assert tree.subtree_end.tolist() == [6, 6, 6, 5, 5, 6]
    assert tree.children(0).tolist() == [1, 2, 3]


def test_prune_frees_ancestors_without_leaves():
    #      0 - 1 - 2 - 3        3 goes, and with it 2 and 1, whose only leaf it is
    #        \ 4
    tree = Tree([-1, 0, 1, 2, 0], [1, 2, 0, 1, 1], [10, 11, 12, 13, 14])
    assert tree.prune(3).tolist() == [11, 12, 13]
    assert tree.node_start.tolist() == [0, -1, -1, -1, 1]
    assert not tree.is_alive(2)
    assert tree.slots.tolist() == [10, 14]
    assert tree.branch(4, 1).tolist() == [5]  # ids are never used again
    assert tree.prune(0).tolist() == [10, 14]
    assert tree.num_tokens == 0
    assert tree.leaves.tolist() == []
    assert tree.redundancy == 1.0
    assert tree.add_roots(2).tolist() == [6, 7]
    assert tree.leaves.tolist() == [6, 7]


def test_identity_renumbers():
    tree = Tree([-1, 0, 0], [2, 1, 1])
    tree.append([1], [2])
    assert tree.node_start.tolist() == [0, 2, 5]
    assert tree.slots.tolist() == list(range(6))
    assert tree.prune(1).tolist() == [2, 3, 4]
    assert tree.slots.tolist() == [0, 1, 2]


@pytest.mark.parametrize("slots", [False, True])
def test_deep_chain(slots):
    """Nothing recurses, and branching a chain step by step stays linear."""
    depth = 100_000
    tree = Tree(range(-1, depth - 1), [1] * depth, range(depth) if slots else None)
    assert tree.leaves.tolist() == [depth - 1]
    assert tree.path_length(depth - 1) == depth
    assert tree.subtree_end.unique().tolist() == [depth]
    node = depth - 1
    for step in range(100):
        (node,) = tree.branch(node, 1).tolist()
        tree.append([node], [1], [depth + step] if slots else None)
    assert tree.path_length(node) == depth + 100
    assert tree.prune(node).numel() == depth + 100
    with pytest.raises(ValueError, match="cycles, got one through node 1"):
        Tree([-1, *range(2, depth), 1], [1] * depth)


def test_chains_stay_contiguous():
    """A leaf that branches gives its spare room back, so that a path is one run of slots."""
    tree = Tree([-1], [1], [0])
    node = 0
    for step in range(1, 50):
        (node,) = tree.branch(node, 1).tolist()
        tree.append([node], [1], [step])
    assert tree.arena[:50].tolist() == list(range(50))


def test_arena_is_compacted():
    """Leaves come and go for ever in an arena that stays small."""
    tree = Tree([-1], [64], range(64))
    (keep,) = tree.branch(0, 1).tolist()
    for step in range(2000):
        (leaf,) = tree.branch(0, 1).tolist()
        tree.append([leaf, keep], [40, step % 40 == 0], [100 + i for i in range(40 + (step % 40 == 0))])
        assert tree.prune(leaf).tolist() == list(range(100, 140))
    assert tree.num_tokens == 64 + 50
    assert tree.arena.numel() < 1000
    assert tree.path_slots(keep).tolist() == list(range(64)) + [140] * 50


def test_appending_is_amortised():
    """A run that outgrows its range moves geometrically: 10,000 tokens do not need 10,000^2 / 2 entries."""
    tree = Tree([-1, 0, 0], [1, 0, 0], [0])
    for step in range(5000):
        tree.append([1, 2], [1, 1], [step, step])
    assert tree.path_slots(2).tolist() == [0, *range(5000)]
    assert tree.arena.numel() < 10 * 10_000


@pytest.mark.parametrize("kind", [list, torch.tensor, lambda x: torch.tensor(x, dtype=torch.int32), tuple])
def test_integers_of_any_kind(kind):
    tree = Tree(kind([-1, 0]), kind([1, 1]), kind([3, 9]))
    tree.append(kind([1]), kind([2]), kind([4, 5]))
    assert tree.slots.tolist() == [3, 9, 4, 5]
    strided = torch.full((2, 3), -1)
    assert Tree(strided[:, 0], strided[:, 1] + 2).num_tokens == 2


# ---- Medusa paths


def test_from_paths():
    tree = Tree.from_paths([[0], [1], [0, 0], [1, 0], [0, 1]], prefix_len=4)
    assert [tree.parent(n) for n in range(6)] == [-1, 0, 0, 1, 2, 1]
    assert tree.node_start.tolist() == [0, 4, 7, 5, 8, 6]
    assert tree.num_tokens == 9
    assert Tree.from_paths([[0, 0], [0]]).order.tolist() == [0, 2, 1]
    assert Tree.from_paths([], prefix_len=3, slots=[5, 6, 7]).slots.tolist() == [5, 6, 7]


@pytest.mark.parametrize(
    ("paths", "prefix_len", "message"),
    [
        ([[0], []], 1, "paths must be non-empty, got an empty path at entry 1"),
        ([[0], [1], [0]], 1, "paths must be distinct, got [0] at entries 0 and 2"),
        ([[0], [1, 0]], 1, "paths must be closed under prefixes, got [1, 0] at entry 1"),
        ([[0]], -1, "prefix_len must be non-negative, got -1"),
    ],
)
def test_bad_paths(paths, prefix_len, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Tree.from_paths(paths, prefix_len)


# ---- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], []), "parent must be non-empty, got 0 nodes"),
        (([-1, 2], [1, 1]), "parent must be in [-1, 2), got 2 for node 1"),
        (([-1, -2], [1, 1]), "parent must be in [-1, 2), got -2 for node 1"),
        (([0], [1]), "parent must be free of cycles, got one through node 0"),
        (([-1, 2, 1, 0], [1] * 4), "parent must be free of cycles, got one through node 1"),
        (([3, -1, 0, 2], [1] * 4), "parent must be free of cycles, got one through node 0"),
        (([-1, 0], [1]), "num_tokens must be 2 long (one entry per node), got 1"),
        (([-1, 0], [1, -4]), "num_tokens must be non-negative, got -4 for node 1"),
        (([-1, 0], [2**31 - 1, 1]), "the sum of num_tokens must be at most 2147483647, got 2147483648"),
        (([-1], [2**31]), "num_tokens must be at most 2147483647, got 2147483648 for node 0"),
        (([-1, 0], [1, 2], [1, 2]), "slots must be 3 long (one entry per token), got 2"),
        (([-1, 0], [1, 1], [1, -2]), "slots must be in [0, 2147483647], got -2 at entry 1"),
        (([-1, 0], [1, 1], [1, 2**31]), "slots must be in [0, 2147483647], got 2147483648 at entry 1"),
        (([-1.0], [1]), "parent must be integers, got float32"),
        (([-1], [True]), "num_tokens must be integers, got bool"),
        (([[-1]], [1]), "parent must be one-dimensional, got [1, 1]"),
        ((["root"], [1]), "parent must be a list or tensor of integers, got ['root']"),
        ((-1, [1]), "parent must be a list or tensor of integers, got -1"),
        (([2**80], [1]), "parent must be a list or tensor of integers"),
    ],
)
def test_bad_trees(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Tree(*arguments)


@pytest.mark.parametrize(
    ("identity", "arguments", "message"),
    [
        (False, ([0], [1], [9]), "nodes must be leaves, got 0, which has children"),
        (False, ([4], [1], [9]), "nodes must be in [0, 4), got 4"),
        (False, ([-1], [1], [9]), "nodes must be in [0, 4), got -1"),
        (False, ([3], [1], [9]), "nodes must be alive, got 3, which was pruned"),
        (False, ([1, 2, 1], [1, 1, 1], [7, 8, 9]), "nodes must be distinct, got 1 twice"),
        (False, ([1, 2], [1], [9]), "counts must be 2 long (one entry per node), got 1"),
        (False, ([1], [-1], []), "counts must be in [0, 2147483647], got -1 for node 1"),
        (False, ([1], [2**31 - 1], [9]), "the tokens of the tree must be at most 2147483647, got 2147483651"),
        (False, ([1], [1]), "slots must be given for a tree that was built with slots, got None"),
        (False, ([1], [2], [9]), "slots must be 2 long (one entry per new token), got 1"),
        (False, ([1], [1], [-1]), "slots must be in [0, 2147483647], got -1 at entry 0"),
        (True, ([1], [1], [9]), "slots must be None for a tree that was built without slots, got 1 slots"),
    ],
)
def test_bad_appends(identity, arguments, message):
    tree = Tree([-1, 0, 0, 0], [1] * 4, None if identity else [1, 2, 3, 4])
    tree.prune(3)
    tree.append([1], [1], None if identity else [5])
    before = tree.copy()
    with pytest.raises(ValueError, match=re.escape(message)):
        tree.append(*arguments)
    for name in ("nodes", "counts", "arena"):  # nothing has changed
        assert torch.equal(getattr(tree, name), getattr(before, name)), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.branch(0, 0), "num_children must be at least 1, got 0"),
        (lambda t: t.branch(3, 1), "node must be alive, got 3, which was pruned"),
        (lambda t: t.branch(4, 1), "node must be in [0, 4), got 4"),
        (lambda t: t.branch(-1, 1), "node must be in [0, 4), got -1"),
        (lambda t: t.branch(0, 2**31), "num_children must be at most 2147483643, got 2147483648"),
        (lambda t: t.add_roots(-1), "count must be at least 1, got -1"),
        (lambda t: t.prune(3), "node must be alive, got 3, which was pruned"),
        (lambda t: t.prune(-1), "node must be in [0, 4), got -1"),
        (lambda t: t.path_slots(3), "node must be alive, got 3, which was pruned"),
        (lambda t: t.path_length(7), "node must be in [0, 4), got 7"),
        (lambda t: t.children(3), "node must be alive, got 3, which was pruned"),
    ],
)
def test_bad_changes(change, message):
    tree = Tree([-1, 0, 0, 0], [1] * 4)
    tree.prune(3)
    version = tree.version
    with pytest.raises(ValueError, match=re.escape(message)):
        change(tree)
    assert tree.version == version


def test_raw_operators_check_their_tables():
    tree = Tree([-1], [1])
    with pytest.raises(
        RuntimeError, match=re.escape("nodes must be a contiguous table of the planner, got [9, 17]")
    ):
        ops.tree_layout(tree.nodes[:9], tree.counts)
    with pytest.raises(RuntimeError, match="counts must be int32, got int64"):
        ops.tree_layout(tree.nodes, tree.counts.long())
    with pytest.raises(RuntimeError, match="nodes must be int32 or int64, got float32"):
        ops.tree_append(tree.nodes, tree.counts, tree.arena, torch.ones(1), torch.ones(1), None)


@hypothesis.given(st.lists(st.integers(-2, 6), min_size=1, max_size=6))
def test_any_parents_build_or_raise(parent):
    def ends(node):
        seen = set()
        while node >= 0 and node not in seen:
            seen.add(node)
            node = parent[node]
        return node < 0

    if all(-1 <= p < len(parent) for p in parent) and all(ends(n) for n in range(len(parent))):
        assert_same(Tree(parent, [1] * len(parent)), reference.Tree(parent, [1] * len(parent)))
    else:
        with pytest.raises(ValueError, match="parent must be"):
            Tree(parent, [1] * len(parent))


# ---- operators


def _tree() -> Tree:
    return Tree([-1, 0, 0], [2, 1, 1], [3, 4, 5, 6])


def _structure(*extra):
    def cases():
        tree = _tree()
        return [(tree.nodes, tree.counts, *extra)]

    return cases


def _append_cases():
    cases = []
    for tree, slots in ((_tree(), torch.tensor([8, 9])), (Tree([-1, 0, 0], [1, 1, 1]), None)):
        cases.append((tree.nodes, tree.counts, tree.arena, torch.tensor([1, 2]), torch.tensor([1, 1]), slots))
    return cases


def _arena_cases(node):
    def cases():
        tree = _tree()
        return [(tree.nodes, tree.counts, tree.arena, node)]

    return cases


OPCHECK_CASES = {
    "tree_build": lambda: [
        (torch.tensor([-1, 0, 0]), torch.tensor([2, 1, 1]), None),
        (torch.tensor([-1, 0]), torch.tensor([1, 1]), torch.tensor([7, 9])),
    ],
    "tree_append": _append_cases,
    "tree_branch": _structure(1, 2),
    "tree_prune": _arena_cases(2),
    "tree_layout": _structure(),
    "tree_subtree_end": _structure(),
    "tree_slots": _arena_cases(2),
}


def test_more_children_than_a_tree_can_have():
    tree = Tree([-1, 0], [1, 1])
    for count in (2**31, 2**63 - 1):
        with pytest.raises(ValueError, match=f"num_children must be at most 2147483645, got {count}"):
            tree.branch(0, count)
        with pytest.raises(ValueError, match=f"must be at most 2147483645, got {count}"):
            tree.add_roots(count)
