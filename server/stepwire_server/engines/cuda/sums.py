"""Small results of kernels on their way to the host: sums. Unverified on a GPU."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar

import numpy as np

from stepwire.errors import DataLossError
from stepwire_server.engines.cuda.device import CudaDevice
from stepwire_server.engines.protocol import HostArray

__all__ = ["CELL_BYTES", "Cells", "Figures", "UnreadFigures"]

CELL_BYTES: Final = 48 << 10
"""The bytes of one call's results at most."""

_MOST_BATCHES: Final = 7

Value = TypeVar("Value")


class _Cell:
    """Room for the results of one call, on both sides."""

    def __init__(self, device: CudaDevice, memory: Any, pinned: HostArray, offset: int) -> None:
        self.device = memory[offset : offset + CELL_BYTES]
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
            ResourceExhaustedError: the device has no memory left.
        """
        self.device = device
        self._batch = batch
        self._batches = 0
        self._free: deque[_Cell] = deque()
        self._given = threading.Condition()
        self._grow()

    @property
    def most_bytes(self) -> int:
        """The device memory of the cells at most."""
        return _MOST_BATCHES * self._batch * CELL_BYTES

    def acquire(self, own: Callable[[], None]) -> _Cell:
        """Return a free cell.

        Args:
            own: reads all results that the caller has not read.

        Returns:
            The cell, until `release`.
        """
        with self._given:
            if not self._free and self._batches < _MOST_BATCHES:
                with contextlib.suppress(Exception):  # whatever a device is short of, others give back
                    self._grow()
            if self._free:
                return self._free.popleft()
        own()
        with self._given:
            self._given.wait_for(lambda: self._free)
            return self._free.popleft()

    def release(self, cell: _Cell) -> None:
        """Free a cell whose results have arrived."""
        with self._given:
            self._free.append(cell)
            self._given.notify()

    def _grow(self) -> None:
        nbytes = self._batch * CELL_BYTES
        memory, pinned = self.device.allocate(nbytes), self.device.pinned(nbytes)
        self._free += [_Cell(self.device, memory, pinned, low) for low in range(0, nbytes, CELL_BYTES)]
        self._batches += 1


class Figures(Generic[Value]):
    """The results of one kernel; see `Pending`."""

    def __init__(
        self,
        cells: Cells,
        unread: UnreadFigures,
        count: int,
        dtype: Any,
        launch: Callable[[Any], None],
        read: Callable[[HostArray], Value],
    ) -> None:
        """Run a kernel in a thread whose stream is `compute`.

        Args:
            cells: the room for results.
            unread: the results that the caller has not read, to which these are added.
            count: the number of figures.
            dtype: their dtype; `count` of them fit into `CELL_BYTES`.
            launch: runs the kernel, given the place of the figures: device memory, `(count,)`.
            read: makes the result of the figures, `(count,)` on the host.
        """
        self._cells = cells
        self._read = read
        self._value: Value
        cell = cells.acquire(unread.clear)
        self._cell: _Cell | None = cell
        nbytes = count * np.dtype(dtype).itemsize
        self._figures: HostArray = cell.host[:nbytes].view(dtype)
        try:
            launch(cell.device[:nbytes].view(dtype))
            cell.device.data.copy_to_host_async(cell.address, nbytes, None)
            cell.arrived.record()
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
            self._value, self._cell = self._read(self._figures), None
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
