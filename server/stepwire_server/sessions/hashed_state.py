"""The arrays of a session with tables whose rows are named by ids: calls with such rows are calls with their places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from stepwire_server.devices.fair_share import Flow
from stepwire_server.devices.fair_state import FairState
from stepwire_server.engines.payloads import convert
from stepwire_server.engines.protocol import PARAM, Done, EngineState, Gradient, HostArray, Pending, RowPass, Table
from stepwire_server.steps.row_ids import RowIds

__all__ = ["HashedState", "make_rows", "write_rows"]

_WRITE_ELEMENTS: Final = 1 << 20


class HashedState(FairState):
    """A `FairState` whose rows are named by ids in some tables. Everybody above it knows ids alone."""

    def __init__(self, state: EngineState, size: int, flow: Flow, ids: Mapping[int, RowIds]) -> None:
        """Share the engine of a state; `ids` are those of tables, by the first element of each."""
        super().__init__(state, size, flow)
        self._ids = ids

    def update_rows(
        self, step: RowPass, table: Table, rows: HostArray, gradient: Gradient, begin: int, out: HostArray | None
    ) -> Pending[tuple[float, ...]]:
        """See `EngineState.update_rows`: every id has its place by now."""
        ids = self._ids.get(table.start)
        return super().update_rows(step, table, rows if ids is None else ids.find(rows), gradient, begin, out)

    def read_rows(self, slot: str, table: Table, rows: HostArray, out: HostArray) -> Pending[None]:
        """See `EngineState.read_rows`; an id without a row has its first values."""
        if (ids := self._ids.get(table.start)) is None:
            return super().read_rows(slot, table, rows, out)
        places = ids.find(rows)
        is_row = places >= 0
        if is_row.all():
            return super().read_rows(slot, table, places, out)
        values = ids.first_values(slot, rows)
        if is_row.any():
            held = np.empty(int(is_row.sum()) * table.width, np.float32)
            super().read_rows(slot, table, places[is_row], held).wait()
            values[is_row] = held.reshape(-1, table.width)
        convert(values.reshape(-1), out)
        return Done(None)


def make_rows(arrays: EngineState, slots: Sequence[str], table: Table, ids: RowIds, places: HostArray) -> None:
    """Write the first values of all slots of some rows.

    Args:
        arrays: the arrays.
        slots: their slots.
        table: the table.
        ids: its ids.
        places: the places of the rows, rising.
    """
    most = max(_WRITE_ELEMENTS // table.width, 1)
    for first, last in _runs_of(places):
        for low in range(first, last, most):
            rows = places[low : min(low + most, last)]
            start, own = table.start + int(rows[0]) * table.width, ids.ids[rows]
            for slot in slots:
                arrays.write(slot, start, ids.first_values(slot, own).reshape(-1))


def write_rows(arrays: EngineState, table: Table, places: HostArray, values: HostArray) -> None:
    """Write the parameters of some rows, `(n, width) float32`, by their places in any order."""
    order = np.argsort(places)
    for low, high in _runs_of(places[order]):
        run = order[low:high]
        arrays.write(PARAM, table.start + int(places[run[0]]) * table.width, values[run].reshape(-1))


def _runs_of(places: HostArray) -> list[tuple[int, int]]:
    """Return the runs `[low, high)` of neighbours among places that rise, as indices into them."""
    cuts = np.flatnonzero(np.diff(places) != 1) + 1
    return list(zip([0, *cuts.tolist()], [*cuts.tolist(), len(places)], strict=True)) if len(places) else []
