"""The C heap, told what a server of large messages does with it.

Messages of megabytes are allocated in one thread and freed in another. By default glibc gives threads arenas of
their own, so memory that a gradient leaves behind is not there for the answer. And it gives back whatever lies free at
the heap's end as soon as that is 128 KiB: the memory of a gradient, step by step, to be faulted in again, page by page,
by the next. So: one arena, a fixed threshold for mapping, nothing given back while steps follow one another, and a
trim when the server is at rest, which brings the resident memory down to the state that is held; benchmarks/main.py
shows both figures. Elsewhere than glibc nothing happens.
"""

from __future__ import annotations

import ctypes
from typing import Any

__all__ = ["HeapKeeper", "configure"]

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
# glibc's own upper limit. Below it, messages come from the heap and are reused warm; mapping each anew would cost
# a page fault every 4 KiB.
_MAP_FROM_BYTES = 32 << 20
_NEVER = -1
_WORTH_BYTES = 32 << 20
_LOOKS_AT_REST = 3


def configure() -> None:
    """Set the heap up; call before threads allocate."""
    if (mallopt := _function("mallopt")) is not None:
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_MMAP_THRESHOLD, _MAP_FROM_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _NEVER)


class HeapKeeper:
    """Trims the heap once a server that has released much memory is at rest.

    Not at once: the next step of a training loop would have to fault in again what was given back.
    """

    def __init__(self) -> None:
        """Start with nothing to give back."""
        self._trimmed_at = 0
        self._seen = 0
        self._quiet_looks = 0

    def look(self, released_bytes: int) -> bool:
        """Look at what has been released since the start, as often as convenient; tell whether it was trimmed."""
        self._quiet_looks = self._quiet_looks + 1 if released_bytes == self._seen else 0
        self._seen = released_bytes
        if self._quiet_looks < _LOOKS_AT_REST or released_bytes - self._trimmed_at < _WORTH_BYTES:
            return False
        self._trimmed_at = released_bytes
        if (malloc_trim := _function("malloc_trim")) is not None:
            malloc_trim(0)
        return True


def _function(name: str) -> Any:
    try:
        return getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError):
        return None
