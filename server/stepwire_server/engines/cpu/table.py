"""Calls of kernels on rows of a table in host memory: threads share the rows."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from stepwire_server.engines.cpu.threads import RangeThreads
from stepwire_server.engines.payloads import convert
from stepwire_server.engines.protocol import HostArray
from stepwire_server.engines.regions import Table

__all__ = ["read_rows", "step_rows"]

# Elements from which a second thread pays: rows wait for memory longer than neighbours do.
_LEAST_SHARED: Final = 1 << 17
_GRAIN: Final = 64


def step_rows(
    kernel: Callable[..., None],
    before: tuple[Any, ...],
    table: Table,
    rows: HostArray,
    summed: int,
    threads: RangeThreads,
) -> tuple[float, ...]:
    """Step rows, and return the sums of the recipe.

    Args:
        kernel: the kernel; see `CpuKernels.table`.
        before: its arguments up to `begin`.
        table: the place of the table.
        rows: the rows, each once; those that rise are fastest.
        summed: the number of sums.
        threads: the threads of the engine.

    Raises:
        IndexError: a row is none of the table's; requests are validated long before.
    """
    if rows.size:
        _check_rows(table, np.array([rows.min(), rows.max()]))
    sums, lock = np.zeros(max(summed, 1)), threading.Lock()

    def work(first: int, size: int) -> None:
        own = np.zeros_like(sums)
        kernel(*before, first, size, own)
        with lock:
            np.add(sums, own, out=sums)

    threads.run(work, len(rows), -(-_LEAST_SHARED // max(table.width, 1)), _GRAIN)
    return tuple(sums[:summed].tolist())


def read_rows(values: HostArray, table: Table, rows: HostArray, out: HostArray) -> None:
    """Encode rows, in any order, of the elements of a table, `(rows · width,) float32`.

    Raises:
        IndexError: as `step_rows`.
    """
    if rows.size:
        _check_rows(table, np.array([rows.min(), rows.max()]))
    convert(values.reshape(table.rows, table.width)[rows].reshape(-1), out)


def _check_rows(table: Table, rows: HostArray) -> None:
    if rows.size and not 0 <= rows[0] <= rows[-1] < table.rows:
        raise IndexError(f"rows [{rows[0]}, {rows[-1]}] are outside the {table.rows} of the table")
