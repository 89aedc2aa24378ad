"""The state of one moment, read while steps go on: copy-on-write by ranges.

A checkpoint reads the state block by block, each under the session's lock. A step that is about to change a block that
has not been read has it copied first. So a step waits for the blocks that it overtakes, and for no others. The copies
that wait to be written have a bound; a step that meets the bound waits for the disk.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np

from stepwire_server.engines.protocol import HostArray, Table
from stepwire_server.sessions.session_lock import SessionLock

__all__ = ["BLOCK", "Block", "Capture"]

BLOCK: Final = 1 << 20
"""The elements of a block: 4 MiB a slot."""

_WAITING_BYTES: Final = 48 << 20
_TRIAL_SECONDS: Final = 0.005


class Block(NamedTuple):
    """A range of one slot, as of the moment: `values` is `(n,) float32`."""

    slot: str
    start: int
    values: HostArray


class Capture:
    """One moment of a session's arrays, while it is read."""

    def __init__(self, slots: Sequence[str], size: int, read: Callable[[str, int, HostArray], None]) -> None:
        """Begin at this moment, under the session's lock.

        Args:
            slots: the slots to read.
            size: the elements of each.
            read: reads a range of a slot into an array, under the session's lock.
        """
        self._slots = tuple(slots)
        self._size = size
        self._read = read
        self._next = 0
        self._done = [False] * -(-size // BLOCK)
        self._waiting: deque[Block] = deque()
        self._waiting_bytes = 0
        self._ended = False
        self._changed = threading.Condition(threading.Lock())

    def preserve(self, start: int, end: int) -> None:
        """Copy the blocks of `[start, end)` that have not been read: they are about to change. Under the lock."""
        for index in range(start // BLOCK, -(-end // BLOCK)):
            if not (self._done[index] or self._ended):
                self._copy(index, bounded=True)

    def preserve_rows(self, table: Table, rows: HostArray) -> None:
        """Copy the blocks of some rows of a table that have not been read: they are about to change. Under the lock."""
        firsts = table.start + rows * table.width
        for index in np.unique(np.concatenate([firsts, firsts + table.width - 1]) // BLOCK).tolist():
            self.preserve(index * BLOCK, index * BLOCK + 1)

    def blocks(self, lock: SessionLock) -> Iterator[Block]:
        """Yield all blocks once, each read under `lock`; those that steps have copied come first."""
        while True:
            while self._waiting:
                yield self._popped()
            if not lock.acquire(timeout=_TRIAL_SECONDS):  # a step that waits for room holds it: make room
                continue
            try:
                index = next((index for index in range(self._next, len(self._done)) if not self._done[index]), None)
                if index is not None:
                    self._next = index + 1
                    self._copy(index, bounded=False)
            finally:
                lock.release()
            if index is None and not self._waiting:
                return

    def end(self) -> None:
        """Copy nothing more: the reader has all, or has given up."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _popped(self) -> Block:
        with self._changed:
            block = self._waiting.popleft()
            self._waiting_bytes -= block.values.nbytes
            self._changed.notify_all()
        return block

    def _copy(self, index: int, *, bounded: bool) -> None:
        start = index * BLOCK
        count = min(BLOCK, self._size - start)
        for slot in self._slots:
            with self._changed:
                while bounded and self._waiting_bytes >= _WAITING_BYTES and not self._ended:
                    self._changed.wait()
                if self._ended:
                    return
            values = np.empty(count, np.float32)
            self._read(slot, start, values)
            with self._changed:
                self._waiting.append(Block(slot, start, values))
                self._waiting_bytes += values.nbytes
        self._done[index] = True
