"""The ranges of the flat space that have arrived, and the bytes that claim to be theirs."""

from __future__ import annotations

import functools
from bisect import bisect_left
from collections.abc import Iterable

import numpy as np

from stepwire.errors import InvalidRequestError, Reason
from stepwire.wire.dtypes import wire_bytes, wire_name
from stepwire_server.engines.protocol import HostArray, Range

__all__ = ["Coverage", "invalid_chunk", "most_chunks", "typed_payload"]

# A chunk costs a few hundred bytes of bookkeeping however few elements it brings, so their number is bounded:
# freely for small sessions, and to one in 16 Ki elements beyond.
_FREE_CHUNKS = 1024
_ELEMENTS_PER_FURTHER_CHUNK = 16384


class Coverage:
    """The ranges of `[0, size)` that have arrived. Refuses overlaps at once and gaps at the end."""

    def __init__(self, size: int) -> None:
        """Start with nothing."""
        self._size = size
        self._ranges: list[Range] = []
        self._max_chunks = most_chunks(size)

    def add(self, offset: int, count: int) -> int:
        """Note a chunk and return its rank among those that have arrived.

        Raises:
            InvalidRequestError: it is empty, out of range, overlaps another, or is one too many.
        """
        end = offset + count
        if count < 1 or end > self._size:
            raise invalid_chunk(offset, end, f"is not a non-empty part of [0, {self._size})")
        if len(self._ranges) == self._max_chunks:
            raise invalid_chunk(offset, end, f"is one more than the {self._max_chunks} allowed; send larger chunks")
        rank = bisect_left(self._ranges, (offset, end))
        for neighbour in self._ranges[max(rank - 1, 0) : rank + 1]:
            if neighbour[0] < end and offset < neighbour[1]:
                raise invalid_chunk(offset, end, f"overlaps [{neighbour[0]}, {neighbour[1]}), sent before")
        self._ranges.insert(rank, (offset, end))
        return rank

    def require(self, needed: Iterable[Range]) -> None:
        """Refuse a gap in the needed ranges, which rise.

        Raises:
            InvalidRequestError: names the first missing range.
        """
        if self._ranges == [(0, self._size)]:
            return
        for start, end in needed:
            reached = start
            for low, high in self._ranges[max(bisect_left(self._ranges, (start, 0)) - 1, 0) :]:
                if low > reached or reached >= end:
                    break
                reached = max(reached, high)
            if reached < end:
                raise self._gap(reached, end)

    def _gap(self, start: int, end: int) -> InvalidRequestError:
        following = bisect_left(self._ranges, (start, 0))
        end = min(end, self._ranges[following][0]) if following < len(self._ranges) else end
        return InvalidRequestError(
            f"elements [{start}, {end}) were not sent; chunks must cover [0, {self._size}), but for tensors without a "
            "gradient",
            reason=Reason.INVALID_TENSOR,
            metadata={"field": "chunk", "missing_offset": start, "missing_end": end},
        )


@functools.lru_cache(256)
def most_chunks(elements: int) -> int:
    """Return how many chunks may bring some elements."""
    return _FREE_CHUNKS + elements // _ELEMENTS_PER_FURTHER_CHUNK


def typed_payload(payload: HostArray, count: int, dtype: np.dtype[np.generic]) -> HostArray:
    """View received bytes as items of an encoding that hold `count` elements.

    Raises:
        InvalidRequestError: the byte count is another.
    """
    if payload.size != wire_bytes(dtype, count):
        raise InvalidRequestError(
            f"chunk.count is {count} ({wire_bytes(dtype, count)} bytes of {wire_name(dtype)}) and the payload has "
            f"{payload.size} bytes",
            reason=Reason.INVALID_TENSOR,
            metadata={"field": "chunk.count", "count": count, "payload_bytes": payload.size},
        )
    return payload.view(dtype)


def invalid_chunk(offset: int, end: int, problem: str) -> InvalidRequestError:
    """Return the error of one chunk."""
    return InvalidRequestError(
        f"chunk [{offset}, {end}) {problem}",
        reason=Reason.INVALID_TENSOR,
        metadata={"field": "chunk", "offset": offset, "end": end},
    )
