# SPDX-License-Identifier: Apache-2.0
"""SharedPrefixSchedule against the dense baseline: every path as a sequence of its own."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pipeline_workers
import pytest
import torch
from palmette import Tree, testing
from torch import Tensor

transformers = pytest.importorskip("transformers")

from palmette.integrations import prefix_transformers  # noqa: E402
from palmette.pipelines import saved_tensors  # noqa: E402
from palmette.pipelines.shared_prefix import MODES, SharedPrefixSchedule, vocabulary  # noqa: E402
from palmette.pipelines.shared_prefix.forest import Forest  # noqa: E402

VOCAB = 61


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Two would wait for each other longer than these models take."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _offload_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """What these models save is so small that it would stay."""
    monkeypatch.setattr(saved_tensors, "LEAST_BYTES", 1)


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
    "mqa": lambda: transformers.LlamaConfig(**SIZES | {"num_key_value_heads": 1}),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=16),
    "mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=7),
    "qwen3-moe": lambda: transformers.Qwen3MoeConfig(**SIZES, **MOE, head_dim=8),
    "gemma2": lambda: transformers.Gemma2Config(
        **SIZES, head_dim=8, sliding_window=7, attn_logit_softcapping=2.0, final_logit_softcapping=3.0
    ),
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
    "empty leaves": ([-1, 0, 0, 0, 3, 3], [6, 4, 0, 5, 0, 3]),
}


def _norm(self: Any, x: Tensor) -> Tensor:
    return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))


def _gemma_norm(self: Any, x: Tensor) -> Tensor:
    return (1 + self.weight) * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps))


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
        config, attn_implementation="eager" if name == "gemma2" else "sdpa", experts_implementation="eager"
    )
    with torch.no_grad():  # larger than usual, so that attention is not almost uniform
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(3)
    if dtype == torch.float64:
        for module in model.modules():
            if type(module).__name__ == "Gemma2RMSNorm":
                module.forward = functools.partial(_gemma_norm, module)
            elif type(module).__name__.endswith("RMSNorm"):
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
    without = {n for n, p in model.named_parameters() if p.grad is None}
    model.zero_grad()
    schedule = SharedPrefixSchedule(model, mode, **options)
    attention = model.config._attn_implementation
    loss = schedule.step(tree, ids, loss_fn, microbatch_tokens=budget, denominator=7.0)
    assert loss.dtype == torch.float64
    assert not loss.requires_grad
    torch.testing.assert_close(loss, want_loss, rtol=tolerance, atol=tolerance)
    assert relative_error(gradients(model), want) < tolerance
    if len(tree.leaves) > 1:  # a prompt alone has no loss
        assert {n for n, p in model.named_parameters() if p.grad is None} == without
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("budget", [1, 11, 1000])
@pytest.mark.parametrize("name", TREES)
def test_gradients_are_those_of_the_dense_baseline(scalar_backend, name, budget, mode):
    compare(model_of("llama"), name, budget=budget, mode=mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [k for k in MODELS if k not in ("llama", "gemma2")])
@pytest.mark.parametrize("name", ["star", "nested"])
def test_models(scalar_backend, kind, name, mode):
    for budget in (1, 12, 1000):
        compare(model_of(kind), name, budget=budget, mode=mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["star", "nested"])
def test_capped_logits(scalar_backend, name, mode):
    """Of attention and of the head; transformers computes parts of this model in float32."""
    model = model_of("gemma2")
    compare(model, name, budget=12, mode=mode, tolerance=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_rollouts_without_a_loss(scalar_backend, mode):
    """A masked rollout, and one microbatch of nothing else."""
    tree, ids = tree_of("star")
    weights = weights_of(tree)
    weights[tree.node_start[1] : tree.node_start[2]] = 0

    def loss_fn(logprobs: Tensor, tokens: Tensor) -> Tensor:
        return (weights[tokens].to(logprobs.dtype) * logprobs.square()).sum()

    model = model_of("llama")
    dense(model, tree, ids, loss_fn, 7.0)
    want = gradients(model)
    for budget in (1, 12, 1000):
        model.zero_grad()
        SharedPrefixSchedule(model, mode).step(tree, ids, loss_fn, microbatch_tokens=budget, denominator=7.0)
        assert relative_error(gradients(model), want) < 1e-9


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("budget", [1, 12, 1000])
@pytest.mark.parametrize("name", ["star", "nested", "forest", "empty leaves"])
def test_the_load_balancing_loss_is_exact(scalar_backend, name, budget, mode):
    compare(model_of("qwen3-moe"), name, budget=budget, mode=mode, aux_loss=0.7)


@pytest.mark.parametrize("mode", MODES)
def test_the_load_balancing_loss_of_checkpointed_layers(scalar_backend, mode):
    model = model_of("qwen3-moe")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    compare(model, "nested", budget=12, mode=mode, aux_loss=0.7)


def test_the_load_balancing_loss_is_that_of_transformers(scalar_backend):
    """And its coefficient that of the model's configuration."""
    tree = Tree(torch.tensor([-1, 0, 0]), torch.tensor([9, 6, 6]))
    ids = torch.randint(0, VOCAB, (tree.num_tokens,), generator=torch.Generator().manual_seed(2))
    model = model_of("qwen3-moe", output_router_logits=True, router_aux_loss_coef=0.3)
    want = model(input_ids=torch.stack([ids[path] for path in paths_of(tree)]), use_cache=False).aux_loss
    (0.3 * want).backward()
    grads = gradients(model)
    model.zero_grad()
    loss = SharedPrefixSchedule(model).step(
        tree, ids, lambda lp, t: 0 * lp.sum(), microbatch_tokens=6, denominator=1.0
    )
    torch.testing.assert_close(loss, 0.3 * want.detach().double(), rtol=1e-6, atol=1e-6)
    assert relative_error(gradients(model), grads) < 1e-5  # transformers' softmax is float32


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


