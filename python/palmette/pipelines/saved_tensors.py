# SPDX-License-Identifier: Apache-2.0
"""What a graph has saved, out of the way until its backward pass."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

LEAST_BYTES = 1 << 14  # smaller ones stay where they are


class _Place(NamedTuple):
    offset: int
    shape: torch.Size
    dtype: torch.dtype


class OffloadedTensors:
    """A context in which saved tensors leave the device: to pinned host memory, or from the CPU to a file.

    The file is a temporary one without a name, so nothing of it is left behind; ``TMPDIR`` says where.
    Leaving the context stops the saving; the tensors come back when the graph asks for them.

    Args:
        keeps: is a storage one that lives on anyway (a parameter, a cache)? Its tensors stay.
    """

    def __init__(self, keeps: Callable[[int], bool]) -> None:
        self._keeps = keeps
        self._file: Any = None
        self._end = 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def __enter__(self) -> OffloadedTensors:
        self._hooks.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._hooks.__exit__(kind, error, traceback)

    def _pack(self, tensor: Tensor) -> Any:
        size = tensor.numel() * tensor.element_size()
        if size < LEAST_BYTES or self._keeps(tensor.untyped_storage().data_ptr()):
            return tensor.detach()  # with its graph it would hold itself, and the file, for ever
        if tensor.device.type != "cpu":
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            return tensor.device, host.copy_(tensor)
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="palmette-")  # noqa: SIM115  closed with the graph
        content = (
            tensor.detach().resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8).numpy().data
        )
        place = _Place(self._end, tensor.shape, tensor.dtype)
        done = 0
        while done < size:
            done += os.pwrite(self._file.fileno(), content[done:], self._end + done)
        self._end += size
        return place

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        if not isinstance(packed, _Place):
            device, host = packed
            back: Tensor = host.to(device)
            return back
        tensor = torch.empty(packed.shape, dtype=packed.dtype)
        content = tensor.view(-1).view(torch.uint8).numpy().data
        done = 0
        while done < len(content):
            got = os.preadv(self._file.fileno(), [content[done:]], packed.offset + done)
            if got == 0:
                raise OSError("the file of saved tensors has ended early")
            done += got
        return tensor
