# SPDX-License-Identifier: Apache-2.0
"""SharedPrefixSchedule against the dense baseline: every path as a sequence of its own."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import pipeline_workers
import pytest
import torch
from palmette import Tree, testing
from torch import Tensor

transformers = pytest.importorskip("transformers")

from palmette.pipelines.shared_prefix import MODES, SharedPrefixSchedule  # noqa: E402
from palmette.pipelines.shared_prefix.forest import Forest  # noqa: E402

VOCAB = 61


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Two would wait for each other longer than these models take."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

MODELS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, head_dim=8),
    "tied": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=16),
    "mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=7),
    "qwen3-moe": lambda: transformers.Qwen3MoeConfig(**SIZES, **MOE, head_dim=8),
}

TREES: dict[str, tuple[list[int], list[int]]] = {
    "star": ([-1, 0, 0, 0], [12, 5, 3, 9]),
    "prompt of one": ([-1, 0, 0], [1, 4, 6]),
    "rollouts of one": ([-1, 0, 0, 0], [9, 1, 1, 1]),
    "one rollout": ([-1, 0], [8, 6]),
    "no rollout": ([-1], [8]),
    "forest": ([-1, 0, 0, -1, 3, 3], [10, 4, 6, 7, 3, 5]),
    "nested": ([-1, 0, 0, 1, 1, 2, 2, 4, 4], [9, 5, 4, 3, 6, 7, 2, 4, 5]),
    "chain": ([-1, 0, 1, 2], [5, 4, 3, 6]),
    "empty nodes": ([-1, 0, 1, 1, 0, 4], [6, 0, 4, 5, 0, 3]),
}


def _norm(self: Any, x: Tensor) -> Tensor:
    return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))


def _route(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = torch.nn.functional.linear(x.reshape(-1, self.hidden_dim), self.weight)
    scores, chosen = logits.softmax(-1).topk(self.top_k, -1)
    return logits, scores, chosen


def model_of(name: str, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """In float64 without the places where transformers computes in float32."""
    torch.manual_seed(1)
    config = MODELS[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="sdpa", experts_implementation="eager"
    )
    with torch.no_grad():  # larger than usual, so that attention is not almost uniform
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(3)
    if dtype == torch.float64:
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.forward = functools.partial(_norm, module)
            elif type(module).__name__ == "Qwen3MoeTopKRouter":
                module.forward = functools.partial(_route, module)
    return model.to(dtype).train()


def tree_of(name: str) -> tuple[Tree, Tensor]:
    parents, counts = TREES[name]
    tree = Tree(torch.tensor(parents), torch.tensor(counts))
    generator = torch.Generator().manual_seed(2)
    return tree, torch.randint(0, VOCAB, (tree.num_tokens,), generator=generator)


def paths_of(tree: Tree) -> list[Tensor]:
    """Of each leaf the depth-first numbers of its path's tokens, and of which it is the first leaf."""
    starts = tree.node_start.tolist()
    paths = []
    for leaf in tree.leaves.tolist():
        path: list[int] = []
        at = leaf
        while at >= 0:
            path = [*range(starts[at], starts[at] + tree.length(at)), *path]
            at = tree.parent(at)
        paths.append(torch.tensor(path))
    return paths