@pytest.mark.parametrize("kind", ["llama", "tied"])
@pytest.mark.parametrize("where", ["weights", "embeddings", "head", "forwards"])
def test_hooks_are_seen(scalar_backend, kind, where):
    """Of the tables too, whose gradients do not come from autograd otherwise."""
    model = model_of(kind)
    rows = torch.arange(VOCAB) % 2 == 0
    if where == "weights":
        for p in {model.model.embed_tokens.weight, model.lm_head.weight}:
            p.register_hook(lambda grad: grad * rows[:, None])
    elif where == "embeddings":
        model.model.embed_tokens.register_forward_hook(lambda m, i, out: 2 * out)
    elif where == "head":
        model.lm_head.register_forward_pre_hook(lambda m, i: (0.5 * i[0],))
    else:  # as accelerate's hooks do
        embed, head = model.model.embed_tokens.forward, model.lm_head.forward
        model.model.embed_tokens.forward = lambda x: 3 * embed(x)
        model.lm_head.forward = lambda x: 0.5 * head(x)
    compare(model, "nested", budget=12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["k_proj", "lm_head"]])
def test_lora(scalar_backend, targets, mode):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    model = peft.get_peft_model(model_of("llama"), config).double()
    compare(model, "nested", budget=12, mode=mode)


def test_biased_heads(scalar_backend):
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


@pytest.mark.parametrize("name", [name for name in TREES if name not in ("star", "nested")])
def test_float32_on_every_tree(cpu_backend, name):
    tree, ids = tree_of(name)
    loss_fn = loss_of(weights_of(tree))
    exact = model_of("llama")
    dense(exact, tree, ids, loss_fn, 7.0)
    want = gradients(exact)
    for mode, budget in itertools.product(MODES, (1, 12)):
        model = model_of("llama", torch.float32)
        schedule = SharedPrefixSchedule(model, mode)
        schedule.step(tree, ids, loss_fn, microbatch_tokens=budget, denominator=7.0)
        assert relative_error(gradients(model), want) < 1e-4


@pytest.mark.parametrize("mode", MODES)
def test_autocast(cpu_backend, mode):
    """As good as the dense baseline under the same autocast."""
    tree, ids = tree_of("nested")
    loss_fn = loss_of(weights_of(tree))
    model = model_of("llama", torch.float32)
    dense(model, tree, ids, loss_fn, 7.0)
    want = gradients(model)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        dense(model, tree, ids, loss_fn, 7.0)
        base = relative_error(gradients(model), want)
        model.zero_grad()
        SharedPrefixSchedule(model, mode).step(tree, ids, loss_fn, microbatch_tokens=12, denominator=7.0)
    assert relative_error(gradients(model), want) < 2 * base
    model.zero_grad()
    tokens = torch.arange(tree.length(0), len(ids))
    with torch.autocast("cpu", torch.bfloat16):
        found = SharedPrefixSchedule(model, mode).differentiable_logprobs(tree, ids, microbatch_tokens=12)
        loss = loss_fn(found[tokens], tokens) / 7.0
    loss.backward()  # outside, as PyTorch recommends
    assert relative_error(gradients(model), want) < 2 * base


