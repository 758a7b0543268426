# SPDX-License-Identifier: Apache-2.0
"""Which prompts a policy learns from, and how old its rollouts may be."""

from __future__ import annotations

import threading
import time

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from palmette.pipelines.rl import StalenessGate, VadeSampler


def sampler(count: int, seed: int = 0, **options) -> VadeSampler:
    return VadeSampler(count, generator=torch.Generator().manual_seed(seed), **options)


def test_prompts_in_between_are_drawn_most():
    vade = sampler(30, decay=1.0)
    prompts = torch.arange(30)
    successes = torch.tensor([0] * 10 + [8] * 10 + [16] * 10)
    for _ in range(5):
        vade.update(prompts, successes, 16)
    drawn = torch.cat([vade.draw(10) for _ in range(50)])
    shares = torch.bincount(drawn // 10, minlength=3) / len(drawn)
    assert shares[1] > 0.95


def test_a_draw_holds_different_prompts():
    vade = sampler(12)
    for _ in range(20):
        drawn = vade.draw(12)
        assert sorted(drawn.tolist()) == list(range(12))


def test_counts_and_decay():
    vade = sampler(3, prior=(2.0, 1.0), decay=0.5)
    vade.update(torch.tensor([1, 2]), torch.tensor([3, 0]), 4)
    assert vade.alpha.tolist() == [2.0, 5.0, 2.0]
    assert vade.beta.tolist() == [1.0, 2.0, 5.0]
    vade.update(torch.tensor([1]), torch.tensor([4]), 4)
    assert vade.alpha.tolist() == [2.0, 3.5 + 4, 2.0]
    assert vade.beta.tolist() == [1.0, 1.5, 3.0]
    for _ in range(60):
        vade.update(torch.tensor([0]), torch.tensor([2]), 4)
    assert vade.alpha[1:].tolist() == pytest.approx([2.0, 2.0])  # forgotten


def test_bad_updates_change_nothing():
    vade = sampler(3)
    before = vade.state_dict()
    with pytest.raises(ValueError, match="prompts must be in"):
        vade.update(torch.tensor([0, 7]), torch.tensor([1, 1]), 4)
    assert all(torch.equal(value, before[name]) for name, value in vade.state_dict().items())


def test_a_sampler_goes_on_where_it_was():
    first, second = sampler(20), sampler(20)
    first.update(torch.arange(20), torch.arange(20) % 5, 4)
    second.load_state_dict(first.state_dict())
    for seed in range(5):
        for vade in (first, second):
            vade.generator = torch.Generator().manual_seed(seed)
        assert torch.equal(first.draw(7), second.draw(7))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: VadeSampler(0), "count must be an integer of at least 1, got 0"),
        (lambda: VadeSampler(3, prior=(0.0, 1.0)), "prior's alpha must be a number in"),
        (lambda: VadeSampler(3, decay=1.5), r"decay must be a number in \[0, 1\], got 1.5"),
        (lambda: VadeSampler(3).draw(4), "batch must be at most the 3 prompts, got 4"),
        (
            lambda: VadeSampler(3).update(torch.tensor([0]), torch.tensor([5]), 4),
            r"successes must be in \[0, 4\], got \[5\]",
        ),
        (
            lambda: VadeSampler(3).update(torch.tensor([0]), torch.tensor([5, 1]), 4),
            r"successes must be \[B\] = \[1\], got \[2\]",
        ),
        (lambda: VadeSampler(3, prior=(1.0,)), r"prior must be \(alpha, beta\), got \(1.0,\)"),
        (lambda: VadeSampler(3, prior=2.0), r"prior must be \(alpha, beta\), got 2.0"),
        (
            lambda: VadeSampler(3).update(torch.tensor([3]), torch.tensor([1]), 4),
            r"prompts must be in \[0, 3\), got \[3\]",
        ),
        (
            lambda: VadeSampler(3).update(torch.tensor([0]), [1], 4),
            "successes must be a tensor, got list",
        ),
        (
            lambda: VadeSampler(3).load_state_dict({"alpha": torch.ones(3).double()}),
            "beta must be a tensor, got NoneType",
        ),
        (
            lambda: VadeSampler(3).load_state_dict(
                {"alpha": torch.ones(3).double(), "beta": -torch.ones(3).double()}
            ),
            "beta must be positive, got -1.0",
        ),
        (lambda: StalenessGate(2, 1).start(5), "count must be at most 4, else it would never start, got 5"),
        (
            lambda: StalenessGate(8, 1, 2).start(3),
            "count must be at most 2, else it would never start, got 3",
        ),
        (lambda: StalenessGate(1, 0).finish(-1), "count must be an integer of at least 1, got -1"),
        (lambda: StalenessGate(0, 1), "batch must be an integer of at least 1, got 0"),
        (lambda: StalenessGate(1, -1), "eta must be an integer of at least 0, got -1"),
        (lambda: StalenessGate(1, 0, 0), "max_concurrent must be an integer of at least 1, got 0"),
        (lambda: StalenessGate(1, 0).finish(), "count must be at most the 0 that run, got 1"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call()


def test_the_gate_by_its_formula():
    gate = StalenessGate(4, 2, 5)
    assert gate.capacity == min(5, 3 * 4)
    assert gate.start(5)
    assert gate.capacity == 0
    gate.finish(3)
    assert gate.capacity == min(5 - 2, 12 - 5)
    gate.finish(1, accepted=False)
    assert (gate.running, gate.accepted) == (1, 3)
    assert gate.start(4)
    gate.finish(5)
    assert gate.accepted == 8
    assert gate.start(4)
    gate.finish(4)
    assert gate.capacity == 0  # 12 accepted: the policy has to move
    assert not gate.start(1, timeout=0.01)
    gate.update()
    assert gate.capacity == 4


@hypothesis.given(
    st.integers(1, 4),
    st.integers(0, 3),
    st.lists(st.sampled_from(["start", "finish", "reject"]), max_size=60),
)
def test_no_rollout_is_used_too_late(batch, eta, events):
    """Consumed in the order in which they were accepted, a batch per update, none is more than eta behind."""
    gate = StalenessGate(batch, eta)
    running: list[int] = []
    accepted: list[int] = []
    for event in events:
        if event == "start" and gate.start(1, timeout=0):
            running.append(gate.version)
        elif event != "start" and running:
            version = running.pop(0)
            gate.finish(1, accepted=event == "finish")
            if event == "finish":
                accepted.append(version)
        while len(accepted) >= batch:
            used, accepted = accepted[:batch], accepted[batch:]
            assert gate.version - min(used) <= eta
            gate.update()


def test_waiting_threads_are_woken():
    gate = StalenessGate(1, 0)
    assert gate.start()
    gate.finish()
    started = []
    thread = threading.Thread(target=lambda: started.append(gate.start(timeout=10)))
    thread.start()
    time.sleep(0.02)
    assert not started
    gate.update()
    thread.join(10)
    assert started == [True]