def weights_of(tree: Tree) -> Tensor:
    return torch.randn(tree.num_tokens, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def loss_of(weights: Tensor):
    """Not linear, so that a wrong log-probability is a wrong gradient too."""

    def loss(logprobs: Tensor, tokens: Tensor) -> Tensor:
        w = weights[tokens].to(logprobs.dtype)
        return (w * logprobs + 0.1 * logprobs.square()).sum()

    return loss


def dense_logprobs(model: Any, path: Tensor, ids: Tensor, temperature: float) -> Tensor:
    logits = model(input_ids=ids[path][None], use_cache=False).logits[0, :-1]
    dtype = torch.promote_types(logits.dtype, torch.float32)
    logprobs = torch.log_softmax(logits.to(dtype) / temperature, -1)
    return logprobs.gather(-1, ids[path][1:, None])[:, 0]


def dense(
    model: Any,
    tree: Tree,
    ids: Tensor,
    loss_fn: Any,
    denominator: float,
    *,
    temperature: float = 1.0,
    aux: float = 0.0,
) -> Tensor:
    """Every path by itself; a token's loss counts on the first path that has it."""
    roots = set()
    starts = tree.node_start.tolist()
    for root in tree.roots.tolist():
        roots |= set(range(starts[root], starts[root] + tree.length(root)))
    seen: set[int] = set()
    total = torch.zeros((), dtype=torch.float64)
    logits: list[list[Tensor]] = []
    handles = []
    if aux:
        routers = [m for m in model.modules() if type(m).__name__ == "Qwen3MoeTopKRouter"]
        logits = [[] for _ in routers]
        for found, module in zip(logits, routers, strict=True):
            handles.append(module.register_forward_hook(lambda m, i, o, found=found: found.append(o[0])))
    for path in paths_of(tree):
        logprobs = dense_logprobs(model, path, ids, temperature)
        new = torch.tensor([t not in seen and t not in roots for t in path.tolist()[1:]], dtype=torch.bool)
        seen |= set(path.tolist())
        if new.any():
            total = total + loss_fn(logprobs[new], path[1:][new]).double() / denominator
    for handle in handles:
        handle.remove()
    if aux:
        everything = torch.cat([torch.cat(found) for found in logits]).softmax(-1)
        experts = everything.shape[-1]
        chosen = everything.topk(2, -1).indices.flatten()
        counts = torch.bincount(chosen, minlength=experts).double() / len(everything)
        total = total + aux * experts * (counts * everything.double().mean(0)).sum()
    if total.requires_grad:
        total.backward()
    return total.detach()


def gradients(model: Any) -> dict[str, Tensor]:
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }


def relative_error(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """The largest over all parameters, of norms."""
    assert got.keys() == want.keys()
    scale = max(float(w.double().norm()) for w in want.values()) * 1e-6
    return max(
        float((got[n].double() - want[n].double()).norm() / max(float(want[n].double().norm()), scale, 1e-30))
        for n in want
    )


def compare(
    model: Any, name: str, *, budget: int, mode: str = "retain", tolerance: float = 1e-9, **options: Any
) -> None:
    tree, ids = tree_of(name)
    loss_fn = loss_of(weights_of(tree))
    model.zero_grad()
    want_loss = dense(
        model,
        tree,
        ids,
        loss_fn,
        7.0,
        temperature=options.get("temperature", 1.0),
        aux=options.get("aux_loss", 0.0),
    )
    want = gradients(model)
    model.zero_grad()
    schedule = SharedPrefixSchedule(model, mode, **options)
    loss = schedule.step(tree, ids, loss_fn, microbatch_tokens=budget, denominator=7.0)
    assert loss.dtype == torch.float64
    assert not loss.requires_grad
    torch.testing.assert_close(loss, want_loss, rtol=tolerance, atol=tolerance)
    assert relative_error(gradients(model), want) < tolerance
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("budget", [1, 11, 1000])
@pytest.mark.parametrize("name", TREES)
def test_gradients_are_those_of_the_dense_baseline(scalar_backend, name, budget, mode):
    compare(model_of("llama"), name, budget=budget, mode=mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [k for k in MODELS if k != "llama"])
@pytest.mark.parametrize("name", ["star", "nested"])
def test_models(scalar_backend, kind, name, mode):
    compare(model_of(kind), name, budget=12, mode=mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("budget", [1, 12, 1000])
@pytest.mark.parametrize("name", ["star", "nested", "forest"])
def test_the_load_balancing_loss_is_exact(scalar_backend, name, budget, mode):
    compare(model_of("qwen3-moe"), name, budget=budget, mode=mode, aux_loss=0.7)


@pytest.mark.parametrize("mode", MODES)
def test_temperature(scalar_backend, mode):
    compare(model_of("llama"), "nested", budget=12, mode=mode, temperature=0.7)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("chunk_bytes", [1, 61 * 8 * 4])
def test_chunks_of_logits(scalar_backend, mode, chunk_bytes):
    compare(model_of("tied"), "nested", budget=20, mode=mode, chunk_bytes=chunk_bytes)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["star", "nested"])
def test_gradient_checkpointing(scalar_backend, name, mode):
    model = model_of("llama")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    compare(model, name, budget=12, mode=mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "frozen",
    ["embed_tokens", "layers.0", "layers.2", "self_attn", "lm_head", "k_proj", "norm", "all but lm_head"],
)
def test_frozen_parameters(scalar_backend, frozen, mode):
    """Some keys and values have no gradient then."""
    model = model_of("llama")
    for name, p in model.named_parameters():
        p.requires_grad = "lm_head" in name if frozen.startswith("all but") else frozen not in name
    compare(model, "nested", budget=12, mode=mode)
    for name, p in model.named_parameters():
        if not p.requires_grad:
            assert p.grad is None, name


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["k_proj", "lm_head"]])
def test_lora(scalar_backend, targets, mode):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    model = peft.get_peft_model(model_of("llama"), config).double()
    compare(model, "nested", budget=12, mode=mode)


