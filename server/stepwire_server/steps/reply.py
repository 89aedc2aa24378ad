"""The chunks of a reply on their way out of an engine."""

from __future__ import annotations

import abc
import contextlib
import itertools
from collections import deque
from collections.abc import Hashable, Sequence
from types import TracebackType
from typing import Any, Protocol

from stepwire.layout import Layout
from stepwire_server.engines.protocol import PARAM, EngineState, HostArray, Pending, Range
from stepwire_server.records.step_request import StepRequest

__all__ = ["ReplyPipeline", "ReplyWriter", "SharedReplyWriter", "reply_parameters", "reply_ranges", "split_range"]


class ReplyWriter(Protocol):
    """Memory for the chunks of a reply. Must not block and must not fail."""

    def buffer(self, offset: int, count: int) -> HostArray:
        """Return an uninitialised array of the reply dtype for the next chunk; every element is written."""
        ...

    def rows(self, offset: int, rows: HostArray, width: int) -> HostArray:
        """Return an uninitialised array of the reply dtype for rows of a table, as `buffer` does for a range.

        Args:
            offset: the first flat element of the table.
            rows: the rows, `(n,) int64`.
            width: the elements of a row.
        """
        ...

    def before(self) -> HostArray:
        """Return an array like the last `buffer` for the same elements before the step.

        Only called where the request has a `reply_base`.
        """
        ...

    def flush(self) -> None:
        """Note that the oldest buffer that was not complete is complete now."""
        ...


class SharedReplyWriter(abc.ABC):
    """A `ReplyWriter` whose chunks may be those of another one: several workers get the same reply.

    Attributes:
        form: equal for writers that may follow each other.
    """

    form: Hashable

    @abc.abstractmethod
    def alone(self) -> ReplyWriter:
        """Return a writer of further chunks, which go to this one's worker alone."""

    @abc.abstractmethod
    def follow(self, leader: ReplyWriter) -> None:
        """Have all chunks of another writer of the same form from now on; nothing is written to this one."""


class ReplyPipeline:
    """The chunks of one reply on their way out of an engine: up to `depth` at a time. A context manager.

    A GPU computes a chunk while the one before crosses the bus and the one before that is copied into its message.
    """

    def __init__(self, writer: ReplyWriter, depth: int) -> None:
        """Hand chunks to `writer`."""
        self.writer = writer
        self._depth = depth
        self._asked: deque[Sequence[Pending[Any]]] = deque()

    def add(self, work: Sequence[Pending[Any]]) -> None:
        """Note the work that the writer's last buffer waits for, and flush chunks beyond the depth."""
        self._asked.append(work)
        while len(self._asked) >= self._depth:
            self._flush()

    def _flush(self) -> None:
        for pending in self._asked[0]:
            pending.wait()
        self._asked.popleft()
        self.writer.flush()

    def __enter__(self) -> ReplyPipeline:
        """Start without chunks."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Flush the rest; after an error, only make sure that nobody writes into the buffers any more."""
        if not self._asked:
            return
        try:
            while self._asked and error is None:
                self._flush()
        finally:
            for pending in itertools.chain(*self._asked):
                with contextlib.suppress(Exception):
                    pending.wait()


def reply_parameters(arrays: EngineState, layout: Layout, request: StepRequest, writer: ReplyWriter) -> None:
    """Reply with the parameters as they are, if the request wants any."""
    if request.reply:
        with ReplyPipeline(writer, arrays.depth) as reply:
            for low, high in reply_ranges(layout, request.reply_first):
                for start, end in split_range(low, high, request.reply_elements):
                    reply.add([arrays.read(PARAM, start, writer.buffer(start, end - start))])


def reply_ranges(layout: Layout, first: Sequence[int]) -> list[Range]:
    """Return the space but for tables in the order of the reply: some tensors by index, then the rest of it."""
    if layout.tables:
        return list(layout.dense_ranges)
    if not first:
        return [(0, layout.size)]
    chosen = [(layout.tensors[index].offset, layout.tensors[index].end) for index in first]
    ranges, done = [(start, end) for start, end in chosen if start < end], 0
    for start, end in sorted(ranges):
        if done < start:
            ranges.append((done, start))
        done = end
    return ranges if done == layout.size else [*ranges, (done, layout.size)]


def split_range(start: int, end: int, most: int) -> list[Range]:
    """Cut `[start, end)` at the multiples of `most`, which blocks of 256 never straddle."""
    if (start // most + 1) * most >= end:
        return [(start, end)] if start < end else []
    cuts = [start, *range((start // most + 1) * most, end, most), end]
    return [(low, high) for low, high in itertools.pairwise(cuts) if low < high]
