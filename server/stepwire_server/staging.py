"""Chunks on their way in: a step's gradient before its commit."""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_left
from collections.abc import Iterator

import numpy as np

from stepwire.errors import InvalidRequestError, Reason
from stepwire.layout import Layout, Span
from stepwire_server.engines.protocol import EngineState, Gradient, HostArray
from stepwire_server.memory import Reservation
from stepwire_server.plan import StepOrder

__all__ = ["Coverage", "GradientStaging", "StagedChunk", "typed_payload"]

# A chunk costs a few hundred bytes of bookkeeping however few elements it brings, so their number is bounded:
# freely for small sessions, and to one in 16 Ki elements beyond.
_FREE_CHUNKS = 1024
_ELEMENTS_PER_FURTHER_CHUNK = 16384


class Coverage:
    """Which parts of `[0, size)` have arrived. Refuses overlaps at once and gaps at the end."""

    def __init__(self, size: int) -> None:
        """Start with nothing."""
        self._size = size
        self._spans: list[tuple[int, int]] = []
        self._max_chunks = _FREE_CHUNKS + size // _ELEMENTS_PER_FURTHER_CHUNK

    def add(self, offset: int, count: int) -> int:
        """Note a chunk and return its rank among those that have arrived.

        Raises:
            InvalidRequestError: it is empty, out of range, overlaps another, or is one too many.
        """
        end = offset + count
        if count < 1 or end > self._size:
            raise _invalid_chunk(offset, end, f"is not a non-empty part of [0, {self._size})")
        if len(self._spans) == self._max_chunks:
            raise _invalid_chunk(offset, end, f"is one more than the {self._max_chunks} allowed; send larger chunks")
        rank = bisect_left(self._spans, (offset, end))
        for neighbour in self._spans[max(rank - 1, 0) : rank + 1]:
            if neighbour[0] < end and offset < neighbour[1]:
                raise _invalid_chunk(offset, end, f"overlaps [{neighbour[0]}, {neighbour[1]}), sent before")
        self._spans.insert(rank, (offset, end))
        return rank

    def require_complete(self) -> None:
        """Refuse a gap.

        Raises:
            InvalidRequestError: names the first missing range.
        """
        expected = 0
        for start, end in self._spans:
            if start != expected:
                break
            expected = end
        else:
            start = self._size
        if expected != self._size:
            raise InvalidRequestError(
                f"elements [{expected}, {start}) were not sent; chunks must cover [0, {self._size})",
                reason=Reason.INVALID_TENSOR,
                metadata={"field": "chunk", "missing_offset": expected, "missing_end": start},
            )


@dataclasses.dataclass(slots=True)
class StagedChunk:
    """A received chunk: flat elements `[offset, offset + count)` and their gradient."""

    offset: int
    gradient: Gradient

    @property
    def end(self) -> int:
        """One past its last flat element."""
        return self.offset + len(self.gradient)


class GradientStaging:
    """One step's gradient as it arrives, with the sums that its norms and its finite check need.

    Nothing here touches the session: a stream that breaks drops the object, and no trace is left.
    """

    def __init__(
        self, order: StepOrder, layout: Layout, state: EngineState, reservation: Reservation, *, replay: bool
    ) -> None:
        """Await the chunks of `order`; `reservation` covers their bytes. A replay's chunks are dropped unread."""
        self.order = order
        self.replay = replay
        self.squared_norms = [0.0] * len(layout.groups)
        self.non_finite_count = 0
        self.first_non_finite = layout.size
        self._layout = layout
        self._state = state
        self._reservation = reservation
        self._coverage = Coverage(layout.size)
        self._chunks: list[StagedChunk] = []
        self._sums: list[list[tuple[int, float]]] = []

    def add(self, offset: int, count: int, payload: HostArray) -> None:
        """Take one chunk: `payload` is its received bytes, `(n,) uint8`.

        Raises:
            InvalidRequestError: range, overlap or byte count are wrong; what came before stays.
        """
        if self.replay:
            return
        values = typed_payload(payload, count, self.order.gradient_dtype)
        rank = self._coverage.add(offset, count)
        chunk = StagedChunk(offset, self._state.stage(values))
        self._chunks.insert(rank, chunk)
        self._sums.insert(rank, [self._sum(chunk, index, span) for index, span in self._groups_of(chunk)])
        if not all(math.isfinite(total) for _, total in self._sums[rank]):
            self._locate_non_finite(offset, values)

    def complete(self) -> None:
        """Check that everything came, and finish the norms in flat order, whatever the order of arrival.

        Raises:
            InvalidRequestError: a range is missing.
        """
        self._coverage.require_complete()
        for sums in self._sums:
            for group, total in sums:
                self.squared_norms[group] += total

    def drain(self) -> Iterator[StagedChunk]:
        """Yield the chunks in flat order, letting go of each as the next is asked for."""
        self._chunks.reverse()
        while self._chunks:
            yield self._chunks.pop()

    def close(self) -> None:
        """Let go of everything. Closing twice is harmless."""
        self._chunks.clear()
        self._reservation.release()

    def _groups_of(self, chunk: StagedChunk) -> Iterator[tuple[int, Span]]:
        for index, group in enumerate(self._layout.groups):
            start, end = max(group.offset, chunk.offset), min(group.end, chunk.end)
            if start < end:
                yield index, Span(start, end - start)

    def _sum(self, chunk: StagedChunk, group: int, span: Span) -> tuple[int, float]:
        begin = span.offset - chunk.offset
        return group, self._state.sum_of_squares(chunk.gradient, begin, begin + span.count)

    def _locate_non_finite(self, offset: int, values: HostArray) -> None:
        """Count NaN and Inf and remember the first; rare, so NumPy on the received bytes will do."""
        for tensor in self._layout.overlapping(offset, offset + len(values)):
            begin, end = max(tensor.offset - offset, 0), min(tensor.end - offset, len(values))
            bad = np.flatnonzero(~np.isfinite(values[begin:end].astype(np.float32)))
            if bad.size:
                self.non_finite_count += int(bad.size)
                self.first_non_finite = min(self.first_non_finite, offset + begin + int(bad[0]))


def typed_payload(payload: HostArray, count: int, dtype: np.dtype[np.generic]) -> HostArray:
    """View received bytes as `count` elements.

    Raises:
        InvalidRequestError: the byte count is another.
    """
    if payload.size != count * dtype.itemsize:
        raise InvalidRequestError(
            f"chunk.count is {count} ({count * dtype.itemsize} bytes of {dtype.name}) and the payload has "
            f"{payload.size} bytes",
            reason=Reason.INVALID_TENSOR,
            metadata={"field": "chunk.count", "count": count, "payload_bytes": payload.size},
        )
    return payload.view(dtype)


def _invalid_chunk(offset: int, end: int, problem: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"chunk [{offset}, {end}) {problem}",
        reason=Reason.INVALID_TENSOR,
        metadata={"field": "chunk", "offset": offset, "end": end},
    )
