"""The settings of the C heap for a server of large messages.

Messages of megabytes are allocated in one thread and freed in another. By default glibc gives threads arenas of their
own, so memory that a gradient leaves behind is not there for the reply. By default glibc also gives back free memory at
the heap's end, from 128 KiB on. Each step would give back the memory of its gradient, and the next step would fault it
in again page by page.

So there is one arena, a fixed threshold for mapping, and no memory given back while steps follow one another. A server
at rest trims the heap, which brings the resident memory down to the state that is held. benchmarks/main.py shows both
figures. Elsewhere than glibc nothing happens.
"""

from __future__ import annotations

import ctypes
import resource
from typing import Any

__all__ = ["WORTH_BYTES", "FreeBytes", "HeapKeeper", "configure", "resident_bytes", "trim"]

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
# glibc's own upper limit. Below the limit, messages come from the heap and are reused warm. Mapping each anew would
# cost a page fault every 4 KiB.
_MAP_FROM_BYTES = 32 << 20
_NEVER = -1
WORTH_BYTES = 32 << 20
"""The free bytes from which giving them back is worth the page faults."""

_LOOKS_AT_REST = 3


def configure() -> None:
    """Set the heap up; call before threads allocate."""
    if (mallopt := _function("mallopt")) is not None:
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_MMAP_THRESHOLD, _MAP_FROM_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _NEVER)


class _Mallinfo2(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    ]


def resident_bytes() -> int:
    """Return the resident bytes of this process; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return 0


def trim() -> None:
    """Give free bytes of the heap back to the system."""
    if (malloc_trim := _function("malloc_trim")) is not None:
        malloc_trim(0)


def _idle_bytes() -> int:
    """Return the resident bytes that no allocation of the heap has: free ones, and the program itself."""
    info = _mallinfo()
    return 0 if info is None else max(resident_bytes() - int(info.uordblks) - int(info.hblkhd), 0)


def _mallinfo() -> _Mallinfo2 | None:
    if (mallinfo2 := _function("mallinfo2")) is None:
        return None
    mallinfo2.restype = _Mallinfo2
    found: _Mallinfo2 = mallinfo2()
    return found


class FreeBytes:
    """Tells how many resident bytes lie free in the heap.

    The heap counts free bytes that it has given back too, and the idle ones are those of stacks and code too. So the
    smaller number is taken.
    """

    def __init__(self) -> None:
        """Take the idle bytes of this moment for those of the program."""
        self._program_bytes = _idle_bytes()

    def __call__(self) -> int:
        """Return the bytes."""
        info = _mallinfo()
        return 0 if info is None else max(min(int(info.fordblks), _idle_bytes() - self._program_bytes), 0)


class HeapKeeper:
    """Trims the heap once a server that has released much memory is at rest.

    Trimming at once would make the next step of a training loop fault the memory in again. Messages that no session
    knows of leave memory behind too, as those of a flood: it shows in the resident bytes that nothing has allocated.
    """

    def __init__(self) -> None:
        """Start with nothing to give back."""
        self._trimmed_at = 0
        self._idle_after_trim = _idle_bytes()
        self._seen = 0
        self._quiet_looks = 0

    def look(self, released_bytes: int) -> bool:
        """Trim the heap if the server is at rest; callers look again and again, as often as convenient.

        Args:
            released_bytes: the bytes released since the start.

        Returns:
            True where the heap was trimmed.
        """
        self._quiet_looks = self._quiet_looks + 1 if released_bytes == self._seen else 0
        self._seen = released_bytes
        if self._quiet_looks < _LOOKS_AT_REST:
            return False
        released = released_bytes - self._trimmed_at >= WORTH_BYTES
        if not released and _idle_bytes() - self._idle_after_trim < WORTH_BYTES:
            return False
        self._trimmed_at = released_bytes
        trim()
        self._idle_after_trim = _idle_bytes()
        return True


def _function(name: str) -> Any:
    try:
        return getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError):
        return None
