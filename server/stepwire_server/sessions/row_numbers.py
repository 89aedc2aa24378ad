"""The numbers of rows, and their form in checkpoints: arrays of float32 like every other, beside those of the slots.

A table with one sum a row has its sums there, in float32. Others count. A number of 32 bits is two numbers of 16, which
float32 holds exactly and whose norm is finite: first the lower halves of all rows, then the upper ones. 24 bits in one
float32 would end at 16 million updates of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np

from stepwire_server.engines.protocol import HostArray
from stepwire_server.records.session_config import SessionConfig
from stepwire_server.rules import RowSemantics
from stepwire_server.sessions.capture import BLOCK, Block
from stepwire_server.steps.reply import split_range
from stepwire_server.steps.row_ids import RowIds

__all__ = [
    "ROW_IDS",
    "ROW_NUMBERS",
    "decoded",
    "encoded",
    "first_numbers",
    "present_numbers",
    "restore_rows",
    "row_blocks",
    "row_slots",
    "rows_on_their_way",
]

ROW_NUMBERS: Final = "row_numbers."
"""The beginning of the names of these arrays; the index of the table follows."""

ROW_IDS: Final = ("row_ids.", "row_ages.")
"""The same of the ids of rows, four numbers of 16 bits each, and of t of the step in which each row last came, two."""

_HALF = np.uint32(16)
_LOWER = np.uint32(0xFFFF)


def first_numbers(config: SessionConfig) -> dict[int, HostArray]:
    """Return the numbers of rows before the first step, by the index of each table that keeps some.

    They are `(rows,) uint32`, of no row that has come, or for sums `(rows,) float32`.
    """
    rows = {index: config.layout.tensors[index].spec.shape[0] for index in config.tables}
    first = config.optimizer.structure().initial_accumulator_value
    return {
        index: np.full(rows[index], first, np.float32) if _sums(semantics) else np.zeros(rows[index], np.uint32)
        for index, semantics in config.tables.items()
        if semantics.counts_rows
    }


def present_numbers(config: SessionConfig, kept: HostArray, ids: RowIds | None, rows: HostArray) -> HostArray:
    """Return the numbers of some rows of a table, those of a new id being the first ones.

    Args:
        config: the session's config.
        kept: the numbers of all rows.
        ids: the ids of the table; None where rows are named by their indices.
        rows: the rows.
    """
    if ids is None:
        return kept[rows]
    places = ids.find(rows)
    first = config.optimizer.structure().initial_accumulator_value if kept.dtype == np.float32 else 0
    return np.where(places < 0, kept.dtype.type(first), kept[places])


def row_slots(config: SessionConfig) -> dict[str, int]:
    """Return the elements of each array of numbers, by its name in checkpoints."""
    counted = {index: semantics for index, semantics in config.tables.items() if semantics.counts_rows}
    rows = {index: config.layout.tensors[index].spec.shape[0] for index in counted}
    slots = {_name(index): rows[index] * (1 if _sums(semantics) else 2) for index, semantics in counted.items()}
    for index in config.hashed_tables:
        spec, (ids, ages) = config.layout.tensors[index].spec, ROW_IDS
        slots[f"{ids}{index}"] = 4 * spec.shape[0]
        slots |= {f"{ages}{index}": 2 * spec.shape[0]} if spec.max_age_steps else {}
    return slots


def rows_on_their_way(config: SessionConfig) -> dict[str, HostArray]:
    """Return room for each array of numbers until all of them are there: sums, or parts of 16 bits."""
    sums = {_name(index) for index, semantics in config.tables.items() if _sums(semantics)}
    return {
        slot: np.zeros(elements, np.float32 if slot in sums else np.uint16)
        for slot, elements in row_slots(config).items()
    }


def row_blocks(numbers: Mapping[int, HostArray], tables: Mapping[int, RowIds]) -> Iterator[Block]:
    """Yield the arrays of some tables' numbers and ids as they are now; they may change once this has returned."""
    arrays = {_name(index): encoded(own) for index, own in numbers.items()}
    for index, own in tables.items():
        for prefix, values in zip(ROW_IDS, (own.ids, own.last), strict=True):
            if values is not None:
                arrays[f"{prefix}{index}"] = values.copy().view(np.uint16)
    return (
        Block(slot, low, values[low:high].astype(np.float32, copy=False))
        for slot, values in arrays.items()
        for low, high in split_range(0, len(values), BLOCK)
    )


def restore_rows(
    numbers: Mapping[int, HostArray], tables: Mapping[int, RowIds], given: Mapping[str, HostArray]
) -> None:
    """Take over the numbers and ids of another moment.

    Args:
        numbers: the numbers of each table that keeps some, by index.
        tables: the ids of each table that has some, by index.
        given: all arrays of `rows_on_their_way`.
    """
    for index, own in numbers.items():
        own[:] = decoded(given[_name(index)], own.dtype)
    for index, ids in tables.items():
        for prefix, kept in zip(ROW_IDS, (ids.ids, ids.last), strict=True):
            if kept is not None:
                kept.view(np.uint16)[:] = given[f"{prefix}{index}"]
        ids.restored()


def encoded(numbers: HostArray) -> HostArray:
    """Return numbers of rows, `(rows,) uint32`, as `(2 · rows,) float32`; sums are copied."""
    if numbers.dtype == np.float32:
        return numbers.copy()
    return np.concatenate([numbers & _LOWER, numbers >> _HALF]).astype(np.float32)


def decoded(values: HostArray, dtype: np.dtype[Any]) -> HostArray:
    """Return the numbers of rows, `(rows,)` of their dtype, of an array of a checkpoint."""
    if dtype == np.float32:
        return values
    halves = values.astype(np.uint32)
    numbers: HostArray = halves[: len(halves) // 2] | (halves[len(halves) // 2 :] << _HALF)
    return numbers


def _sums(semantics: RowSemantics) -> bool:
    return semantics is RowSemantics.ROW_WISE


def _name(index: int) -> str:
    return f"{ROW_NUMBERS}{index}"
