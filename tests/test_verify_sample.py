# SPDX-License-Identifier: Apache-2.0
"""verify_sample: against the reference and, statistically, against the target's distribution."""

from __future__ import annotations

import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from conftest import BODIES
from palmette import Tree, testing, verify_sample
from palmette.reference import verify as reference
from palmette.verify import token_tree_shape
from token_trees import DTYPES, assert_same, token_tree, token_trees
from torch import Tensor


@hypothesis.example(drawn=([-1, 0, -1, 2, -1], [0, 1, 0, 1, 0], 3), seed=1, dtype=torch.float32)
@hypothesis.example(drawn=([-1, 0, -1, 2, -1], [0, 1, 0, 1, 0], 40), seed=2, dtype=torch.bfloat16)
@hypothesis.given(drawn=token_trees(), seed=st.integers(0, 2**31), dtype=st.sampled_from(DTYPES))
def test_sample_equals_the_reference(backend, drawn, seed, dtype):
    parent, tokens, vocab = drawn
    generator = torch.Generator().manual_seed(seed)
    probs = torch.softmax(torch.randn(len(parent), vocab, generator=generator), dim=-1).to(dtype)
    draft = torch.tensor(tokens)
    num_roots, depth = token_tree_shape(token_tree(parent))
    state = generator.get_state()
    got = verify_sample(token_tree(parent), draft, probs, generator=generator)
    generator.set_state(state)
    uniforms = torch.rand(num_roots, depth + 1, dtype=torch.float64, generator=generator)
    assert_same(got, reference.verify_sample(parent, draft, probs, uniforms))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("vocab", [513, 5000, 50_257])
def test_all_backends_draw_the_same(dtype, vocab):
    tree, draft = Tree([-1] * 64, [1] * 64), torch.zeros(64, dtype=torch.int64)
    probs = torch.softmax(3 * torch.randn(64, vocab), dim=-1).to(dtype)
    drawn = []
    for body in BODIES:
        with testing.backend(body):
            drawn.append(verify_sample(tree, draft, probs, generator=torch.Generator().manual_seed(1))[2])
    assert all(torch.equal(drawn[0], other) for other in drawn)


def sample_bonus(probs: Tensor, uniform: float) -> int:
    tree = Tree([-1], [1])
    args = (
        tree.nodes,
        tree.counts,
        torch.tensor([0]),
        probs[None],
        torch.tensor([[uniform]], dtype=torch.float64),
        1,
        0,
    )
    return int(torch.ops.palmette.verify_sample(*args)[2])


def uneven_rows(rows: int, vocab: int) -> Tensor:
    """Probabilities of very different sizes, whose sums depend on the order; some are 0, at the ends many."""
    probs = torch.rand(rows, vocab).double() * 2.0 ** -torch.randint(0, 40, (rows, vocab))
    probs[torch.rand(rows, vocab) < 0.3] = 0.0
    probs[:, 500:520] = probs[:, 1010:1030] = probs[:, -30:] = 0.0
    return probs / probs.sum(dim=1, keepdim=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [37, 1500, 5003])
def test_bounds_between_tokens_are_the_same_to_the_bit(backend, dtype, vocab):
    """Sums in another order would move some of them."""
    rows, tokens = [], []
    for row in uneven_rows(8, vocab).to(dtype):
        possible = row.nonzero().flatten()
        ends = [possible[possible < end][-1:] for end in range(512, vocab, 512)]
        some = torch.cat([*ends, possible[torch.randperm(len(possible) - 1)[:20]]])
        tokens.append(some[some < possible[-1]])
        rows.append(row.expand(len(tokens[-1]), vocab))
    probs, token = torch.cat(rows), torch.cat(tokens)
    roots = len(token)
    tree, draft = Tree([-1] * roots, [1] * roots), torch.zeros(roots, dtype=torch.int64)

    def draw(uniforms: Tensor) -> Tensor:
        op = torch.ops.palmette.verify_sample
        return op(tree.nodes, tree.counts, draft, probs, uniforms[:, None], roots, 0)[2]

    below, above = torch.zeros(roots).double(), torch.full((roots,), 1 - 2.0**-53).double()
    with testing.backend("scalar"):
        for _ in range(64):  # the greatest number that draws the token or one before it
            middle = (below + above) / 2
            before = draw(middle) <= token
            below, above = torch.where(before, middle, below), torch.where(before, above, middle)
        want = draw(below), draw(above)
    assert (want[0] <= token).all()
    assert (want[1] >= token).all()
    assert torch.equal(draw(below), want[0])
    assert torch.equal(draw(above), want[1])


