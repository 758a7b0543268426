# SPDX-License-Identifier: Apache-2.0
"""Which slots of a paged KV pool are free."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence


class SlotPool:
    """Hands out the slots of a KV pool in pages; a page belongs to one node, so its tokens lie together.

    The lowest free page goes first: what is recycled is used again before the pool grows, and a prompt in a
    fresh pool is contiguous.

    Args:
        page_size: Slots per page.
        num_slots: Slots to begin with, rounded up to whole pages.
        max_slots: Upper limit, rounded down to whole pages; None (default): the pool grows without one.
    """

    def __init__(self, page_size: int, num_slots: int, max_slots: int | None = None) -> None:
        if page_size < 1:
            raise ValueError(f"page_size must be positive, got {page_size}")
        if max_slots is not None and max_slots < page_size:
            raise ValueError(f"max_slots must be at least page_size ({page_size}), got {max_slots}")
        self.page_size = page_size
        self.max_slots = max_slots
        self._max_pages = None if max_slots is None else max_slots // page_size
        pages = max(1, -(-num_slots // page_size))
        self._num_pages = pages if self._max_pages is None else min(pages, self._max_pages)
        self._free = list(range(self._num_pages))

    @property
    def num_slots(self) -> int:
        """Slots of the pool, free or not: what the KV pool must hold."""
        return self._num_pages * self.page_size

    @property
    def num_free(self) -> int:
        """Slots of the free pages."""
        return len(self._free) * self.page_size

    def allocate(self, wanted: Sequence[tuple[Sequence[int], int]]) -> list[list[int]]:
        """Slots for (held slots, count) of several nodes: the rest of each one's last page, then new pages.

        The pool grows to at least twice its size where it must; its owner then grows the KV pool to
        ``num_slots``.

        Raises:
            RuntimeError: ``max_slots`` is used up; nothing was allocated.
        """
        slots: list[list[int]] = []
        for held, count in wanted:
            rest = -(held[-1] + 1) % self.page_size if held else 0
            slots.append([held[-1] + 1 + i for i in range(min(rest, count))])
        pages = [
            -(-(count - len(part)) // self.page_size) for (_, count), part in zip(wanted, slots, strict=True)
        ]
        if sum(pages) > len(self._free):
            self._grow(sum(pages) - len(self._free))
        for (_, count), part, new in zip(wanted, slots, pages, strict=True):
            for _ in range(new):
                first = heapq.heappop(self._free) * self.page_size
                part.extend(range(first, first + min(self.page_size, count - len(part))))
        return slots

    def release(self, slots: Iterable[int], kept: Iterable[int] = ()) -> None:
        """Give back some of a node's slots: pages that hold none of its other slots, ``kept``, are free."""
        pages = {slot // self.page_size for slot in slots} - {slot // self.page_size for slot in kept}
        for page in pages:
            heapq.heappush(self._free, page)

    def _grow(self, missing: int) -> None:
        wanted = max(self._num_pages + missing, 2 * self._num_pages)
        if self._max_pages is not None:
            wanted = min(wanted, self._max_pages)
        if wanted < self._num_pages + missing:
            raise RuntimeError(
                f"max_slots must be at least {(self._num_pages + missing) * self.page_size} for this step, "
                f"got {self.max_slots}: prune branches or make the decoder with a larger max_slots"
            )
        for page in range(self._num_pages, wanted):
            heapq.heappush(self._free, page)
        self._num_pages = wanted
