# SPDX-License-Identifier: Apache-2.0
"""palmette.testing.recorded_launches: what the emulators run, as another machine gets it."""

from __future__ import annotations

import struct

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