def test_capped_logits_and_biased_heads(scalar_backend):
    model = model_of("llama")
    model.lm_head.bias = torch.nn.Parameter(torch.randn(VOCAB, dtype=torch.float64))
    compare(model, "star", budget=12)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral"])
@pytest.mark.parametrize("name", ["star", "nested"])
def test_float32_is_as_good_as_the_dense_baseline(backend, kind, name):
    """Within twice the baseline's own error against float64."""
    if backend.startswith("emulated"):
        pytest.skip("hundreds of launches")
    tree, ids = tree_of(name)
    loss_fn = loss_of(weights_of(tree))
    exact = model_of(kind)
    dense(exact, tree, ids, loss_fn, 7.0)
    want = gradients(exact)
    model = model_of(kind, torch.float32)
    dense(model, tree, ids, loss_fn, 7.0)
    base = relative_error(gradients(model), want)
    for mode, budget in itertools.product(MODES, (1, 12, 1000)):
        model.zero_grad()
        schedule = SharedPrefixSchedule(model, mode)
        schedule.step(tree, ids, loss_fn, microbatch_tokens=budget, denominator=7.0)
        assert relative_error(gradients(model), want) < 2 * base


@pytest.mark.parametrize("mode", MODES)
def test_bfloat16(cpu_backend, mode):
    """Sums of the prefix's gradients are in float32: it is as good as the dense baseline."""
    tree, ids = tree_of("star")
    loss_fn = loss_of(weights_of(tree))
    exact = model_of("llama", torch.float32)
    dense(exact, tree, ids, loss_fn, 7.0)
    want = gradients(exact)
    model = model_of("llama", torch.bfloat16)
    dense(model, tree, ids, loss_fn, 7.0)
    base = relative_error(gradients(model), want)
    model.zero_grad()
    SharedPrefixSchedule(model, mode).step(tree, ids, loss_fn, microbatch_tokens=9, denominator=7.0)
    assert relative_error(gradients(model), want) < 2 * base


@pytest.mark.parametrize("name", ["star", "nested"])
def test_on_the_emulated_gpu(name):
    """All of a step's kernels; the model is PyTorch's."""
    if "emulated" not in testing.backends():
        pytest.skip("the emulator is not built")
    tree, ids = tree_of(name)
    loss_fn = loss_of(weights_of(tree))
    model = model_of("llama", torch.float32, num_hidden_layers=2)
    dense(model, tree, ids, loss_fn, 7.0)
    want = gradients(model)
    model.zero_grad()
    with testing.backend("emulated"):
        SharedPrefixSchedule(model).step(tree, ids, loss_fn, microbatch_tokens=12, denominator=7.0)
    assert relative_error(gradients(model), want) < 1e-4


def with_dropout(model: Any) -> Any:
    for layer in model.model.layers:
        layer.mlp = torch.nn.Sequential(layer.mlp, torch.nn.Dropout(0.3))
    return model


def test_a_prefix_is_computed_again_with_the_same_dropout(scalar_backend):
    tree, ids = tree_of("nested")
    loss_fn = loss_of(weights_of(tree))
    model = with_dropout(model_of("llama"))
    results = []
    for mode in MODES:
        model.zero_grad()
        torch.manual_seed(5)
        loss = SharedPrefixSchedule(model, mode).step(
            tree, ids, loss_fn, microbatch_tokens=12, denominator=7.0
        )
        results.append((loss, gradients(model), torch.rand(1)))
    for loss, grads, drawn in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert relative_error(grads, results[0][1]) < 1e-12
        assert torch.equal(drawn, results[0][2])


