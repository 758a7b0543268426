# SPDX-License-Identifier: Apache-2.0
"""palmette.testing.recorded_launches: what the emulators run, as another machine gets it."""

from __future__ import annotations

import struct
from concurrent.futures import ThreadPoolExecutor

import palmette
import pytest
import torch
from palmette import testing

if "emulated" not in testing.backends():
    pytest.skip("the emulator is not built (ci/build.sh builds it)", allow_module_level=True)


def test_a_launch():
    outs, lses = torch.randn(5, 2, 3, 8), torch.randn(5, 2, 3)
    calls = []
    with testing.backend("emulated"), testing.recorded_launches(calls.append) as launches:
        out, lse = palmette.merge_states(outs, lses)
    palmette.merge_states(outs, lses)  # not recorded
    (launch,) = launches
    assert calls == launches
    assert (launch.name, launch.grid, launch.block, launch.shared_bytes) == (
        "merge_states", (4, 1, 1), (128, 1, 1), 0,
    )  # fmt: skip
    memory = {m.name: m for m in launch.memory}
    tensors = {"outs": outs, "lses": lses, "out": out, "lse": lse}
    assert memory.keys() == tensors.keys()
    for name, tensor in tensors.items():
        m = memory[name]
        assert (m.address, m.writable) == (tensor.data_ptr(), name in ("out", "lse"))
        assert m.after == tensor.numpy().tobytes()
        assert m.writable or m.before == m.after
    # the struct of csrc/merge/params.h, with pointers
    assert len(launch.parameters) % 8 == 0
    words = struct.unpack(f"{len(launch.parameters) // 8}Q", launch.parameters)
    assert {m.address for m in launch.memory} <= set(words)
    assert words[1:5] == (5, 2, 3, 8)


def test_launches_see_what_others_wrote():
    tree = palmette.Tree([-1, 0], [400, 2])
    plan = palmette.plan_tree_attention(tree, num_q_heads=2, num_kv_heads=1, head_dim=64, target="gpu")
    assert plan.io.partial_states > 0
    q, k, v = torch.randn(1, 2, 64), torch.randn(402, 1, 64), torch.randn(402, 1, 64)
    with testing.backend("emulated"), testing.recorded_launches() as launches:
        palmette.tree_attention(q, k, v, plan)
    first, second = ({m.name: m for m in launch.memory} for launch in launches)
    assert [launch.name for launch in launches] == ["attend", "attend_merge"]
    assert first["partial_sum"].after == second["partial_sum"].before == second["partial_sum"].after
    assert first["partial_sum"].before != first["partial_sum"].after


def test_recordings_within_recordings():
    outs, lses = torch.randn(5, 2, 3, 8), torch.randn(5, 2, 3)
    with testing.backend("emulated"), testing.recorded_launches() as outer:
        palmette.merge_states(outs, lses)
        with testing.recorded_launches() as inner:
            palmette.merge_states(outs, lses)
        palmette.merge_states(outs, lses)
    assert (len(outer), len(inner)) == (3, 1)
    assert inner[0] == outer[1]


def fail(_):
    raise KeyError("no such thing")


@pytest.mark.parametrize("callback", ["then", "before"])
def test_what_a_callback_raises_is_raised(callback):
    outs, lses = torch.randn(5, 2, 3, 8), torch.randn(5, 2, 3)
    with testing.backend("emulated"):
        with pytest.raises(KeyError, match="no such thing"), testing.recorded_launches(**{callback: fail}):
            out, _ = palmette.merge_states(outs, lses)
        assert torch.equal(out, palmette.merge_states(outs, lses)[0])


def test_a_callback_cannot_run_operators():
    outs, lses = torch.randn(5, 2, 3, 8), torch.randn(5, 2, 3)

    def then(_):
        palmette.merge_states(outs, lses)

    message = "a recorder of launches cannot run operators on the emulator"
    with (
        testing.backend("emulated"),
        pytest.raises(RuntimeError, match=message),
        testing.recorded_launches(then),
    ):
        palmette.merge_states(outs, lses)


def test_a_callback_cannot_change_the_emulators():
    """Others may wait for its operator, and hold what it would wait for."""
    outs, lses = torch.randn(5, 2, 3, 8), torch.randn(5, 2, 3)

    def before(_):
        with testing.emulator(seed=3):
            pass

    message = r"^a callback of recorded_launches\(\) cannot change the emulators$"
    with (
        testing.backend("emulated"),
        pytest.raises(RuntimeError, match=message),
        testing.recorded_launches(before=before),
    ):
        palmette.merge_states(outs, lses)


def test_settings_are_what_they_were():
    outs, lses = torch.randn(5, 2, 3, 8), torch.randn(5, 2, 3)
    with testing.emulator(order="reverse", count_requests=True):
        with testing.emulator(order="random", seed=3):
            pass
        with testing.backend("emulated_check"):
            palmette.merge_states(outs, lses)
            assert testing.traffic("outs").read_requests > 0
    with testing.backend("emulated_check"):
        palmette.merge_states(outs, lses)
        assert testing.traffic("outs").read_requests == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"order": "backward"}, "^order must be one of forward, reverse, random, got 'backward'$"),
        ({"warp_size": 16}, "^warp_size must be 32 or 64, got 16$"),
        ({"seed": -1}, r"^seed must be an integer in \[0, 2\^63\), got -1$"),
        ({"shared_limit": -1}, r"^shared_limit must be an integer in \[0, 2\^63\), got -1$"),
        ({"shared_limit": 1.5}, r"^shared_limit must be an integer in \[0, 2\^63\), got 1.5$"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message), testing.emulator(**settings):
        pass


@pytest.mark.parametrize("name", [n for n in testing.EMULATORS if n in testing.backends()])
def test_operators_of_several_threads(name):
    """Each launch is looked at, and recorded, by itself."""
    tree = palmette.Tree([-1, 0, 0], [70, 9, 5])
    plan = palmette.plan_tree_attention(tree, num_q_heads=2, num_kv_heads=1, head_dim=8, split="node")
    inputs = [(torch.randn(2, 2, 8), torch.randn(84, 1, 8), torch.randn(84, 1, 8)) for _ in range(24)]
    with testing.backend(name):
        want = [palmette.tree_attention(*x, plan) for x in inputs]
        with ThreadPoolExecutor(4) as pool, testing.recorded_launches() as launches:
            got = list(pool.map(lambda x: palmette.tree_attention(*x, plan), inputs))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    recorded = {m.after for launch in launches for m in launch.memory if m.name == "out"}
    assert {x.numpy().tobytes() for x in want} <= recorded
