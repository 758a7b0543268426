# SPDX-License-Identifier: Apache-2.0
"""AQ-SGD's memory of samples: both ends stay equal to the bit, through evictions, repeats and restarts."""

from __future__ import annotations

import math
import random
import threading
from collections import OrderedDict
from typing import NamedTuple

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from palmette import testing
from palmette.codecs import FixpointCodec, TahCodec
from palmette.pipelines import ActivationStore, DeltaCodec
from torch import Tensor

TOKENS, CHANNELS = 6, 8
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def make(capacity: int = 4, dtype: torch.dtype = torch.float16, **options) -> ActivationStore:
    return ActivationStore(capacity=capacity, slot_shape=(TOKENS, CHANNELS), dtype=dtype, **options)


class Link(NamedTuple):
    """Both ends of an edge."""

    sender: DeltaCodec
    receiver: DeltaCodec

    def send(self, x: Tensor, ids, **options) -> tuple[Tensor, Tensor]:
        wire = self.sender.encode(x, ids, **options)
        return self.receiver.decode(wire, ids, x.shape, dtype=x.dtype, **options), wire

    def check_equal(self) -> None:
        a, b = self.sender.store, self.receiver.store
        assert list(a) == list(b)
        assert torch.equal(a.table(), b.table())
        assert a.digest() == b.digest()
        assert all(torch.equal(a[sample], b[sample]) for sample in a)


def link(bits: int = 4, grid: str = "full-range", **options) -> Link:
    return Link(*(DeltaCodec(make(**options), bits=bits, grid=grid) for _ in range(2)))


