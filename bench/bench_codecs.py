# SPDX-License-Identifier: Apache-2.0
"""Codecs: against copying the same memory, and against what there is in PyTorch and on PyPI."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench import codec_peers
from bench.jobs import Job, Row, Settings, run_job, run_with
from bench.measure import Race
from bench.peers import Contender

SHAPE = {"quick": (2, 256, 2048), "default": (4, 512, 2048), "full": (4, 1024, 4096)}
OUTLIERS, OUTLIER_SIZE = 1 / 500, 20.0
HADAMARD_ELEMENTS = {"quick": 1 << 20, "default": 1 << 24, "full": 1 << 24}
HADAMARD_SIZES = (64, 128, 256, 512, 1024, 2048, 4096)
PLAIN_SHAPE = {"quick": (1024, 2048), "default": (4096, 4096), "full": (4096, 4096)}

# What ours may take: peer / ours is to be at least this.
TAH_ENCODE, TAH_DECODE, UNFUSED = 1 / 3, 1 / 1.2, 25.0
IN_PLACE, OUT_OF_PLACE, MATMUL = 0.95, 1 / 2, 5.0
COMPILED, PACKAGES = 2.0, 5.0


def jobs(settings: Settings) -> list[Job]:
    found: list[Job] = []

    def add(name: str, threads: int, prepare: Callable[[], tuple[Contender, list[Contender], Row]]) -> None:
        title = f"codec {name}, {threads} thread{'s' if threads > 1 else ''}"
        if settings.wants("codec", title):
            found.append(Job("codec", title, lambda: _race(settings, threads, prepare)))

    for threads in sorted({1, torch.get_num_threads()}):
        for dtype in (torch.float32, torch.bfloat16):
            short = str(dtype).removeprefix("torch.")
            for direction in ("encode", "decode"):
                for given in (True, False):
                    how = "" if given else ", new memory"
                    add(
                        f"TAH {direction} {short}{how}",
                        threads,
                        lambda d=dtype, e=direction, g=given: _tah(settings, d, e, g),
                    )
        for name in ("fixpoint 6 bits", "fixpoint 8 bits", "delta 4 bits"):
            for direction in ("encode", "decode"):
                add(f"{name} {direction}", threads, lambda n=name, e=direction: _fixpoint(settings, n, e))
        for size in HADAMARD_SIZES:
            for what in ("in place", "out of place", "bfloat16"):
                add(f"Hadamard {size} {what}", threads, lambda s=size, w=what: _hadamard(settings, s, w))
        for dtype in (torch.float32, torch.bfloat16):
            short = str(dtype).removeprefix("torch.")
            for group in (64, 128):
                for direction in ("quantize", "dequantize"):
                    add(
                        f"plain 4-bit, group {group}, {short} {direction}",
                        threads,
                        lambda d=dtype, g=group, e=direction: _plain(settings, d, g, e),
                    )
    return found


def _race(
    settings: Settings, threads: int, prepare: Callable[[], tuple[Contender, list[Contender], Row]]
) -> tuple[Race, Row]:
    torch.set_num_threads(threads)
    ours, peers, row = prepare()
    race = Race(ours, peers, budget_s=settings.budget_s, drop_hopeless=False, before=settings.before())
    return race, {**row, "threads": threads}


def _activations(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Normal numbers, a few of them large."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, generator=draw)
    large = torch.rand(*shape, generator=draw) < OUTLIERS
    return torch.where(large, OUTLIER_SIZE * x, x).to(dtype)


def _nothing(_: Any) -> Tensor:
    return torch.empty(0)


def _copy(x: Tensor, name: str = "memcpy") -> Contender:
    to = torch.empty_like(x)
    return Contender(name, lambda: to.copy_(x), _nothing)


def _row(elements: int, goals: dict[str, float | None], **more: Any) -> Row:
    return {"elements": elements, "goals": goals, **more}


def _tah(
    settings: Settings, dtype: torch.dtype, direction: str, given: bool
) -> tuple[Contender, list[Contender], Row]:
    import palmette

    x = _activations(SHAPE[settings.suite], dtype)
    wire = palmette.tah_encode(x)
    unfused = codec_peers.unfused_tah(x)
    share = codec_peers.fired_share(wire, x.shape)
    decoded, other = palmette.tah_decode(wire, x.shape), unfused.decode(unfused.encode(x))
    _check_close("unfused TAH", decoded, other, x)
    main = dtype == torch.float32
    if direction == "encode":
        memory = wire.clone() if given else None
        ours = Contender("palmette", lambda: palmette.tah_encode(x, out=memory), _nothing)
        peers = [_copy(x), Contender("unfused torch", lambda: unfused.encode(x), _nothing)]
        goals = {"memcpy": TAH_ENCODE if main else None, "unfused torch": UNFUSED if main else None}
    else:
        out, packed = torch.empty_like(x) if given else None, unfused.encode(x)
        ours = Contender(
            "palmette", lambda: palmette.tah_decode(wire, x.shape, dtype=dtype, out=out), _nothing
        )
        peers = [_copy(x), Contender("unfused torch", lambda: unfused.decode(packed), _nothing)]
        goals = {"memcpy": TAH_DECODE if main else None, "unfused torch": None}
    if not given:
        goals = dict.fromkeys(goals)
    return ours, peers, _row(x.numel(), goals, note=f"{share:.1%} of tiles fire")


def _fixpoint(settings: Settings, name: str, direction: str) -> tuple[Contender, list[Contender], Row]:
    import palmette

    x = _activations(SHAPE[settings.suite], torch.float32)
    bits = int(name.split()[1])
    codec = palmette.FixpointCodec(bits)
    out, m = torch.empty_like(x), torch.zeros_like(x)
    if name.startswith("delta"):
        wire = palmette.delta_encode_(x, m, bits=bits)
        run: Callable[[], Any] = lambda: palmette.delta_encode_(x, m, bits=bits, out=wire)  # noqa: E731
        if direction == "decode":
            run = lambda: palmette.delta_decode_(wire, m)  # noqa: E731
    else:
        wire = codec.encode(x)
        run = lambda: codec.encode(x, out=wire)  # noqa: E731
        if direction == "decode":
            run = lambda: codec.decode(wire, x.shape, out=out)  # noqa: E731
    return Contender("palmette", run, _nothing), [_copy(x)], _row(x.numel(), {"memcpy": None})


def _hadamard(settings: Settings, size: int, what: str) -> tuple[Contender, list[Contender], Row]:
    import palmette

    elements = HADAMARD_ELEMENTS[settings.suite]
    x = torch.randn(elements // size, size, generator=torch.Generator().manual_seed(0))
    scale = size**-0.5
    if what == "in place":
        ours = Contender("palmette", lambda: palmette.hadamard_transform(x, scale, out=x), _nothing)
        peers = codec_peers.hadamard_in_place(x.clone())
        mine, theirs = x.clone(), [peer.read(None) for peer in peers[:1]]
        for other in theirs:
            peers[0].run()
            want = palmette.hadamard_transform(mine)
            if not torch.allclose(other, want, atol=1e-3, rtol=1e-3):
                raise AssertionError("fht-cpu computes something else")
        goals: dict[str, float | None] = {peer.name: IN_PLACE for peer in peers[:1]}
        matmul = codec_peers.hadamard_by_matmul(x.clone())
        return ours, [*peers, matmul], _row(elements, {**goals, matmul.name: MATMUL})
    if what == "bfloat16":
        x = x.bfloat16()
    out = torch.empty_like(x)
    ours = Contender("palmette", lambda: palmette.hadamard_transform(x, scale, out=out), _nothing)
    return ours, [_copy(x)], _row(elements, {"memcpy": OUT_OF_PLACE})


def _plain(
    settings: Settings, dtype: torch.dtype, group: int, direction: str
) -> tuple[Contender, list[Contender], Row]:
    import palmette

    x = _activations(PLAIN_SHAPE[settings.suite], dtype)
    codec = palmette.TahCodec(tile_size=group, allocation="none", gate="never")
    wire, out = codec.encode(x), torch.empty_like(x)
    decoded = codec.decode(wire, x.shape)
    peers = codec_peers.four_bit(x, group)
    for peer in peers:
        _check_close(peer.name, decoded, peer.decode(peer.encode(x)), x)
    if direction == "quantize":
        ours = Contender("palmette", lambda: codec.encode(x, out=wire), _nothing)
        others = [Contender(p.name, lambda p=p: p.encode(x), _nothing) for p in peers]
    else:
        ours = Contender("palmette", lambda: codec.decode(wire, x.shape, dtype=dtype, out=out), _nothing)
        packed = [peer.encode(x) for peer in peers]
        others = [
            Contender(p.name, lambda p=p, w=w: p.decode(w), _nothing)
            for p, w in zip(peers, packed, strict=True)
        ]
    goals: dict[str, float | None] = {p.name: COMPILED if p.compiled else PACKAGES for p in peers}
    return ours, [*others, _copy(x)], _row(x.numel(), {**goals, "memcpy": None})


def _check_close(name: str, ours: Tensor, theirs: Tensor, x: Tensor) -> None:
    """Both are as good as each other, within a factor of two: else one of them does something else.

    Raises:
        AssertionError: they are not.
    """
    own, other = ((y.float() - x.float()).norm() / x.float().norm() for y in (ours, theirs.view(x.shape)))
    if not (math.isfinite(float(other)) and float(own) < 2 * float(other) and float(other) < 2 * float(own)):
        raise AssertionError(f"{name}: error {float(other):.3g}, ours {float(own):.3g}")


def test_codecs(benchmark: Any, job: Job, report: Any) -> None:
    benchmark.group = "codec"
    benchmark.extra_info.update(report(run_job(job, run_with(benchmark))))
