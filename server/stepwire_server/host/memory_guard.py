"""The end of a process for want of memory, prevented: some of its memory is given up shortly before.

The kernel ends a process that has all of a machine's memory, or of its container's, and every session in memory ends
with it. A budget counts what sessions hold. It cannot count the messages that gRPC keeps until their last byte, of
which gRPC tells nothing. So the resident memory itself is watched, at the price of one read of a file.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

import structlog

from stepwire_server.host import heap
from stepwire_server.host.limits import memory_bytes

__all__ = ["MemoryGuard"]

_log = structlog.get_logger()

_LOOK_SECONDS: Final = 0.1
_SHARE: Final = 0.9
"""The portion of the limit from which memory is given up. A budget of its own has 80 % by default."""


class MemoryGuard:
    """Watches the memory of this process in a thread of its own. Closes twice without complaint."""

    def __init__(
        self,
        relieve: Callable[[], int],
        limit_bytes: int = 0,
        *,
        resident: Callable[[], int] = heap.resident_bytes,
        free: Callable[[], int] | None = None,
        trim: Callable[[], object] = heap.trim,
    ) -> None:
        """Watch from `start` on.

        Args:
            relieve: has memory given up, and returns the number of those who give it.
            limit_bytes: the memory that this process may have; 0 for that of the machine or the container.
            resident: returns the resident bytes of this process.
            free: returns those of them that lie free in the heap; None asks the heap.
            trim: gives free bytes back to the system.
        """
        self._relieve, self._resident, self._trim = relieve, resident, trim
        self._free = free or heap.FreeBytes()
        self._most = int((limit_bytes or memory_bytes()) * _SHARE)
        self._free_after_trim = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory", daemon=True)

    def start(self) -> None:
        """Watch from now on."""
        self._thread.start()

    def close(self) -> None:
        """Watch no longer."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def look(self) -> None:
        """Have memory given up if nearly all of it is in use; what lies free in the heap is given back first."""
        resident = self._resident()
        if resident <= self._most:
            return
        free = self._free()
        if free - self._free_after_trim >= heap.WORTH_BYTES:
            self._trim()
            self._free_after_trim = self._free()
        if resident - free > self._most and (count := self._relieve()):
            _log.warning("memory is short; calls and streams that wait for messages were ended", count=count)

    def _run(self) -> None:
        while not self._ended.wait(_LOOK_SECONDS):
            self.look()