def full_size(samples: int, tokens: int = TOKENS) -> int:
    return -(-(16 + samples * tokens * CHANNELS * 2) // 16) * 16


def delta_size(samples: int, bits: int = 4, tokens: int = TOKENS) -> int:
    return 16 + FixpointCodec(bits, (0,)).wire_size((samples * tokens, CHANNELS))


# ---- what travels


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("x_dtype", DTYPES)
def test_first_visit_in_full_then_deltas(dtype, x_dtype):
    ends = link(dtype=dtype)
    x = torch.randn(2, TOKENS, CHANNELS).to(x_dtype)
    y, wire = ends.send(x, [7, 3])
    assert torch.equal(y, x.to(dtype).to(x_dtype))
    assert wire.numel() == 16 + 2 * TOKENS * CHANNELS * dtype.itemsize
    changed = (x.float() + 0.01 * torch.randn(x.shape)).to(x_dtype)
    y, wire = ends.send(changed, [7, 3])
    assert wire.numel() == delta_size(2)
    assert (y.float() - changed.float()).abs().max() < 0.02
    ends.check_equal()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_error_shrinks_as_in_the_paper(bits):
    """|x - m_t| <= 2^(-(bits - 1) t) |x| for constant x, where m_0 = 0: here 0 is the first visit."""
    ends = link(bits, "ac-sgd", dtype=torch.float32)
    x = torch.randn(1, TOKENS, CHANNELS)
    ends.send(torch.zeros_like(x), [0])
    largest = x.abs().amax((0, 1))
    for visit in range(1, 5):
        y, _ = ends.send(x, [0])
        bound = largest * 2.0 ** (-(bits - 1) * visit) * (1 + 1e-3)
        assert ((y - x).abs() <= bound).all()


def test_deltas_with_another_codec():
    """Hadamard tiles in the place of fixed point: smaller errors where outliers come and go."""
    codec = TahCodec(tile_size=8, allocation="tile", gate="range")
    ends = [DeltaCodec(make(), codec=codec) for _ in range(2)]
    x = torch.randn(3, TOKENS, CHANNELS)
    for visit in range(4):
        x = x + 0.1 * torch.randn_like(x)
        wire = ends[0].encode(x, [5, 6, 7])
        got = ends[1].decode(wire, [5, 6, 7], x.shape)
        assert ends[0].store.digest() == ends[1].store.digest()
        assert (got - x).abs().max() < (0.1 if visit else 1e-2)
    assert "codec=TahCodec(tile_size=8" in repr(ends[0])
    with pytest.raises(ValueError, match="codec must be a Codec or None, got str"):
        DeltaCodec(make(), codec="tah")


def test_new_and_known_samples_share_a_wire():
    ends = link()
    x = torch.randn(4, TOKENS, CHANNELS)
    ends.send(x[:2], [0, 1])
    y, wire = ends.send(x, [2, 1, 3, 0])
    assert wire.numel() == delta_size(2) - 16 + full_size(2)
    assert torch.equal(y[0], x[0].half().float())
    ends.check_equal()


@pytest.mark.parametrize(
    "shape", [(2, CHANNELS), (2, 2, 3, CHANNELS), (2, TOKENS, CHANNELS), (0, 3, CHANNELS)]
)
def test_shapes(shape):
    ends = link()
    x = torch.randn(*shape)
    for _ in range(2):
        y, wire = ends.send(x, list(range(shape[0])))
        assert y.shape == x.shape
        assert y.numel() == 0 or (y - x).abs().max() < 1e-2
    assert wire.numel() == (delta_size(2, tokens=math.prod(shape[1:-1])) if shape[0] else 0)


def test_not_contiguous_and_buffers_given():
    ends = link()
    x = torch.randn(CHANNELS, TOKENS, 2).permute(2, 1, 0)
    plan = ends.sender.plan([4, 5], x.shape)
    out = torch.empty(plan.wire_size, dtype=torch.uint8)
    assert ends.sender.encode(x, plan, out=out) is out
    y = torch.empty(x.shape)
    assert ends.receiver.decode(out, [4, 5], x.shape, out=y) is y
    assert torch.equal(y, x.half().float())


def test_size_is_known_before_and_never_beyond_room():
    generator = random.Random(0)
    ends = link(capacity=8)
    for _ in range(30):
        ids = [generator.randrange(12) for _ in range(6)]
        x = torch.randn(6, TOKENS, CHANNELS)
        sent, received = (end.plan(ids, x.shape) for end in ends)
        assert (sent.wire_size, sent.room) == (received.wire_size, received.room)
        wire = ends.sender.encode(x, sent)
        assert wire.numel() == sent.wire_size <= sent.room
        ends.receiver.decode(wire, received, x.shape)
    ends.check_equal()


def test_repeated_ids_are_as_microbatches_that_follow_each_other():
    ends, separate = link(), link()
    x = torch.randn(5, TOKENS, CHANNELS)
    ids = [3, 8, 3, 3, 8]
    together, wire = ends.send(x, ids)
    assert wire.numel() == full_size(2) + delta_size(2) + delta_size(1)
    for positions in ([0, 1], [2, 4], [3]):
        y, _ = separate.send(x[positions], [ids[i] for i in positions])
        assert torch.equal(y, together[positions])
    ends.check_equal()
    assert ends.sender.store.digest() == separate.sender.store.digest()


def test_another_length_is_a_miss():
    ends = link()
    x = torch.randn(2, TOKENS, CHANNELS)
    y, wire = ends.send(x, [0, 1], lengths=[2, 6])
    assert wire.numel() == -(-(16 + 8 * CHANNELS * 2) // 16) * 16
    assert torch.equal(y[0, 2:], torch.zeros(4, CHANNELS))
    assert torch.equal(y[0, :2], x[0, :2].half().float())
    assert ends.sender.store[0].shape == (2, CHANNELS)
    _, wire = ends.send(x, [0, 1], lengths=[3, 6])  # one full, one delta
    assert wire.numel() == delta_size(1) - 16 + full_size(1, 3)
    _, wire = ends.send(x, [0, 1], lengths=[3, 6])
    assert wire.numel() == 16 + FixpointCodec(4, (0,)).wire_size((9, CHANNELS))
    _, wire = ends.send(x[:, :4], [0, 1], lengths=[3, 4])
    assert wire.numel() == delta_size(1, tokens=3) - 16 + full_size(1, 4)
    ends.check_equal()


def test_a_thousand_updates_leave_both_ends_equal(backend):
    """Also where they run on different backends."""
    generator = random.Random(1)
    ends = link(capacity=5, grid="ac-sgd")
    content = torch.randn(9, TOKENS, CHANNELS)
    hits = 0
    for step in range(1000):
        ids = [generator.randrange(9) for _ in range(generator.randint(1, 4))]
        lengths = [TOKENS if generator.random() < 0.8 else 3 for _ in ids]
        content += 0.01 * torch.randn(content.shape)
        hits += sum(sample in ends.sender.store for sample in ids)
        with testing.backend("scalar"):
            wire = ends.sender.encode(content[ids], ids, lengths=lengths)
        y = ends.receiver.decode(wire, ids, (len(ids), TOKENS, CHANNELS), lengths=lengths)
        if step % 100 == 0:
            ends.check_equal()
            for received, sample, length in zip(y, ids, lengths, strict=True):
                assert (received - content[sample])[:length].abs().max() < 0.1
    assert hits > 500
    ends.check_equal()
    assert ends.sender.store.verify() == []


def test_evicts_the_least_recently_visited():
    """Against a model of the rule."""
    generator = random.Random(2)
    store = make(capacity=5)
    model: OrderedDict[int, int] = OrderedDict()
    for _ in range(300):
        ids = generator.sample(range(12), generator.randint(1, 5))
        visit = store.visit(ids, [TOKENS] * len(ids))
        assert [ids[i] for i, _ in visit.hits] == [sample for sample in ids if sample in model]
        for sample in [s for s in ids if s in model]:
            model.move_to_end(sample)
        for sample in [s for s in ids if s not in model]:
            if len(model) == 5:
                model.popitem(last=False)
            model[sample] = 0
        assert list(store) == list(model)
        assert len({entry.slot for entry in store._entries.values()}) == len(store)


# ---- what must not happen


def test_every_altered_byte_is_refused():
    ends = link()
    x = torch.randn(2, 2, CHANNELS)
    ends.send(x[:1], [0])
    wire = ends.sender.encode(x, [0, 1])
    saved = {sample: ends.receiver.store[sample] for sample in ends.receiver.store}
    status = range(16 + 52, 16 + 64)  # of the delta's header: a GPU's notes, which no checksum holds
    for place in set(range(wire.numel())) - set(status):
        store = make()
        visit = store.visit([0], [2])
        store.write([visit.misses[0][1]], saved[0])
        altered = wire.clone()
        altered[place] ^= 0x10
        with pytest.raises(ValueError):
            DeltaCodec(store, grid="full-range").decode(altered, [0, 1], x.shape)
        assert torch.equal(store[0], saved[0])


@pytest.mark.parametrize(("ids", "lengths"), [([1, 0], None), ([0, 2], None), ([0, 1], [2, 3])])
def test_other_samples_at_the_receiver_are_refused(ids, lengths):
    ends = link()
    x = torch.randn(2, 3, CHANNELS)
    wire = ends.sender.encode(x, [0, 1])
    with pytest.raises(ValueError, match="wire must be"):
        ends.receiver.decode(wire, ids, x.shape, lengths=lengths)


def test_a_failed_step_shows():
    ends = link()
    x = torch.randn(1, TOKENS, CHANNELS)
    wire = ends.sender.encode(x, [0])
    wire[20] ^= 1
    with pytest.raises(
        ValueError, match="wire must be as it was encoded, of these 0 stored and 1 new samples"
    ):
        ends.receiver.decode(wire, [0], x.shape)
    store = ends.receiver.store
    with pytest.raises(ValueError, match="sample 0 must be written before it is read"):
        store[0]
    with pytest.raises(ValueError, match="must be between two steps, got no rows of sample 0"):
        store.save("never")
    tables = ends.sender.store.table(), store.table()
    assert ends.sender.store.repair(tables[1]) == store.repair(tables[0]) == [0]
    ends.send(x, [0])
    ends.check_equal()


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e5])
def test_values_that_do_not_fit_are_refused(value):
    x = torch.randn(1, TOKENS, CHANNELS)
    x[0, 2, 3] = value
    with pytest.raises(ValueError, match=r"x must be finite in torch\.float16"):
        DeltaCodec(make()).encode(x, [0])


