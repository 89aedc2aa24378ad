"""The chunks of an answer on their way out of an engine."""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Protocol

from stepwire.layout import Layout
from stepwire_server.engines.protocol import PARAM, EngineState, HostArray, Pending, Range
from stepwire_server.records.step_request import StepRequest

__all__ = ["ReplyPipeline", "ReplyWriter", "reply_ranges", "send_parameters", "split_range"]


class ReplyWriter(Protocol):
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


class ReplyPipeline:
    """What an engine computes of one answer: up to `depth` chunks at a time. A context manager.

    A GPU computes a chunk while the one before crosses the bus and the one before that is copied into its message.
    """

    def __init__(self, sink: ReplyWriter, depth: int) -> None:
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

    def __enter__(self) -> ReplyPipeline:
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


def send_parameters(state: EngineState, layout: Layout, request: StepRequest, sink: ReplyWriter) -> None:
    """Answer with the parameters as they are, if an answer is wanted."""
    if request.reply:
        with ReplyPipeline(sink, state.depth) as answer:
            for low, high in reply_ranges(layout, request.reply_first):
                for start, end in split_range(low, high, request.reply_elements):
                    answer.add([state.read(PARAM, start, sink.buffer(start, end - start))])


def reply_ranges(layout: Layout, first: Sequence[int]) -> list[Range]:
    """Return the space in the order in which it is answered: some tensors by index, then what is left of it."""
    if not first:
        return [(0, layout.size)]
    spans = [(layout.tensors[index].offset, layout.tensors[index].end) for index in first]
    ranges, done = [span for span in spans if span[0] < span[1]], 0
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
