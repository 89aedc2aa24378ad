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

__all__ = ["ROW_NUMBERS", "decoded", "encoded", "first_numbers", "row_blocks", "row_slots"]

ROW_NUMBERS: Final = "row_numbers."
"""The beginning of the names of these arrays; the index of the table follows."""

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


def row_slots(config: SessionConfig) -> dict[str, int]:
    """Return the elements of each array of numbers, by its name in checkpoints."""
    counted = {index: semantics for index, semantics in config.tables.items() if semantics.counts_rows}
    rows = {index: config.layout.tensors[index].spec.shape[0] for index in counted}
    return {_name(index): rows[index] * (1 if _sums(semantics) else 2) for index, semantics in counted.items()}


def row_blocks(numbers: Mapping[int, HostArray]) -> Iterator[Block]:
    """Yield the arrays of some tables' numbers as they are now; they may change once this has returned."""
    return (
        Block(_name(index), low, values[low:high])
        for index, values in [(index, encoded(own)) for index, own in numbers.items()]
        for low, high in split_range(0, len(values), BLOCK)
    )


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
