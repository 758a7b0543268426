# SPDX-License-Identifier: Apache-2.0
"""``python -m bench.codec_link [--out FILE.md]``: what encoding costs and saves where the link is fast.

Two processes of one thread each pass a boundary of 32 MB, float32 [4, 1024, 2048], over gloo on loopback: as
it is, as bfloat16, and encoded. One round trip is timed and halved, so both ends encode and decode.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import palmette
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from palmette import CastCodec, Codec, FixpointCodec, TahCodec
from palmette.pipelines.train_pipeline.report import table

SHAPE = (4, 1024, 2048)
ROUNDS = 15
CODECS: dict[str, Codec | None] = {
    "as it is": None,
    "bfloat16": CastCodec(torch.bfloat16),
    "TAH, faithful": TahCodec(),
    "plain 4-bit": TahCodec(allocation="none", gate="never"),
    "fixed point, 6 bits": FixpointCodec(6),
}


def _worker(rank: int, init: str, file: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=2)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(SHAPE, generator=draw)
    x = torch.where(torch.rand(SHAPE, generator=draw) < 1 / 500, 20 * x, x)
    out = torch.empty_like(x)
    rows = []
    for name, codec in CODECS.items():
        wire = x.view(-1).view(torch.uint8) if codec is None else codec.encode(x)
        arrived = torch.empty_like(wire)
        times, parts = [], []
        for _ in range(ROUNDS):
            dist.barrier()
            begin = time.perf_counter()
            spent = 0.0
            for sends in (rank == 0, rank == 1):
                start = time.perf_counter()
                if sends:
                    if codec is not None:
                        codec.encode(x, out=wire)
                    spent += time.perf_counter() - start
                    dist.send(wire, 1 - rank)
                else:
                    dist.recv(arrived, 1 - rank)
                    start = time.perf_counter()
                    if codec is not None:
                        codec.decode(arrived, SHAPE, out=out)
                    spent += time.perf_counter() - start
            times.append((time.perf_counter() - begin) / 2)
            parts.append(spent)
        rows.append((name, wire.numel(), statistics.median(times) * 1e3, statistics.median(parts) * 1e3))
    if rank == 0:
        cells = [
            [name, f"{size / 1e6:.1f}", f"{ms:.1f}", f"{part:.1f}", f"{rows[0][2] / ms:.2f}x"]
            for name, size, ms, part in rows
        ]
        head = ["", "MB", "ms, one way", "of these encoding and decoding", "times as fast"]
        Path(file).write_text(table(head, cells) + "\n")
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "table.md"
        mp.spawn(_worker, (f"file://{folder}/init", str(file)), nprocs=2)
        text = file.read_text()
    print(f"palmette {palmette.__version__}, torch {torch.__version__}\n\n{text}")
    if out is not None:
        out.write_text(text)


if __name__ == "__main__":
    main()
