"""The chunks of an answer on their way out of an engine."""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Protocol

from stepwire_server.engines.protocol import HostArray, Pending

__all__ = ["Answer", "ReplySink"]


class ReplySink(Protocol):
    """Where a commit puts the answer's chunks. Must not block and must not fail."""

    def buffer(self, offset: int, count: int) -> HostArray:
        """Return an uninitialised array of the reply dtype for the next chunk; every element is written."""
        ...

    def before(self) -> HostArray:
        """Return an array like the last `buffer` for what those elements were before the step.

        Only called where the order has a `reply_base`.
        """
        ...

    def flush(self) -> None:
        """The oldest buffer that is not complete is complete now."""
        ...


class Answer:
    """What an engine computes of one answer: up to `depth` chunks at a time. A context manager.

    A GPU computes a chunk while the one before crosses the bus and the one before that is copied into its message.
    """

    def __init__(self, sink: ReplySink, depth: int) -> None:
        """Hand chunks to `sink`."""
        self._sink = sink
        self._depth = depth
        self._asked: deque[Sequence[Pending[Any]]] = deque()

    def add(self, work: Sequence[Pending[Any]]) -> None:
        """Note what the sink's last buffer waits for, and hand over what has had its time."""
        self._asked.append(work)
        while len(self._asked) >= self._depth:
            self._hand_over()

    def _hand_over(self) -> None:
        for pending in self._asked[0]:
            pending.wait()
        self._asked.popleft()
        self._sink.flush()

    def __enter__(self) -> Answer:
        """Start without chunks."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Hand over the rest; after an error, only see to it that nobody writes into the buffers any more."""
        if not self._asked:
            return
        try:
            while self._asked and error is None:
                self._hand_over()
        finally:
            for pending in itertools.chain(*self._asked):
                with contextlib.suppress(Exception):
                    pending.wait()
