"""The rows of a step's gradient as they arrive, table by table, and what they are once all have come."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from stepwire.errors import InvalidRequestError, Reason
from stepwire.layout import Layout, Placement
from stepwire_server.engines.protocol import EngineState, Gradient, GradientBuffer, HostArray, Table
from stepwire_server.records.step_request import StepRequest
from stepwire_server.records.tensor_selection import TensorSelection
from stepwire_server.steps.arriving_rows import ArrivingRows
from stepwire_server.steps.summed_rows import summed_rows

__all__ = [
    "NamedRows",
    "RowEntries",
    "RowGradients",
    "TableGradient",
    "row_bytes",
    "row_gradients",
    "step_row_bytes",
    "table_of",
    "table_row_bytes",
]

_ENTRY_BYTES = 64
"""The bytes of an entry's index, and of its share of sorting, beside its elements."""


class NamedRows(NamedTuple):
    """The rows of a table that a step names: each once, `(n,) int64`, rising."""

    table: Table
    rows: HostArray


class RowEntries(NamedTuple):
    """The rows of one table as they came.

    Attributes:
        tensor: the index of the table.
        rows: the rows, `(k,) int64`, in any order and perhaps often.
        values: their gradients, `(k, width) float32`, as they were sent.
    """

    tensor: int
    rows: HostArray
    values: HostArray


class TableGradient(NamedTuple):
    """The gradient of one table: each row that came once.

    Attributes:
        tensor: the index of the table.
        group: its group.
        table: its place.
        rows: the rows, `(n,) int64`, rising.
        values: their gradients, `(n · width,) float32`, as they were sent: not unscaled.
        gradient: the same in memory that the engine reads.
    """

    tensor: int
    group: int
    table: Table
    rows: HostArray
    values: HostArray
    gradient: Gradient


class RowGradients:
    """The rows of one step's gradient; nothing of them touches the state."""

    def __init__(
        self,
        entries: Mapping[int, int],
        selection: TensorSelection,
        dtype: np.dtype[Any],
        state: EngineState,
        *,
        keeps_entries: bool = False,
    ) -> None:
        """Await rows.

        Args:
            entries: the number of rows that come for each table, by its index.
            selection: the tensors that the step moves.
            dtype: the encoding of the rows.
            state: reads the rows once they have come.
            keeps_entries: the rows are kept as they came too, for a sum with those of other workers.
        """
        self._kept: list[RowEntries] | None = [] if keeps_entries else None
        self._selection = selection
        self._dtype = dtype
        self._state = state
        tensors = selection.layout.tensors
        self._entries = {index: ArrivingRows(tensors[index], count, "begin.tables") for index, count in entries.items()}
        self._at = {tensors[index].offset: index for index in entries}
        self._tables: list[TableGradient] | None = None
        self._buffers: list[GradientBuffer] = []

    def add(self, offset: int, count: int, rows: HostArray, payload: HostArray) -> None:
        """Keep one chunk: `payload` is its received bytes, `(n,) uint8`, and `rows` its rows, `(k,) uint64`.

        Raises:
            InvalidRequestError: the table, a row, or a number of rows or bytes is wrong; the chunks before it stay.
        """
        if (index := self._at.get(offset)) is None:
            raise _invalid("chunk.offset", f"{offset} is not the offset of a table that `begin.tables` names")
        self._entries[index].add(rows, count, payload, self._dtype)

    def complete(self) -> None:
        """Check that all rows have come, and add up those that came often. A second call changes nothing.

        Raises:
            InvalidRequestError: a table's rows are missing, or the step names no rows for a table.
        """
        if self._tables is not None:
            return
        for index in self._selection.tables:
            if index not in self._entries:
                name = self._selection.layout.tensors[index].spec.name
                raise _invalid("begin.tables", f"table {name!r} is not named; name the rows of its gradient, perhaps 0")
        for entries in self._entries.values():
            entries.require()
        moving = frozenset(self._selection.tables)
        self._tables = [self._table(index) for index in self._entries if index in moving]

    def tables(self) -> Iterator[TableGradient]:
        """Yield the tables that the step moves, by rising index, once everything has come."""
        assert self._tables is not None
        yield from self._tables

    def named(self) -> Sequence[NamedRows]:
        """Return the rows that came, by table: those that go back.

        The rows of a step that was applied before, or comes too late, may be fewer than it says. Nothing adds their
        gradients up.
        """
        if self._tables is None:
            came = [entries for entries in self._entries.values() if entries.count]
            return [NamedRows(table_of(each.placement), np.unique(each.rows())) for each in came]
        return [NamedRows(table.table, table.rows) for table in self.tables()]

    def entries(self) -> Sequence[RowEntries]:
        """Return the rows of the tables that the step moves as they came, once everything has come."""
        assert self._tables is not None and self._kept is not None
        return self._kept

    def close(self) -> None:
        """Let go of the rows. Closing twice is harmless."""
        self._entries, self._tables = {}, []
        self._kept = None if self._kept is None else []
        buffers, self._buffers = self._buffers, []
        for buffer in buffers:
            buffer.close()

    def _table(self, index: int) -> TableGradient:
        entries = self._entries[index]
        rows, values = entries.rows(), entries.pop_values()
        if self._kept is not None:
            self._kept.append(RowEntries(index, rows, values))
        rows, sums = summed_rows(rows, values)
        flat = np.ascontiguousarray(sums).reshape(-1)
        self._buffers.append(self._state.receive(flat.size))
        gradient = self._buffers[-1].put(0, flat)
        return TableGradient(index, entries.placement.spec.group, table_of(entries.placement), rows, flat, gradient)


def row_gradients(
    request: StepRequest, selection: TensorSelection, state: EngineState, *, keeps_entries: bool = False
) -> RowGradients | None:
    """Await the rows of a step; None in a session without tables."""
    if not selection.layout.tables:
        return None
    dtype = request.gradient_dtype
    return RowGradients(dict(request.tables), selection, dtype, state, keeps_entries=keeps_entries)


def table_of(placement: Placement) -> Table:
    """Return the place of a table."""
    return Table(placement.offset, placement.spec.shape[0], placement.spec.width)


def step_row_bytes(request: StepRequest, layout: Layout) -> int:
    """Return the bytes that a step needs at most for all its rows."""
    return table_row_bytes(request.tables, layout, request.gradient_dtype.itemsize)


def table_row_bytes(tables: Sequence[tuple[int, int]], layout: Layout, itemsize: int) -> int:
    """Return the bytes that rows of some tables need at most, by the index of each and its number of rows."""
    return sum(row_bytes(entries, layout.tensors[index].spec.width, itemsize) for index, entries in tables)


def row_bytes(entries: int, width: int, itemsize: int) -> int:
    """Return the bytes that a step needs at most for rows: as received, in float32, sorted, and in the reply."""
    return entries * (width * (itemsize + 16) + _ENTRY_BYTES)


def _invalid(field: str, problem: str) -> InvalidRequestError:
    return InvalidRequestError.of(field, problem, reason=Reason.INVALID_TENSOR)