def test_a_loss_is_under_the_autocast_of_its_caller(cpu_backend):
    tree, ids = tree_of("star")
    seen: list[bool] = []

    def loss_fn(logprobs: Tensor, tokens: Tensor) -> Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return logprobs.sum()

    schedule = SharedPrefixSchedule(model_of("llama", torch.float32))
    for enabled in (True, False):
        seen.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            schedule.step(tree, ids, loss_fn, microbatch_tokens=12, denominator=7.0)
        assert set(seen) == {enabled}


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


def test_gradients_of_another_dtype(cpu_backend):
    tree, ids = tree_of("star")
    loss_fn = loss_of(weights_of(tree))
    model = model_of("llama", torch.bfloat16)
    for p in model.parameters():
        p.grad_dtype = torch.float32
    for _ in range(2):
        SharedPrefixSchedule(model).step(tree, ids, loss_fn, microbatch_tokens=9, denominator=7.0)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.fixture
def world() -> Iterator[Any]:
    """A group of this process alone."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_gradients_of_another_dtype_that_a_rank_does_not_reach(cpu_backend, world):
    tree, ids = tree_of("no rollout")
    model = model_of("llama", torch.bfloat16)
    for p in model.parameters():
        p.grad_dtype = torch.float32
    schedule = SharedPrefixSchedule(model, group=world)
    schedule.step(tree, ids, loss_of(weights_of(tree)), microbatch_tokens=9, denominator=7.0)
    assert all(p.grad.dtype == torch.float32 and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("name", TREES)
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
def test_log_probabilities_have_the_dropout_of_their_gradient(scalar_backend, mode):
    tree, ids = tree_of("nested")
    loss_fn = loss_of(weights_of(tree))
    tokens = torch.arange(tree.length(0), len(ids))
    model = with_dropout(model_of("llama"))
    schedule = SharedPrefixSchedule(model, mode)
    torch.manual_seed(5)
    loss = schedule.step(tree, ids, loss_fn, microbatch_tokens=12, denominator=1.0)
    want = gradients(model)
    model.zero_grad()
    torch.manual_seed(5)
    found = schedule.differentiable_logprobs(tree, ids, microbatch_tokens=12)
    drawn = torch.rand(1)
    later = loss_fn(found[tokens], tokens)
    torch.testing.assert_close(later.detach(), loss)
    later.backward()
    assert relative_error(gradients(model), want) < 1e-12
    torch.manual_seed(5)
    schedule.logprobs(tree, ids, microbatch_tokens=12)
    assert torch.equal(drawn, torch.rand(1))  # the backward pass draws nothing of its own


def test_offloaded_tensors_are_in_a_file(scalar_backend, monkeypatch):
    sizes = []
    real = saved_tensors.OffloadedTensors._pack

    def pack(self: Any, tensor: Tensor) -> Any:
        packed = real(self, tensor)
        sizes.append(self._end)
        return packed

    monkeypatch.setattr(saved_tensors.OffloadedTensors, "_pack", pack)
    compare(model_of("llama"), "nested", budget=12, mode="offload")
    assert max(sizes) > 10_000


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


class Failure(Exception):
    """Of a test."""


def fails_after(calls: int):
    """A hook that raises when it is called once more than ``calls`` times; tells whether it has."""
    seen = {"calls": 0, "raised": False}

    def hook(*_: object) -> None:
        seen["calls"] += 1
        if seen["calls"] > calls:
            seen["raised"] = True
            raise Failure

    return hook, seen


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("where", ["forward", "backward", "counting", "the end"])
def test_an_exception_anywhere_changes_nothing(scalar_backend, monkeypatch, where, mode):
    """In any forward of a layer, in any backward, while experts are counted, and after all."""
    tree, ids = tree_of("nested")
    loss_fn = loss_of(weights_of(tree))
    model = model_of("qwen3-moe")
    aux = 0.1 if where == "counting" else 0.0
    schedule = SharedPrefixSchedule(model, mode, aux_loss=aux)

    def step() -> None:
        schedule.step(tree, ids, loss_fn, microbatch_tokens=12, denominator=7.0)

    step()
    before = {n: p.grad.clone() for n, p in model.named_parameters()}
    raised = 0
    for calls in itertools.count():
        hook, seen = fails_after(calls)
        with monkeypatch.context() as patch:
            handle = None
            if where == "forward":
                handle = model.model.layers[1].register_forward_hook(hook)
            elif where == "backward":
                handle = model.model.layers[1].self_attn.k_proj.weight.register_hook(hook)
            elif where == "counting":
                handle = model.model.layers[1].mlp.register_forward_hook(hook)
            else:
                patch.setattr(vocabulary.Head, "finish", hook)
            with contextlib.suppress(Failure):
                step()
            if handle is not None:
                handle.remove()
        if not seen["raised"]:
            break
        raised += 1
        for name, p in model.named_parameters():
            assert torch.equal(p.grad, before[name])
        assert model.config._attn_implementation == "sdpa"
    assert raised >= (1 if where == "the end" else 4)
    for p in model.parameters():
        p.grad = None
    step()
    assert all(torch.equal(p.grad, before[name]) for name, p in model.named_parameters())


def open_files() -> int:
    """Temporary ones of this process."""
    found = 0
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found += "palmette-" in str(fd.readlink())
    return found


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="Linux tells which files are open")
def test_an_exception_leaves_no_files_behind(scalar_backend):
    tree, ids = tree_of("nested")
    model = model_of("llama")
    gc.collect()
    before = open_files()
    for _ in range(3):
        hook, _ = fails_after(3)
        with contextlib.suppress(Failure):
            SharedPrefixSchedule(model, "offload").step(
                tree, ids, lambda lp, t, hook=hook: hook() or lp.sum(), microbatch_tokens=12, denominator=7.0
            )
    gc.collect()
    assert open_files() == before


@pytest.mark.parametrize("kind", ["inference", "expanded"])
def test_old_gradients_that_cannot_be_added_to(scalar_backend, kind):
    tree, ids = tree_of("star")
    model = model_of("llama")
    step = functools.partial(
        SharedPrefixSchedule(model).step, tree, ids, loss_of(weights_of(tree)), denominator=7.0
    )
    step(microbatch_tokens=12)
    weight = model.lm_head.weight
    if kind == "inference":
        with torch.inference_mode():
            weight.grad = weight.grad.clone()
    else:
        weight.grad = torch.ones(1, 1, dtype=weight.dtype).expand_as(weight)
    before = {n: (p.grad, p.grad.clone()) for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match="gradients that are there must be dense, not expanded, no infer"):
        step(microbatch_tokens=12)
    for name, p in model.named_parameters():
        assert p.grad is before[name][0]
        assert torch.equal(p.grad, before[name][1])


@pytest.mark.parametrize("call", ["logprobs", "step"])
def test_a_loss_may_call_the_schedule(scalar_backend, call):
    tree, ids = tree_of("nested")
    other, other_ids = tree_of("star")
    loss_fn = loss_of(weights_of(tree))
    model = model_of("llama")
    schedule = SharedPrefixSchedule(model)
    options = {"microbatch_tokens": 12, "denominator": 7.0}
    schedule.step(tree, ids, loss_fn, **options)
    want = gradients(model)
    model.zero_grad()

    def curious(logprobs: Tensor, tokens: Tensor) -> Tensor:
        if call == "logprobs":
            schedule.logprobs(other, other_ids, microbatch_tokens=12)
        else:
            schedule.step(other, other_ids, lambda lp, t: 0 * lp.sum(), **options)
        return loss_fn(logprobs, tokens)

    schedule.step(tree, ids, curious, **options)
    assert all(torch.equal(g, want[n]) for n, g in gradients(model).items())


def test_inference_mode_leaves_nothing_behind(scalar_backend):
    tree, ids = tree_of("star")
    model = model_of("llama")
    schedule = SharedPrefixSchedule(model)
    with torch.inference_mode():
        first = schedule.logprobs(tree, ids, microbatch_tokens=12)
    schedule.step(tree, ids, loss_of(weights_of(tree)), microbatch_tokens=12, denominator=7.0)
    with torch.inference_mode():
        assert torch.equal(schedule.logprobs(tree, ids, microbatch_tokens=12), first)


def test_tokens_that_change_before_the_backward(scalar_backend):
    tree, ids = tree_of("star")
    model = model_of("llama")
    schedule = SharedPrefixSchedule(model)
    wants = []
    for change in (False, True):
        model.zero_grad()
        given = ids.clone()
        found = schedule.differentiable_logprobs(tree, given, microbatch_tokens=12)
        if change:
            given.zero_()
        found.square().sum().backward()
        wants.append(gradients(model))
    assert all(torch.equal(g, wants[1][n]) for n, g in wants[0].items())


def test_no_gradient_at_all(scalar_backend):
    """Equal rewards: every advantage is 0, and so is every gradient, but none is missing."""
    tree, ids = tree_of("star")
    for kind in ("llama", "tied"):
        model = model_of(kind)
        loss = SharedPrefixSchedule(model).step(
            tree, ids, lambda lp, t: (0 * lp).sum(), microbatch_tokens=12, denominator=7.0
        )
        assert loss == 0
        for p in model.parameters():
            assert p.grad is not None
            assert not p.grad.any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["llama", "qwen3-moe"])
def test_without_gradients(scalar_backend, world, kind, mode):
    """The same loss, that of load balancing included, and nothing else, of a group too."""
    tree, ids = tree_of("star")
    loss_fn = loss_of(weights_of(tree))
    model = model_of(kind)
    aux = 0.3 if kind == "qwen3-moe" else 0.0
    options = {"microbatch_tokens": 12, "denominator": torch.tensor(7)}
    want = SharedPrefixSchedule(model, mode, aux_loss=aux).step(tree, ids, loss_fn, **options)
    model.zero_grad()
    for group in (None, world):
        with torch.no_grad():
            schedule = SharedPrefixSchedule(model, mode, aux_loss=aux, group=group)
            torch.testing.assert_close(schedule.step(tree, ids, loss_fn, **options), want)
        assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tree": None}, "tree must be a palmette.Tree, got NoneType"),
        ({"token_ids": torch.zeros(3).long()}, r"token_ids must be \[N\] = \[29\], got \[3\]"),
        ({"token_ids": torch.zeros(29)}, "token_ids must be int32 or int64, got float32"),
        ({"token_ids": torch.full((29,), 61)}, r"token_ids must be in \[0, 61\), got 61 to 61"),
        ({"microbatch_tokens": 0}, "microbatch_tokens must be an integer of at least 1, got 0"),
        ({"denominator": 0}, "denominator must be a number in"),
        ({"loss_fn": None}, "loss_fn must be a function, got NoneType"),
        ({"loss_fn": lambda lp, t: lp}, r"loss_fn must return a scalar tensor, got torch.float32 \[5\]"),
        (
            {"loss_fn": lambda lp, t: lp.sum() * 1j},
            "loss_fn must return a scalar tensor, got torch.complex64",
        ),
        ({"loss_fn": lambda lp, t: 1.0}, "loss_fn must return a scalar tensor, got float"),
        (
            {"tree": Tree(torch.tensor([-1, -1, 1]), torch.tensor([20, 0, 9]))},
            "tree must have tokens in a root with children, got none in 1",
        ),
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


class Wrapper(torch.nn.Module):
    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module


def test_models_that_it_cannot_run():
    model = model_of("llama", torch.float32)
    with pytest.raises(
        ValueError, match="model must be a causal language model of transformers, not wrapped"
    ):
        SharedPrefixSchedule(Wrapper(model))
    model.config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    with pytest.raises(ValueError, match="layer_types of the model must be of full_attention, sliding_atten"):
        SharedPrefixSchedule(model)
    model = model_of("llama", torch.float32)
    model.lm_head.weight.device_mesh = None
    with pytest.raises(ValueError, match="model must hold whole parameters, got DTensors"):
        SharedPrefixSchedule(model)


def test_a_layer_that_attends_twice(scalar_backend):
    config = transformers.DiffLlamaConfig(**SIZES)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    tree, ids = tree_of("nested")
    with pytest.raises(ValueError, match="model must attend once in each layer behind a prefix, got another"):
        SharedPrefixSchedule(model).logprobs(tree, ids, microbatch_tokens=12)


def test_heads_that_are_more_than_the_output_embeddings():
    sizes = {key: SIZES[key] for key in ("vocab_size", "hidden_size", "intermediate_size")}
    config = transformers.BertConfig(**sizes, num_hidden_layers=2, num_attention_heads=4, is_decoder=True)
    with pytest.raises(ValueError, match="logits of the model must be its output embeddings times its dec"):
        SharedPrefixSchedule(transformers.BertLMHeadModel(config))
    config = transformers.ElectraConfig(
        **sizes, embedding_size=48, num_hidden_layers=2, num_attention_heads=4, is_decoder=True
    )
    with pytest.raises(ValueError, match="logits of the model must be its output embeddings times its dec"):
        SharedPrefixSchedule(transformers.ElectraForCausalLM(config))
    model = model_of("llama", torch.float32)
    model.config.logit_scale = 0.5
    with pytest.raises(ValueError, match=r"logit_scale of the model must be 1, got 0\.5"):
        SharedPrefixSchedule(model)


def test_attention_that_was_not_decided_stays_so():
    config = transformers.MptConfig(vocab_size=VOCAB, d_model=32, n_heads=4, n_layers=2, max_seq_len=64)
    model = transformers.AutoModelForCausalLM.from_config(config)
    before = model.config._attn_implementation, model.config.attn_config._attn_implementation
    tree, ids = tree_of("star")
    with pytest.raises(ValueError, match="model must attend to the tokens before in all of its 2 layers"):
        SharedPrefixSchedule(model).logprobs(tree, ids, microbatch_tokens=12)
    assert before == (model.config._attn_implementation, model.config.attn_config._attn_implementation)


def test_a_schedule_can_be_copied(scalar_backend):
    tree, ids = tree_of("star")
    schedule = SharedPrefixSchedule(model_of("llama"))
    want = schedule.logprobs(tree, ids, microbatch_tokens=12)
    copied = copy.deepcopy(schedule)
    assert copied.model is not schedule.model
    assert torch.equal(copied.logprobs(tree, ids, microbatch_tokens=12), want)


def test_learned_prompts():
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(model_of("llama", torch.float32), config)
    with pytest.raises(ValueError, match="model must have no learned prompts"):
        SharedPrefixSchedule(model)


def test_a_model_without_a_head():
    with pytest.raises(ValueError, match="model must have a language-model head, got LlamaModel without one"):
        SharedPrefixSchedule(transformers.AutoModel.from_config(MODELS["llama"]()))


def test_positions_that_depend_on_the_length():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    config = transformers.LlamaConfig(**SIZES | {"max_position_embeddings": 16}, rope_parameters=rope)
    schedule = SharedPrefixSchedule(transformers.LlamaForCausalLM(config))
    tree, ids = tree_of("star")
    with pytest.raises(ValueError, match=r"tree must have paths of at most 16 tokens, got 21: .*rope_type"):
        schedule.logprobs(tree, ids, microbatch_tokens=12)
    tree = Tree(torch.tensor([-1, 0, 0]), torch.tensor([8, 8, 5]))
    schedule.logprobs(tree, ids[:21], microbatch_tokens=12)


def test_calling_the_model_in_a_loss():
    tree, ids = tree_of("star")
    model = model_of("llama", torch.float32)

    def loss_fn(logprobs: Tensor, tokens: Tensor) -> Tensor:
        model(input_ids=ids[None])
        return logprobs.sum()

    with pytest.raises(ValueError, match="model must not be called by others while a step of it runs"):
        SharedPrefixSchedule(model).step(tree, ids, loss_fn, microbatch_tokens=5, denominator=1.0)


def test_parts_of_a_model_keep_their_attention():
    class Config:
        def __init__(self, implementation: str) -> None:
            self._attn_implementation = implementation

    class Composite:
        config = Config("sdpa")

        def set_attn_implementation(self, value: str | dict[str, str]) -> None:
            names = (
                value
                if isinstance(value, dict)
                else dict.fromkeys(("", "vision_config", "text_config"), value)
            )
            for name, found in names.items():
                (getattr(self.config, name) if name else self.config)._attn_implementation = found

    model = Composite()
    model.config.sub_configs = {"vision_config": Config, "text_config": Config}
    model.config.vision_config, model.config.text_config = Config("eager"), Config("sdpa")
    with prefix_transformers.prefix_attention_of(model):
        assert model.config.vision_config._attn_implementation == prefix_transformers.ATTENTION_NAME
    assert model.config.vision_config._attn_implementation == "eager"
    assert model.config.text_config._attn_implementation == "sdpa"


def test_a_layer_that_does_not_attend():
    model = model_of("llama", torch.float32)
    model.model.layers[1].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    tree, ids = tree_of("star")
    with pytest.raises(ValueError, match=r"^model must attend .* in all of its 3 layers, .* got 2 that do"):
        SharedPrefixSchedule(model).step(
            tree, ids, loss_of(weights_of(tree)), microbatch_tokens=5, denominator=1.0
        )


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


def test_parameters_that_change_before_the_backward(scalar_backend):
    tree, ids = tree_of("star")
    model = model_of("llama")
    found = SharedPrefixSchedule(model).differentiable_logprobs(tree, ids, microbatch_tokens=12)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    with pytest.raises(RuntimeError, match="parameters must not change between log-probabilities and their"):
        found.sum().backward()


def test_log_probabilities_have_no_load_balancing_loss(scalar_backend):
    tree, ids = tree_of("nested")
    model = model_of("qwen3-moe", output_router_logits=True, router_aux_loss_coef=0.3)
    wants = []
    for schedule in (SharedPrefixSchedule(model), SharedPrefixSchedule(model, aux_loss=0.0)):
        model.zero_grad()
        found = schedule.differentiable_logprobs(tree, ids, microbatch_tokens=12)
        found.square().sum().backward()
        wants.append(gradients(model))
    assert all(torch.equal(g, wants[1][n]) for n, g in wants[0].items())


def test_each_token_is_computed_once(scalar_backend):
    tree, ids = tree_of("nested")
    model = model_of("llama")
    schedule = SharedPrefixSchedule(model)
    seen: list[int] = []
    model.model.embed_tokens.register_forward_hook(lambda m, i, o: seen.extend(i[0].flatten().tolist()))
    schedule.step(tree, ids, loss_of(weights_of(tree)), microbatch_tokens=12, denominator=1.0)
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


def rank_steps(
    rank: int, size: int, names: list[str], kind: str, aux: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """One step with a tree of its own; the denominator is everybody's."""
    tree, ids = tree_of(names[rank])
    model = model_of(kind)
    with testing.backend("scalar"):
        schedule = SharedPrefixSchedule(model, group=torch.distributed.group.WORLD, aux_loss=aux)
        options = {"microbatch_tokens": 12, "denominator": 7.0}
        schedule.step(tree, ids, loss_of(weights_of(tree)), **options)  # what is there is not summed
        loss = schedule.step(tree, ids, loss_of(weights_of(tree)), **options)
    return loss, gradients(model)


