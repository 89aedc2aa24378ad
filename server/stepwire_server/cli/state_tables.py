"""The tables of a checkpoint in a file of state: rows by ids without the empty places, their ids, and numbers of rows.

A table whose rows are named by ids is in a file as its rows by rising id, `(rows, …)`, and has its ids beside them, in
`row_ids.NAME`. With `max_age_steps` the t of the step in which each row last came is in `row_ages.NAME`. Numbers of
rows are in `row_numbers.NAME`: t_r of `row_counter`, and of `skipped` the t of the step in which the row last came.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

import stepwire
from stepwire.layout import Layout, Placement
from stepwire_server.cli.tensor_file import Tensor
from stepwire_server.durability.checkpoint import Checkpoint
from stepwire_server.rules import RowSemantics
from stepwire_server.sessions.capture import BLOCK
from stepwire_server.sessions.row_numbers import ROW_IDS, ROW_NUMBERS, decoded

__all__ = ["TablesOfCheckpoint", "check_forms", "is_of_tables", "refuse_import"]

_FLOAT32: Final = np.dtype(np.float32)
_INT64: Final = np.dtype(np.int64)
_IDS, _AGES = ROW_IDS
_NUMBERED: Final = ("row_counter", "skipped")
_COUNTING: Final = tuple(semantics.value for semantics in RowSemantics if semantics.counts_rows)
_FORMS: Final = ("stepwire", "torch")

Places = npt.NDArray[np.int64]


class TablesOfCheckpoint:
    """The tables of one checkpoint; their arrays are read when they are needed."""

    def __init__(self, checkpoint: Checkpoint, layout: Layout) -> None:
        """Use a checkpoint whose tensors have a layout."""
        self._checkpoint = checkpoint
        self._layout = layout
        self._places = {index: self._rising(index) for index, each in layout.tables.items() if each.spec.hashed}

    def beside(self) -> dict[str, Tensor]:
        """Return the arrays beside those of the slots, by their names in a file."""
        found = {}
        for index, table in self._layout.tables.items():
            name, arrays = table.spec.name, self._checkpoint.manifest.arrays
            if index in self._places:
                found[f"{_IDS}{name}"] = self._numbers(index, functools.partial(self._ids, index))
            if f"{_AGES}{index}" in arrays:
                ages = functools.partial(self._parts, f"{_AGES}{index}", np.dtype(np.uint32))
                found[f"{_AGES}{name}"] = self._numbers(index, ages)
            if table.spec.table in _NUMBERED:
                found[f"{ROW_NUMBERS}{name}"] = self._numbers(index, functools.partial(self._counts, index))
        return found

    def sums(self) -> dict[str, Tensor]:
        """Return the sums of the rows of each table that has one a row, `(rows, 1, …)` as TorchRec has them."""
        found = {}
        for index, table in self._layout.tables.items():
            if table.spec.table == "row_wise":
                read = functools.partial(self._whole, f"{ROW_NUMBERS}{index}", _FLOAT32)
                ones = [1 for _ in table.spec.shape[1:]]
                found[table.spec.name] = self._of_rows(index, read, _FLOAT32, *ones)
        return found

    def slot(self, slot: str, index: int, placed: Placement) -> Tensor | None:
        """Return the rows of a table in a slot by rising id; None for a tensor that has no ids."""
        if index not in self._places:
            return None
        shape = (len(self._places[index]), *placed.spec.shape[1:])
        return Tensor(shape, _FLOAT32, lambda: self._rows(slot, placed, self._places[index]).reshape(shape))

    def _of_rows(self, index: int, read: Any, dtype: np.dtype[Any], *extents: int) -> Tensor:
        """Return an array with a number for each row of a table: those that there are, for one with ids.

        `read` returns the numbers of all places.
        """
        places = self._places.get(index)
        shape = (self._layout.tensors[index].spec.shape[0] if places is None else len(places), *extents)

        def chosen() -> npt.NDArray[Any]:
            values: npt.NDArray[Any] = read()
            values = values if places is None else values[places]
            return values.astype(dtype, copy=False).reshape(shape)

        return Tensor(shape, dtype, chosen)

    def _numbers(self, index: int, read: Any) -> Tensor:
        return self._of_rows(index, read, _INT64)

    def _rising(self, index: int) -> Places:
        """Return the places of the rows of a table with ids, by rising id."""
        ids = self._ids(index)
        held = np.flatnonzero(ids >= 0)
        places: Places = held[np.argsort(ids[held])]
        return places

    def _ids(self, index: int) -> npt.NDArray[Any]:
        return self._parts(f"{_IDS}{index}", _INT64)

    def _counts(self, index: int) -> npt.NDArray[Any]:
        return decoded(self._whole(f"{ROW_NUMBERS}{index}", _FLOAT32), np.dtype(np.uint32))

    def _parts(self, slot: str, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """Return numbers whose parts of 16 bits follow each other."""
        return self._whole(slot, np.dtype(np.uint16)).view(dtype)

    def _whole(self, slot: str, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """Return an array, block by block."""
        found = np.empty(self._checkpoint.manifest.arrays[slot].elements, dtype)
        for low in range(0, len(found), BLOCK):
            block = np.empty(min(BLOCK, len(found) - low), np.float32)
            self._checkpoint.body.read(slot, low, block)
            found[low : low + len(block)] = block
        return found

    def _rows(self, slot: str, placed: Placement, places: Places) -> npt.NDArray[Any]:
        """Return the rows of a table by rising id, some at a time, and without the empty places."""
        width, order = placed.spec.width, np.argsort(places)
        most = max(BLOCK // width, 1)
        found, rising = np.empty((len(places), width), np.float32), places[order]
        for first in range(0, int(rising[-1]) + 1 if len(rising) else 0, most):
            low, high = np.searchsorted(rising, [first, first + most]).tolist()
            if low < high:
                block = np.empty(min(most, placed.spec.shape[0] - first) * width, np.float32)
                self._checkpoint.body.read(slot, placed.offset + first * width, block)
                found[order[low:high]] = block.reshape(-1, width)[rising[low:high] - first]
        return found


def is_of_tables(slot: str) -> bool:
    """Tell whether an array of a checkpoint belongs to tables, and is no slot."""
    return slot.startswith((ROW_NUMBERS, *ROW_IDS))


def check_forms(form: str, layout: Layout) -> None:
    """Refuse tables that a form has no counterpart of.

    Raises:
        InvalidRequestError: names the table.
    """
    for table in layout.tables.values():
        what = {"row_wise": "one sum a row", "row_counter": "numbers of rows", "skipped": "numbers of rows"}
        has = "rows by ids" if table.spec.hashed else what.get(table.spec.table)
        if has and form not in _FORMS:
            problem = f"{form} has no counterpart of {has}, of table {table.spec.name!r}"
            raise stepwire.InvalidRequestError.of("form", f"{problem}; use the form torch or stepwire")


def refuse_import(tensors: Mapping[str, Any], tables: Mapping[str, str]) -> None:
    """Refuse to import rows by ids, and into tables that keep numbers of rows.

    Raises:
        InvalidRequestError: a table has ids, or keeps numbers.
    """
    for name in tensors:
        if name.startswith(_IDS):
            table = name.removeprefix(_IDS)
            raise stepwire.InvalidRequestError.of(
                "file", f"rows of table {table!r} are named by ids, and no load brings ids; fork the session"
            )
    for name, meaning in tables.items():
        if meaning in _COUNTING:
            raise stepwire.InvalidRequestError.of(
                "file",
                f"table {name!r} is {meaning!r}, and no load brings numbers of rows; fork the session",
            )
