"""One load on its way in: staged beside the state, so that a broken one changes nothing."""

from __future__ import annotations

from bisect import bisect_right
from operator import attrgetter
from types import TracebackType
from typing import Final

from stepwire.errors import InvalidRequestError, Reason
from stepwire_server.durability.session_log import EntryLog
from stepwire_server.engines.protocol import HostArray
from stepwire_server.records.load_request import LoadRequest
from stepwire_server.records.tensor_selection import TensorSelection
from stepwire_server.sessions.state import Residency
from stepwire_server.sessions.workers import Holder
from stepwire_server.steps.coverage import Coverage, typed_payload

__all__ = ["Load"]

_END: Final = attrgetter("end")


class Load:
    """One load from its first message to its commit. A context manager, which gives its memory back.

    Attributes:
        request: the load as it was asked for.
        holder: the hold that it began under; nothing commits under an older one.
        staged: the slots that arrive.
        entry: the load's entry in the log; None where none is kept.
    """

    def __init__(
        self,
        request: LoadRequest,
        holder: Holder,
        staged: Residency,
        everything: TensorSelection,
        entry: EntryLog | None = None,
    ) -> None:
        """Await the chunks of a load; `everything` is all tensors of the layout."""
        self.entry = entry
        self.request = request
        self.holder = holder
        self.staged = staged
        self._segments = everything.segments
        self._coverage = {slot: Coverage(everything.layout.size) for slot in request.slots}

    def add(self, slot: str, offset: int, count: int, payload: HostArray) -> None:
        """Stage one chunk of a slot: `payload` is its received bytes, `(n,) uint8`. Padding stays zero.

        Raises:
            InvalidRequestError: the slot was not announced, or range or byte count are wrong.
        """
        if (coverage := self._coverage.get(slot)) is None:
            raise InvalidRequestError.of(
                "slot", f"{slot[:64]!r} was not announced; open.slots is {list(self.request.slots)}"
            )
        values = typed_payload(payload, count, self.request.dtype)
        coverage.add(offset, count)
        if self.entry is not None:
            self.entry.chunk(offset, count, payload, self.request.slots.index(slot))
        for start, end, _ in self._segments[bisect_right(self._segments, offset, key=_END) :]:
            if start >= offset + count:
                return
            low, high = max(start, offset), min(end, offset + count)
            self.staged.arrays.write(slot, low, values[low - offset : high - offset])

    def add_rows(self, offset: int, count: int, rows: HostArray, payload: HostArray) -> None:
        """Refuse rows.

        Raises:
            InvalidRequestError: always.
        """
        raise InvalidRequestError.of(
            "chunk.rows",
            "the load brings whole slots; leave the rows out, or announce rows in `open.tables`",
            reason=Reason.INVALID_FRAME,
        )

    def complete(self) -> None:
        """Check that every slot has arrived.

        Raises:
            InvalidRequestError: names the first missing range.
        """
        for coverage in self._coverage.values():
            coverage.require((start, end) for start, end, _ in self._segments)

    def close(self) -> None:
        """Give the memory back. Closing twice is harmless."""
        self.staged.close()
        if self.entry is not None:
            self.entry.close()

    def __enter__(self) -> Load:
        """Hold the memory for a block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the memory back."""
        self.close()
