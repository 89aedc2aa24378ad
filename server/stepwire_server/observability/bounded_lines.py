"""Log lines of what strangers can cause as often as they like: so many a second, and the number of the others."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Final

__all__ = ["BoundedLines"]

_LINES_A_SECOND: Final = 20
_LINES_AT_ONCE: Final = 100
"""The lines of refusals, which one client may cause by thousands a second."""


class BoundedLines:
    """Passes log lines on, up to a rate. Thread-safe."""

    def __init__(
        self,
        log: Callable[..., object],
        clock: Callable[[], float] = time.monotonic,
        *,
        a_second: int = _LINES_A_SECOND,
        at_once: int = _LINES_AT_ONCE,
    ) -> None:
        """Begin with room for a burst.

        Args:
            log: writes a line: a function of structlog such as `log.info`.
            clock: returns seconds.
            a_second: the lines of a second.
            at_once: the lines of a burst.
        """
        self._log = log
        self._clock = clock
        self._a_second, self._at_once = float(a_second), float(at_once)
        self._room = self._at_once
        self._filled = clock()
        self._left_out = 0
        self._lock = threading.Lock()

    def write(self, event: str, **values: Any) -> None:
        """Write a line, or count it as left out; the next line that is written says how many were."""
        with self._lock:
            now = self._clock()
            self._room = min(self._room + (now - self._filled) * self._a_second, self._at_once)
            self._filled = now
            if self._room < 1.0:
                self._left_out += 1
                return
            self._room -= 1.0
            left_out, self._left_out = self._left_out, 0
        if left_out:
            values["lines_left_out"] = left_out
        self._log(event, **values)