def test_plans_are_used_in_order():
    codec = DeltaCodec(make())
    shape = (1, TOKENS, CHANNELS)
    first, second = codec.plan([0], shape), codec.plan([0], shape)
    with pytest.raises(ValueError, match="plans must be used once and in order, got 2 after 0"):
        codec.encode(torch.zeros(shape), second)
    codec.encode(torch.zeros(shape), first)
    codec.encode(torch.zeros(shape), second)
    with pytest.raises(ValueError, match="got 2 after 2"):
        codec.encode(torch.zeros(shape), second)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": [0]}, r"ids must be \[B\] = \[2\], got \[1\]"),
        ({"ids": [0, 1.5]}, "ids must be 64-bit integers, got 1.5"),
        ({"ids": [0, True]}, "ids must be 64-bit integers, got True"),
        ({"ids": [0, 2**63]}, "ids must be 64-bit integers, got 9223372036854775808"),
        ({"ids": torch.zeros(2)}, "ids must be int32 or int64, got float32"),
        ({"ids": torch.zeros(2, 1, dtype=torch.int64)}, r"ids must be \[B\], got \[2, 1\]"),
        ({"shape": (2, 7, 8)}, r"x must be \[B, up to 6 tokens, 8\], got \[2, 7, 8\]"),
        ({"shape": (2, 6, 4)}, r"x must be \[B, up to 6 tokens, 8\]"),
        ({"lengths": [6]}, r"lengths must be \[2\] numbers in \[1, 6\], got \[6\]"),
        ({"lengths": [0, 6]}, r"lengths must be \[2\] numbers in \[1, 6\]"),
        ({"ids": list(range(5)), "shape": (5, 6, 8)}, "distinct ids must be at most 4, got 5"),
    ],
)
def test_arguments_of_plans_are_checked(change, message):
    arguments = {"ids": [0, 1], "shape": (2, 6, 8), "lengths": None} | change
    store = make()
    with pytest.raises(ValueError, match=message):
        DeltaCodec(store).plan(arguments["ids"], arguments["shape"], lengths=arguments["lengths"])
    assert len(store) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity": 0}, "capacity must be an integer of at least 1, got 0"),
        ({"slot_shape": (3,)}, r"slot_shape must be \(tokens, channels\), got \(3,\)"),
        ({"slot_shape": (0, 3)}, "tokens must be an integer of at least 1, got 0"),
        ({"dtype": torch.int8}, "dtype must be float32, bfloat16 or float16, got torch.int8"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        ActivationStore(**({"capacity": 2, "slot_shape": (2, 2)} | options))
    with pytest.raises(ValueError, match="store must be an ActivationStore, got NoneType"):
        DeltaCodec(None)
    with pytest.raises(ValueError, match=r"bits must be an integer in \[2, 8\], got 9"):
        DeltaCodec(make(), bits=9)


# ---- comparing and repairing


def test_digest_shows_every_difference():
    ends = link()
    ends.send(torch.randn(3, TOKENS, CHANNELS), [0, 1, 2])
    a, b = ends.sender.store, ends.receiver.store
    assert a.digest() == b.digest()
    b.visit([0], [TOKENS])  # another order of use
    assert a.digest() != b.digest()
    assert a.digest([2, 0]) == b.digest([2, 0])
    entry = b._entries[1]
    rows = b[1]
    rows[5, 7] += 1
    b.write([entry], rows)
    assert a.digest([1]) != b.digest([1])
    assert a.digest([5]) == b.digest([5])
    table = a.table(), b.table()
    assert a.repair(table[1]) == b.repair(table[0]) == [1]
    assert list(a) == list(b) == [0, 2]
    ends.check_equal()


@hypothesis.given(st.lists(st.integers(0, 9), max_size=8), st.lists(st.integers(0, 9), max_size=8))
def test_repair_makes_any_two_stores_equal(first, second):
    ends = link()
    x = torch.zeros(1, TOKENS, CHANNELS)
    for end, ids in zip(ends, (first, second), strict=True):
        for sample in ids:
            end.encode(x + sample, [sample])
    tables = [end.store.table() for end in ends]
    forgotten = [end.store.repair(table) for end, table in zip(ends, reversed(tables), strict=True)]
    assert forgotten[0] == forgotten[1]
    ends.check_equal()
    for sample in range(9):
        ends.receiver._planned = ends.receiver._done = ends.sender._done  # one has had fewer microbatches
        ends.send(x + sample, [sample])
    ends.check_equal()


def test_verify_reads_what_is_stored():
    store = make()
    DeltaCodec(store).encode(torch.randn(2, TOKENS, CHANNELS), [4, 5])
    assert store.verify() == []
    store._rows[store._entries[5].slot, 3, 3] += 1
    assert store.verify() == [5]
    store.invalidate([5, 77])
    assert list(store) == [4]


# ---- files


@pytest.mark.parametrize("dtype", DTYPES)
def test_saved_store_goes_on_as_if_nothing_had_happened(tmp_path, dtype):
    generator = random.Random(3)
    ends = link(capacity=5, dtype=dtype)

    def step(*links: Link) -> None:
        ids = [generator.randrange(8) for _ in range(3)]
        x = torch.randn(3, TOKENS, CHANNELS)
        results = [each.send(x, ids, lengths=[6, 6, 2]) for each in links]
        assert all(torch.equal(a, b) for r in results for a, b in zip(r, results[0], strict=True))

    for _ in range(20):
        step(ends)
    path = tmp_path / "store"
    path.write_bytes(b"what was there before")
    ends.sender.store.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["store"]
    loaded = Link(*(DeltaCodec(ActivationStore.load(path), bits=4, grid="full-range") for _ in range(2)))
    assert loaded.sender.store.digest() == ends.sender.store.digest()
    for _ in range(20):
        step(ends, loaded)
    loaded.check_equal()
    assert loaded.sender.store.digest() == ends.sender.store.digest()


def test_damaged_snapshots_are_refused(tmp_path):
    store = make()
    DeltaCodec(store).encode(torch.randn(2, 1, CHANNELS), [4, 5])
    path = tmp_path / "store"
    store.save(path)
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"must be (a saved|whole|as it was saved)"):
            ActivationStore.load(path)
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"must be (a saved|whole|as it was saved)"):
            ActivationStore.load(path)


