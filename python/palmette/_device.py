# SPDX-License-Identifier: Apache-2.0
"""Plans on another device than the CPU, where they are made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_ALIGNED = 32  # elements: tables begin at multiples of 128 bytes


def resolve(device: torch.device | str | None) -> torch.device:
    """The device, with the index that it has now; the CPU for None."""
    place = torch.device("cpu" if device is None else device)
    if place.type == "cuda" and place.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return place


def on_device(tables: tuple[Tensor, ...], device: torch.device | None) -> tuple[Tensor, ...]:
    """Tables of the CPU as they are, or for another device one block of copies there."""
    place = resolve(device)
    if place.type == "cpu":
        return tables
    copies = DeviceTables(place)
    copies.fill(tables)
    return copies.tables


class DeviceTables:
    """int32 tables on a device: one block of memory there, filled by a copy that the host does not wait for.

    The copy comes from pinned memory, which PyTorch keeps until it is done, and is ordered as the current
    stream is.

    Args:
        device: where they are.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.tables: tuple[Tensor, ...] = ()
        self._block = torch.empty(0, dtype=torch.int32, device=device)

    def __getstate__(self) -> dict[str, Any]:  # unpickled views would be copies
        return {"device": self.device, "block": self._block, "shapes": [t.shape for t in self.tables]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.device, self._block = state["device"], state["block"]
        self._cut(state["shapes"])

    def _cut(self, shapes: Sequence[torch.Size]) -> None:
        begins, _ = _places([shape.numel() for shape in shapes])
        self.tables = tuple(
            self._block[begin : begin + shape.numel()].view(shape)
            for shape, begin in zip(shapes, begins, strict=True)
        )

    def has_shapes_of(self, tables: Sequence[Tensor]) -> bool:
        """Will ``fill`` use the memory that is there?"""
        return [table.shape for table in tables] == [table.shape for table in self.tables]

    def fill(self, tables: Sequence[Tensor], used: Sequence[int] | None = None) -> None:
        """Brings tables of the CPU there: into the same memory, unless one has another shape than before.

        Args:
            tables: contiguous, int32.
            used: how many elements of each matter, from the first on. Default: all of them.
        """
        counts = [table.numel() for table in tables] if used is None else used
        begins, end = _places([table.numel() for table in tables])
        if not self.has_shapes_of(tables):
            self._block = torch.zeros(end, dtype=torch.int32, device=self.device)
            self._cut([table.shape for table in tables])
        sent = max((begin + count for begin, count in zip(begins, counts, strict=True)), default=0)
        staging = torch.empty(sent, dtype=torch.int32, pin_memory=self.device.type == "cuda")
        for table, begin, count in zip(tables, begins, counts, strict=True):
            staging[begin : begin + count] = table.view(-1)[:count]
        self._block[:sent].copy_(staging, non_blocking=True)


def _places(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where tables of so many elements begin in a block, and where the last one ends."""
    begins, end = [], 0
    for size in sizes:
        begins.append(end)
        end += -(-size // _ALIGNED) * _ALIGNED
    return begins, end