@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_added_to_those_that_are_there(scalar_backend, mode):
    tree, ids = tree_of("nested")
    loss_fn = loss_of(weights_of(tree))
    model = model_of("tied")
    schedule = SharedPrefixSchedule(model, mode)

    def step() -> None:
        schedule.step(tree, ids, loss_fn, microbatch_tokens=12, denominator=7.0)

    step()
    once = gradients(model)
    step()
    assert relative_error(gradients(model), {n: 2 * g for n, g in once.items()}) < 1e-12
    model.zero_grad()
    step()
    assert all(torch.equal(g, once[n]) for n, g in gradients(model).items())


def test_an_equal_step_of_the_optimizer(scalar_backend):
    tree, ids = tree_of("nested")
    loss_fn = loss_of(weights_of(tree))
    models = [model_of("llama") for _ in range(2)]
    optimizers = [torch.optim.AdamW(m.parameters(), 1e-2) for m in models]
    schedule = SharedPrefixSchedule(models[0])
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        schedule.step(tree, ids, loss_fn, microbatch_tokens=12, denominator=7.0)
        dense(models[1], tree, ids, loss_fn, 7.0)
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


# ---- what goes wrong


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("calls", [0, 1, 3])
def test_an_exception_changes_nothing(scalar_backend, mode, calls):
    tree, ids = tree_of("nested")
    loss_fn = loss_of(weights_of(tree))
    model = model_of("tied")
    schedule = SharedPrefixSchedule(model, mode)
    schedule.step(tree, ids, loss_fn, microbatch_tokens=12, denominator=7.0)
    before = {n: (p.grad, None if p.grad is None else p.grad.clone()) for n, p in model.named_parameters()}
    values = {n: p.detach().clone() for n, p in model.named_parameters()}
    count = 0

    def fails(logprobs: Tensor, tokens: Tensor) -> Tensor:
        nonlocal count
        if count == calls:
            raise KeyboardInterrupt
        count += 1
        return loss_fn(logprobs, tokens)

    with pytest.raises(KeyboardInterrupt):
        schedule.step(tree, ids, fails, microbatch_tokens=12, denominator=7.0)
    for name, p in model.named_parameters():
        same, content = before[name]
        assert p.grad is same
        assert p.grad is None or torch.equal(p.grad, content)
        assert torch.equal(p, values[name])
    assert model.config._attn_implementation == "sdpa"
    model.zero_grad()
    schedule.step(tree, ids, loss_fn, microbatch_tokens=12, denominator=7.0)
    for name, p in model.named_parameters():
        assert p.grad is None or torch.equal(p.grad, before[name][1])


def test_no_gradient_at_all(scalar_backend):
    """Equal rewards: every advantage is 0."""
    tree, ids = tree_of("star")
    model = model_of("llama")
    loss = SharedPrefixSchedule(model).step(
        tree, ids, lambda lp, t: (0 * lp).sum(), microbatch_tokens=12, denominator=7.0
    )
    assert loss == 0
    assert not any(g.any() for g in gradients(model).values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tree": None}, "tree must be a palmette.Tree, got NoneType"),
        ({"token_ids": torch.zeros(3).long()}, r"token_ids must be \[N\] = \[29\], got \[3\]"),
        ({"token_ids": torch.zeros(29)}, "token_ids must be int32 or int64, got float32"),
        ({"token_ids": torch.full((29,), 61)}, r"token_ids must be in \[0, 61\), got 61 to 61"),
        ({"microbatch_tokens": 0}, "microbatch_tokens must be an integer of at least 1, got 0"),
        ({"denominator": 0}, "denominator must be a number in"),
        ({"loss_fn": lambda lp, t: lp}, r"loss_fn must return a scalar tensor, got \[5\]"),
        ({"loss_fn": lambda lp, t: 1.0}, "loss_fn must return a scalar tensor, got float"),
    ],
)
def test_bad_arguments(change, message):
    tree, ids = tree_of("star")
    arguments = {
        "tree": tree,
        "token_ids": ids,
        "loss_fn": loss_of(weights_of(tree)),
        "microbatch_tokens": 5,
        "denominator": 1.0,
    } | change
    positional = [arguments.pop(name) for name in ("tree", "token_ids", "loss_fn")]
    with pytest.raises(ValueError, match=f"^{message}"):
        SharedPrefixSchedule(model_of("llama", torch.float32)).step(*positional, **arguments)


