"""The memory of replies: what a user has let go of is written again, so that no page of it is new to the process.

The kernel zeroes each page of a large new array at the first touch. For the parameters of a large model that takes
about as long as to copy them. A training program holds one reply while it waits for the next, and lets go of the first
then. So the last two memories are known here: one is in the user's hands, and one is for the next reply.

All arrays of a reply refer to one `_Lent`, through whatever views of views. Its end is that of the last of them. A user
who keeps a slice for ever keeps the memory, and the next reply has another one. The end runs no code, so that it may
come in any thread, between any two instructions.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any, Final

import numpy as np
import numpy.typing as npt

__all__ = ["ReplyMemory"]

_LEAST_BYTES: Final = 1 << 20
"""The bytes of a reply from which its memory is kept: fewer come from the process's heap, whose pages are there."""


class _Lent:
    """NumPy's protocol for "an array at this address", by which all arrays of one reply hold its memory."""

    def __init__(self, memory: npt.NDArray[np.uint8]) -> None:
        self.__array_interface__ = memory.__array_interface__
        self.memory = memory


class ReplyMemory:
    """The memory of one session's replies. Thread-safe."""

    def __init__(self) -> None:
        """Know none yet."""
        self._lock = threading.Lock()
        self._known: list[tuple[weakref.ref[_Lent], npt.NDArray[np.uint8]]] = []

    def empty(self, size: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """Return a writable array, `(size,)` of a dtype, whose content is undefined and whose memory nobody else has.

        Args:
            size: the elements.
            dtype: the dtype.
        """
        nbytes = size * dtype.itemsize
        if nbytes < _LEAST_BYTES:
            return np.empty(size, dtype)
        with self._lock:
            memory = self._let_go(nbytes)
            lent = _Lent(memory)
            self._known = [*self._known[-1:], (weakref.ref(lent), memory)]
        values: npt.NDArray[Any] = np.asarray(lent).view(dtype)
        return values

    def _let_go(self, nbytes: int) -> npt.NDArray[np.uint8]:
        """Return memory of so many bytes that no array shows any more, or new memory."""
        for at, (lent, memory) in enumerate(self._known):
            if lent() is None and memory.nbytes == nbytes:
                del self._known[at]
                return memory
        return np.empty(nbytes, np.uint8)
