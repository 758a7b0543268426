# SPDX-License-Identifier: Apache-2.0
"""token_logprobs and policy_loss against their formulas."""

from __future__ import annotations

import functools
import math

import hypothesis
import hypothesis.strategies as st
import palmette
import pytest
import torch
from palmette import testing
from palmette.reference import losses as reference
from torch import Tensor

_ops = torch.ops.palmette
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(
    tokens: int, hidden: int, vocab: int, dtype: torch.dtype = torch.float32, size: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        (size * torch.randn(tokens, hidden)).to(dtype),
        torch.randn(vocab, hidden).to(dtype),
        torch.randint(0, vocab, (tokens,)),
    )


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The formulas of the reference in float32, with products of the inputs' dtype."""
    logits = (hidden.float() @ weight.float().T) / temperature
    logprobs = torch.log_softmax(logits, -1)
    return logprobs.gather(-1, targets[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "hidden", "vocab"),
    [(1, 1, 1), (5, 8, 3), (7, 16, 2048), (9, 16, 2049), (3, 32, 5000), (0, 8, 10), (40, 24, 333)],
)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_equals_the_reference(backend, tokens, hidden, vocab, dtype, temperature):
    h, w, y = make(tokens, hidden, vocab, dtype)
    leaves = h.clone().requires_grad_(), w.clone().requires_grad_()
    options = {"temperature": temperature, "chunk_bytes": 40_000}
    got = palmette.token_logprobs(*leaves, y, return_entropy=True, **options)
    assert [x.dtype for x in got] == [torch.float32] * 2
    double = h.double().requires_grad_(), w.double().requires_grad_()
    want = reference.token_logprobs(*double, y, temperature=temperature)
    single = h.clone().requires_grad_(), w.clone().requires_grad_()
    base = plain(*single, y, temperature)
    for name, *three in zip(("logprobs", "entropies"), got, want, base, strict=True):
        testing.assert_accurate(*three, factor=2, atol=2e-6, name=name)
    weights = torch.randn(2, tokens)
    grads = [
        torch.autograd.grad(values, at, tuple(weights.to(values[0].dtype)))
        for values, at in ((got, leaves), (want, double), (base, single))
    ]
    for name, *three in zip(("dhidden", "dweight"), *grads, strict=True):
        testing.assert_accurate(*three, factor=3, atol=1e-5, name=name)


def test_chunks_change_nothing_but_rounding(backend):
    h, w, y = make(50, 16, 100)
    whole = palmette.token_logprobs(h, w, y)
    for chunk_bytes in (1, 400, 4_000):
        torch.testing.assert_close(palmette.token_logprobs(h, w, y, chunk_bytes=chunk_bytes), whole)


