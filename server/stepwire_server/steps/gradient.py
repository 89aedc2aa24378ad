"""A step's gradient before its commit: chunks as they arrive, and the sums that decide the step."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from fractions import Fraction
from operator import attrgetter, itemgetter
from typing import Any, Final, NamedTuple, Protocol

import numpy as np

from stepwire.wire.dtypes import wire_alignment
from stepwire_server.engines.numpy_reference import gradient_on_host
from stepwire_server.engines.protocol import EngineState, Gradient, HostArray, Pending, Range
from stepwire_server.records.tensor_selection import TensorSelection
from stepwire_server.rules.exact_norm import exact_sum_of_squares
from stepwire_server.steps.coverage import Coverage, invalid_chunk, typed_payload
from stepwire_server.steps.row_gradients import RowGradients

__all__ = ["ChunkRange", "Room", "StagedChunk", "StagedGradient"]


_FIRST: Final = itemgetter(0)
_LAST: Final = itemgetter(1)
_OFFSET: Final = attrgetter("offset")


class StagedChunk(NamedTuple):
    """A received chunk: flat elements `[offset, end)` and their gradient."""

    offset: int
    end: int
    gradient: Gradient


class ChunkRange(NamedTuple):
    """Elements `[begin, end)` of a chunk: flat elements from `start` on, all of one segment."""

    chunk: StagedChunk
    start: int
    begin: int
    end: int


class Room(Protocol):
    """Memory that is reserved for a gradient."""

    def release(self) -> object:
        """Give it back. Releasing twice is harmless."""
        ...


class StagedGradient:
    """One step's gradient as it arrives, with the sums that its norms and its finite check need.

    Attributes:
        dtype: the encoding of the chunks.
        selection: the tensors that the step moves; elements of others are ignored.
        unscale: the factor that gradients are multiplied by first.
        non_finite_count: the elements so far that are NaN or Inf.
        first_non_finite: the first flat element of those; the size of the space for none.
        rows: the rows of tables; None in a session without tables.
    """

    def __init__(
        self,
        dtype: np.dtype[Any],
        selection: TensorSelection,
        state: EngineState,
        reservation: Room,
        *,
        unscale: float,
        sums: bool = True,
    ) -> None:
        """Await the chunks of a gradient.

        Args:
            dtype: their encoding.
            selection: the tensors that the step moves.
            state: stages the chunks.
            reservation: covers their bytes; released by `close`.
            unscale: the factor that gradients are multiplied by.
            sums: squares are summed as chunks arrive. Without, norms are 0 and every element counts as finite.
        """
        self.dtype = dtype
        self.selection = selection
        self.unscale = unscale
        self.non_finite_count = 0
        self.first_non_finite = selection.layout.size
        self.rows: RowGradients | None = None
        self._measured_rows = False
        self._sums_squares = sums
        self._state = state
        self._reservation = reservation
        self._coverage = Coverage(selection.layout.dense_extent)
        self._buffer = state.receive(selection.layout.dense_extent)
        self._chunks: list[StagedChunk] = []
        self._asked: list[tuple[int, ChunkRange, Pending[float]]] = []
        self._sums: list[list[float]] = [[] for _ in selection.layout.groups]

    def add(self, offset: int, count: int, payload: HostArray) -> None:
        """Stage one chunk: `payload` is its received bytes, `(n,) uint8`.

        Raises:
            InvalidRequestError: range, overlap or byte count are wrong; the chunks before it stay.
        """
        values = typed_payload(payload, count, self.dtype)
        if offset % self.selection.layout.chunk_alignment:
            problem = (
                f"starts at no multiple of {self.selection.layout.chunk_alignment}, the layout's `chunk_alignment`"
            )
            raise invalid_chunk(offset, offset + count, problem)
        if offset % wire_alignment(values.dtype):
            problem = f"starts at no multiple of {wire_alignment(values.dtype)}, where a block of int8 does"
            raise invalid_chunk(offset, offset + count, problem)
        if self._ends_inside_a_block(offset + count):
            raise invalid_chunk(offset, offset + count, "ends inside a block of 8-bit moments, which is stepped whole")
        rank = self._coverage.add(offset, count)
        chunk = StagedChunk(offset, offset + count, self._buffer.put(offset, values, count))
        self._chunks.insert(rank, chunk)
        if not self._sums_squares:
            return
        for group, found in self._moved_ranges(chunk):
            asked = self._state.sum_of_squares(chunk.gradient, found.begin, found.end, self.unscale)
            self._asked.append((group, found, asked))

    def pop(self) -> StagedChunk | None:
        """Return a chunk that arrived, and forget it: somebody else applies it. None where there is none."""
        return self._chunks.pop() if self._chunks else None

    def complete(self) -> None:
        """Check that every segment of the step has arrived.

        Raises:
            InvalidRequestError: a range is missing.
        """
        self._coverage.require((start, end) for start, end, _ in self.selection.segments)
        self.settle()
        if self.rows is not None:
            self.rows.complete()
            self._measure_rows(self.rows)

    def settle(self) -> None:
        """Wait for the sums that were asked for while chunks arrived."""
        asked, self._asked = self._asked, []
        for group, found, pending in asked:
            total = pending.wait()
            self._sums[group].append(total)
            if not math.isfinite(total):
                self._locate_non_finite(found)

    def squared_norms(self) -> list[float]:
        """Return the sum of squares of each group's unscaled gradient, within `norms.RELATIVE_ERROR`."""
        return [math.fsum(sums) for sums in self._sums]

    def exact_squared_norm(self, groups: Sequence[int]) -> Fraction:
        """Return the sum of squares of some groups' unscaled gradients exactly; slow and rarely needed."""
        return exact_sum_of_squares(
            self._state.fetch(found.chunk.gradient, found.begin, found.end, self.unscale)
            for chunk in self._chunks
            for group, found in self._moved_ranges(chunk)
            if group in groups
        ) + exact_sum_of_squares(
            self._state.fetch(table.gradient, 0, len(table.gradient), self.unscale)
            for table in (() if self.rows is None else self.rows.tables())
            if table.group in groups
        )

    def ranges(self, start: int, end: int) -> Iterator[ChunkRange]:
        """Yield the ranges of chunks that cover flat elements `[start, end)`, in order."""
        first = max(bisect_right(self._chunks, start, key=_OFFSET) - 1, 0)
        for chunk in self._chunks[first:]:
            if chunk.offset >= end:
                return
            low, high = max(start, chunk.offset), min(end, chunk.end)
            if low < high:
                yield ChunkRange(chunk, low, low - chunk.offset, high - chunk.offset)

    def drain(self, ranges: Sequence[Range]) -> Iterator[tuple[int, int, StagedChunk | None]]:
        """Yield `ranges`, which together are the space, as `(start, end, chunk)`; None where nothing was sent.

        Lets go of each chunk when all of it has been yielded and the next is asked for.
        """
        arrived = [(start, end) for start, end, _ in self._chunks]
        left = [end - start for start, end in arrived]
        chunks: list[StagedChunk | None] = [*self._chunks]
        self._chunks = []
        for start, end in ranges:
            done = start
            for index in range(max(bisect_right(arrived, start, key=_FIRST) - 1, 0), len(arrived)):
                low, high = arrived[index]
                if low >= end:
                    break
                low, high = max(start, low), min(end, high)
                if low >= high:
                    continue
                if done < low:
                    yield done, low, None
                yield low, high, chunks[index]
                done, left[index] = high, left[index] - (high - low)
                if not left[index]:
                    chunks[index] = None
            if done < end:
                yield done, end, None

    def close(self) -> None:
        """Let go of chunks, memory and reservation. Closing twice is harmless."""
        self._chunks.clear()
        self._asked.clear()
        try:
            self._buffer.close()
            if self.rows is not None:
                self.rows.close()
        finally:
            self._reservation.release()

    def _measure_rows(self, rows: RowGradients) -> None:
        """Sum the squares of rows, each row once: its exact sum counts."""
        for table in rows.tables() if self._sums_squares and not self._measured_rows else ():
            total = self._state.sum_of_squares(table.gradient, 0, len(table.gradient), self.unscale).wait()
            self._sums[table.group].append(total)
            if not math.isfinite(total):
                bad = np.flatnonzero(~np.isfinite(gradient_on_host(table.values, self.unscale, None)))
                self.non_finite_count += int(bad.size)
                row, column = divmod(int(bad[0]), table.table.width)
                first = table.table.start + int(table.rows[row]) * table.table.width + column
                self.first_non_finite = min(self.first_non_finite, first)
        self._measured_rows = True

    def _ends_inside_a_block(self, end: int) -> bool:
        """Tell whether elements of tensors lie between the end of a chunk and the end of its block."""
        layout = self.selection.layout
        rest = -end % layout.chunk_alignment
        return rest > 0 and any(layout.overlapping(end, min(end + rest, layout.size)))

    def _moved_ranges(self, chunk: StagedChunk) -> Iterator[tuple[int, ChunkRange]]:
        """Yield the ranges of a chunk that the step moves, with their groups."""
        segments = self.selection.segments
        offset, last, _ = chunk
        for start, end, group in segments[bisect_right(segments, offset, key=_LAST) :]:
            if start >= last:
                return
            low, high = max(start, offset), min(end, last)
            yield group, ChunkRange(chunk, low, low - offset, high - offset)

    def _locate_non_finite(self, found: ChunkRange) -> None:
        """Count NaN and Inf and remember the first; rare, so NumPy on the host will do."""
        values = self._state.fetch(found.chunk.gradient, found.begin, found.end, self.unscale)
        bad = np.flatnonzero(~np.isfinite(values))
        # A client that changes shared memory may have made the element finite since: it was not when it was summed.
        self.non_finite_count += max(int(bad.size), 1)
        self.first_non_finite = min(self.first_non_finite, found.start + (int(bad[0]) if bad.size else 0))
