# SPDX-License-Identifier: Apache-2.0
"""Reads wires that say something else than they should: ci/fuzz.sh runs this under the address sanitizer.

A wire is altered in some bytes, most of them in its header, cut or lengthened, and read. The error names the
checksum that the bytes should have; with it, the wire is read again, so that what lies behind the checksum
sees altered bytes too. Whatever comes, the decoder returns or raises ValueError, and never touches memory
that is not its own. The same seed is the same wires.
"""

from __future__ import annotations

import argparse
import itertools
import random
import re
import struct
from collections import Counter

import numpy as np
import palmette
import torch
from palmette import FixpointCodec, TahCodec, testing

CHECKSUM = re.compile(r"bytes of checksum \d+, as its header says, got (\d+)$")


def originals(random_numbers: random.Random) -> list[tuple[str, bytes, tuple[int, ...]]]:
    """Wires of all kinds, options and small shapes, with the shapes."""
    found = []
    for tile, allocation, gate, metadata in itertools.product(
        (8, 16, 64, 256),
        ("none", "token", "tile"),
        ("never", "ratio", "range", "always"),
        ("fp16", "fp32"),
    ):
        shape = (
            random_numbers.randint(1, 2),
            random_numbers.randint(1, 11),
            tile * random_numbers.randint(1, 2),
        )
        low = random_numbers.randint(2, 8)
        codec = TahCodec(
            tile_size=tile,
            low_bits=low,
            high_bits=random_numbers.randint(low, 8),
            high_ratio=random_numbers.choice((0.0, 0.5, 0.8, 1.0)),
            allocation=allocation,
            gate=gate,
            metadata=metadata,
        )
        found.append(("tah", bytes(codec.encode(torch.randn(shape)).numpy()), shape))
    for bits, grid in itertools.product(range(2, 9), ("ac-sgd", "full-range")):
        shape = (random_numbers.randint(1, 3), random_numbers.randint(1, 5), random_numbers.randint(1, 40))
        dims = random_numbers.choice(((0, 1), (1,), (0, 1, 2), (2,), (0,)))
        x = torch.randn(shape)
        found.append(("fixpoint", bytes(FixpointCodec(bits, dims, grid).encode(x).numpy()), shape))
        wire = palmette.delta_encode_(x, torch.zeros(shape), bits=bits, scale_dims=dims, grid=grid)
        found.append(("delta", bytes(wire.numpy()), shape))
    return found


def altered(wire: bytes, random_numbers: random.Random) -> bytearray:
    data = bytearray(wire)
    how = random_numbers.random()
    if how < 0.1:
        del data[random_numbers.randint(0, len(data)) :]
    elif how < 0.15:
        data += random_numbers.randbytes(random_numbers.randint(1, 64))
    for _ in range(random_numbers.choice((0, 1, 1, 2, 3, 8))):
        if not data:
            break
        at = random_numbers.randrange(min(len(data), random_numbers.choice((48, 48, 120, 1 << 30))))
        data[at] = random_numbers.choice((0, 1, 2, 3, 4, 8, 127, 128, 255, random_numbers.randrange(256)))
    if len(data) >= 64 and random_numbers.random() < 0.8:  # let it come as far as the checksum
        struct.pack_into("<I", data, 0, 0x544D4C50)
        data[4] = 1
        struct.pack_into("<Q", data, 40, len(data))
    return data


def read(kind: str, data: bytearray, shape: tuple[int, ...]) -> str:
    """ "" or the error."""
    # memory of its own, to the byte: the sanitizer sees what is read behind it
    wire = (
        torch.from_numpy(np.frombuffer(bytes(data), np.uint8).copy())
        if data
        else torch.empty(0, dtype=torch.uint8)
    )
    out = torch.zeros(shape, dtype=random.choice((torch.float32, torch.bfloat16)))
    try:
        if kind == "delta":
            palmette.delta_decode_(wire, out)
        else:
            (palmette.tah_decode if kind == "tah" else palmette.fixpoint_decode)(
                wire, shape, dtype=out.dtype, out=out
            )
    except ValueError as error:
        return str(error)
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--backends", default=",".join(b for b in testing.backends() if not b.startswith("emulated"))
    )
    arguments = parser.parse_args()
    random_numbers = random.Random(arguments.seed)
    random.seed(arguments.seed)
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(1)
    wires = originals(random_numbers)
    backends = arguments.backends.split(",")
    outcomes: Counter[str] = Counter()
    done = 0
    while done < arguments.count:
        with testing.backend(backends[done // 10_000 % len(backends)]):
            for _ in range(10_000):
                kind, wire, shape = random_numbers.choice(wires)
                data = altered(wire, random_numbers)
                result = read(kind, data, shape)
                done += 1
                if found := CHECKSUM.search(result):
                    struct.pack_into("<I", data, 48, int(found[1]))
                    result = read(kind, data, shape)
                    done += 1
                outcomes[re.sub(r"[0-9]+", "N", result)[:60] or "read"] += 1
    for result, count in outcomes.most_common():
        print(f"{count:9,}  {result}")
    print(f"{done:9,}  wires read, on {', '.join(backends)}")


if __name__ == "__main__":
    main()
