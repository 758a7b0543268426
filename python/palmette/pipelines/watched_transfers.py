# SPDX-License-Identifier: Apache-2.0
"""Transfers between two stages whose errors say where they were, and whose waits have an end."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

FORWARD, BACKWARD = "forward", "backward"
_CARGO = {FORWARD: "activations", BACKWARD: "gradients"}


class PipelineError(RuntimeError):
    """A message between two stages did not arrive, or not as it was sent.

    Attributes:
        stage: That noticed it.
        peer: The stage at the other end.
        direction: ``"forward"``, ``"backward"``; ``"setup"`` for what is exchanged before a step.
        microbatch: Of the step; None outside.
    """

    def __init__(
        self, message: str, *, stage: int, peer: int, direction: str, microbatch: int | None
    ) -> None:
        super().__init__(message)
        self.stage = stage
        self.peer = peer
        self.direction = direction
        self.microbatch = microbatch

    def __reduce__(self) -> tuple[Any, ...]:
        """Workers send their errors to the process that started them."""
        where = {name: getattr(self, name) for name in ("stage", "peer", "direction", "microbatch")}
        return functools.partial(type(self), **where), self.args


@dataclass(frozen=True)
class Place:
    """Where a message is, for errors: from or to which stage, and on which rank of the group that is."""

    stage: int
    peer: int
    rank: int
    direction: str
    microbatch: int | None

    def _error(self, action: str, what: str) -> PipelineError:
        cargo = _CARGO.get(self.direction, "what the stages agree on before a step")
        of = "" if self.microbatch is None else f" of microbatch {self.microbatch}"
        receives = action in ("receiving", "decoding")
        way = "from" if receives else "to"
        return PipelineError(
            f"stage {self.stage}: {action} {cargo}{of} {way} stage {self.peer} (rank {self.rank}): {what}",
            stage=self.stage,
            peer=self.peer,
            direction=self.direction,
            microbatch=self.microbatch,
        )

    @contextmanager
    def explaining(self, action: str) -> Iterator[None]:
        """A codec's error says where it was."""
        try:
            yield
        except ValueError as error:
            raise self._error(action, str(error)) from error

    @contextmanager
    def watching(self, action: str, timeout: float) -> Iterator[None]:
        """A backend's error says who is missing."""
        begin = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            waited = time.monotonic() - begin
            if waited >= timeout:
                what = f"nothing within the timeout of {timeout:g} s; the peer has stalled or computes longer"
            else:
                what = "the connection is lost; the peer has ended or cannot be reached"
            raise self._error(action, f"{what} ({_first_line(error)})") from error


class WatchedTransfer:
    """``isend`` or ``irecv`` whose errors are PipelineErrors, and whose wait has an end."""

    def __init__(
        self, op: Callable[..., Any], begin: Callable[..., Any], place: Place, timeout: float
    ) -> None:
        self.__name__ = op.__name__
        self._op = op
        self._begin = begin
        self._place = place
        self._timeout = timeout

    def __call__(
        self,
        tensor: Tensor,
        group: dist.ProcessGroup | None = None,
        tag: int = 0,
        group_dst: int | None = None,
        group_src: int | None = None,
    ) -> _WatchedWork:
        # torch names the peer of an operation that it does not know a source
        sends = self._op is dist.isend
        peer = group_src if group_dst is None else group_dst
        action = "sending" if sends else "receiving"
        with self._place.watching(action, math.inf):
            end = {"group_dst" if sends else "group_src": peer}
            work = self._begin(self._op, tensor, group=group, tag=tag, **end)
        return _WatchedWork(work, tensor, self._place, action, self._timeout)


@dataclass(frozen=True)
class _WatchedWork:
    """A transfer that has begun. It keeps its buffer alive."""

    work: Any
    tensor: Tensor
    place: Place
    action: str
    timeout: float

    def wait(self) -> None:
        with self.place.watching(self.action, self.timeout):
            self.work.wait(timedelta(seconds=self.timeout))


def _first_line(error: Exception) -> str:
    """Without the path of a source file that gloo begins with, and its advice."""
    line = str(error).partition("\n")[0]
    if line.startswith("["):
        line = line.partition("] ")[2]
    return line.partition(". This is typically")[0]
