"""One load of some rows of tables on its way in: kept beside the state, so that a broken one changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import NamedTuple

import numpy as np

from stepwire.errors import InvalidRequestError, Reason
from stepwire.layout import Layout
from stepwire_server.devices.budget import Reservation
from stepwire_server.durability.session_log import EntryLog
from stepwire_server.engines.protocol import HostArray
from stepwire_server.records.load_request import LoadRequest
from stepwire_server.sessions.workers import Holder
from stepwire_server.steps.arriving_rows import ArrivingRows

__all__ = ["LoadedRows", "RowLoad"]


class LoadedRows(NamedTuple):
    """Rows of one table that a load brings.

    Attributes:
        tensor: the index of the table.
        rows: the rows, each once, `(n,) int64`, rising.
        values: their parameters, `(n, width) float32`.
    """

    tensor: int
    rows: HostArray
    values: HostArray


class RowLoad:
    """One load of rows from its first message to its commit. A context manager, which gives its memory back.

    Attributes:
        request: the load as it was asked for.
        holder: the hold that it began under; nothing commits under an older one.
        entry: the load's entry in the log; None where none is kept.
        tables: the rows, once all have come.
    """

    def __init__(
        self, request: LoadRequest, holder: Holder, layout: Layout, room: Reservation, entry: EntryLog | None = None
    ) -> None:
        """Await the rows of a load; `room` is the memory that it has."""
        self.request = request
        self.holder = holder
        self.entry = entry
        self.tables: tuple[LoadedRows, ...] = ()
        self._room = room
        arriving = {index: ArrivingRows(layout.tensors[index], count, "open.tables") for index, count in request.tables}
        self._arriving = arriving
        self._at = {each.placement.offset: each for each in arriving.values()}

    def add(self, slot: str, offset: int, count: int, payload: HostArray) -> None:
        """Refuse a chunk of a whole slot.

        Raises:
            InvalidRequestError: always.
        """
        raise _invalid("chunk", f"{count} elements from {offset} on name no rows, and `open.tables` announces rows")

    def add_rows(self, offset: int, count: int, rows: HostArray, payload: HostArray) -> None:
        """Keep one chunk: `payload` is its received bytes, `(n,) uint8`, and `rows` its rows, `(k,) uint64`.

        Raises:
            InvalidRequestError: the table, a row, or a number of rows or bytes is wrong; the chunks before it stay.
        """
        if (arriving := self._at.get(offset)) is None:
            raise _invalid("chunk.offset", f"{offset} is not the offset of a table that `open.tables` names")
        arriving.add(rows, count, payload, self.request.dtype)
        if self.entry is not None:
            self.entry.rows(offset, count, rows, payload)

    def complete(self) -> None:
        """Check that all rows have come, each once.

        Raises:
            InvalidRequestError: some are missing, or a row came often.
        """
        for arriving in self._arriving.values():
            arriving.require()
        self.tables = tuple(self._loaded())

    def _loaded(self) -> Iterator[LoadedRows]:
        for index, arriving in self._arriving.items():
            came = arriving.rows()
            order = np.argsort(came, kind="stable")
            rows = came[order]
            if len(again := rows[1:][rows[1:] == rows[:-1]]):
                problem = f"table {arriving.placement.spec.name!r}: row {int(again[0])} comes twice; name it once"
                raise _invalid("chunk.rows", problem)
            yield LoadedRows(index, rows, arriving.pop_values()[order])

    def close(self) -> None:
        """Give the memory back. Closing twice is harmless."""
        self._arriving, self._at, self.tables = {}, {}, ()
        self._room.release()
        if self.entry is not None:
            self.entry.close()

    def __enter__(self) -> RowLoad:
        """Hold the memory for a block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the memory back."""
        self.close()


def _invalid(field: str, problem: str) -> InvalidRequestError:
    return InvalidRequestError.of(field, problem, reason=Reason.INVALID_TENSOR)
