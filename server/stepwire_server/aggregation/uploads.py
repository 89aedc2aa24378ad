"""The gradients that are received at a time. The others wait in their connections, and take no memory here.

An upload that has fallen silent does not count: one stopped worker must not keep the others from their round.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Final, Protocol

__all__ = ["UploadGate", "UploadSlot", "Uploader"]

_SILENT_SECONDS: Final = 1.0


class Uploader(Protocol):
    """The stream that an upload comes over.

    Attributes:
        last_seen: the clock reading of its last message.
    """

    last_seen: float


class UploadGate:
    """Lets so many uploads in at a time. Thread-safe."""

    def __init__(self, most: int, clock: Callable[[], float]) -> None:
        """Let `most` in."""
        self._most = most
        self._clock = clock
        self._slots: set[UploadSlot] = set()
        self._changed = threading.Condition()

    def slot(self, uploader: Uploader) -> UploadSlot:
        """Wait for a slot, and return it; the caller releases it."""
        slot = UploadSlot(self, uploader)
        with self._changed:
            while (seconds := self._until_vacant()) > 0.0:
                self._changed.wait(seconds)
            uploader.last_seen = self._clock()  # its silence begins here: it waited until now
            self._slots.add(slot)
        return slot

    def release(self, slot: UploadSlot) -> None:
        """Let the next one in. Releasing twice is harmless."""
        with self._changed:
            if slot in self._slots:
                self._slots.remove(slot)
                self._changed.notify()

    def _until_vacant(self) -> float:
        """Return the seconds until a slot is vacant if every upload falls silent now; 0 if one is vacant."""
        ends = sorted(slot.uploader.last_seen + _SILENT_SECONDS for slot in self._slots)
        if len(ends) < self._most:
            return 0.0
        return max(ends[len(ends) - self._most] - self._clock(), 0.0)


class UploadSlot:
    """One upload's place. A context manager, which releases it.

    Attributes:
        uploader: the stream that the upload comes over.
    """

    def __init__(self, gate: UploadGate, uploader: Uploader) -> None:
        """Belong to a gate."""
        self._gate = gate
        self.uploader = uploader

    def release(self) -> None:
        """Give the place to another upload. Releasing twice is harmless."""
        self._gate.release(self)

    def __enter__(self) -> UploadSlot:
        """Hold the place for a block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release the place."""
        self.release()
