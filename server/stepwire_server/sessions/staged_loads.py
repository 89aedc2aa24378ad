"""Loads on their way into a session's state: room for them, and the check and the change that rows make."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from stepwire_server.records.load_request import LoadRequest
from stepwire_server.sessions.hashed_state import write_rows
from stepwire_server.sessions.load import Load
from stepwire_server.sessions.progress import Progress
from stepwire_server.sessions.row_load import LoadedRows, RowLoad
from stepwire_server.sessions.state import SessionState
from stepwire_server.sessions.workers import Holder
from stepwire_server.steps.row_gradients import table_of, table_row_bytes

__all__ = ["check_loaded_rows", "replace_rows", "staged_load"]

_RETRY_SECONDS: Final = 0.1


def staged_load(state: SessionState, request: LoadRequest, holder: Holder, progress: Progress) -> Load | RowLoad:
    """Make room for a load beside the state: of whole slots, or of rows as received and in float32.

    Raises:
        ResourceExhaustedError: it does not fit.
    """
    if not request.by_rows:
        staged, entry = state.stage_load(request.slots), progress.begin(at_once=True)
        return Load(request, holder, staged, state.config.everything, entry)
    layout = state.config.layout
    nbytes = table_row_bytes(request.tables, layout, request.dtype.itemsize)
    room = state.device.budget.reserve(nbytes, "the load's rows", retry_after_seconds=_RETRY_SECONDS)
    return RowLoad(request, holder, layout, room, progress.begin(at_once=True))


def check_loaded_rows(state: SessionState, tables: Sequence[LoadedRows]) -> None:
    """Refuse new ids that a table has no room for; nothing is changed.

    Raises:
        ResourceExhaustedError: there is none.
    """
    for index, rows, _ in tables:
        if (ids := state.row_ids.get(index)) is not None:
            ids.check(rows, state.tensor_steps.tensor_steps()[index] + 1)


def replace_rows(state: SessionState, tables: Sequence[LoadedRows]) -> None:
    """Replace the parameters of rows; a new id gets a row, with the first moments and numbers."""
    for index, rows, values in tables:
        table, ids = table_of(state.config.layout.tensors[index]), state.row_ids.get(index)
        numbers = state.numbers_of(index, rows) if index in state.row_numbers else None
        state.before_rows(table, rows)
        if numbers is not None:  # a place may have those of an evicted row
            state.note_numbers(index, rows, numbers)
        write_rows(state.arrays, table, rows if ids is None else ids.find(rows), values)
    state.arrays.settle()
