# SPDX-License-Identifier: Apache-2.0
"""What only the GPU kernels have: schedules, stages, tilings, plans for another device, and bytes moved."""

from __future__ import annotations

import pickle
import random

import palmette
import pytest
import torch
from palmette import testing
from palmette._device import DeviceTables
from test_tree_attention import IRREGULAR, check, make_case

pytestmark = pytest.mark.skipif("emulated" not in testing.backends(), reason="the emulator is not built")
EMULATORS = [name for name in testing.EMULATORS if name in testing.backends()]

SCHEDULES = ({"order": "forward"}, {"order": "reverse"}, {"order": "random", "seed": 7})


def everything(case, **options):
    """out, lse, dq, dk, dv."""
    inputs = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]
    out, lse = palmette.tree_attention(*inputs, case.plan, return_lse=True, **options)
    torch.autograd.backward([out, lse], [torch.cos(out.detach()), torch.sin(lse.detach())])
    return [out, lse, *(x.grad for x in inputs)]


@pytest.mark.parametrize("name", EMULATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries", ["leaves", "tokens"])
def test_schedules_are_bit_identical(name, dtype, queries):
    case = make_case(
        [-1, 0, 0, 1], [70, 9, 40, 5], queries, q_heads=6, dtype=dtype, split="flatten", block_len=48
    )
    results = []
    with testing.backend(name):
        for schedule in SCHEDULES:
            with testing.emulator(**schedule):
                results.append(everything(case))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 32, 33, 64, 65, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_a_task(rows, dtype):
    """Up to 16, 32 and 64 rows are divided among the warps in other ways."""
    with testing.backend("emulated"):
        check(make_case([-1] + [0] * rows, [100] + [3] * rows, q_heads=1, kv_heads=1, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 200])
def test_keys_around_whole_tiles(length, dtype):
    with testing.backend("emulated"):
        check(make_case([-1], [length], dtype=dtype))
        check(make_case([-1, 0], [length, 2], split="node", dtype=dtype))


@pytest.mark.parametrize("segments", [2, 31, 32, 33, 63, 64, 65, 70, 97])
def test_many_short_segments(segments):
    """A tile of keys is put together from up to 32 segments at a time."""
    parent = [-1] + [0] * segments
    for tokens in (1, 2, 3):
        case = make_case(
            parent, [7] + [tokens] * segments, "tokens", q_heads=1, kv_heads=1, split="flatten", block_len=500
        )
        with testing.backend("emulated"):
            check(case)


def test_one_stage_where_two_do_not_fit():
    case = make_case(*IRREGULAR, "tokens", dtype=torch.bfloat16, head_dim=256, v_head_dim=256)
    with testing.backend("emulated"):
        expected = everything(case)
        with testing.emulator(shared_limit=140 << 10):
            assert all(torch.equal(a, b) for a, b in zip(everything(case), expected, strict=True))
        with (
            testing.emulator(shared_limit=48 << 10),
            pytest.raises(ValueError, match="bytes of shared memory, got 256"),
        ):
            everything(case)


def test_head_dims_beyond_256():
    case = make_case([-1, 0], [4, 4], head_dim=264)
    message = "head_dim of q and k must be at most 256 on a GPU, got 264"
    with testing.backend("emulated"), pytest.raises(ValueError, match=message):
        palmette.tree_attention(case.q, case.k, case.v, case.plan)
    case = make_case([-1, 0], [4, 4], head_dim=8, v_head_dim=300)
    message = "head_dim of v must be at most 256 on a GPU, got 300"
    with testing.backend("emulated"), pytest.raises(ValueError, match=message):
        palmette.tree_attention(case.q, case.k, case.v, case.plan)


@pytest.mark.parametrize(
    ("limit", "dtype", "forward", "backward"),
    [
        (227, torch.bfloat16, 256, 256),
        (227, torch.float32, 256, 256),
        (163, torch.bfloat16, 256, 256),
        (163, torch.float32, 256, 208),
        (99, torch.bfloat16, 240, 176),
        (99, torch.float32, 176, 112),
    ],
    ids=str,
)
def test_head_dims_that_fit(limit, dtype, forward, backward):
    """The table in docs/gpu.md."""

    def case(head_dim):
        return make_case([-1, 0], [40, 3], q_heads=1, kv_heads=1, head_dim=head_dim, dtype=dtype)

    message = f"head_dim must be such that a block fits the GPU's {limit * 1024} bytes of shared memory, got"
    with testing.backend("emulated"), testing.emulator(shared_limit=limit << 10):
        check(case(forward))
        everything(case(backward))
        if forward < 256:
            with pytest.raises(ValueError, match=message):
                check(case(forward + 16))
        if backward < 256:
            with pytest.raises((ValueError, RuntimeError), match=message):
                everything(case(backward + 16))


def test_float64_has_no_kernel():
    case = make_case([-1, 0], [4, 4], dtype=torch.float64)
    with (
        testing.backend("emulated"),
        pytest.raises(ValueError, match="float64 runs on the scalar backend only"),
    ):
        palmette.tree_attention(case.q, case.k, case.v, case.plan)


@pytest.mark.parametrize("queries", ["leaves", "tokens"])
@pytest.mark.parametrize(("q_heads", "kv_heads"), [(4, 2), (32, 4), (80, 1)])
def test_plans_for_a_gpu(queries, q_heads, kv_heads):
    parent, num_tokens = [-1] + [0] * 5 + [1, 1], [400, 3, 70, 5, 64, 1, 9, 30]
    case = make_case(parent, num_tokens, queries, q_heads=q_heads, kv_heads=kv_heads)
    plan = palmette.plan_tree_attention(
        case.plan.tree, queries, num_q_heads=q_heads, num_kv_heads=kv_heads, head_dim=32, target="gpu"
    )
    assert plan.target == "gpu"
    rows = max(64, q_heads // kv_heads)
    tasks = plan.task[: plan.counts[3]]
    assert ((tasks[:, 3] - tasks[:, 2]) * (q_heads // kv_heads) <= rows).all()
    for name in ("emulated", testing.backends()[0]):
        with testing.backend(name):
            check(case._replace(plan=plan))


def test_a_long_chain_is_shared_out_among_many_blocks():
    tree = palmette.Tree([-1], [16384])
    sizes = {"num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128}
    on_cpu, on_gpu = (palmette.plan_tree_attention(tree, target=t, **sizes) for t in ("cpu", "gpu"))
    assert int(on_gpu.counts[3]) * 8 >= 132 > int(on_cpu.counts[3]) * 8
    assert on_gpu.io.kv_tokens_read == 16384


def test_gradients_that_meet_inf_and_nan():
    """A key that no query sees may hold anything."""
    case = make_case([-1, 0, 0, 0], [20, 6, 6, 6], ([1, 3], [5, 2]), dtype=torch.bfloat16)
    unseen = ~case.visible.any(dim=0)
    with testing.backend("emulated"):
        want = everything(case)
        case.k[unseen] = torch.nan
        case.v[unseen] = torch.inf
        got = everything(case)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_weight_of_zero_contributes_nothing(value):
    """Not even to a query that sees the key."""
    case = make_case([-1, 0, 0], [80, 6, 6], "tokens", head_dim=16)
    case.q[4:, :, 0] = 20.0
    case.k[3, :, 0] = -200.0  # a logit of about -1000 from the fifth query on
    with testing.backend("emulated"):
        want = palmette.tree_attention(case.q, case.k, case.v, case.plan)
        case.v[3, :, 5] = value
        got = palmette.tree_attention(case.q, case.k, case.v, case.plan)
    assert not torch.isfinite(got[3, :, 5]).any()
    got[3, :, 5] = want[3, :, 5]
    torch.testing.assert_close(got, want)


def test_a_partial_state_of_weight_zero_contributes_nothing():
    """Whatever it holds: here inf and NaN."""
    case = make_case([-1, 0, 0], [1500, 4, 4], head_dim=16)
    plan = palmette.plan_tree_attention(
        case.plan.tree, num_q_heads=4, num_kv_heads=2, head_dim=16, target="gpu"
    )
    assert plan.io.partial_states == 2 * plan.num_queries  # of 754 keys each
    case.q[..., 0] = 20.0
    case.k[:800, :, 0] = -200.0
    with testing.backend("emulated"):
        want = palmette.tree_attention(case.q, case.k, case.v, plan)
        case.v[:400], case.v[400:700] = torch.inf, torch.nan
        got = palmette.tree_attention(case.q, case.k, case.v, plan)
    assert torch.equal(got, want)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
def test_gradients_of_a_key_of_weight_zero(value):
    """It lies infinitely far away, which is no news for the queries."""
    case = make_case([-1, 0, 0], [80, 6, 6], "tokens", head_dim=16)
    case.q[..., 0] = 1.0
    case.k[3, :, 0] = -300.0
    with testing.backend("emulated"):
        out, lse, dq, _, _ = everything(case)
        case.k[3, :, 0] = -torch.inf
        case.v[3] = value
        got = everything(case)
    beyond = list(range(3)) + list(range(4, len(dq)))
    for have, want in zip(got[:3], (out, lse, dq), strict=True):
        torch.testing.assert_close(have[4:], want[4:])
    assert torch.isfinite(got[2][beyond]).all()


# ---- launches that find another plan than operators have checked, as those of a captured graph may


class Replay:
    """Operators on a plan that changes right before a kernel runs."""

    def __init__(self, split):
        self.tree = palmette.Tree([-1, 0, 0], [70, 9, 5], range(84))
        self.plan = palmette.plan_tree_attention(
            self.tree, num_q_heads=4, num_kv_heads=2, head_dim=16, target="gpu", split=split
        )
        torch.manual_seed(0)
        self.inputs = [torch.randn(2, 4, 16), torch.randn(90, 2, 16), torch.randn(90, 2, 16)]
        for x in self.inputs:
            x.requires_grad_()

    def changed_at(self, kernel, change):
        tables, changed = self.plan.tensors, []

        def before(name):
            if name == kernel and not changed:
                change(self.tree)
                self.plan.update()
                changed.append(name)
                assert all(a is b for a, b in zip(tables, self.plan.tensors, strict=True)), "it has grown"

        return testing.recorded_launches(before=before)

    def attention(self):
        return palmette.tree_attention(*self.inputs, self.plan, return_lse=True)


OTHER_PLANS = pytest.mark.parametrize(
    "change",
    [
        lambda tree: tree.branch(1, 3),
        lambda tree: tree.prune(2),
        lambda tree: tree.append([1], [1], [90]),  # k has 90 rows
    ],
    ids=["more queries", "fewer queries", "a slot beyond k"],
)


@pytest.mark.parametrize("name", EMULATORS)
@pytest.mark.parametrize("split", ["auto", "node"])  # with and without partial states
class TestChangedPlans:
    @torch.no_grad()
    def test_as_many_queries_are_followed(self, split, name):
        case = Replay(split)
        with testing.backend(name):
            with case.changed_at("attend", lambda tree: tree.append([1, 2], [1, 2], [84, 85, 86])):
                got = case.attention()
            assert case.tree.num_tokens == 87
            assert all(torch.equal(a, b) for a, b in zip(got, case.attention(), strict=True))

    @torch.no_grad()
    @OTHER_PLANS
    def test_others_give_nan(self, split, name, change):
        case = Replay(split)
        with testing.backend(name), case.changed_at("attend", change):
            out, lse = case.attention()
        assert out.isnan().all()
        assert lse.isnan().all()

    @OTHER_PLANS
    def test_gradients_of_others_are_nan(self, split, name, change):
        case = Replay(split)
        with testing.backend(name), case.changed_at("attend_dq", change):
            case.attention()[0].sum().backward()
        assert all(x.grad.isnan().all() for x in case.inputs)


# ---- plans on another device


def test_a_plan_on_another_device_is_updated_in_place():
    tree = palmette.Tree([-1, 0, 0], [40, 1, 1], range(42))
    plan = palmette.plan_tree_attention(tree, num_q_heads=4, num_kv_heads=2, head_dim=16, device="meta")
    assert plan.target == "gpu"
    assert all(t.device.type == "meta" for t in plan.tensors)
    before = plan.tensors
    tree.append([1, 2], [1, 1], [42, 43])
    plan.update()
    assert all(a is b for a, b in zip(plan.tensors, before, strict=True))
    tree.branch(1, 200)
    plan.update()
    assert plan.tensors[1] is not before[1]  # more queries than there was room for
    with pytest.raises(ValueError, match="q must be on the plan's device meta, got cpu"):
        palmette.tree_attention(torch.zeros(201, 4, 16), torch.zeros(60, 2, 16), torch.zeros(60, 2, 16), plan)


def test_bad_target():
    tree = palmette.Tree([-1], [4])
    with pytest.raises(ValueError, match="target must be one of cpu, gpu, got 'tpu'"):
        palmette.plan_tree_attention(tree, num_q_heads=1, num_kv_heads=1, head_dim=8, target="tpu")


def test_tables_of_a_device_are_those_of_the_host():
    """On the CPU, where they can be looked at."""
    for slots in (None, range(42)):
        tree = palmette.Tree([-1, 0, 0], [40, 1, 1], slots)
        plan = palmette.plan_tree_attention(tree, num_q_heads=4, num_kv_heads=2, head_dim=16)
        plan._there = DeviceTables(torch.device("cpu"))
        for step in range(60):
            leaves = tree.leaves
            first = tree.num_tokens
            tree.append(
                leaves, [1] * len(leaves), None if slots is None else range(first, first + len(leaves))
            )
            if step % 20 == 19:
                tree.branch(int(leaves[0]), 2)
                tree.append(tree.children(int(leaves[0])), [1, 1], None if slots is None else [200, 201])
            if step == 50:
                tree.prune(int(tree.leaves[-1]))
            plan.update()
            host = plan.slots, plan.query, plan.segment, plan.item, plan.task
            host = *host, plan.merge_ptr, plan.merge_row, plan.counts
            used = int(tree.counts[4]) if slots is not None else tree.num_tokens
            for i, (got, want) in enumerate(zip(plan.tensors, host, strict=True)):
                assert got.shape == want.shape
                assert torch.equal(got[:used], want[:used]) if i == 0 else torch.equal(got, want)


def test_tables_of_a_device_survive_pickling():
    tables = DeviceTables(torch.device("cpu"))
    tables.fill([torch.arange(5, dtype=torch.int32), torch.arange(40, dtype=torch.int32).view(10, 4)])
    loaded = pickle.loads(pickle.dumps(tables))
    before = loaded.tables
    loaded.fill([torch.full_like(t, 7) for t in tables.tables])
    assert all((a == 7).all() for a in before)
    assert all(a is b for a, b in zip(loaded.tables, before, strict=True))


def test_shared_slots_have_no_gradients_on_a_gpu():
    tree = palmette.Tree([-1, 0, 0], [4, 1, 1], [0, 1, 2, 3, 4, 4])
    plan = palmette.plan_tree_attention(tree, num_q_heads=4, num_kv_heads=2, head_dim=16, device="meta")
    message = "slots of the tree must be distinct where gradients are wanted on a GPU, got 5 for 6 tokens"
    q, k = torch.zeros(2, 4, 16, device="meta"), torch.zeros(5, 2, 16, device="meta", requires_grad=True)
    with pytest.raises(ValueError, match=message):
        palmette.tree_attention(q, k, k, plan)
    tree.prune(2)
    plan.update()
    plan.check_gradients()


# ---- bytes


def bytes_of_kv(case):
    with testing.backend("emulated_check"):
        palmette.tree_attention(case.q, case.k, case.v, case.plan)
    assert testing.traffic("k").written == testing.traffic("v").written == 0
    return testing.traffic("k").read + testing.traffic("v").read


@pytest.mark.skipif("emulated_check" not in testing.backends(), reason="the check build is not there")
class TestBytes:
    def expected(self, case):
        io = case.plan.io
        return io.bytes(case.q.dtype) - 2 * io.partial_states * io.num_q_heads * (io.head_dim + 1) * 4

    @pytest.mark.parametrize("split", ["flatten", "node", "node_chunk", "sequence", "auto"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_kv_is_read_as_often_as_the_plan_says(self, split, dtype):
        case = make_case(*IRREGULAR, dtype=dtype, split=split, block_len=64)
        assert bytes_of_kv(case) == self.expected(case)

    def test_nan_in_a_query_costs_nothing(self):
        case = make_case(*IRREGULAR, "tokens")
        expected = bytes_of_kv(case)
        case.q[3, 1, 2] = torch.nan
        assert bytes_of_kv(case) == expected

    def test_inf_of_weight_zero_reads_the_keys_of_its_rows_once_more(self):
        case = make_case([-1], [80], head_dim=16)  # one query
        expected = bytes_of_kv(case)
        case.q[..., 0], case.k[3, :, 0], case.v[3] = 20.0, -200.0, torch.inf
        k_and_v = 80 * 2 * (16 + 16) * 4
        assert expected == k_and_v
        assert bytes_of_kv(case) == k_and_v + 2 * k_and_v - 4 * 16 * 4  # 2 heads share a KV head; v[3] is not

    def test_partial_states(self):
        tree = palmette.Tree([-1, 0, 0], [1500, 4, 4])
        plan = palmette.plan_tree_attention(tree, num_q_heads=4, num_kv_heads=2, head_dim=32, target="gpu")
        case = make_case([-1, 0, 0], [1500, 4, 4])._replace(plan=plan)
        assert plan.io.partial_states > 0
        assert bytes_of_kv(case) == self.expected(case)
        states = plan.io.partial_states * 4
        out, largest = testing.traffic("partial_out"), testing.traffic("partial_max")
        assert out.written == states * 32 * 4
        assert largest.written == states * 4
        assert out.read == out.written  # once each

    @pytest.mark.parametrize("width", [32, 64, 128, 256])
    def test_token_trees(self, width):
        draw = random.Random(width)
        parent = [-1] + [draw.randrange(max(0, i - 9), i) for i in range(1, width)]
        case = make_case(parent, [50] + [1] * (width - 1), "tokens", q_heads=2, kv_heads=1, head_dim=16)
        sizes = {"num_q_heads": 2, "num_kv_heads": 1, "head_dim": 16}
        plan = palmette.plan_tree_attention(case.plan.tree, "tokens", target="gpu", **sizes)
        case = case._replace(plan=plan)
        assert bytes_of_kv(case) == self.expected(case)


@pytest.mark.skipif("emulated_check" not in testing.backends(), reason="the check build is not there")
class TestRequests:
    """What tests/test_ptx_kernels.py finds in nvcc's PTX, the emulator finds in the sources."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("head_dim", [64, 80, 128])
    def test_keys_and_values_fill_their_sectors(self, head_dim, dtype):
        case = make_case([-1, 0, 0], [70, 3, 3], q_heads=4, kv_heads=1, head_dim=head_dim, dtype=dtype)
        with testing.emulator(count_requests=True):
            kv_bytes = bytes_of_kv(case)
        sectors = testing.traffic("k").read_sectors + testing.traffic("v").read_sectors
        assert sectors * 32 == kv_bytes

    @pytest.mark.parametrize("head_dim", [16, 48, 64, 80, 96, 112, 128, 192, 256])
    def test_matrices_have_no_bank_conflicts(self, head_dim):
        case = make_case(
            [-1, 0, 0], [70, 3, 3], q_heads=2, kv_heads=1, head_dim=head_dim, dtype=torch.bfloat16
        )
        with testing.emulator(count_requests=True), testing.backend("emulated_check"):
            palmette.tree_attention(case.q, case.k, case.v, case.plan)
        shared = testing.shared_traffic()
        assert shared.requests > 0
        assert shared.wavefronts - shared.least == sum(shared.conflicts.values())
        for place in shared.conflicts:  # of a key's slot, once per tile
            assert place.startswith("tiles_gpu.cuh"), shared.conflicts

    def test_nothing_is_counted_without_being_asked(self):
        case = make_case([-1, 0], [20, 3])
        bytes_of_kv(case)
        assert testing.traffic("k").read_sectors == 0
        assert testing.shared_traffic() == testing.SharedTraffic(0, 0, 0, {})
