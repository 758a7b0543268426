# SPDX-License-Identifier: Apache-2.0
"""attn_implementation="palmette" against transformers' own SDPA."""

from __future__ import annotations

from typing import Any

import palmette
import pytest
import torch
from palmette.integrations.transformers import DeferredMask, PagedCache, attention_forward, register
from tiny_models import VOCAB, random_tokens, tiny_llama, tiny_qwen


@pytest.fixture(autouse=True, scope="module")
def _registered() -> None:
    register()
    register()  # twice does no harm


@pytest.fixture(autouse=True)
def _one_thread(num_threads: Any) -> None:
    num_threads(1)  # nothing here is large enough for two


def both(make: Any, **options: Any) -> tuple[Any, Any]:
    return make(**options), make(attention="palmette", **options)


@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen])
@pytest.mark.parametrize("length", [1, 33])
def test_causal_batches(make: Any, length: int) -> None:
    expected, ours = both(make)
    ids = torch.tensor([random_tokens(length, seed) for seed in (1, 2, 3)])
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-3)
        one = ours(ids[:1]).logits
        torch.testing.assert_close(one, expected(ids[:1]).logits, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("sliding_window", [None, 5])
def test_padded_batches(side: str, sliding_window: int | None) -> None:
    expected, ours = both(tiny_qwen, sliding_window=sliding_window)
    ids = torch.tensor([random_tokens(20, seed) for seed in (1, 2, 3)])
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 6, 19)):
        if padding:
            mask[row, :padding] = 0
    if side == "right":
        mask = mask.flip(1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        wanted = expected(ids, attention_mask=mask, position_ids=positions).logits
        got = ours(ids, attention_mask=mask, position_ids=positions).logits
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got[mask == 1], wanted[mask == 1], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("sliding_window", [None, 6])
def test_generate(sliding_window: int | None) -> None:
    expected, ours = both(tiny_qwen, sliding_window=sliding_window)
    ids = torch.tensor([random_tokens(16, seed) for seed in (1, 2)])
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    assert ours.generate(ids, **options).tolist() == expected.generate(ids, **options).tolist()
    beams = {**options, "num_beams": 3}
    assert ours.generate(ids, **beams).tolist() == expected.generate(ids, **beams).tolist()
    static = {**options, "cache_implementation": "static", "disable_compile": True}
    assert ours.generate(ids, **static).tolist() == expected.generate(ids, **static).tolist()


def test_gradients() -> None:
    expected, ours = both(tiny_llama)
    ids = torch.tensor([random_tokens(12, seed) for seed in (1, 2)])
    for model in (expected, ours):
        model(ids, labels=ids).loss.backward()
    for (name, a), b in zip(ours.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_masks_that_are_no_chains_go_through_sdpa() -> None:
    expected, ours = both(tiny_llama)
    ids = torch.tensor([random_tokens(10)])
    dense = torch.ones(10, 10, dtype=torch.bool).tril()
    dense[5:, 2] = False
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])  # two sequences in one row
    with torch.no_grad():
        for options in ({"attention_mask": dense[None, None]}, {"position_ids": packed}):
            torch.testing.assert_close(
                ours(ids, **options).logits, expected(ids, **options).logits, rtol=1e-4, atol=1e-3
            )
    torch.manual_seed(0)
    trained, own = both(tiny_llama, attention_dropout=0.5)
    for model in (trained.train(), own.train()):
        torch.manual_seed(0)
        model.logits = model(ids).logits
    torch.testing.assert_close(own.logits, trained.logits)


