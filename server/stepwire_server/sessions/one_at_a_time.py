"""Work that is done one at a time for each name, and side by side for different ones."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

__all__ = ["OneAtATime"]


class OneAtATime:
    """The names that work is under way for. Thread-safe; nothing stays of a name whose work is over."""

    def __init__(self) -> None:
        """Have no work."""
        self._names: set[str] = set()
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Wait until nobody works for a name, and work for it in a block. A thread works for one name at a time."""
        with self._changed:
            self._changed.wait_for(lambda: name not in self._names)
            self._names.add(name)
        try:
            yield
        finally:
            with self._changed:
                self._names.discard(name)
                self._changed.notify_all()
