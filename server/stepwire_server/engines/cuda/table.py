"""Calls of kernels on rows of a table in GPU memory. Unverified on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import numpy as np

from stepwire_server.engines.cuda.bus import Crossings
from stepwire_server.engines.cuda.gradient import CudaGradient
from stepwire_server.engines.cuda.resources import CudaResources, Together
from stepwire_server.engines.cuda.sums import Figures, RepliedSums, UnreadFigures
from stepwire_server.engines.payloads import check_range, cut
from stepwire_server.engines.protocol import Done, HostArray, Pending, RowPass
from stepwire_server.engines.regions import Table

__all__ = ["TableCalls"]

_FLOAT32: Final = np.dtype(np.float32)
_NO_SUMS: Done[tuple[float, ...]] = Done(())


class TableCalls:
    """The calls on tables of one session."""

    def __init__(self, resources: CudaResources, crossings: Crossings, unread: UnreadFigures) -> None:
        """Use the resources of the device, and the crossings and unread sums of the session."""
        self._resources = resources
        self._crossings = crossings
        self._unread = unread

    def step(
        self,
        step: RowPass,
        addresses: Sequence[int],
        table: Table,
        rows: HostArray,
        gradient: int,
        out: HostArray | None,
    ) -> Pending[tuple[float, ...]]:
        """Step rows; see `EngineState.update_rows`.

        Args:
            step: the arithmetic.
            addresses: of the parameters and the slots at the first element of the table.
            table: the place of the table.
            rows: the rows.
            gradient: the address of the gradient of the first row.
            out: the place of the new rows; None for no reply.
        """
        _check_rows(table, np.array([rows.min(), rows.max()]))
        if out is None:
            return self._launched(step, (*addresses, gradient), table, rows)
        asked = []
        for low, high in self._parts(len(rows), table.width, out.dtype.itemsize):
            part = step.part(low, high)
            target = out[low * table.width : high * table.width]
            asked.append(
                self._replied(part, (*addresses, gradient + 4 * low * table.width), table, rows[low:high], target)
            )
        return Together(asked, lambda sums: tuple(map(sum, zip(*sums, strict=True))))

    def read(self, source: int, table: Table, rows: HostArray, out: HostArray) -> Pending[None]:
        """Encode rows of a table of float32, whose first element is at `source`; see `EngineState.read_rows`."""
        if rows.size:
            _check_rows(table, np.array([rows.min(), rows.max()]))
        kernel = self._resources.kernels.of_tables(f"gather_{out.dtype.name}")
        asked = []
        for low, high in self._parts(len(rows), table.width, out.dtype.itemsize):
            now, size = rows[low:high], (high - low) * table.width

            def make(place: int, now: HostArray = now, size: int = size) -> None:
                self._with_numbers(
                    [now],
                    lambda at: kernel.launch(kernel.blocks(size), (source, at[0], place, size, table.width)),
                )

            asked.append(self._crossings.bring(0, make, out[low * table.width : high * table.width]))
        return Together(asked, lambda _: None)

    def _replied(
        self, step: RowPass, addresses: Sequence[int], table: Table, rows: HostArray, out: HostArray
    ) -> Pending[tuple[float, ...]]:
        moved: Pending[tuple[float, ...]] = _NO_SUMS

        def make(place: int) -> None:
            nonlocal moved
            moved = self._launched(step, (*addresses, place), table, rows, out.dtype)

        return RepliedSums(self._crossings.bring(0, make, out), moved)

    def _launched(
        self,
        step: RowPass,
        addresses: Sequence[int],
        table: Table,
        rows: HostArray,
        reply: np.dtype[Any] | None = None,
    ) -> Pending[tuple[float, ...]]:
        """Run the kernel once."""
        kernel, size = self._resources.kernels.table(step.recipe, reply), len(rows) * table.width
        blocks, summed = kernel.blocks_of(step.recipe, size), len(step.recipe.sums)
        moved: Pending[tuple[float, ...]] = _NO_SUMS

        def launch(numbers: Sequence[int]) -> None:
            nonlocal moved
            after = (*numbers, size, table.width)
            if not summed:
                kernel.launch(blocks, (*addresses, *after))
                return
            moved = Figures(
                self._resources.cells,
                self._unread,
                lambda sums: kernel.launch(blocks, (*addresses, sums, *after)),
                lambda sums: tuple(sums.reshape(summed, -1).sum(axis=1).tolist()),
                blocks * summed,
            )

        with self._resources.device.current():
            self._with_numbers([rows, step.kinds, step.scalars], launch)
        return moved

    def _with_numbers(self, arrays: Sequence[HostArray], use: Callable[[Sequence[int]], None]) -> None:
        """Bring arrays to the device, and call a function with their addresses that launches what reads them."""
        parts = [np.ascontiguousarray(array).view(np.uint8).reshape(-1) for array in arrays]
        words = np.concatenate(parts).view(_FLOAT32)
        resources = self._resources
        buffer = CudaGradient(resources.device, resources.bus, resources.gradients, len(words))
        try:
            first = buffer.put(0, words).address
            offsets = np.cumsum([0, *(part.nbytes for part in parts)]).tolist()
            use([first + offset for offset in offsets[:-1]])
        finally:
            buffer.close()

    def _parts(self, rows: int, width: int, itemsize: int) -> Iterator[tuple[int, int]]:
        """Cut rows into those that a buffer of the bus holds."""
        most = max(self._resources.bus.buffer_bytes // (width * itemsize), 1)
        return cut(rows, most)


def _check_rows(table: Table, rows: HostArray) -> None:
    if rows.size:
        check_range("table", int(rows[0]), int(rows[-1]) + 1, table.rows)