@pytest.mark.parametrize("vocab", [100, 2049, 9000])
def test_rows_that_rise_and_fall(backend, vocab):
    """The largest logit so far changes all along the row, or never."""
    rising = torch.linspace(-3, 6, vocab)
    x, y = torch.stack([rising, rising.flip(0), 3 * rising]), torch.tensor([5, 7, vocab - 1])
    logprobs, _, entropies = _ops.gather_logprobs(x, y, 1.0, True)
    want = reference.gather_logprobs(x, y)
    torch.testing.assert_close(logprobs.double(), want[0], rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(entropies.double(), want[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [30.0, 1e4])
def test_logits_far_apart(backend, size):
    h, w, y = make(20, 8, 3000, size=size)
    got = palmette.token_logprobs(h, w, y, return_entropy=True)
    logits = h @ w.T
    want = reference.gather_logprobs(logits, y)
    for mine, other in zip(got, want, strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=3e-6, atol=3e-6 * size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_of_minus_infinity(backend, dtype):
    """Tokens that cannot be sampled: no probability, no gradient, no part in the entropy."""
    x = torch.randn(6, 2500).to(dtype)
    x[:, ::3] = -math.inf
    x[2] = -math.inf
    x[2, 7] = 1.0
    y = torch.tensor([1, 4, 7, 2, 0, 2498])
    logprobs, lse, entropies = _ops.gather_logprobs(x, y, 0.5, True)
    want = reference.gather_logprobs(x, y, temperature=0.5)
    torch.testing.assert_close(logprobs.double(), want[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropies.double(), want[1], atol=1e-5, rtol=1e-5)
    assert entropies[2] == 0
    dx = x.clone()
    _ops.gather_logprobs_backward_(torch.ones(6), torch.ones(6), dx, y, lse, entropies, 0.5)
    seen = torch.isfinite(x)
    assert dx.isfinite().all()  # in row 4, whose target has logit -inf, too
    rows = torch.arange(6) != 4
    assert not dx[rows][~seen[rows]].any()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 2047, 2048, 4999])
def test_what_is_not_finite_stays_in_its_row(backend, value, place):
    x = torch.randn(3, 5000)
    x[1, place] = value
    y = torch.tensor([1, 2, 3])
    logprobs, _, entropies = _ops.gather_logprobs(x, y, 1.0, True)
    assert logprobs.isnan().tolist() == entropies.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("temperature", [1e-6, 1e-3, 0.01, 0.1])
def test_probabilities_are_at_most_1(backend, temperature):
    """Also where a product of the largest logit would be rounded up, and another one down."""
    x = torch.randn(50, 3000) * 8
    y = x.argmax(-1)
    logprobs, _, _ = _ops.gather_logprobs(x, y, temperature, False)
    assert (logprobs <= 0).all()
    want = torch.log_softmax(x.double() / temperature, -1).gather(-1, y[:, None])[:, 0]
    torch.testing.assert_close(logprobs.double(), want, rtol=1e-5, atol=1e-6)


def test_a_row_of_minus_infinity(backend):
    x = torch.full((2, 70), -math.inf)
    x[0] = 0.0
    logprobs, lse, _ = _ops.gather_logprobs(x, torch.tensor([1, 2]), 1.0, False)
    assert logprobs[0] == pytest.approx(-math.log(70))
    assert logprobs[1].isnan()
    assert lse[1] == -math.inf


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_rows(backend, dtype):
    whole = torch.randn(5, 210).to(dtype)
    y = torch.randint(0, 99, (5,))
    for begin in range(4):
        part = whole[:, begin : begin + 99]
        got = _ops.gather_logprobs(part, y, 1.0, True)
        want = _ops.gather_logprobs(part.contiguous(), y, 1.0, True)
        for mine, other in zip(got, want, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)
        kept = whole.clone()
        inside = kept[:, begin : begin + 99]
        _ops.gather_logprobs_backward_(torch.ones(5), None, inside, y, got[1], None, 1.0)
        outside = torch.ones(210, dtype=torch.bool)
        outside[begin : begin + 99] = False
        assert torch.equal(kept[:, outside], whole[:, outside])


def test_tokens_without_gradient_cost_nothing_and_get_zeros(backend):
    x = torch.randn(4, 300)
    x[1] = math.nan
    y = torch.tensor([0, 1, 2, 3])
    lse = _ops.gather_logprobs(x, y, 1.0, False)[1]
    g = torch.tensor([1.0, 0.0, -2.0, 0.0])
    _ops.gather_logprobs_backward_(g, None, x, y, lse, None, 1.0)
    assert not x[1].any()
    assert not x[3].any()
    assert x[0].any()
    assert x[2].any()


@pytest.mark.parametrize("num_threads", [2])
def test_threads(cpu_backend, num_threads):
    x, y = torch.randn(33, 3001), torch.randint(0, 3001, (33,))
    results = []
    before = torch.get_num_threads()
    for threads in (1, num_threads):
        torch.set_num_threads(threads)
        logprobs, lse, entropies = _ops.gather_logprobs(x, y, 0.9, True)
        dx = x.clone()
        _ops.gather_logprobs_backward_(logprobs, entropies, dx, y, lse, entropies, 0.9)
        results.append((logprobs, lse, entropies, dx))
    torch.set_num_threads(before)
    assert all(map(torch.equal, *results))


def test_gradcheck(scalar_backend):
    h, w, y = make(4, 3, 5, torch.float64)

    def run(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        options = {"temperature": 0.8, "chunk_bytes": 90}
        found = palmette.token_logprobs(hidden, weight, y, return_entropy=True, **options)
        assert isinstance(found, tuple)
        return found

    assert torch.autograd.gradcheck(run, (h.requires_grad_(), w.requires_grad_()))


def test_frozen_weights():
    h, w, y = make(4, 3, 5)
    h.requires_grad_()
    palmette.token_logprobs(h, w, y).sum().backward()
    assert h.grad is not None
    assert w.grad is None


def test_never_more_than_a_chunk():
    """Neither forward nor backward holds the logits of all tokens."""
    tokens, vocab, chunk_bytes = 64, 1000, 16_000
    h, w, y = make(tokens, 3, vocab)
    h.requires_grad_()
    w.requires_grad_()
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.dim() == 2 and result.shape[1] == vocab:
                largest = max(largest, result.numel() * 4)
            return result

    with Watch():
        palmette.token_logprobs(h, w, y, chunk_bytes=chunk_bytes).sum().backward()
    assert 0 < largest <= chunk_bytes


def test_compiled():
    h, w, y = make(20, 8, 30)
    results = []
    compiled = torch.compile(palmette.token_logprobs, fullgraph=True, backend="aot_eager")
    for run in (palmette.token_logprobs, compiled):
        leaves = h.clone().requires_grad_(), w.clone().requires_grad_()
        logprobs = run(*leaves, y)
        results.append((logprobs, *torch.autograd.grad(logprobs.sum(), leaves)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(4, 3).long()}, "hidden must be float32 or"),
        ({"weight": torch.zeros(5, 4)}, r"weight must be \[vocab, 3\] like hidden, got \[5, 4\]"),
        ({"weight": torch.zeros(0, 3)}, r"weight must be \[vocab, 3\] like hidden, got \[0, 3\]"),
        ({"weight": torch.zeros(5, 3).half()}, "weight must be float32, got float16"),
        ({"targets": torch.zeros(3).long()}, r"targets must be \[T\] = \[4\], got \[3\]"),
        ({"targets": torch.zeros(4)}, "targets must be int32 or int64, got float32"),
        ({"targets": torch.tensor([0, 1, 5, 2])}, r"targets must be in \[0, 5\), got 5"),
        ({"targets": torch.tensor([0, -1, 5, 2])}, r"targets must be in \[0, 5\), got -1"),
        ({"temperature": 0.0}, "temperature must be a number in"),
        ({"chunk_bytes": 0}, "chunk_bytes must be an integer of at least 1, got 0"),
    ],
)
def test_bad_input(change, message):
    arguments = {
        "hidden": torch.zeros(4, 3),
        "weight": torch.zeros(5, 3),
        "targets": torch.arange(4),
    } | change
    with pytest.raises(ValueError, match=f"^{message}"):
        palmette.token_logprobs(**arguments)


def test_the_operator_looks_at_targets(raising_backend):
    with pytest.raises(RuntimeError, match=r"targets must be in \[0, 7\), got 7 at 1"):
        _ops.gather_logprobs(torch.zeros(2, 7), torch.tensor([0, 7]), 1.0, False)


# ---- policy_loss


def tokens(count: int = 12) -> tuple[Tensor, ...]:
    """logprobs, advantages, old, behaviour, reference."""
    base = -torch.rand(count) * 3
    return base, torch.randn(count), *(base + 0.4 * torch.randn(count) for _ in range(3))


def test_by_the_formula():
    """Token by token, in plain Python."""
    logprobs, advantages, old, behavior, ref = tokens(200)
    advantages *= 3
    got = palmette.policy_loss(
        logprobs,
        advantages,
        old_logprobs=old,
        behavior_logprobs=behavior,
        ref_logprobs=ref,
        clip=(0.2, 0.3),
        dual_clip=1.5,
        kl=0.1,
        correction="clamp",
        correction_cap=1.2,
        reduction="none",
    )
    for i in range(200):
        lp, a, o, b, r = (float(x[i]) for x in (logprobs, advantages, old, behavior, ref))
        u = math.exp(lp - o)
        loss = max(-a * u, -a * min(max(u, 0.8), 1.3))
        loss = min(loss, 1.5 * abs(a))
        loss *= min(math.exp(o - b), 1.2)
        loss += 0.1 * (math.exp(r - lp) - (r - lp) - 1)
        assert float(got[i]) == pytest.approx(loss, rel=1e-5, abs=1e-6)


def test_on_policy_gradient_is_reinforce():
    logprobs, advantages = tokens()[:2]
    logprobs.requires_grad_()
    palmette.policy_loss(logprobs, advantages, reduction="sum").backward()
    torch.testing.assert_close(logprobs.grad, -advantages)


def test_clipped_tokens_have_no_gradient():
    logprobs = torch.tensor([0.0, 0.0, 0.0, 0.0], requires_grad=True)
    old = torch.tensor([-1.0, 1.0, -1.0, 1.0])  # u = e, 1/e, e, 1/e
    advantages = torch.tensor([1.0, -1.0, -1.0, 1.0])
    palmette.policy_loss(logprobs, advantages, old_logprobs=old, reduction="sum").backward()
    assert logprobs.grad is not None
    assert (logprobs.grad != 0).tolist() == [False, False, True, True]


def test_dual_clip_bounds_the_loss_of_bad_tokens():
    logprobs = torch.tensor([5.0, 5.0], requires_grad=True)
    advantages = torch.tensor([-2.0, 2.0])
    loss = palmette.policy_loss(
        logprobs, advantages, old_logprobs=torch.zeros(2), dual_clip=3.0, reduction="none"
    )
    assert loss.tolist() == pytest.approx([6.0, -2.4])


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("correction", ["mask", "clamp"])
def test_corrections(level, correction):
    logprobs, advantages, old, _, _ = tokens(6)
    behavior = old - torch.tensor([0.0, 2.0, 0.5, 0.1, 0.2, 0.3])
    ends = torch.tensor([0, 3, 6])
    loss = functools.partial(
        palmette.policy_loss,
        logprobs,
        advantages,
        old_logprobs=old,
        behavior_logprobs=behavior,
        correction=correction,
        correction_cap=2.0,
        correction_level=level,
        cu_seqlens=ends,
    )
    got = loss(reduction="none")
    log_weight = old - behavior
    if level == "sequence":
        log_weight = torch.cat([log_weight[a:b].mean().expand(3) for a, b in ((0, 3), (3, 6))])
    weight = log_weight.exp()
    weight = weight.clamp(max=2.0) if correction == "clamp" else torch.where(weight > 2.0, 0.0, weight)
    plain_loss = palmette.policy_loss(logprobs, advantages, old_logprobs=old, reduction="none")
    torch.testing.assert_close(got, weight * plain_loss)
    torch.testing.assert_close(loss(), got.sum() / 6)  # masked tokens count in the denominator


def test_only_the_trained_policy_has_a_gradient():
    leaves = [x.requires_grad_() for x in tokens()]
    logprobs, advantages, old, behavior, ref = leaves
    loss = palmette.policy_loss(
        logprobs,
        advantages,
        old_logprobs=old,
        behavior_logprobs=behavior,
        ref_logprobs=ref,
        kl=0.1,
        correction="clamp",
    )
    loss.backward()
    assert [x.grad is not None for x in leaves] == [True, False, False, False, False]


@pytest.mark.parametrize(
    ("advantage", "options", "loss"),
    [
        (1.0, {}, -1.2),  # clipped
        (0.0, {}, 0.0),
        (-1.0, {"dual_clip": 3.0}, 3.0),
        (-1.0, {"correction": "mask", "behavior_logprobs": torch.tensor([-300.0])}, 0.0),
        (1.0, {"correction": "clamp", "behavior_logprobs": torch.tensor([-300.0])}, -6.0),
    ],
)
def test_ratios_beyond_float32(advantage, options, loss):
    """Where the loss is a constant, its gradient is 0, not 0 times infinity."""
    logprobs = torch.tensor([0.0], requires_grad=True)
    got = palmette.policy_loss(
        logprobs, torch.tensor([advantage]), old_logprobs=torch.tensor([-200.0]), **options
    )
    got.sum().backward()
    assert float(got) == pytest.approx(loss)
    assert logprobs.grad.tolist() == [0.0]


def test_gradients_of_the_policy():
    """Against autograd through the formula, away from where it has corners."""
    for seed in range(20):
        torch.manual_seed(seed)
        logprobs, advantages, old, behavior, _ = (x.double() for x in tokens(40))
        leaf, other = (logprobs.clone().requires_grad_() for _ in range(2))
        got = palmette.policy_loss(
            leaf,
            advantages,
            old_logprobs=old,
            behavior_logprobs=behavior,
            correction="clamp",
            clip=(0.1, 0.3),
            dual_clip=1.4,
            reduction="sum",
        )
        u = torch.exp(other - old)
        want = torch.maximum(-advantages * u, -advantages * u.clamp(0.9, 1.3))
        want = torch.where(advantages < 0, torch.minimum(want, 1.4 * advantages.abs()), want)
        want = (want * torch.exp(old - behavior).clamp(max=5.0)).sum()
        torch.testing.assert_close(got, want)
        got.backward()
        want.backward()
        torch.testing.assert_close(leaf.grad, other.grad)


def test_all_tokens_masked():
    """Weights above the cap: no loss and no gradient, where products would be infinite."""
    logprobs = torch.zeros(3, requires_grad=True)
    loss = palmette.policy_loss(
        logprobs,
        torch.ones(3),
        old_logprobs=torch.zeros(3),
        behavior_logprobs=torch.full((3,), -math.inf),
        correction="mask",
    )
    loss.backward()
    assert loss == 0
    assert not logprobs.grad.any()


def test_means():
    logprobs, advantages, old, _, _ = tokens(6)
    ends = torch.tensor([0, 1, 1, 6])
    each = palmette.policy_loss(logprobs, advantages, old_logprobs=old, reduction="none")
    options = {"old_logprobs": old, "cu_seqlens": ends}
    by_sequence = palmette.policy_loss(logprobs, advantages, **options, reduction="sequence_mean")
    torch.testing.assert_close(by_sequence, (each[0] + each[1:].mean()) / 2)
    torch.testing.assert_close(palmette.policy_loss(logprobs, advantages, **options), each.mean())
    empty = torch.zeros(0)
    assert palmette.policy_loss(empty, empty) == 0


@hypothesis.given(st.integers(1, 9), st.integers(1, 20), st.integers(0, 2**31))
def test_any_microbatches_add_up(cut, count, seed):
    torch.manual_seed(seed)
    logprobs, advantages, old, behavior, ref = tokens(count)
    options = {"kl": 0.2, "dual_clip": 2.0, "correction": "mask", "reduction": "sum"}

    def loss(part: slice) -> Tensor:
        return palmette.policy_loss(
            logprobs[part],
            advantages[part],
            old_logprobs=old[part],
            behavior_logprobs=behavior[part],
            ref_logprobs=ref[part],
            **options,
        )

    torch.testing.assert_close(loss(slice(cut)) + loss(slice(cut, None)), loss(slice(None)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logprobs": torch.zeros(3).half()}, "logprobs must be float32 or float64, got float16"),
        ({"advantages": torch.zeros(4)}, r"advantages must be \[T\] = \[3\], got \[4\]"),
        ({"old_logprobs": torch.zeros(2)}, r"old_logprobs must be \[T\] = \[3\], got \[2\]"),
        ({"clip": -0.1}, "clip must be a number in"),
        ({"dual_clip": 0.5}, "dual_clip must be a number in"),
        ({"kl": 0.1}, "ref_logprobs must be given where kl is not 0, got None"),
        ({"correction": "mask"}, "behavior_logprobs must be given where correction is, got None"),
        (
            {"behavior_logprobs": torch.zeros(3)},
            "correction must be one of mask, clamp where behavior_logprobs is given, got None",
        ),
        ({"clip": (0.1, 0.2, 0.3)}, r"clip must be a number or \(below, above\), got \(0.1, 0.2, 0.3\)"),
        ({"clip": None}, "clip must be a number in"),
        ({"dual_clip": math.inf}, "dual_clip must be a number in"),
        ({"advantages": [1.0, 2.0]}, r"advantages must be \[T\] = \[3\], got \[2\]"),
        ({"advantages": torch.zeros(3, 1)}, r"advantages must be \[T\] = \[3\], got \[3, 1\]"),
        ({"advantages": None}, "advantages must be numbers, got NoneType"),
        ({"correction": "drop"}, "correction must be one of mask, clamp, got 'drop'"),
        ({"reduction": "max"}, "reduction must be one of mean, sequence_mean, sum, none, got 'max'"),
        ({"reduction": "sequence_mean"}, "cu_seqlens must be given for sequences, got None"),
        (
            {"reduction": "sequence_mean", "cu_seqlens": torch.tensor([0, 2])},
            r"cu_seqlens must be non-decreasing from 0 to 3 \(tokens\), got \[0, 2\]",
        ),
    ],
)
def test_bad_policies(change, message):
    arguments = {"logprobs": torch.zeros(3), "advantages": torch.zeros(3)} | change
    with pytest.raises(ValueError, match=f"^{message}"):
        palmette.policy_loss(**arguments)


def test_advantages_of_groups():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    got = palmette.group_advantages(rewards)
    assert got[1].tolist() == [0.0] * 4
    torch.testing.assert_close(got[0], (rewards[0] - 0.5) / (rewards[0].std() + 1e-4))
    torch.testing.assert_close(palmette.group_advantages(rewards, normalize=False)[0], rewards[0] - 0.5)
    assert palmette.group_advantages(torch.ones(3, 1)).tolist() == [[0.0]] * 3
    # the mean of equal numbers is another one by rounding
    equal = torch.full((2, 7), 1000.1)
    assert (equal - equal.mean(-1, keepdim=True)).any()
    assert not palmette.group_advantages(equal).any()
    with pytest.raises(ValueError, match=r"rewards must be \[..., G\] with G of at least 1, got a scalar"):
        palmette.group_advantages(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"rewards must be \[..., G\] with G of at least 1, got \[2, 0\]"):
        palmette.group_advantages(torch.zeros(2, 0))


def _logprobs_case(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    x, y = torch.randn(5, 40).to(dtype), torch.randint(0, 40, (5,))
    return x, y, *_ops.gather_logprobs(x, y, 0.7, True)


def _backward_cases() -> list[tuple[object, ...]]:
    x, y, logprobs, lse, entropies = _logprobs_case()
    return [
        (torch.ones(5), None, x, y, lse, None, 0.7),
        (torch.ones(5), torch.ones(5), x.clone(), y, lse, entropies, 0.7),
        (None, logprobs, x.clone(), y, lse, entropies, 0.7),
    ]


OPCHECK_CASES = {
    "gather_logprobs": lambda: [
        (torch.randn(5, 40), torch.arange(5), 1.0, False),
        (torch.randn(5, 40).bfloat16(), torch.arange(5), 0.7, True),
    ],
    "gather_logprobs_backward_": _backward_cases,
}