def test_a_tree_plan_without_a_cache() -> None:
    """A packed tree: each path's logits are those of its own sequence."""
    expected, ours = both(tiny_llama)
    tree = palmette.Tree([-1, 0, 0, 2], [7, 3, 4, 2])
    plan = palmette.plan_tree_attention(tree, "tokens", num_q_heads=6, num_kv_heads=2, head_dim=8)
    tokens = random_tokens(16)
    positions = torch.tensor([*range(7), *range(7, 10), *range(7, 11), *range(11, 13)])
    with torch.no_grad():
        packed = ours(
            torch.tensor([tokens]), position_ids=positions[None], use_cache=False, tree_plan=plan
        ).logits[0]
        for path in ([*range(7), 7, 8, 9], [*range(7), 10, 11, 12, 13, 14, 15]):
            alone = expected(torch.tensor([[tokens[i] for i in path]])).logits[0]
            torch.testing.assert_close(packed[path], alone, rtol=1e-4, atol=1e-3)


def test_a_paged_cache() -> None:
    expected, ours = both(tiny_llama)
    tokens = random_tokens(14)
    slots = torch.randperm(40, generator=torch.Generator().manual_seed(0))[:14]
    cache = PagedCache(ours.config, 32)
    cache.reserve(40)
    assert cache.num_slots == 40
    for layer in cache.layers:
        layer.keys.fill_(float("nan"))  # what no query may see
        layer.values.fill_(float("nan"))
    tree = palmette.Tree([-1], [10], slots[:10])
    logits = []
    with torch.no_grad():
        for part in (range(6), range(6, 10), range(10, 14)):
            if part.start == 10:
                tree.append([0], [4], slots[10:])
            queries = (torch.zeros(len(part), dtype=torch.long), torch.tensor(list(part)))
            plan = palmette.plan_tree_attention(tree, queries, num_q_heads=6, num_kv_heads=2, head_dim=8)
            cache.slots = slots[list(part)]
            out = ours(
                torch.tensor([[tokens[i] for i in part]]),
                position_ids=torch.tensor([list(part)]),
                past_key_values=cache,
                use_cache=True,
                tree_plan=plan,
            )
            logits.append(out.logits[0])
        alone = expected(torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(torch.cat(logits), alone, rtol=1e-4, atol=1e-3)


def test_errors() -> None:
    ours = tiny_llama(attention="palmette")
    ids = torch.tensor([random_tokens(5)] * 2)
    tree = palmette.Tree([-1], [5])
    plan = palmette.plan_tree_attention(tree, "tokens", num_q_heads=6, num_kv_heads=2, head_dim=8)
    with pytest.raises(ValueError, match=r"one packed row \[1, tokens\] with a tree_plan, got 2 rows"):
        ours(ids, tree_plan=plan)
    with pytest.raises(ValueError, match="attention_mask must be None with a tree_plan"):
        ours(ids[:1], tree_plan=plan, attention_mask=torch.ones(1, 1, 5, 5, dtype=torch.bool))
    cache = PagedCache(ours.config, 8)
    with pytest.raises(ValueError, match="slots must name one slot for each token"):
        ours(ids[:1], past_key_values=cache, use_cache=True, tree_plan=plan)
    cache.slots = torch.arange(4)
    with pytest.raises(ValueError, match="got 4 slots for states"):
        ours(ids[:1], past_key_values=cache, use_cache=True, tree_plan=plan)
    with pytest.raises(ValueError, match="num_slots must be positive, got 0"):
        PagedCache(ours.config, 0)
    dropping = tiny_llama(attention="palmette", attention_dropout=0.5).train()
    with pytest.raises(ValueError, match=r"attention_dropout must be 0 with a tree_plan, got 0\.5"):
        dropping(ids[:1], tree_plan=plan)
    q = torch.zeros(1, 6, 5, 8)
    with pytest.raises(ValueError, match="softcap must be None with dropout or a dense attention mask"):
        attention_forward(ours, q, q[:, :2], q[:, :2], torch.ones(1, 1, 5, 5, dtype=torch.bool), softcap=3.0)


def test_the_mask_is_deferred() -> None:
    arguments = {"batch_size": 1, "q_length": 4, "kv_length": 4}
    mask = DeferredMask({**arguments, "mask_function": lambda b, h, q, k: k <= q})
    assert mask.chains(6, 2, 8) is None  # a mask function of somebody else's
    assert VOCAB == 97
