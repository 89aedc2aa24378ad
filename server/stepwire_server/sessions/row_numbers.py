"""The numbers of rows in checkpoints: arrays of float32 like every other, beside those of the slots.

A number of 32 bits is two numbers of 16, which float32 holds exactly and whose norm is finite: first the lower halves
of all rows, then the upper ones. 24 bits in one float32 would end at 16 million updates of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

import numpy as np

from stepwire_server.engines.protocol import HostArray
from stepwire_server.records.session_config import SessionConfig
from stepwire_server.sessions.capture import BLOCK, Block
from stepwire_server.steps.reply import split_range

__all__ = ["ROW_NUMBERS", "decoded", "encoded", "row_blocks", "row_slots"]

ROW_NUMBERS: Final = "row_numbers."
"""The beginning of the names of these arrays; the index of the table follows."""

_HALF = np.uint32(16)
_LOWER = np.uint32(0xFFFF)


def row_slots(config: SessionConfig) -> dict[str, int]:
    """Return the elements of each array of numbers, by its name in checkpoints."""
    counted = [index for index, semantics in config.tables.items() if semantics.counts_rows]
    return {_name(index): 2 * config.layout.tensors[index].spec.shape[0] for index in counted}


def row_blocks(numbers: Mapping[int, HostArray]) -> Iterator[Block]:
    """Yield the arrays of some tables' numbers as they are now; they may change once this has returned."""
    return (
        Block(_name(index), low, values[low:high])
        for index, values in [(index, encoded(own)) for index, own in numbers.items()]
        for low, high in split_range(0, len(values), BLOCK)
    )


def encoded(numbers: HostArray) -> HostArray:
    """Return numbers of rows, `(rows,) uint32`, as `(2 · rows,) float32`."""
    return np.concatenate([numbers & _LOWER, numbers >> _HALF]).astype(np.float32)


def decoded(values: HostArray) -> HostArray:
    """Return the numbers of rows, `(rows,) uint32`, of `(2 · rows,) float32`."""
    halves = values.astype(np.uint32)
    numbers: HostArray = halves[: len(halves) // 2] | (halves[len(halves) // 2 :] << _HALF)
    return numbers


def _name(index: int) -> str:
    return f"{ROW_NUMBERS}{index}"
