# SPDX-License-Identifier: Apache-2.0
"""What bounds the attention kernels on an A100 and an H100, on paper: no GPU has measured anything here.

    python -m bench.gpu_roofline [--write docs/gpu.md]

Registers come from the cubins; shared memory, bytes and wavefronts from the emulator, which runs each kernel
with some tiles of keys and with more of them: the difference, divided by the tiles, is what a tile costs. The
machines' rates come from their data sheets and from the CUDA programming guide. Needs libpalmette_cuda.so and
the check build of the emulator.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import palmette
import torch
from palmette import testing
from palmette.testing import RecordedLaunch

from bench.pages import table, write_between

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = "python -m bench.gpu_roofline"
THREADS = 128
DTYPES = {torch.bfloat16: "bf16", torch.float32: "float"}


@dataclass(frozen=True)
class Gpu:
    """Rates are per SM and clock."""

    name: str
    arch: str
    memory: float  # bytes of HBM
    tensor: int  # floating-point operations of 16-bit mma
    fp32: int
    shared_kb: int  # of an SM; a block takes 1 KB more than it asks for, and may ask for all of the rest
    registers: int = 65536
    special: int = 16  # exponentials
    blocks: int = 32
    warps: int = 64

    def occupancy(self, registers: int, shared_bytes: int) -> int:
        """Blocks that an SM holds."""
        of_registers = self.registers // (-(-registers // 8) * 8 * THREADS)
        of_shared = (self.shared_kb << 10) // (shared_bytes + 1024)
        return min(of_registers, of_shared, self.blocks, self.warps * 32 // THREADS)


GPUS = (
    Gpu("A100", "sm_80", 2039e9 / 108 / 1.41e9, 2048, 128, 164),  # 80 GB, SXM
    Gpu("H100", "sm_90", 3350e9 / 132 / 1.83e9, 4096, 256, 228),  # SXM; mma reaches less than wgmma of it
)


@dataclass(frozen=True)
class Tile:
    """What one tile of keys costs one block."""

    kernel: str
    dtype: torch.dtype
    head_dim: int
    rows: int
    shared_bytes: tuple[int, ...]  # of a block, on each of GPUS
    moved: float  # bytes of matrices; plans' tables come from caches
    wavefronts: float
    flops: int
    exponentials: int

    def clocks(self, gpu: Gpu) -> dict[str, float]:
        products = gpu.fp32 if self.dtype == torch.float32 else gpu.tensor
        return {
            "HBM": self.moved / gpu.memory,
            "shared": self.wavefronts,
            "products": self.flops / products,
            "exp": self.exponentials / gpu.special,
        }


MATRICES = {"q", "k", "v", "out", "dout", "dq", "dk", "dv"}


def run(tokens: int, rows: int, head_dim: int, dtype: torch.dtype) -> None:
    """One task of all rows: forward, and backward."""
    group, leaves = 4, rows // 4
    tree = palmette.Tree([-1] + [0] * leaves, [tokens] + [1] * leaves)
    sizes = {"num_q_heads": group, "num_kv_heads": 1, "head_dim": head_dim}
    plan = palmette.plan_tree_attention(tree, split="flatten", block_len=1024, target="gpu", **sizes)
    task, counts = plan.tensors[4], plan.tensors[7]  # docs/design.md, "A plan"
    task[0] = torch.tensor([0, int(counts[2]), 0, leaves, -1, -1])  # all items, all rows, no partial states
    counts[3], counts[4] = 1, 0
    q = torch.randn(leaves, group, head_dim).to(dtype).requires_grad_()
    k, v = (torch.randn(tokens + leaves, 1, head_dim).to(dtype).requires_grad_() for _ in range(2))
    out = palmette.tree_attention(q, k, v, plan)
    out.backward(torch.randn_like(out))


def costs(tokens: int, rows: int, head_dim: int, dtype: torch.dtype) -> dict[str, tuple[int, int]]:
    """Bytes of matrices and wavefronts, by launch."""
    found: dict[str, tuple[int, int]] = {}
    before = (0, 0)

    def look(launch: RecordedLaunch) -> None:
        nonlocal before
        traffic = [testing.traffic(m.name) for m in launch.memory if m.name in MATRICES]
        now = (sum(t.read + t.written for t in traffic), testing.shared_traffic().wavefronts)
        if launch.name in ("attend", "attend_delta"):  # counts begin anew with an operator
            before = (0, 0)
        found[launch.name] = (now[0] - before[0], now[1] - before[1])
        before = now

    with (
        testing.backend("emulated_check"),
        testing.emulator(count_requests=True),
        testing.recorded_launches(look),
    ):
        run(tokens, rows, head_dim, dtype)
    return found


def shared_bytes(gpu: Gpu, rows: int, head_dim: int, dtype: torch.dtype) -> dict[str, int]:
    """Of a block, by launch."""
    with (
        testing.backend("emulated"),
        testing.emulator(shared_limit=(gpu.shared_kb - 1) << 10),
        testing.recorded_launches() as launches,
    ):
        run(1, rows, head_dim, dtype)
    return {launch.name: launch.shared_bytes for launch in launches}


def tiles(dtype: torch.dtype, head_dim: int, rows: int) -> Iterator[Tile]:
    wide = dtype == torch.float32
    keys = 32 if wide else 64
    few, more = (costs(tokens, rows, head_dim, dtype) for tokens in (128, 256))
    shared = [shared_bytes(gpu, rows, head_dim, dtype) for gpu in GPUS]
    # gradients of more columns than registers hold are found in parts, each with its own S and dP
    parts = {
        "attend": 1,
        "attend_dq": -(-head_dim // 128),
        "attend_dkv": -(-head_dim // (64 if wide else 128)),
    }
    for kernel, n in parts.items():
        if rows != 64 and kernel != "attend":
            continue
        pairs = rows * keys
        products = {"attend": 2, "attend_dq": 2 * n + 1, "attend_dkv": 2 * n + 2}[kernel]
        moved, wavefronts = ((more[kernel][i] - few[kernel][i]) / (128 // keys) for i in (0, 1))
        yield Tile(
            kernel,
            dtype,
            head_dim,
            rows,
            tuple(by_launch[kernel] for by_launch in shared),
            moved,
            wavefronts,
            flops=2 * pairs * head_dim * products,
            exponentials=pairs * n,
        )


def registers() -> dict[tuple[str, str], int]:
    """By short name and architecture."""
    spec = importlib.util.spec_from_file_location("cubins", ROOT / "ci" / "cubins.py")
    assert spec is not None
    assert spec.loader is not None
    cubins = importlib.util.module_from_spec(spec)
    sys.modules["cubins"] = cubins
    spec.loader.exec_module(cubins)
    path = cubins.tools()
    if path is None or not cubins.LIBRARY.is_file():
        raise SystemExit("gpu_roofline: libpalmette_cuda.so, cuobjdump, nvdisasm or c++filt is missing")
    return {(kernel.name, kernel.arch): kernel.registers for kernel in cubins.read(cubins.LIBRARY, path)}


def instance(tile: Tile) -> str:
    """The kernel's name in the cubins."""
    math = "Scalar<float>" if tile.dtype == torch.float32 else "Tensor<bf16>"
    widest = {"attend": 256, "attend_dq": 128}.get(tile.kernel, 64 if tile.dtype == torch.float32 else 128)
    columns = min(widest, next(n for n in (64, 128, 256) if tile.head_dim <= n))
    exact = tile.dtype != torch.float32 and tile.head_dim in (64, 128)
    more = {"attend": f", {str(exact).lower()}", "attend_dq": ", false"}.get(tile.kernel, "")
    return f"{tile.kernel}_kernel<{math}, {columns}{more}>"


