"""The rows of a step's gradient as they arrive, table by table, and what they are once all have come."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from stepwire.errors import InvalidRequestError, Reason
from stepwire.layout import Layout, Placement
from stepwire_server.engines.payloads import floats_of
from stepwire_server.engines.protocol import EngineState, Gradient, GradientBuffer, HostArray, Table
from stepwire_server.records.step_request import StepRequest
from stepwire_server.records.tensor_selection import TensorSelection
from stepwire_server.steps.coverage import most_chunks, typed_payload
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


class _Entries:
    """The entries of one table as they arrive."""

    def __init__(self, placement: Placement, expected: int) -> None:
        self.placement = placement
        self.expected = expected
        self.count = 0
        self.rows: list[HostArray] = []
        self.payloads: list[tuple[HostArray, int]] = []


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
        self._entries = {index: _Entries(tensors[index], count) for index, count in entries.items()}
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
        entries = self._entries[index]
        spec, problem = entries.placement.spec, ""
        if count != len(rows) * spec.width:
            problem = f"{len(rows)} rows of {spec.width} elements, and `count` is {count}"
        elif (largest := int(rows.max())) >= spec.named_rows:
            problem = f"row {largest} is not below {spec.named_rows}, the rows of the table"
        elif entries.count + len(rows) > entries.expected:
            problem = f"{entries.count + len(rows)} rows, and `begin.tables` says {entries.expected}"
        elif len(entries.rows) == most_chunks(entries.expected * spec.width):
            problem = f"more than {len(entries.rows)} chunks; send larger ones"
        if problem:
            raise _invalid("chunk.rows", f"table {spec.name!r}: {problem}")
        entries.payloads.append((typed_payload(payload, count, self._dtype), count))
        entries.rows.append(rows.astype(np.int64))
        entries.count += len(rows)

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
            if entries.count != entries.expected:
                name = entries.placement.spec.name
                problem = f"{entries.count} rows of table {name!r} came, and `begin.tables` says {entries.expected}"
                raise _invalid("begin.tables", problem)
        self._settle(frozenset(self._selection.tables))

    def _settle(self, moving: frozenset[int]) -> None:
        self._tables = [self._table(index) for index in self._entries if index in moving]

    def tables(self) -> Iterator[TableGradient]:
        """Yield the tables that the step moves, by rising index, once everything has come."""
        assert self._tables is not None
        yield from self._tables

    def named(self) -> Sequence[NamedRows]:
        """Return the rows that came, by table: those that go back.

        The rows of a step that was applied before, or comes too late, may be fewer than it says.
        """
        if self._tables is None:
            self._settle(frozenset(index for index, entries in self._entries.items() if entries.count))
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
        spec, width = entries.placement.spec, entries.placement.spec.width
        given = [floats_of(payload, 0, count) for payload, count in entries.payloads]
        values = given[0] if len(given) == 1 else np.concatenate([np.empty(0, np.float32), *given])
        rows = np.concatenate([np.empty(0, np.int64), *entries.rows])
        entries.payloads.clear()
        if self._kept is not None:
            self._kept.append(RowEntries(index, rows, values.reshape(-1, width)))
        rows, sums = summed_rows(rows, values.reshape(-1, width))
        flat = np.ascontiguousarray(sums).reshape(-1)
        self._buffers.append(self._state.receive(flat.size))
        gradient = self._buffers[-1].put(0, flat)
        return TableGradient(index, spec.group, table_of(entries.placement), rows, flat, gradient)


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
    itemsize, tensors = request.gradient_dtype.itemsize, layout.tensors
    return sum(row_bytes(entries, tensors[index].spec.width, itemsize) for index, entries in request.tables)


def row_bytes(entries: int, width: int, itemsize: int) -> int:
    """Return the bytes that a step needs at most for rows: as received, in float32, sorted, and in the reply."""
    return entries * (width * (itemsize + 16) + _ENTRY_BYTES)


def _invalid(field: str, problem: str) -> InvalidRequestError:
    return InvalidRequestError.of(field, problem, reason=Reason.INVALID_TENSOR)