def test_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    store = make()
    store.save(tmp_path / "store")
    before = (tmp_path / "store").read_bytes()
    DeltaCodec(store).encode(torch.randn(2, 1, CHANNELS), [4, 5])

    def fails(_):
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", fails)
    with pytest.raises(OSError, match="no space left"):
        store.save(tmp_path / "store")
    assert [file.name for file in tmp_path.iterdir()] == ["store"]
    assert (tmp_path / "store").read_bytes() == before


def test_scratch_file(tmp_path):
    file = tmp_path / "rows"
    store = make(file=file)
    DeltaCodec(store).encode(torch.ones(1, TOKENS, CHANNELS), [0])
    assert file.stat().st_size == 4096 + 4 * TOKENS * CHANNELS * 2
    assert file.stat().st_blocks * 512 >= file.stat().st_size  # a disk that is full shows when it is made
    other = make(file=file)
    assert len(other) == 0
    assert torch.equal(store[0], torch.ones(TOKENS, CHANNELS).half())
    (tmp_path / "thesis").write_text("not a store")
    with pytest.raises(FileExistsError, match="file must be new or an activation store"):
        make(file=tmp_path / "thesis")
    assert (tmp_path / "thesis").read_text() == "not a store"


def test_prefetch_changes_nothing_while_rows_change():
    generator = random.Random(4)
    plain, fetched = link(capacity=6), link(capacity=6)
    done = threading.Event()

    def fetch() -> None:
        while not done.is_set():
            fetched.sender.store.prefetch(range(12))

    thread = threading.Thread(target=fetch)
    thread.start()
    try:
        for _ in range(100):
            ids = [generator.randrange(10) for _ in range(4)]
            x = torch.randn(4, TOKENS, CHANNELS)
            assert torch.equal(plain.send(x, ids)[1], fetched.send(x, ids)[1])
    finally:
        done.set()
        thread.join()
    fetched.check_equal()
    assert plain.sender.store.digest() == fetched.sender.store.digest()


def test_a_refused_call_does_not_stand_in_the_way():
    codec = DeltaCodec(make())
    x = torch.randn(1, TOKENS, CHANNELS)
    with pytest.raises(ValueError, match="out must be"):
        codec.encode(x, [2], out=torch.zeros(3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="wire must be"):
        codec.decode(torch.zeros(3, dtype=torch.uint8), [3], x.shape)
    assert list(codec.store) == []
    codec.encode(x, [2])
    assert list(codec.store) == [2]
    with pytest.raises(ValueError, match=r"ids must be 64-bit integers, got 1\.5"):
        codec.plan([4], x.shape, lengths=[1.5])
    assert list(codec.store) == [2]


def test_stores_of_two_processes_do_not_meet(tmp_path):
    """Each has the file that it made, whoever's name it has in the end."""
    stores = [make(file=tmp_path / "rows") for _ in range(2)]
    for value, store in enumerate(stores):
        DeltaCodec(store).encode(torch.full((1, TOKENS, CHANNELS), float(value)), [0])
    assert [float(store[0].mean()) for store in stores] == [0.0, 1.0]
    assert [path.name for path in tmp_path.iterdir()] == ["rows"]