def occupancy_table(found: list[Tile], of: dict[tuple[str, str], int]) -> str:
    head = ["kernel", "head_dim"]
    for gpu in GPUS:
        head += [f"{gpu.name}: registers", "shared memory", "blocks per SM", "warps"]
    rows = [head]
    for tile in found:
        if tile.rows != 64:
            continue
        row = [f"{tile.kernel}, {DTYPES[tile.dtype]}", str(tile.head_dim)]
        for gpu, size in zip(GPUS, tile.shared_bytes, strict=True):
            used = of[instance(tile), gpu.arch]
            blocks = gpu.occupancy(used, size)
            row += [str(used), f"{size / 1024:.0f} KB", str(blocks), str(blocks * THREADS // 32)]
        rows.append(row)
    return table(rows)


def roofline_table(found: list[Tile]) -> str:
    head = ["kernel", "head_dim", "rows", "keys", "bytes", "MFLOP", "FLOP per byte"]
    for gpu in GPUS:
        head += [f"{gpu.name}: HBM", "shared", "products", "exp", "bound by"]
    rows = [head]
    for tile in found:
        row = [
            f"{tile.kernel}, {DTYPES[tile.dtype]}",
            str(tile.head_dim),
            str(tile.rows),
            "32" if tile.dtype == torch.float32 else "64",
            f"{tile.moved:,.0f}",
            f"{tile.flops / 1e6:.2f}",
            f"{tile.flops / tile.moved:.0f}",
        ]
        for gpu in GPUS:
            clocks = tile.clocks(gpu)
            row += [f"{n:,.0f}" for n in clocks.values()]
            row.append(max(clocks, key=lambda name: clocks[name]))
        rows.append(row)
    return table(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", type=Path, help="a page with the marks")
    arguments = parser.parse_args()
    if "emulated_check" not in testing.backends():
        parser.error("the check build of the emulator is missing: make test builds it")
    of = registers()
    found = [
        tile
        for dtype, head_dims in ((torch.bfloat16, (64, 128, 256)), (torch.float32, (64, 128)))
        for head_dim in head_dims
        for rows in (16, 64)
        for tile in tiles(dtype, head_dim, rows)
    ]
    found.sort(key=lambda tile: ("attend", "attend_dq", "attend_dkv").index(tile.kernel))
    text = f"{occupancy_table(found, of)}\n\nClocks of an SM for one tile:\n\n{roofline_table(found)}"
    print(text)
    if arguments.write is not None:
        write_between(arguments.write, PROGRAM, "roofline", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
