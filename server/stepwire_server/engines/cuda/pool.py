"""Things that threads lend and give back: buffers of the bus, and cells for sums."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable
from typing import Generic, TypeVar

__all__ = ["Pool"]

Item = TypeVar("Item")


class Pool(Generic[Item]):
    """Items that one thread at a time has. Thread-safe.

    Each piece of a gradient and of a reply acquires and releases, so neither takes a lock where nobody waits.
    """

    def __init__(self, items: Iterable[Item] = ()) -> None:
        """Start with these items."""
        self._free = deque(items)
        self._released = threading.Condition()
        self._waiting = 0

    def __len__(self) -> int:
        """Count the free items."""
        return len(self._free)

    def add(self, items: Iterable[Item]) -> None:
        """Add free items."""
        for item in items:
            self.release(item)

    def try_acquire(self) -> Item | None:
        """Return a free item; None where there is none."""
        try:
            return self._free.popleft()
        except IndexError:
            return None

    def acquire(self) -> Item:
        """Wait for a free item."""
        if (item := self.try_acquire()) is not None:
            return item
        with self._released:
            self._waiting += 1
            try:
                item = self._released.wait_for(self.try_acquire)
            finally:
                self._waiting -= 1
        assert item is not None
        return item

    def release(self, item: Item) -> None:
        """Give an item to the next thread."""
        self._free.append(item)
        if self._waiting:  # whoever waits has counted itself before it looked for an item, so nobody is missed
            with self._released:
                self._released.notify()
