# SPDX-License-Identifier: Apache-2.0
"""dK and dV on a GPU: tiles of keys find their items by an index, which also cuts tiles into pieces, or by
looking through all tasks. Which, follows from the sizes of the tables, so these tests make them larger."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import palmette
import pytest
import test_sparse_attention as sparse
import torch
from palmette import _selection, testing
from palmette.testing import assert_accurate
from test_tree_attention import IRREGULAR, check_gradients, make_case
from torch import Tensor

EMULATORS = [name for name in testing.EMULATORS if name in testing.backends()]
pytestmark = pytest.mark.skipif(not EMULATORS, reason="the emulator is not built")

SLOTS, QUERY, SEGMENT, ITEM, TASK, COUNTS = 0, 1, 2, 3, 4, 7  # of a plan's tables
INDEX = [f"attend_index_{name}" for name in ("count", "sum", "place", "fill", "cut")]
LEAST_SCAN = 1 << 19  # csrc/attend/key_tiles.h: tiles * KV heads * items from which on there is an index


class Problem(NamedTuple):
    """What attend_backward is given."""

    q: Tensor
    k: Tensor
    v: Tensor
    plan: tuple[Tensor, ...]  # nine tables, or eight
    dout: Tensor
    options: tuple  # scale, softcap, window

    def tiles(self) -> int:
        return -(-len(self.plan[SLOTS]) // (32 if self.q.dtype == torch.float32 else 64))

    def with_rows(self, table: int, rows: int) -> Problem:
        """With a table of so many rows at least; what nobody uses is nonsense."""
        plan = list(self.plan)
        old = plan[table]
        if len(old) < rows:
            plan[table] = torch.full((rows, *old.shape[1:]), -12345, dtype=torch.int32)
            plan[table][: len(old)] = old
        return self._replace(plan=tuple(plan))

    def has_index(self) -> bool:
        """Where looking through the tables is much work, or there is work to share out."""
        columns = -(-max(self.k.shape[2], self.v.shape[2]) // (64 if self.q.dtype == torch.float32 else 128))
        heads = self.k.shape[1]
        few = self.tiles() * heads * columns < 264 and self.q[:, :, 0].numel() // heads >= 4096
        return few or self.tiles() * heads * len(self.plan[ITEM]) >= LEAST_SCAN

    def indexed(self, chunks: int = 3) -> Problem:
        items = -(-LEAST_SCAN // (self.tiles() * self.k.shape[1]))
        return self.with_rows(ITEM, items).with_rows(TASK, 8 * chunks)

    def forward(self) -> tuple[Tensor, Tensor]:
        tables = (*self.plan[:8], None, *self.options, *self.plan[8:])
        return torch.ops.palmette.attend(self.q, self.k, self.v, *tables)

    def backward(self, out: Tensor, lse: Tensor) -> list[Tensor]:
        """dk, dv."""
        tables = (*self.plan[:8], None, *self.options, *self.plan[8:])
        inputs = self.dout, None, self.q, self.k, self.v, out, lse
        return list(torch.ops.palmette.attend_backward(*inputs, *tables)[1:3])


def problem(q: Tensor, k: Tensor, v: Tensor, plan, scale=0.2, softcap=0.0, window=0) -> Problem:
    dout = torch.randn(*q.shape[:2], v.shape[2]).to(q.dtype)
    return Problem(q, k, v, tuple(t.clone() for t in plan), dout, (scale, softcap, window))


def forest(
    parent, num_tokens, queries="leaves", *, split="auto", softcap=0.0, window=0, **options
) -> Problem:
    case = make_case(parent, num_tokens, queries, split=split, window=window or None, **options)
    plan = palmette.plan_tree_attention(
        case.plan.tree,
        queries,
        num_q_heads=case.q.shape[1],
        num_kv_heads=case.k.shape[1],
        head_dim=case.q.shape[2],
        split=split,
        block_len=options.get("block_len"),
        target="gpu",
    )
    return problem(case.q, case.k, case.v, plan.tensors, softcap=softcap, window=window)


def selection(tokens: list[int], block_size: int, topk: int, **options) -> Problem:
    case = sparse.make(tokens, **options)
    index = sparse.random_blocks(case, topk, block_size)
    ends = case.cu_seqlens
    plan = _plan_for_gpus(case, index, ends, block_size)
    return problem(case.q, case.k, case.v, plan)


def _plan_for_gpus(case, index, ends, block_size):
    """Of as few queries to a task as a GPU has it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_selection, "ROWS_PER_BLOCK", 64)
        patch.setattr(_selection, "TILE_BYTES", 64 * 4 * (case.q.shape[2] + case.v.shape[2]))
        return _selection.plan_by_tiles(case.q, case.k, case.v, index, ends, ends, None, block_size)


