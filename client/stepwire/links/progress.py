"""The progress of a load, told to the user's function while the load is sent."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TypeAlias

__all__ = ["LoadProgress", "OnProgress"]

_log = logging.getLogger("stepwire")

OnProgress: TypeAlias = Callable[[int, int], object]
"""A function of the bytes that are sent, and of all bytes; called in another thread than the caller's."""


class LoadProgress:
    """The bytes of a load that are sent, to all shards together. Thread-safe."""

    def __init__(self, told: OnProgress, total_bytes: int) -> None:
        """Tell a function of the progress towards all bytes."""
        self._told: OnProgress | None = told
        self._total_bytes = total_bytes
        self._sent: dict[str, int] = {}
        self._lock = threading.Lock()

    def sent(self, session_id: str, nbytes: int) -> None:
        """Note the bytes that one session was sent so far; a repetition begins again.

        A function that fails is told by `logging`, and not called again: the load goes on.
        """
        with self._lock:
            self._sent[session_id] = nbytes
            if self._told is None:
                return
            try:
                self._told(sum(self._sent.values()), self._total_bytes)
            except BaseException:
                self._told = None
                _log.exception("the function that is told of a load's progress failed; the load goes on")