def test_bad_options():
    model = model_of("llama", torch.float32)
    with pytest.raises(ValueError, match="mode must be one of retain, offload, recompute, got 'keep'"):
        SharedPrefixSchedule(model, "keep")
    with pytest.raises(ValueError, match="temperature must be a number in"):
        SharedPrefixSchedule(model, temperature=0.0)
    tree, ids = tree_of("star")
    options = {"microbatch_tokens": 5, "denominator": 1.0}
    with pytest.raises(ValueError, match="aux_loss must be 0 for a model without routers"):
        SharedPrefixSchedule(model, aux_loss=0.1).step(tree, ids, loss_of(weights_of(tree)), **options)
    model = model_of("llama", torch.float32, attention_dropout=0.1)
    with pytest.raises(ValueError, match=r"attention_dropout must be 0 behind a shared prefix, got 0\.1"):
        SharedPrefixSchedule(model).step(tree, ids, loss_of(weights_of(tree)), **options)
    model = model_of("llama", torch.float32)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="gradient checkpointing must not be the reentrant one"):
        SharedPrefixSchedule(model).step(tree, ids, loss_of(weights_of(tree)), **options)


# ---- what else it does


@pytest.mark.parametrize("budget", [1, 12, 1000])
@pytest.mark.parametrize("name", TREES)
def test_logprobs(scalar_backend, name, budget):
    tree, ids = tree_of(name)
    model = model_of("llama")
    got = SharedPrefixSchedule(model, temperature=0.8).logprobs(tree, ids, microbatch_tokens=budget)
    want = torch.zeros(len(ids), dtype=torch.float64)
    starts = tree.node_start.tolist()
    roots = {t for r in tree.roots.tolist() for t in range(starts[r], starts[r] + tree.length(r))}
    for path in paths_of(tree):
        want[path[1:]] = dense_logprobs(model, path, ids, 0.8).detach()
    want[list(roots)] = 0.0
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    assert not got.requires_grad


@pytest.mark.parametrize("biased", [False, True])
def test_entropies(scalar_backend, biased):
    tree, ids = tree_of("nested")
    model = model_of("llama")
    if biased:
        model.lm_head.bias = torch.nn.Parameter(torch.randn(VOCAB, dtype=torch.float64))
    schedule = SharedPrefixSchedule(model, temperature=0.8)
    logprobs, got = schedule.logprobs(tree, ids, microbatch_tokens=12, return_entropy=True)
    assert torch.equal(logprobs, schedule.logprobs(tree, ids, microbatch_tokens=12))
    want = torch.zeros(len(ids), dtype=torch.float64)
    for path in paths_of(tree):
        logits = model(input_ids=ids[path][None], use_cache=False).logits[0, :-1] / 0.8
        want[path[1:]] = torch.distributions.Categorical(logits=logits).entropy().detach()
    want[: tree.length(0)] = 0.0
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_losses_that_are_no_sums_over_tokens(scalar_backend, mode):
    """Through differentiable log-probabilities."""
    tree, ids = tree_of("nested")
    model = model_of("tied")
    tokens = torch.arange(tree.length(0), len(ids))

    def loss_of_all(logprobs: Tensor) -> Tensor:
        return torch.exp(0.1 * logprobs[tokens].sum()) + logprobs[tokens].square().mean().sqrt()

    schedule = SharedPrefixSchedule(model, mode)
    found = schedule.differentiable_logprobs(tree, ids, microbatch_tokens=12)
    loss_of_all(found).backward()
    got = gradients(model)
    model.zero_grad()
    everything = torch.zeros(len(ids), dtype=torch.float64)
    for path in paths_of(tree):
        everything = everything.index_copy(0, path[1:], dense_logprobs(model, path, ids, 1.0))
    loss_of_all(everything).backward()
    assert relative_error(got, gradients(model)) < 1e-9
    with torch.no_grad():
        assert not schedule.differentiable_logprobs(tree, ids, microbatch_tokens=12).requires_grad