def pieces(p: Problem, memory: bytes) -> Tensor:
    """[pieces, 4]: tile, part, parts, slot, from the memory of the index."""
    words = torch.frombuffer(bytearray(memory), dtype=torch.int32)
    entries = 2 * (len(p.plan[SEGMENT]) + len(p.plan[ITEM]))
    tail = 2 * leaves(p) * chunks(p) + 2 * leaves(p) + 64 + p.tiles()
    return words[4 * entries : len(words) - tail].view(-1, 4)


def leaves(p: Problem) -> int:
    return 1 << math.ceil(math.log2(p.tiles()))


def chunks(p: Problem) -> int:
    room = max(1 << 20, len(p.plan[SEGMENT]) + len(p.plan[ITEM])) // (2 * leaves(p))
    return max(1, min(room, len(p.plan[TASK]) // 8, 1024))


def run(p: Problem, out: Tensor, lse: Tensor, name: str = "emulated", **schedule) -> tuple[list[Tensor], int]:
    """dk, dv, and the most pieces that a tile was cut into; launches are as they should be."""
    launches = {}
    with (
        testing.backend(name),
        testing.emulator(**schedule),
        testing.recorded_launches(lambda launch: launches.setdefault(launch.name, launch)),
    ):
        result = p.backward(out, lse)
    cut = "attend_dkv_add" in launches
    wanted = [*(INDEX if p.has_index() else []), "attend_dkv", *(["attend_dkv_add"] if cut else [])]
    assert [kernel for kernel in launches if kernel in (*INDEX, "attend_dkv", "attend_dkv_add")] == wanted
    if not p.has_index():
        return result, 1
    memory = next(m for m in launches["attend_dkv"].memory if m.name == "index")
    table = pieces(p, memory.after)
    table = table[table[:, 2] > 0]
    for tile, part, parts, slot in table.tolist():
        of_tile = table[table[:, 0] == tile]
        assert of_tile[:, 1].tolist() == list(range(parts))
        assert slot == (-1 if parts == 1 else int(of_tile[0, 3]) + part)
    assert table[:, 0].unique().tolist() == list(range(p.tiles()))
    assert (table[:, 3] >= 0).sum() == len(table[table[:, 3] >= 0, 3].unique())
    return result, int(table[:, 2].max())


def check(p: Problem) -> int:
    """All ways come to what the CPU finds in float64, and to the same bits in any order of the threads.

    Returns: the most pieces of a tile.
    """
    with testing.backend("scalar"):
        out, lse = p.forward()
        wide = p._replace(q=p.q.double(), k=p.k.double(), v=p.v.double(), dout=p.dout.double())
        want = wide.backward(*wide.forward())
        base = p.backward(out, lse)
    atol = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[p.q.dtype]
    results = [run(p, out, lse), run(p.indexed(), out, lse)]
    for got, _ in results:
        for x, y, z in zip(got, want, base, strict=True):
            assert_accurate(x, y, z, factor=3.0, atol=atol * max(1.0, y.abs().max().item()))
    again, _ = run(p.indexed(chunks=7), out, lse, order="random", seed=5)
    assert all(torch.equal(a, b) for a, b in zip(again, results[1][0], strict=True))
    return results[1][1]


FORESTS = {
    "auto": {},
    "single": {"split": "sequence"},
    # items of several segments, of which some share a tile and some reach over many
    "flat": {"split": "flatten", "block_len": 100},
    "long": {"split": "flatten", "block_len": 500},
    "short": {"split": "flatten", "block_len": 7},
    "nodes": {"split": "node"},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("slots", ["in order", "backwards"])
@pytest.mark.parametrize("name", FORESTS)
def test_forests(name, slots, dtype):
    total = sum(IRREGULAR[1])
    order = list(range(total)) if slots == "in order" else list(range(total))[::-1]
    check(forest(*IRREGULAR, "tokens", slots=order, head_dim=8, dtype=dtype, **FORESTS[name]))


@pytest.mark.parametrize("options", [{"window": 9}, {"softcap": 3.0}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_options(options, dtype):
    check(forest(*IRREGULAR, "tokens", head_dim=16, dtype=dtype, **options))


@pytest.mark.parametrize("root", [1, 31, 64, 65, 129, 640, 1500])
def test_segments_of_any_number_of_tiles(root):
    """They lie at any level of the tree of tiles."""
    check(forest([-1, 0, 0, 1], [root, 5, 70, 3], dtype=torch.bfloat16, head_dim=8, split="node"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("block_size", [1, 16, 64, 100, 300])
def test_selections(block_size, dtype):
    """Blocks that begin within tiles, and items of few queries whose rows share a tile of rows."""
    topk = 40 if block_size == 1 else 4
    check(selection([70, 0, 150, 1, 330], block_size, topk, dtype=dtype, head_dim=8))


@pytest.mark.parametrize("group", [1, 3, 5, 16])
def test_queries_of_several_items_in_a_tile_of_rows(group):
    """Tiles of rows begin and end within the query heads of a query."""
    check(selection([200], 64, 3, q_heads=2 * group, dtype=torch.bfloat16, v_head_dim=24))


@pytest.mark.parametrize(("head_dim", "v_head_dim"), [(96, 40), (136, 200)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_head_dims(head_dim, v_head_dim, dtype):
    """Several parts of the columns, each of several pieces."""
    case = selection([90], 64, 2, q_heads=16, head_dim=head_dim, v_head_dim=v_head_dim, dtype=dtype)
    assert check(case) > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_pieces(dtype):
    """Of few tiles, which many rows meet."""
    p = forest([-1, 0, 0], [60, 40, 10], "tokens", q_heads=64, kv_heads=1, head_dim=8, dtype=dtype)
    assert check(p) > 10


def test_a_tile_that_all_queries_chose():
    """Into pieces of 256 rows."""
    p = selection([600], 64, 2, q_heads=8, kv_heads=1, dtype=torch.bfloat16, head_dim=8)
    index = torch.stack([torch.zeros(600), torch.arange(600) // 64], 1).int()[None]
    index[:, :64, 1] = -1
    ends = sparse.indptr([600])
    p = problem(p.q, p.k, p.v, _plan_for_gpus(p, index, ends, 64))
    assert check(p) == -(-600 * 8 // 256)


def test_no_pieces_for_few_rows():
    for queries, most in ((255, 1), (256, 1), (257, 2), (600, 3)):
        q, k = torch.randn(queries, 1, 8), torch.randn(30, 1, 8)
        tree = palmette.Tree([-1] + [0] * queries, [30] + [0] * queries)
        plan = palmette.plan_tree_attention(tree, num_q_heads=1, num_kv_heads=1, head_dim=8, target="gpu")
        assert check(problem(q, k, k, plan.tensors)) == most


@pytest.mark.parametrize("name", EMULATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_schedules_are_bit_identical(name, dtype):
    """Several blocks lie in a tile, so several items of a task are entries of the same node."""
    p = selection([100, 70], 16, 3, q_heads=16, dtype=dtype, head_dim=8).indexed()
    with testing.backend(name):
        out, lse = p.forward()
    results = [
        run(p, out, lse, name, **schedule)
        for schedule in ({"order": "forward"}, {"order": "reverse"}, {"order": "random", "seed": 3})
    ]
    assert results[0][1] > 1
    for result, _ in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0][0], strict=True))


@pytest.mark.parametrize("name", EMULATORS)
@pytest.mark.parametrize("indexed", [False, True])
def test_plans_that_change_before_the_kernels_run(indexed, name):
    """As those of a captured graph do: sizes stay, what the tables hold does not."""
    first, second = (
        selection([300, 40], 32, topk, q_heads=8, dtype=torch.bfloat16, head_dim=8) for topk in (2, 9)
    )
    first = first._replace(plan=(*first.plan[:8], torch.zeros_like(second.plan[8])))
    second = second._replace(q=first.q, k=first.k, v=first.v, dout=first.dout)
    for table in (ITEM, TASK):
        rows = max(len(first.plan[table]), len(second.plan[table]))
        first, second = first.with_rows(table, rows), second.with_rows(table, rows)
    if indexed:
        first, second = first.indexed(), second.indexed()
    with testing.backend(name):
        out, lse = second.forward()
        want = second.backward(out, lse)

    def before(kernel: str) -> None:
        if kernel == "attend_delta":
            for to, source in zip(first.plan, second.plan, strict=True):
                to.copy_(source)

    first.plan[COUNTS][2:4] = 0  # no tasks yet
    with testing.backend(name), testing.recorded_launches(before=before):
        got = first.backward(out, lse)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert got[0].abs().max() > 0


def table(*rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32)


def hand_made(segments: Tensor, items: Tensor, tasks: Tensor, places: int, **heads) -> Problem:
    """One query per position; everybody sees all."""
    queries = int(tasks[:, 3].max())
    numbers = torch.arange(queries, dtype=torch.int32)
    counts = torch.tensor([queries, len(segments), len(items), len(tasks)] + [0] * 12, dtype=torch.int32)
    plan = [
        torch.arange(places, dtype=torch.int32),
        torch.stack([numbers, numbers, numbers, numbers * 0]),
        segments,
        items,
        tasks,
        torch.zeros(queries + 1, dtype=torch.int32),
        torch.zeros(0, dtype=torch.int32),
        counts,
    ]
    q_heads, kv_heads = heads.get("q_heads", 4), heads.get("kv_heads", 2)
    q, k, v = torch.randn(queries, q_heads, 8), *torch.randn(2, places, kv_heads, 8)
    return problem(q.bfloat16(), k.bfloat16(), v.bfloat16(), plan)


def test_more_entries_than_there_is_room_for():
    """Items that share many segments: then tiles look through all tasks, as without an index."""
    places, count = 1 << 19, 40
    segments = table(*([3 * i, 2, 0, 0, 99, 0] for i in range(count)))
    items = table(*([0, count, i, i + 1] for i in range(32)))
    p = hand_made(segments, items, table([0, 32, 0, 32, -1, -1]), places)
    assert p.tiles() * 2 * len(items) == LEAST_SCAN
    assert count * len(items) > 2 * (count + len(items))
    p = p._replace(k=p.k[:200], v=p.v[:200])
    with testing.backend("scalar"):
        out, lse = p.forward()
        want = p.backward(out, lse)
    got, _ = run(p, out, lse)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_segments_of_an_item_in_the_same_tile():
    """An item is met once by a tile, whichever of its segments hold the keys; empty ones hold none."""
    segments = table(
        [70, 4, 0, 0, 99, 0], [66, 0, 0, 0, 99, 0], [3, 200, 0, 0, 99, 0], [80, 0, 0, 0, 99, 0],
        [250, 3, 0, 0, 99, 0], [210, 5, 0, 0, 99, 0], [300, 1, 0, 0, 99, 0], [302, 2, 0, 0, 99, 0],
    )  # fmt: skip
    segments[0, 0], segments[2, 1] = 260, 190
    items = table([0, 8, 0, 3], [4, 5, 3, 5], [1, 2, 3, 5], [4, 5, 5, 6])
    tasks = table([0, 1, 0, 3, -1, -1], [1, 3, 3, 5, -1, -1], [3, 4, 5, 6, 0, -1])
    tasks[2] = table([3, 4, 5, 6, -1, 1])[0]  # of one KV head
    other = table([4, 4, 5, 6, -1, 0])  # the other one's has nothing
    check(hand_made(segments, items, torch.cat([tasks, other]), 320))


def test_many_items_of_the_same_segments():
    """More than are found at a time, and more of equal ones than a warp has lanes."""
    segments = table([5, 70, 0, 0, 999, 0], [50, 4, 0, 0, 999, 0])
    items = table(*([i % 2, i % 2 + 1, i, i + 1] for i in range(200)))
    check(hand_made(segments, items, table([0, 200, 0, 200, -1, -1]), 90, q_heads=2))


@functools.cache
def _no_tasks() -> Problem:
    return hand_made(table([0, 9, 0, 0, 9, 0]), table([0, 1, 0, 1]), table([0, 1, 0, 1, -1, -1]), 9)


@pytest.mark.parametrize("rows", [1, 600])
def test_no_tasks(rows):
    p = _no_tasks()
    p.plan[COUNTS][3] = 0
    q = torch.randn(1, rows * 2, 8).bfloat16()
    p = p._replace(q=q, dout=q)
    out, lse = torch.zeros_like(q), torch.zeros(1, rows * 2)
    for other in (p, p.indexed()):
        dk, dv = run(other, out, lse)[0]
        assert not dk.any()
        assert not dv.any()


def test_gradients_of_many_rows_equal_the_reference(backend):
    """Rows enough to share out few tiles, through the function."""
    case = make_case([-1, 0, 0], [90, 20, 30], "tokens", q_heads=32, kv_heads=1, head_dim=16)
    assert case.q.shape[0] * 32 >= 4096
    check_gradients(case)


@pytest.mark.parametrize("name", EMULATORS)
def test_gradients_of_other_plans_are_nan(name):
    """With pieces, too: nobody adds up what no plan has filled."""
    p = selection([100, 70], 64, 3, q_heads=16, dtype=torch.bfloat16, head_dim=8).indexed()
    with testing.backend(name):
        out, lse = p.forward()

    def before(kernel: str) -> None:
        if kernel == "attend_dq":
            p.plan[COUNTS][0] -= 1

    with testing.backend(name), testing.recorded_launches(before=before):
        dk, dv = p.backward(out, lse)
    assert dk.isnan().all()
    assert dv.isnan().all()


def test_bytes_of_the_index():
    """In proportion to the tables: two entries of 16 bytes for each of their rows, and counts of chunks."""
    p = selection([300], 32, 4, dtype=torch.bfloat16, head_dim=8).indexed()
    sizes = {}
    with (
        testing.backend("emulated"),
        testing.recorded_launches(lambda launch: sizes.update({m.name: len(m.after) for m in launch.memory})),
    ):
        p.backward(*p.forward())
    rows, extra = len(p.plan[SEGMENT]) + len(p.plan[ITEM]), p.tiles() * 300 * 2 // 256
    counts = 2 * leaves(p) * (chunks(p) + 1) + 64 + p.tiles()
    assert sizes["index"] == 2 * 16 * rows + 16 * (p.tiles() + extra) + 4 * counts
    assert sizes["part_dk"] == 2 * extra * 2 * 64 * 8 * 4
