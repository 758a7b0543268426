# SPDX-License-Identifier: Apache-2.0
"""A slow link between two processes of one machine.

Two network namespaces joined by a pair of virtual Ethernet devices, each shaped by a token bucket
(``tc tbf``): what the kernel does to any other network device. That needs root, or a system that gives users
namespaces of their own. Where neither works, the sending process keeps a token bucket itself.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Sequence
from typing import Any

from torch import Tensor

ADDRESSES = ("10.213.0.1", "10.213.0.2")
DEVICE = "palmette0"  # in either namespace
_TOOLS = ("unshare", "nsenter", "ip", "tc")
_BURST = 8192  # bytes that may leave at once: a few packets
_QUEUE = 64 << 20  # bytes that may wait: TCP sees a slow link, not a lossy one


class SlowLink:
    """Two ends of a link whose rate can be set at any time.

    Attributes:
        description: What it is made of, for reports.
        shaped: Does the kernel shape it? Otherwise the processes have to pace what they send.
    """

    description = "loopback; a token bucket in the sending process (no permission to make network namespaces)"
    shaped = False

    def command(self, rank: int, command: Sequence[str]) -> list[str]:
        """The command that runs another one at an end of the link."""
        return list(command)

    def address(self) -> str:
        """Of rank 0."""
        return "127.0.0.1"

    def environment(self) -> dict[str, str]:
        """Environment variables that a process needs to use the link."""
        return {}

    def set_rate(self, bits_per_second: float | None) -> None:
        """In both directions; None: as fast as it goes."""

    def close(self) -> None:
        """Removes it."""

    def __enter__(self) -> SlowLink:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class _Namespaces(SlowLink):
    """As SlowLink; each namespace lives as long as a process that waits for this one to end.

    Raises:
        OSError: the system does not permit it, or a tool is missing; the message says which.
    """

    shaped = True

    def __init__(self) -> None:
        for tool in _TOOLS:
            if shutil.which(tool) is None:
                raise OSError(f"{tool} is not installed")
        self._users = os.geteuid() != 0
        self._holders: list[subprocess.Popen[bytes]] = []
        self.description = "two network namespaces joined by veth, tc tbf at both ends"
        if self._users:
            self.description += ", in a user namespace"
        try:
            enter = ["--user", "--map-root-user"] if self._users else []
            self._hold(["unshare", *enter, "--net"])
            inside = self._enter(0, "--net=/proc/self/ns/net")[:-1] if self._users else []
            self._hold([*inside, "unshare", "--net"])
            there = str(self._holders[1].pid)
            self._run(0, "ip", "link", "add", DEVICE, "type", "veth", "peer", "name", DEVICE, "netns", there)
            for rank, address in enumerate(ADDRESSES):
                self._run(rank, "ip", "address", "add", f"{address}/30", "dev", DEVICE)
                self._run(rank, "ip", "link", "set", DEVICE, "up")
                self._run(rank, "ip", "link", "set", "lo", "up")
            self.set_rate(1e9)
            self.set_rate(None)
        except OSError:
            self.close()
            raise

    def _hold(self, command: list[str]) -> None:
        """Starts a process in a new namespace; it ends when its input does, with this one at the latest."""
        holder = subprocess.Popen(
            [*command, "sh", "-c", "echo ready; exec cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self._holders.append(holder)
        assert holder.stdout is not None
        if holder.stdout.readline() != b"ready\n":
            _, error = holder.communicate()
            raise OSError(error.decode(errors="replace").strip() or f"{command[0]} failed")

    def _enter(self, rank: int, *options: str) -> list[str]:
        users = ["--user", "--preserve-credentials"] if self._users else []
        return ["nsenter", "--target", str(self._holders[rank].pid), *users, *(options or ("--net",))]

    def _run(self, rank: int, *command: str) -> None:
        done = subprocess.run([*self._enter(rank), *command], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")

    def command(self, rank: int, command: Sequence[str]) -> list[str]:
        return [*self._enter(rank), *command]

    def address(self) -> str:
        return ADDRESSES[0]

    def environment(self) -> dict[str, str]:
        return {"GLOO_SOCKET_IFNAME": DEVICE}

    def set_rate(self, bits_per_second: float | None) -> None:
        for rank in range(2):
            with contextlib.suppress(OSError):  # there may be none
                self._run(rank, "tc", "qdisc", "delete", "dev", DEVICE, "root")
            if bits_per_second is not None:
                shape = ["rate", f"{int(bits_per_second)}bit", "burst", str(_BURST), "limit", str(_QUEUE)]
                self._run(rank, "tc", "qdisc", "replace", "dev", DEVICE, "root", "tbf", *shape)

    def close(self) -> None:
        for holder in reversed(self._holders):
            holder.kill()
            holder.wait()
            for pipe in (holder.stdin, holder.stdout, holder.stderr):
                if pipe is not None:
                    pipe.close()


def slow_link(kind: str = "auto") -> SlowLink:
    """The best link that the system permits.

    Args:
        kind: ``"namespaces"``, ``"bucket"`` (in the sending process), or ``"auto"``: the first if possible.

    Raises:
        OSError: namespaces were asked for and are not possible.
    """
    if kind == "bucket":
        return SlowLink()
    try:
        return _Namespaces()
    except OSError:
        if kind == "namespaces":
            raise
        return SlowLink()


class TokenBucket:
    """Delays what a process sends, as a link of a certain rate would.

    Attributes:
        rate: Bits per second; None: no delay.
    """

    def __init__(self) -> None:
        self.rate: float | None = None
        self._free_at = 0.0
        self._lock = threading.Lock()

    def send(self, op: Any, tensor: Tensor, **options: Any) -> Any:
        """``op`` (``dist.isend``), as soon as the link would have carried the message."""
        if self.rate is None:
            return op(tensor, **options)
        with self._lock:
            begin = max(time.monotonic(), self._free_at)
            self._free_at = begin + tensor.numel() * tensor.element_size() * 8 / self.rate
            return _Delayed(op, tensor, options, self._free_at)


class _Delayed:
    """A transfer that begins in a while."""

    def __init__(self, op: Any, tensor: Tensor, options: dict[str, Any], when: float) -> None:
        self._error: BaseException | None = None
        self._work: Any = None
        self._thread = threading.Thread(target=self._begin, args=(op, tensor, options, when), daemon=True)
        self._thread.start()

    def _begin(self, op: Any, tensor: Tensor, options: dict[str, Any], when: float) -> None:
        try:
            time.sleep(max(0.0, when - time.monotonic()))
            self._work = op(tensor, **options)
        except BaseException as error:  # wait() tells
            self._error = error

    def wait(self, timeout: Any = None) -> bool:
        self._thread.join()
        if self._error is not None:
            raise self._error
        return bool(self._work.wait(timeout) if timeout is not None else self._work.wait())