def test_each_token_is_computed_once(scalar_backend):
    tree, ids = tree_of("nested")
    model = model_of("llama")
    seen: list[int] = []
    model.model.embed_tokens.register_forward_hook(lambda m, i, o: seen.extend(i[0].flatten().tolist()))
    SharedPrefixSchedule(model).step(
        tree, ids, loss_of(weights_of(tree)), microbatch_tokens=12, denominator=1.0
    )
    assert sorted(seen) == sorted(ids.tolist())


def test_no_microbatch_is_larger_than_asked(scalar_backend):
    tree, ids = tree_of("nested")
    model = model_of("llama")
    for budget in (7, 12, 20):
        sizes: list[int] = []
        handle = model.model.embed_tokens.register_forward_hook(
            lambda m, i, o, s=sizes: s.append(i[0].numel())
        )
        SharedPrefixSchedule(model).step(
            tree, ids, loss_of(weights_of(tree)), microbatch_tokens=budget, denominator=1.0
        )
        handle.remove()
        longest = max(tree.length(n) for n in tree.order.tolist())
        assert max(sizes) <= max(budget, longest)


def test_what_a_microbatch_holds():
    tree, _ = tree_of("nested")
    forest = Forest.of(tree)
    assert sum(forest.length) == forest.size[0] == 45
    for budget in range(1, 60):
        done: list[int] = []
        open_nodes: list[int] = []
        for do, places, parent in forest.walk(budget):
            if do == "push":
                assert parent == (open_nodes[-1] if open_nodes else -1)
                open_nodes.append(places[0])
                done += places
            elif do == "pop":
                assert open_nodes.pop() == places[0]
            else:
                assert parent == (open_nodes[-1] if open_nodes else -1)
                assert sum(forest.length[p] for p in places) <= budget or len(places) == 1
                done += places
        assert sorted(done) == list(range(len(forest.length)))


def test_deep_chains():
    """As deep as a tree search of hundreds of steps."""
    depth = 400
    tree = Tree(torch.arange(-1, depth - 1), torch.ones(depth, dtype=torch.int64))
    model = model_of("llama", torch.float32, num_hidden_layers=1, max_position_embeddings=512)
    ids = torch.randint(0, VOCAB, (depth,))
    loss = SharedPrefixSchedule(model).step(
        tree, ids, lambda lp, t: -lp.sum(), microbatch_tokens=16, denominator=float(depth)
    )
    want = model(input_ids=ids[None], labels=ids[None]).loss
    torch.testing.assert_close(loss.float() * depth / (depth - 1), want.detach(), rtol=1e-4, atol=1e-4)


# ---- data parallel


def rank_steps(rank: int, size: int, names: list[str], kind: str) -> tuple[Tensor, dict[str, Tensor]]:
    """One step with a tree of its own; the denominator is everybody's."""
    tree, ids = tree_of(names[rank])
    model = model_of(kind)
    with testing.backend("scalar"):
        schedule = SharedPrefixSchedule(model, group=torch.distributed.group.WORLD)
        options = {"microbatch_tokens": 12, "denominator": 7.0}
        schedule.step(tree, ids, loss_of(weights_of(tree)), **options)  # what is there is not summed
        loss = schedule.step(tree, ids, loss_of(weights_of(tree)), **options)
    return loss, gradients(model)


@pytest.mark.parametrize("names", [["star", "nested"], ["nested", "no rollout"]])
def test_two_ranks(scalar_backend, tmp_path, names):
    results = pipeline_workers.run(tmp_path, 2, rank_steps, names, "tied")
    model = model_of("tied")
    total = torch.zeros((), dtype=torch.float64)
    for name in names:
        tree, ids = tree_of(name)
        total = total + dense(model, tree, ids, loss_of(weights_of(tree)), 7.0)
    want = {n: 2 * g for n, g in gradients(model).items()}
    for loss, grads in results:
        torch.testing.assert_close(loss, total, rtol=1e-9, atol=1e-9)
        assert relative_error(grads, want) < 1e-9
    assert all(torch.equal(g, results[1][1][n]) for n, g in results[0][1].items())
