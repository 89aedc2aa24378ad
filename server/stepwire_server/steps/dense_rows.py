"""The gradient of a table of the meaning `global` as that of a dense tensor: zeros for the rows that did not come.

It comes some rows at a time, so that no gradient is as large as the table.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np

from stepwire_server.engines.protocol import EngineState
from stepwire_server.steps.gradient import ChunkRange, StagedChunk
from stepwire_server.steps.row_gradients import TableGradient

__all__ = ["dense_ranges"]

_ELEMENTS: Final = 1 << 20


def dense_ranges(gradient: TableGradient, arrays: EngineState) -> Iterator[ChunkRange]:
    """Yield the whole table as chunks of one range each; a chunk is gone with the next one.

    Args:
        gradient: the rows that came.
        arrays: the state, which receives the chunks.
    """
    table, rows = gradient.table, gradient.rows
    values = gradient.values.reshape(-1, table.width)
    most = max(_ELEMENTS // table.width, 1)
    for low in range(0, table.rows, most):
        high = min(low + most, table.rows)
        first, last = np.searchsorted(rows, [low, high]).tolist()
        dense = np.zeros((high - low, table.width), np.float32)
        dense[rows[first:last] - low] = values[first:last]
        start = table.start + low * table.width
        buffer = arrays.receive(dense.size)
        try:
            chunk = StagedChunk(start, start + dense.size, buffer.put(0, dense.reshape(-1)))
            yield ChunkRange(chunk, start, 0, dense.size)
        finally:
            buffer.close()
