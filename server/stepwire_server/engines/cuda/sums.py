"""Small results of kernels, in memory of the host that kernels write to: sums. Unverified on a GPU.

A copy to the host of some kilobytes would wait in the copy engine behind the megabytes of other sessions' replies. So
kernels write sums over the bus themselves, and an event behind the kernel says that the sums are there.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar

import numpy as np

from stepwire.errors import DataLossError
from stepwire_server.engines.cuda.device import CudaDevice
from stepwire_server.engines.cuda.pool import Pool
from stepwire_server.engines.protocol import HostArray, Pending

__all__ = ["CELL_BYTES", "Cells", "Figures", "RepliedSums", "UnreadFigures", "listed", "two_rows", "two_sums"]

CELL_BYTES: Final = 48 << 10
"""The bytes of one call's results at most."""

_MOST_BATCHES: Final = 7
_FLOAT64: Final = np.dtype(np.float64)

Value = TypeVar("Value")


class _Cell:
    """Room for the results of one call.

    Attributes:
        host: the room, `(CELL_BYTES,) uint8`.
        address: its address, for the host and for kernels alike.
        arrived: recorded behind the kernel that writes the results.
    """

    __slots__ = ("address", "arrived", "host")

    def __init__(self, device: CudaDevice, pinned: HostArray, offset: int) -> None:
        self.host = pinned[offset : offset + CELL_BYTES]
        self.address: int = self.host.ctypes.data
        self.arrived = device.event()


class Cells:
    """Room for results, kept for reuse: cells that have been needed at one time stay. Thread-safe.

    Acquiring a cell never fails, because a commit may be half done. A caller that finds none reads its own results,
    which frees their cells, and waits for others to do so.

    Attributes:
        device: the device whose kernels leave the results.
    """

    def __init__(self, device: CudaDevice, batch: int) -> None:
        """Start with `batch` cells; as many more are made at a time, up to a few times.

        Raises:
            Exception: the host has no memory left that can be pinned.
        """
        self.device = device
        self._batch = batch
        self._batches = 0
        self._cells: Pool[_Cell] = Pool()
        self._growing = threading.Lock()
        self._grow()

    @property
    def most_bytes(self) -> int:
        """The pinned memory of the cells at most."""
        return _MOST_BATCHES * self._batch * CELL_BYTES

    def acquire(self, own: Callable[[], None]) -> _Cell:
        """Return a free cell.

        Args:
            own: reads all results that the caller has not read.

        Returns:
            The cell, until `release`.
        """
        return self._cells.try_acquire() or self._grown() or self._awaited(own)

    def release(self, cell: _Cell) -> None:
        """Free a cell whose results have arrived."""
        self._cells.release(cell)

    def _grown(self) -> _Cell | None:
        with self._growing:
            if not len(self._cells) and self._batches < _MOST_BATCHES:
                with contextlib.suppress(Exception):  # whatever the host is short of, others give back
                    self._grow()
            return self._cells.try_acquire()

    def _awaited(self, own: Callable[[], None]) -> _Cell:
        own()
        return self._cells.acquire()

    def _grow(self) -> None:
        pinned = self.device.pinned(self._batch * CELL_BYTES)
        self._cells.add([_Cell(self.device, pinned, low) for low in range(0, len(pinned), CELL_BYTES)])
        self._batches += 1


class Figures(Generic[Value]):
    """The results of one kernel; see `Pending`."""

    __slots__ = ("_cell", "_cells", "_count", "_dtype", "_read", "_value")

    def __init__(
        self,
        cells: Cells,
        unread: UnreadFigures,
        launch: Callable[[int], None],
        read: Callable[[HostArray], Value],
        count: int,
        dtype: Any = _FLOAT64,
    ) -> None:
        """Run a kernel in a thread whose device is current.

        Args:
            cells: the room for results.
            unread: the results that the caller has not read, to which these are added.
            launch: runs the kernel on `compute`, given the address of the figures, `(count,)`.
            read: makes the result of the figures, `(count,)`.
            count: the number of figures.
            dtype: their dtype; `count` of them fit into `CELL_BYTES`.
        """
        self._cells, self._count, self._dtype, self._read = cells, count, dtype, read
        self._value: Value
        cell = cells.acquire(unread.clear)
        self._cell: _Cell | None = cell
        try:
            launch(cell.address)
            cell.arrived.record(cells.device.compute)
        except BaseException:
            cells.release(cell)
            raise
        unread.add(self)

    def wait(self) -> Value:
        """See `Pending`."""
        if (cell := self._cell) is not None:
            try:
                self._cells.device.wait(cell.arrived)
            except DataLossError:  # for good: others may be waiting for a cell
                self._cell = None
                self._cells.release(cell)
                raise
            self._value = self._read(cell.host[: self._count * self._dtype.itemsize].view(self._dtype))
            self._cell = None
            self._cells.release(cell)
        return self._value


class UnreadFigures:
    """Results that may not have been read: few, so that cells suffice, and none of them lost."""

    def __init__(self, most: int) -> None:
        """Leave at most `most` unread."""
        self._most = most
        self._figures: deque[Figures[Any]] = deque()

    @property
    def empty(self) -> bool:
        """True if all have been read."""
        return not self._figures

    def add(self, figures: Figures[Any]) -> None:
        """Add results; the oldest are read when there are too many."""
        self._figures.append(figures)
        if len(self._figures) > self._most:
            self._figures.popleft().wait()

    def clear(self) -> None:
        """Read all; their cells are free again, even where the device is lost.

        Raises:
            DataLossError: the device is lost.
        """
        with contextlib.ExitStack() as all_of_them:
            while self._figures:
                all_of_them.callback(self._figures.pop().wait)


class RepliedSums:
    """The sums of an update, once its new parameters have crossed too; see `Pending`."""

    __slots__ = ("_crossing", "_sums")

    def __init__(self, crossing: Pending[None], sums: Pending[tuple[float, ...]]) -> None:
        """Wait for a crossing, and then for sums."""
        self._crossing = crossing
        self._sums = sums

    def wait(self) -> tuple[float, ...]:
        """See `Pending`; nothing is on its way afterwards, even after an error."""
        try:
            self._crossing.wait()
        finally:
            sums = self._sums.wait()
        return sums


def listed(partials: HostArray) -> list[float]:
    """Return the sums of blocks."""
    values: list[float] = partials.tolist()
    return values


def two_rows(partials: HostArray) -> list[list[float]]:
    """Return two rows of sums of blocks."""
    rows: list[list[float]] = partials.reshape(2, -1).tolist()
    return rows


def two_sums(sums: list[list[list[float]]]) -> tuple[float, float]:
    """Add up the two rows of some kernels."""
    first, second = (math.fsum(itertools.chain(*(each[row] for each in sums))) for row in (0, 1))
    return first, second