@pytest.mark.parametrize("names", [["star", "nested"], ["nested", "no rollout"]])
def test_two_ranks(scalar_backend, tmp_path, names):
    results = pipeline_workers.run(tmp_path, 2, rank_steps, names, "tied", 0.0)
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


def test_experts_are_counted_over_all_ranks(scalar_backend, tmp_path):
    """One auxiliary loss over all sequences, not one per rank."""
    names = ["star", "forest"]
    results = pipeline_workers.run(tmp_path, 2, rank_steps, names, "qwen3-moe", 0.7)
    model = model_of("qwen3-moe")
    (parents, counts), (more, lengths) = (TREES[name] for name in names)
    both = Tree(
        torch.tensor([*parents, *(p if p < 0 else p + len(parents) for p in more)]),
        torch.tensor([*counts, *lengths]),
    )
    trees = [tree_of(name) for name in names]
    weights = torch.cat([weights_of(tree) for tree, _ in trees])
    total = dense(model, both, torch.cat([ids for _, ids in trees]), loss_of(weights), 7.0, aux=0.7)
    want = {n: 2 * g for n, g in gradients(model).items()}
    for loss, grads in results:
        torch.testing.assert_close(loss, total, rtol=1e-9, atol=1e-9)
        assert relative_error(grads, want) < 1e-9