@pytest.mark.parametrize("vocab", [1, 5, 512, 513, 1024, 1500])
def test_tokens_of_probability_zero_are_never_drawn(backend, vocab):
    largest = 1 - 2.0**-53
    for place in {0, vocab // 2, vocab - 1}:
        probs = torch.zeros(vocab)
        probs[place] = 1.0
        for uniform in (0.0, 0.5, largest):
            assert sample_bonus(probs, uniform) == place
    if vocab > 3:
        probs = torch.zeros(vocab)
        probs[1], probs[vocab - 2] = 0.25, 0.75
        assert [sample_bonus(probs, u) for u in (0.0, 0.2499, 0.25, largest)] == [1, 1, vocab - 2, vocab - 2]


def test_a_row_is_scaled_to_sum_to_one(backend):
    probs = torch.tensor([0.5, 0.4999])  # sums to 0.9999
    assert sample_bonus(probs, 1 - 2.0**-53) == 1
    assert [sample_bonus(probs, u) for u in (0.50004, 0.50006)] == [0, 1]


def test_generator_decides(backend):
    tree, draft = token_tree([-1, 0, 0]), torch.tensor([0, 1, 2])
    probs = torch.full((3, 50), 1 / 50)
    draws = []
    for seed in (3, 3, 4):
        generator = torch.Generator().manual_seed(seed)
        draws.append(verify_sample(tree, draft, probs, generator=generator)[2])
    assert torch.equal(draws[0], draws[1])
    torch.manual_seed(3)
    assert torch.equal(verify_sample(tree, draft, probs)[2], draws[0])
    assert len({int(verify_sample(tree, draft, probs)[2]) for _ in range(50)}) > 10


VOCAB, ROOT_TOKEN = 4, 0
# Siblings 1 and 3, and 6 and 7, hold the same token; node 4 goes on below the first of them.
PARENT = [-1, 0, 0, 0, 1, 3, 4, 4, 2]
TOKENS = [ROOT_TOKEN, 1, 2, 1, 3, 0, 0, 0, 2]


def emitted_triples(
    copies: int, transition: Tensor, outcome: tuple[Tensor, Tensor, Tensor], tokens: Tensor
) -> Tensor:
    """Three tokens per copy: accepted ones, the bonus, and then draws from the target."""
    accepted, num_accepted, bonus = outcome
    out = torch.zeros(copies, 3, dtype=torch.int64)
    previous = torch.full((copies,), ROOT_TOKEN)
    for level in range(3):
        fresh = torch.multinomial(transition[previous], 1)[:, 0]
        path = accepted[:, level] if level < accepted.shape[1] else torch.full((copies,), -1)
        token = torch.where(level == num_accepted, bonus, fresh)
        token = torch.where(level < num_accepted, tokens[path.clamp(min=0)], token)
        out[:, level] = previous = token
    return out


def chi_square(triples: Tensor, transition: Tensor) -> tuple[float, float]:
    """The statistic, and what a right sampler exceeds in less than one of 10,000 runs (3.8 sigma)."""
    index = (triples * torch.tensor([VOCAB**2, VOCAB, 1])).sum(1)
    counts = torch.bincount(index, minlength=VOCAB**3).double()
    first, second, third = transition[ROOT_TOKEN], transition, transition
    expected = (first[:, None, None] * second[:, :, None] * third[None]).flatten().double() * len(triples)
    degrees = VOCAB**3 - 1
    return float(((counts - expected) ** 2 / expected).sum()), degrees + 3.8 * math.sqrt(2 * degrees)


def test_the_output_follows_the_target(backend):
    copies, nodes = 30_000, len(PARENT)
    torch.manual_seed(20)
    transition = torch.softmax(1.5 * torch.randn(VOCAB, VOCAB), dim=-1)
    tokens = torch.tensor(TOKENS).repeat(copies)
    parent = [-1 if up < 0 else up + nodes * copy for copy in range(copies) for up in PARENT]
    outcome = verify_sample(token_tree(parent), tokens, transition[tokens])
    triples = emitted_triples(copies, transition, outcome, tokens)
    statistic, limit = chi_square(triples, transition)
    assert statistic < limit
    # A node goes on as often as the target gives its children's distinct tokens.
    rate = float((outcome[1] > 0).double().mean())
    assert rate == pytest.approx(float(transition[ROOT_TOKEN, [1, 2]].sum()), abs=0.012)


def test_the_statistic_finds_siblings_that_count_twice():
    """The same test on the scheme that adds up the children's probabilities, equal tokens included."""
    copies = 30_000
    torch.manual_seed(20)
    transition = torch.softmax(1.5 * torch.randn(VOCAB, VOCAB), dim=-1)
    row = transition[ROOT_TOKEN]
    children = torch.tensor([TOKENS[node] for node in (1, 2, 3)])
    uniform = torch.rand(copies)
    chosen = (uniform[:, None] < row[children].cumsum(0)).double()
    first = torch.where(
        chosen.any(1),
        children[chosen.argmax(1)],
        torch.multinomial(row.index_fill(0, children, 0.0), copies, True),
    )
    second = torch.multinomial(transition[first], 1)[:, 0]
    third = torch.multinomial(transition[second], 1)[:, 0]
    statistic, limit = chi_square(torch.stack([first, second, third], 1), transition)
    assert statistic > 3 * limit


def test_nan_negative_and_unnormalized_rows_raise_where_visited(raising_backend):
    tree, draft = token_tree([-1, 0, 0]), torch.tensor([0, 1, 2])
    good = torch.zeros(3, 600)
    good[0, 1] = good[1, 7] = good[2, 9] = 1.0
    unvisited = good.clone()
    unvisited[2] = math.nan
    assert verify_sample(tree, draft, unvisited)[0].tolist() == [[1]]
    for place, value, message in (
        (550, math.nan, "target_probs must be free of NaN, got NaN at node 1, token 550"),
        (3, -0.25, "target_probs must be non-negative, got -0.25 at node 1, token 3"),
        (599, 2.0, "target_probs must be rows that sum to 1, got 3 at node 1"),
        (0, math.inf, "target_probs must be rows that sum to 1, got inf at node 1"),
    ):
        bad = good.clone()
        bad[1, place] = value
        with pytest.raises(ValueError, match=f"^{message}$"):
            verify_sample(tree, draft, bad)
    with pytest.raises(ValueError, match=r"^target_probs must be rows that sum to 1, got 0 at node 0$"):
        verify_sample(tree, draft, torch.zeros(3, 600))


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({700: math.nan, 701: -1.0, 4000: -2.0}, "free of NaN, got NaN at node 0, token 700"),
        ({701: -1.0, 702: math.nan, 4000: math.nan}, "non-negative, got -1 at node 0, token 701"),
        ({5002: -0.5, 5001: -0.25}, "non-negative, got -0.25 at node 0, token 5001"),
        ({0: math.inf, 5002: math.nan}, "free of NaN, got NaN at node 0, token 5002"),
    ],
)
def test_the_first_bad_probability_is_named(raising_backend, places, message):
    probs = torch.full((1, 5003), 1 / 5003)
    for place, value in places.items():
        probs[0, place] = value
    with pytest.raises(ValueError, match=f"^target_probs must be {message}$"):
        verify_sample(Tree([-1], [1]), torch.tensor([0]), probs)


def test_a_bad_probability_at_every_place(raising_backend):
    tree, draft, probs = Tree([-1], [1]), torch.tensor([0]), torch.full((1, 600), 1 / 600)
    for place in range(600):
        probs[0, place] = -1.0
        with pytest.raises(ValueError, match=f"got -1 at node 0, token {place}$"):
            verify_sample(tree, draft, probs)
        probs[0, place] = 1 / 600


def test_sixteen_bits_may_be_off_by_more(raising_backend):
    probs = torch.tensor([[0.99, 0.0]])
    tree, draft = Tree([-1], [1]), torch.tensor([0])
    with pytest.raises(ValueError, match=r"must be rows that sum to 1, got 0\.99 at node 0"):
        verify_sample(tree, draft, probs)
    for dtype in (torch.bfloat16, torch.float16):
        assert verify_sample(tree, draft, probs.to(dtype))[2].tolist() == [0]
        flat = torch.softmax(torch.zeros(1, 50_000), dim=-1).to(dtype)
        assert 0 <= int(verify_sample(tree, draft, flat)[2]) < 50_000
