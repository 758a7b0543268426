# SPDX-License-Identifier: Apache-2.0
"""The tree decoder against Hugging Face's generate and brute force, on a tiny Llama in float32."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from palmette.pipelines import (
    ThoughtNode,
    Thoughts,
    TokenRecycling,
    TokenTree,
    TreeDecoder,
    beam_search,
    best_of_n,
    few_shot,
    medusa_paths,
    tree_of_thought,
    tree_of_thought_steps,
)
from palmette.pipelines.sampling import choose_tokens, probabilities
from palmette.pipelines.slots import SlotPool
from tiny_models import VOCAB, greedy, logits_after, random_tokens, score, tiny_llama, tiny_qwen

PROMPT = random_tokens(40)


@pytest.fixture(autouse=True)
def _one_thread(num_threads: Any) -> None:
    num_threads(1)  # nothing here is large enough for two


@pytest.fixture(scope="module")
def reference() -> Any:
    return tiny_llama()


@pytest.fixture
def model(reference: Any) -> Any:
    model = tiny_llama()
    model.load_state_dict(reference.state_dict())
    return model


def held_slots(decoder: TreeDecoder) -> list[int]:
    nodes = {n for leaf in decoder.leaves for n in decoder.path(leaf)}
    return [slot for n in nodes for slot in decoder.node(n).slots]


def check_slots(decoder: TreeDecoder) -> None:
    """The decoder, the tree and the pool agree on who holds which slot, and nobody shares one."""
    held = held_slots(decoder)
    assert len(set(held)) == len(held)
    pages = {slot // decoder._pool.page_size for slot in held}
    assert decoder._pool.num_free == decoder._pool.num_slots - len(pages) * decoder._pool.page_size
    assert decoder.cache.num_slots >= decoder._pool.num_slots > max(held, default=-1)
    if decoder.leaves:
        for leaf in decoder.leaves:
            path = [slot for n in decoder.path(leaf) for slot in decoder.node(n).slots]
            assert decoder.tree.path_slots(leaf).tolist() == path


# ---- decoding


@pytest.mark.parametrize(("page_size", "chunk"), [(1, 512), (4, 16), (16, 7)])
def test_few_shot_is_generate_per_branch(model: Any, reference: Any, page_size: int, chunk: int) -> None:
    decoder = TreeDecoder(model, page_size=page_size, prefill_chunk=chunk)
    sequences = few_shot(decoder, PROMPT, 5, 12)
    first = logits_after(reference, PROMPT)[-1].topk(5).indices.tolist()
    for token, sequence in zip(first, sequences, strict=True):
        assert sequence.tokens == [token, *greedy(reference, [*PROMPT, token], 11)]
        assert sequence.score == pytest.approx(score(reference, PROMPT, sequence.tokens), abs=1e-3)
        assert not sequence.finished
    check_slots(decoder)
    assert decoder.plan.io.kv_tokens_per_sequence == 5 * (40 + 12)
    full = decoder.sequences(include_prompt=True)
    assert full[0].tokens == PROMPT + sequences[0].tokens


def test_a_batch_of_prompts_is_a_forest(model: Any, reference: Any) -> None:
    decoder = TreeDecoder(model, prefill_chunk=16)
    prompts = [random_tokens(n, seed=n) for n in (1, 30, 17)]
    roots = decoder.prefill(prompts)
    late = random_tokens(9, seed=9)
    for _ in range(3):
        decoder.step()
    roots += decoder.prefill(late)
    for _ in range(3):
        decoder.step()
    for root, prompt, count in zip(roots, [*prompts, late], (6, 6, 6, 3), strict=True):
        assert decoder.sequence(root).tokens == greedy(reference, prompt, count)
    check_slots(decoder)


def test_qwen_with_a_sliding_window(model: Any) -> None:
    reference, ours = tiny_qwen(sliding_window=8), tiny_qwen(sliding_window=8)
    sequences = few_shot(TreeDecoder(ours, prefill_chunk=16), PROMPT, 3, 10)
    for sequence in sequences:
        assert sequence.tokens[1:] == greedy(reference, [*PROMPT, sequence.tokens[0]], 9)


def test_a_shorter_dtype_for_the_pool(model: Any) -> None:
    decoder = TreeDecoder(model, dtype=torch.bfloat16)
    few_shot(decoder, PROMPT, 2, 4)
    assert decoder.cache.layers[0].keys.dtype == torch.bfloat16
    (first, _) = decoder.leaves
    tokens = decoder.sequence(first, include_prompt=True).tokens
    expected = logits_after(tiny_llama(), tokens)[-1]
    torch.testing.assert_close(
        decoder.logits([first])[0], expected, rtol=0.1, atol=0.1 * float(expected.abs().max())
    )


def test_fork_and_prune_keep_every_other_path(model: Any, reference: Any) -> None:
    decoder = TreeDecoder(model, page_size=4)
    (root,) = decoder.prefill(PROMPT)
    a, b, c = decoder.fork(root, [3, 5, 7])
    decoder.step()
    decoder.step()
    a1, a2 = decoder.fork(a, 2)  # share their next token's logits, and so their tokens
    decoder.extend({b: [11, 12, 13]})
    decoder.step()
    assert sorted(decoder.prune(c)) == [c]
    check_slots(decoder)
    d = decoder.fork(root, [9])[0]  # an inner node can be forked again
    decoder.step()
    expected = [3, *greedy(reference, [*PROMPT, 3], 3)]
    for leaf in (a1, a2):
        assert decoder.sequence(leaf).tokens == expected
    given = [5, *greedy(reference, [*PROMPT, 5], 1), 11, 12, 13]
    assert decoder.sequence(b).tokens == given + greedy(reference, PROMPT + given, 2)
    assert decoder.sequence(d).tokens == [9]
    assert decoder.score(d) == pytest.approx(score(reference, PROMPT, [9]), abs=1e-4)
    # given tokens do not count
    parts = score(reference, PROMPT, given[:2]) + score(
        reference, PROMPT + given, decoder.sequence(b).tokens[5:]
    )
    assert decoder.score(b) == pytest.approx(parts, abs=1e-3)
    # the last leaf below an inner node takes it along
    assert sorted(decoder.prune(a1)) == [a1]
    assert sorted(decoder.prune(a2)) == [a, a2]
    check_slots(decoder)
    with pytest.raises(ValueError, match="node must be a live node"):
        decoder.node(a)


def test_pruned_slots_are_used_again(model: Any, reference: Any) -> None:
    decoder = TreeDecoder(model, page_size=4, max_slots=96)
    (root,) = decoder.prefill(PROMPT)
    keeper = decoder.fork(root, [2])[0]
    for round_ in range(12):
        children = decoder.fork(root, [4 + round_, 5 + round_, 6 + round_])
        for _ in range(2):
            decoder.step()
        check_slots(decoder)
        for child, token in zip(children, range(4 + round_, 7 + round_), strict=True):
            assert decoder.sequence(child).tokens == [token, *greedy(reference, [*PROMPT, token], 1)]
            decoder.prune(child)
    assert decoder.cache.num_slots <= 96
    tokens = decoder.sequence(keeper).tokens
    assert tokens == [2, *greedy(reference, [*PROMPT, 2], 23)]


def test_a_full_pool_raises_and_changes_nothing(model: Any, reference: Any) -> None:
    decoder = TreeDecoder(model, page_size=4, max_slots=48)
    (root,) = decoder.prefill(PROMPT)
    decoder.fork(root, [2, 3])
    for _ in range(4):
        decoder.step()
    before = decoder.sequences()
    with pytest.raises(RuntimeError, match="max_slots must be at least 56 for this step, got 48"):
        decoder.step()
    assert decoder.sequences() == before
    check_slots(decoder)
    decoder.prune(decoder.leaves[1])
    decoder.step()
    assert decoder.sequences()[0].tokens == [2, *greedy(reference, [*PROMPT, 2], 4)]
    with pytest.raises(RuntimeError, match="max_slots"):
        TreeDecoder(model, max_slots=32).prefill(PROMPT)


def test_the_pool_grows(model: Any, reference: Any) -> None:
    long = tiny_llama(max_position_embeddings=4096)
    decoder = TreeDecoder(long)
    prompt = random_tokens(1000)
    (root,) = decoder.prefill(prompt)
    before = decoder.cache.num_slots
    children = decoder.fork(root, [2, 3, 4])
    decoder.step()
    assert decoder.cache.num_slots >= 2 * before
    expected = logits_after(tiny_llama(max_position_embeddings=4096), [*prompt, 3])[-1]
    torch.testing.assert_close(decoder.logits([children[1]])[0], expected, rtol=1e-4, atol=1e-3)


def test_everything_pruned_then_a_new_prompt(model: Any, reference: Any) -> None:
    decoder = TreeDecoder(model)
    (root,) = decoder.prefill(PROMPT)
    decoder.prune(root)
    assert decoder.leaves == []
    assert decoder.active == []
    (again,) = decoder.prefill(PROMPT[:20])
    assert again != root
    decoder.step()
    assert decoder.sequence(again).tokens == greedy(reference, PROMPT[:20], 1)
    decoder.reset()
    assert decoder.prefill(PROMPT) == [0]


def test_some_leaves_may_wait(model: Any, reference: Any) -> None:
    decoder = TreeDecoder(model)
    (root,) = decoder.prefill(PROMPT)
    a, b = decoder.fork(root, [2, 3])
    decoder.step()
    for _ in range(3):
        assert decoder.step([b]).nodes == [b]
    decoder.step()
    assert decoder.sequence(a).tokens == [2, *greedy(reference, [*PROMPT, 2], 1)]
    assert decoder.sequence(b).tokens == [3, *greedy(reference, [*PROMPT, 3], 4)]


def test_end_tokens(reference: Any) -> None:
    first = logits_after(reference, PROMPT)[-1].topk(4).indices.tolist()
    plain = [[token, *greedy(reference, [*PROMPT, token], 9)] for token in first]
    eos = plain[1][4]
    ended = [tokens[: tokens.index(eos) + 1] if eos in tokens else tokens for tokens in plain]
    assert any(tokens != end for tokens, end in zip(plain, ended, strict=True))
    for option in ("model", eos, [eos, VOCAB + 1]):
        decoder = TreeDecoder(tiny_llama(eos_token_id=eos), eos_token_id=option)
        sequences = few_shot(decoder, PROMPT, 4, 10)
        assert [s.tokens for s in sequences] == ended
        assert [s.finished for s in sequences] == [tokens[-1] == eos for tokens in ended]
        for sequence in sequences:
            assert sequence.score == pytest.approx(score(reference, PROMPT, sequence.tokens), abs=1e-3)
        finished = next(s.node for s in sequences if s.finished)
        with pytest.raises(ValueError, match="is finished"):
            decoder.step([finished])
        with pytest.raises(ValueError, match="unfinished"):
            decoder.fork(finished, 2)
    decoder = TreeDecoder(tiny_llama(eos_token_id=eos), eos_token_id=None)
    assert [s.tokens for s in few_shot(decoder, PROMPT, 4, 10)] == plain


# ---- sampling


def test_sampling_repeats_with_its_generator(model: Any, reference: Any) -> None:
    def run(seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        decoder = TreeDecoder(model)
        found = best_of_n(decoder, PROMPT, 6, 8, temperature=1.0, top_k=20, top_p=0.95, generator=generator)
        ranks = [s.score / len(s.tokens) for s in found]
        assert ranks == sorted(ranks, reverse=True)
        for s in found:
            assert s.score == pytest.approx(score(reference, PROMPT, s.tokens), abs=1e-3)
        return [s.tokens for s in found]

    assert run(3) == run(3)
    assert run(3) != run(4)
    assert len({tuple(tokens) for tokens in run(3)}) > 1


def test_probabilities() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    torch.testing.assert_close(probabilities(logits, 2.0), (logits / 2).softmax(-1))
    top = probabilities(logits, top_k=2)
    torch.testing.assert_close(top[0, 2:], logits[0, 2:].softmax(-1))
    assert top[0, :2].tolist() == [0, 0]
    # softmax: .032 .087 .237 .644
    assert (probabilities(logits, top_p=0.64)[0] > 0).tolist() == [False, False, False, True]
    assert (probabilities(logits, top_p=0.65)[0] > 0).tolist() == [False, False, True, True]
    assert (probabilities(logits, top_p=1.0)[0] > 0).all()
    drawn = choose_tokens(
        logits.expand(20000, -1), temperature=1.0, generator=torch.Generator().manual_seed(0)
    ).bincount(minlength=4)
    torch.testing.assert_close(drawn / 20000, logits[0].softmax(-1), atol=0.015, rtol=0)


# ---- searches


def brute_force_beams(
    model: Any, prompt: list[int], beams: int, length: int
) -> list[tuple[float, list[int]]]:
    kept: list[tuple[float, list[int]]] = [(0.0, [])]
    for _ in range(length):
        candidates = []
        for total, tokens in kept:
            logprobs = logits_after(model, prompt + tokens)[-1].log_softmax(-1)
            candidates += [(total + float(logprobs[t]), [*tokens, t]) for t in range(VOCAB)]
        kept = sorted(candidates, key=lambda c: c[0], reverse=True)[:beams]
    return kept


@pytest.mark.parametrize("num_beams", [1, 4])
def test_beam_search_is_brute_force(model: Any, reference: Any, num_beams: int) -> None:
    decoder = TreeDecoder(model, page_size=2)
    found = beam_search(decoder, PROMPT, num_beams, 6)
    expected = brute_force_beams(reference, PROMPT, num_beams, 6)
    assert [s.tokens for s in found] == [tokens for _, tokens in expected]
    for s, (total, _) in zip(found, expected, strict=True):
        assert s.score == pytest.approx(total, abs=1e-3)
    check_slots(decoder)


def test_beam_search_sets_ended_beams_aside(reference: Any) -> None:
    ranked = brute_force_beams(reference, PROMPT, 3, 3)
    eos = ranked[0][1][2]
    found = beam_search(TreeDecoder(tiny_llama(), eos_token_id=eos), PROMPT, 3, 5, length_penalty=0.0)
    assert len(found) == 3
    for s in found:
        assert eos not in s.tokens[:-1]
        assert s.finished == (s.tokens[-1] == eos)
        assert s.score == pytest.approx(score(reference, PROMPT, s.tokens), abs=1e-3)
    assert any(s.finished for s in found)


def test_tree_of_thought_follows_its_schedule(model: Any, reference: Any) -> None:
    schedule = [
        ThoughtNode(0, [1, 2, 3]),
        ThoughtNode(4, []),
        ThoughtNode(6, [4, 5]),
        ThoughtNode(5, []),
        ThoughtNode(9, []),
        ThoughtNode(10, [6]),
        ThoughtNode(11, []),
    ]
    decoder = TreeDecoder(model, page_size=4)
    thoughts = Thoughts()
    steps = tree_of_thought_steps(decoder, PROMPT, schedule, thoughts)
    assert [len(step.nodes) for step in steps] == [3, 3, 3, 3, 2, 1, 2, 2, 2, 1, 1]
    assert thoughts.steps == 11
    assert thoughts.parent == {1: 0, 2: 0, 3: 0, 4: 2, 5: 2, 6: 5}
    lengths = {1: 4, 2: 6, 3: 5, 4: 3, 5: 4, 6: 1}
    ranks = logits_after(reference, PROMPT)[-1].topk(3).indices.tolist()
    above: dict[int, list[int]] = {0: PROMPT}
    for name in sorted(lengths):
        past = above[thoughts.parent[name]]
        siblings = [n for n in lengths if thoughts.parent[n] == thoughts.parent[name]]
        ranks = logits_after(reference, past)[-1].topk(len(siblings)).indices.tolist()
        first = ranks[siblings.index(name)]
        assert thoughts.tokens[name] == [first, *greedy(reference, [*past, first], lengths[name] - 1)]
        above[name] = past + thoughts.tokens[name]
    # every step counts the live tree once, or every leaf's path
    live = [[1, 2, 3]] * 4 + [[2, 3], [2]] + [[4, 5]] * 3 + [[5], [6]]
    age = dict.fromkeys(lengths, 0)
    unique = per_sequence = 0
    for leaves in live:
        for leaf in leaves:
            age[leaf] += 1
        paths = []
        for leaf in leaves:
            path, node = [], leaf
            while node:
                path.append(node)
                node = thoughts.parent[node]
            paths.append(path)
        unique += 40 + sum(age[n] for n in {n for path in paths for n in path})
        per_sequence += sum(40 + sum(age[n] for n in path) for path in paths)
    assert (thoughts.kv_tokens, thoughts.kv_tokens_per_sequence) == (unique, per_sequence)
    assert decoder.leaves == []
    assert decoder._pool.num_free == decoder._pool.num_slots


# ---- token trees


@pytest.mark.parametrize("page_size", [1, 16])
def test_verify_step_is_greedy_decoding(model: Any, reference: Any, page_size: int) -> None:
    expected = greedy(reference, PROMPT, 80)
    tree = TokenTree(medusa_paths(20, branching=4))
    draft = TokenRecycling(VOCAB, 4)
    everything = PROMPT + expected
    draft.update(torch.tensor(everything), logits_after(reference, everything))
    decoder = TreeDecoder(model, page_size=page_size)
    (root,) = decoder.prefill(PROMPT)
    steps = 0
    while len(decoder.sequence(root).tokens) < 60:
        (pending,) = decoder.choose([root])
        (outcome,) = decoder.verify_step(tree, draft.draft(pending, tree))
        assert outcome.node == root
        assert len(outcome.tokens) == 1 + outcome.num_accepted
        steps += 1
    tokens = decoder.sequence(root).tokens
    assert tokens == expected[: len(tokens)]
    assert steps < len(tokens)  # some drafts were accepted
    assert decoder.score(root) == pytest.approx(score(reference, PROMPT, tokens), abs=1e-3)
    check_slots(decoder)
    decoder.step()  # and plain decoding goes on from there
    assert decoder.sequence(root).tokens == expected[: len(tokens) + 1]


def test_verify_step_on_several_leaves(model: Any, reference: Any) -> None:
    decoder = TreeDecoder(model, page_size=4)
    root, other = decoder.prefill([PROMPT, PROMPT[:9]])
    children = decoder.fork(root, [2, 3, 4])
    decoder.step([other, *children])
    leaves = [children[2], other, children[0]]
    paths = [[0], [0, 0], [1], [0, 0, 0], [0, 1]]
    futures = {
        leaf: greedy(reference, decoder.sequence(leaf, include_prompt=True).tokens, 8) for leaf in leaves
    }
    pending = decoder.choose(leaves)
    assert pending == [futures[leaf][0] for leaf in leaves]
    a, b, c = (futures[leaf] for leaf in leaves)
    wrong = (a[1] + 1) % VOCAB
    drafts = torch.tensor(
        [
            [a[1], a[2], a[1], a[3], a[2]],  # everything right
            [wrong if wrong != b[1] else wrong + 1, 0, b[1], 0, 0],  # the second child of the root
            [(c[1] + 1) % VOCAB, 0, (c[1] + 2) % VOCAB, 0, 0],  # nothing
        ]
    )
    outcomes = decoder.verify_step(paths, drafts, leaves)
    assert [o.num_accepted for o in outcomes] == [3, 1, 0]
    assert [o.tokens for o in outcomes] == [a[:4], b[:2], c[:1]]
    check_slots(decoder)
    decoder.step(leaves)
    for leaf, outcome in zip(leaves, outcomes, strict=True):
        assert (
            decoder.sequence(leaf).tokens[-len(outcome.tokens) - 1 :]
            == futures[leaf][: len(outcome.tokens) + 1]
        )


def test_verify_step_ends_at_an_end_token(reference: Any) -> None:
    future = greedy(reference, PROMPT, 8)
    eos = future[2]
    assert eos not in future[:2]
    decoder = TreeDecoder(tiny_llama(), eos_token_id=eos)
    (root,) = decoder.prefill(PROMPT)
    (outcome,) = decoder.verify_step([[0], [0, 0], [0, 0, 0]], torch.tensor(future[1:4]))
    assert outcome.tokens == future[:3]
    assert decoder.sequence(root).tokens == future[:3]
    assert decoder.sequence(root).finished
    assert decoder.score(root) == pytest.approx(score(reference, PROMPT, future[:3]), abs=1e-3)
    check_slots(decoder)
    decoder = TreeDecoder(tiny_llama(), eos_token_id=future[0])
    (root,) = decoder.prefill(PROMPT)
    (outcome,) = decoder.verify_step([[0]], torch.tensor([5]))
    assert (outcome.tokens, outcome.num_accepted) == ([future[0]], 0)
    assert decoder.sequence(root).finished


def test_verify_step_samples_the_models_distribution(reference: Any) -> None:
    """The token after the pending one is distributed as the model has it, whatever was drafted."""
    probs = probabilities(logits_after(reference, [*PROMPT, 2])[-1:], 1.5, top_k=5)[0]
    drafts = torch.tensor([probs.topk(5).indices[i] for i in (1, 3, 3)])
    decoder = TreeDecoder(tiny_llama())
    (root,) = decoder.prefill(PROMPT)
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(VOCAB)
    rounds, width = 25, 24
    for _ in range(rounds):
        leaves = decoder.fork(root, [2] * width)
        outcomes = decoder.verify_step(
            [[0], [1], [2]], drafts.expand(width, -1), leaves, temperature=1.5, top_k=5, generator=generator
        )
        for leaf, outcome in zip(leaves, outcomes, strict=True):
            counts[outcome.tokens[1] if outcome.num_accepted else decoder.choose([leaf])[0]] += 1
            decoder.prune(leaf) if leaf != leaves[-1] else None
        keep = leaves[-1]
        decoder.fork(root, [3])
        decoder.prune(keep)
    total = rounds * width
    expected = probs * total
    kept = expected > 0
    assert counts[~kept].sum() == 0
    chi2 = float(((counts - expected)[kept] ** 2 / expected[kept]).sum())
    assert chi2 < 18.5  # the 99.9% point for 4 degrees of freedom


def test_medusa_paths() -> None:
    for count in (1, 8, 63, 255):
        paths = [tuple(path) for path in medusa_paths(count)]
        assert len(set(paths)) == count
        for index, path in enumerate(paths):
            assert len(path) == 1 or path[:-1] in paths[:index]
            assert path[-1] == 0 or (*path[:-1], path[-1] - 1) in paths[:index]
    tree = TokenTree([[1], [0], [0, 1], [0, 0]])
    assert (tree.order, tree.parent, tree.depth, tree.rank) == (
        [1, 3, 2, 0],
        [-1, 0, 0, -1],
        [1, 2, 2, 1],
        [0, 0, 1, 1],
    )


def test_token_recycling_drafts_in_the_order_of_the_paths() -> None:
    draft = TokenRecycling(5, 2)
    logits = torch.zeros(3, 5)
    logits[0, 3], logits[0, 1] = 2, 1
    logits[1, 4], logits[1, 2] = 2, 1
    logits[2, 0], logits[2, 1] = 2, 1
    draft.update(torch.tensor([2, 3, 3]), logits)
    assert draft.table[2].tolist() == [3, 1]
    assert draft.table[3].tolist() == [0, 1]  # the last of equal tokens
    assert draft.draft(2, TokenTree([[1], [0], [0, 1], [0, 0]])).tolist() == [1, 3, 1, 0]
    other = draft.copy()
    other.table.zero_()
    assert draft.table[2].tolist() == [3, 1]


# ---- slots and errors


def test_slot_pool() -> None:
    pool = SlotPool(4, 8)
    (a,) = pool.allocate([([], 6)])
    assert a == [0, 1, 2, 3, 4, 5]
    assert pool.allocate([(a, 3), ([], 1)]) == [[6, 7, 8], [12]]
    assert pool.num_slots == 16
    pool.release([4, 5, 6, 7], kept=[0, 1, 2, 3, 8])
    assert pool.allocate([([12], 5)]) == [[13, 14, 15, 4, 5]]
    pool.release([8], kept=[9])
    assert pool.num_free == 0
    full = SlotPool(4, 4, 11)
    with pytest.raises(RuntimeError, match="max_slots must be at least 12 for this step, got 11"):
        full.allocate([([], 4), ([], 5)])
    assert full.allocate([([], 4), ([], 4)]) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(ValueError, match="page_size must be positive, got 0"):
        SlotPool(0, 8)
    with pytest.raises(ValueError, match="max_slots must be at least page_size"):
        SlotPool(16, 8, 15)


def test_bad_input(model: Any) -> None:
    decoder = TreeDecoder(model)
    with pytest.raises(ValueError, match="prefill must come first"):
        _ = decoder.tree
    with pytest.raises(ValueError, match="prompt must hold at least one token"):
        decoder.prefill([])
    with pytest.raises(ValueError, match="prompt must hold at least one token"):
        decoder.prefill([[1], []])
    with pytest.raises(ValueError, match=r"at most 256 tokens \(max_position_embeddings\), got 257"):
        decoder.prefill([1] * 257)
    (root,) = decoder.prefill(PROMPT)
    with pytest.raises(ValueError, match="branches must be at least 1, got 0"):
        decoder.fork(root, 0)
    with pytest.raises(ValueError, match="node must be a live node of the tree, got 77"):
        decoder.fork(77, 2)
    (child,) = decoder.fork(root, [4])
    with pytest.raises(ValueError, match="has children"):
        decoder.step([root])
    with pytest.raises(ValueError, match="must have no pending token"):
        decoder.extend({child: [3]})
    with pytest.raises(ValueError, match="must have no pending token"):
        decoder.force({child: 3})
    with pytest.raises(ValueError, match="decoded to its end"):
        decoder.fork(child, 2)
    with pytest.raises(ValueError, match="last token was decoded"):
        decoder.logits([child])
    decoder.step()
    with pytest.raises(ValueError, match="tokens must hold at least one token"):
        decoder.extend({child: []})
    for options, message in (
        ({"temperature": -1.0}, "temperature must be"),
        ({"top_k": 0}, "top_k must be"),
        ({"top_p": 1.5}, "top_p must be"),
    ):
        with pytest.raises(ValueError, match=message):
            decoder.step(**options)
    with pytest.raises(ValueError, match=r"draft_tokens must be \[1, 2\]"):
        decoder.verify_step([[0], [1]], torch.tensor([1, 2, 3]))
    for paths, message in (
        ([], "at least one path"),
        ([[0], [0]], "distinct"),
        ([[0], []], "non-empty"),
        ([[0], [1, 0]], r"paths must hold the path \[1\] above \[1, 0\]"),
    ):
        with pytest.raises(ValueError, match=message):
            decoder.verify_step(paths, torch.tensor([1] * len(paths)))
    with pytest.raises(ValueError, match='eos_token_id must be token ids, None or "model"'):
        TreeDecoder(model, eos_token_id="none")
    with pytest.raises(ValueError, match="prefill_chunk must be positive"):
        TreeDecoder(model, prefill_chunk=0)
    with pytest.raises(ValueError, match="schedule must list children behind"):
        tree_of_thought(decoder, None, [ThoughtNode(0, [1]), ThoughtNode(1, [1])])
    with pytest.raises(ValueError, match="root that has children"):
        tree_of_thought(decoder, None, [ThoughtNode(0, [])])
    with pytest.raises(ValueError, match="branches must be at least 1"):
        few_shot(decoder, None, 0, 3)
    assert math.isfinite(decoder.score(child))
