"""The arrays of a session on an engine that sessions share: every pass over them has its turn."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final, TypeVar

from stepwire_server.devices.fair_share import Flow
from stepwire_server.engines.protocol import (
    Done,
    EngineState,
    Gradient,
    GradientBuffer,
    HostArray,
    Pass,
    Pending,
    RowPass,
    Table,
)

__all__ = ["FairState"]

_MOST_ELEMENTS: Final = 16 << 20
"""The elements that the processor steps in one turn, in about ten milliseconds: a whole number of `GRAIN`."""

_LEAST_BYTES: Final = 1 << 20
"""The bytes of a chunk from which its sum needs a turn: fewer are summed before a turn has changed hands."""

_FLOAT32_BYTES: Final = 4
_Made = TypeVar("_Made")


class FairState:
    """The arrays of one session; see `EngineState`. Calls that pass over arrays wait for a turn of the engine.

    A GPU carries calls out later, in the order in which they were made. There a turn is a place in that order.
    """

    def __init__(self, state: EngineState, size: int, flow: Flow) -> None:
        """Share the engine of a state of `size` elements, which is closed with this one."""
        self._state = state
        self._size = size
        self._flow = flow
        self._depth = state.depth
        self._at_once = self._depth == 1
        self._slots_bytes = state.nbytes // max(size, 1)

    @property
    def unshared(self) -> EngineState:
        """The state whose passes wait for no turn."""
        return self._state

    @property
    def nbytes(self) -> int:
        """See `EngineState.nbytes`."""
        return self._state.nbytes

    @property
    def depth(self) -> int:
        """See `EngineState.depth`."""
        return self._depth

    def receive(self, size: int | None = None) -> GradientBuffer:
        """See `EngineState.receive`."""
        return self._state.receive(size)

    # --- the calls of a step ----------------------------------------------------------------------------

    def sum_of_squares(
        self, gradient: Gradient, begin: int, end: int, factor: float, accumulated: int | None = None
    ) -> Pending[float]:
        """See `EngineState.sum_of_squares`.

        Chunks are summed as they arrive, and not under the session's lock. On a GPU they have no turn: the call waits
        for nothing, and its thread could not give back the buffers of a step that is under way.
        """
        nbytes = (end - begin) * gradient.dtype.itemsize
        if accumulated is None and (nbytes < _LEAST_BYTES or not self._at_once):
            return self._state.sum_of_squares(gradient, begin, end, factor)
        began = self._flow.acquire(nbytes, self._state, gradient)
        try:
            return self._state.sum_of_squares(gradient, begin, end, factor, accumulated)
        finally:
            self._flow.release(began)

    def update(
        self, step: Pass, start: int, gradient: Gradient, begin: int, end: int, out: HostArray | None
    ) -> Pending[tuple[float, ...]]:
        """See `EngineState.update`."""
        if self._at_once and end - begin > _MOST_ELEMENTS:
            return self._update_in_turns(step, start, gradient, begin, end, out)
        nbytes = (end - begin) * (2 * self._slots_bytes + gradient.dtype.itemsize)
        began = self._flow.acquire(nbytes, self._state, gradient)
        try:
            return self._state.update(step, start, gradient, begin, end, out)
        finally:
            self._flow.release(began)

    def _update_in_turns(
        self, step: Pass, start: int, gradient: Gradient, begin: int, end: int, out: HostArray | None
    ) -> Pending[tuple[float, ...]]:
        """Step a large range in several turns. No element depends on another one, so the bits stay the same."""
        sums = []
        for low in range(0, end - begin, _MOST_ELEMENTS):
            high = min(low + _MOST_ELEMENTS, end - begin)
            target = None if out is None else out[low:high]
            sums.append(self.update(step, start + low, gradient, begin + low, begin + high, target).wait())
        return Done(tuple(map(math.fsum, zip(*sums, strict=True))))

    def update_rows(
        self, step: RowPass, table: Table, rows: HostArray, gradient: Gradient, begin: int, out: HostArray | None
    ) -> Pending[tuple[float, ...]]:
        """See `EngineState.update_rows`."""
        nbytes = len(rows) * table.width * (2 * self._slots_bytes + _FLOAT32_BYTES)
        return self._in_turn(nbytes, lambda: self._state.update_rows(step, table, rows, gradient, begin, out), gradient)

    def accumulate(self, start: int, gradient: Gradient, begin: int, end: int, factor: float) -> None:
        """See `EngineState.accumulate`."""
        nbytes = (end - begin) * (2 * _FLOAT32_BYTES + gradient.dtype.itemsize)
        self._in_turn(nbytes, lambda: self._state.accumulate(start, gradient, begin, end, factor), gradient)

    def measure(self, step: Pass, start: int, gradient: Gradient, begin: int, end: int) -> Pending[tuple[float, float]]:
        """See `EngineState.measure`."""
        nbytes = (end - begin) * (self._slots_bytes + gradient.dtype.itemsize)
        return self._in_turn(nbytes, lambda: self._state.measure(step, start, gradient, begin, end), gradient)

    # --- rare calls -------------------------------------------------------------------------------------

    def fetch(
        self, gradient: Gradient, begin: int, end: int, factor: float, accumulated: int | None = None
    ) -> HostArray:
        """See `EngineState.fetch`: computed on the host."""
        return self._state.fetch(gradient, begin, end, factor, accumulated)

    def fetch_direction(self, step: Pass, start: int, gradient: Gradient, begin: int, end: int) -> HostArray:
        """See `EngineState.fetch_direction`: computed on the host."""
        return self._state.fetch_direction(step, start, gradient, begin, end)

    # --- state in and out --------------------------------------------------------------------------------

    def read(self, slot: str, start: int, out: HostArray) -> Pending[None]:
        """See `EngineState.read`."""
        nbytes = _FLOAT32_BYTES * len(out) + out.nbytes
        return self._in_turn(nbytes, lambda: self._state.read(slot, start, out))

    def read_rows(self, slot: str, table: Table, rows: HostArray, out: HostArray) -> Pending[None]:
        """See `EngineState.read_rows`."""
        nbytes = _FLOAT32_BYTES * len(out) + out.nbytes
        return self._in_turn(nbytes, lambda: self._state.read_rows(slot, table, rows, out))

    def write(self, slot: str, start: int, values: HostArray) -> None:
        """See `EngineState.write`."""
        nbytes = _FLOAT32_BYTES * len(values) + values.nbytes
        self._in_turn(nbytes, lambda: self._state.write(slot, start, values))

    def copy(self, source: str, target: str) -> None:
        """See `EngineState.copy`."""
        self._in_turn(2 * _FLOAT32_BYTES * self._size, lambda: self._state.copy(source, target))

    def clear(self, slot: str) -> None:
        """See `EngineState.clear`."""
        self._in_turn(_FLOAT32_BYTES * self._size, lambda: self._state.clear(slot))

    def adopt(self, other: EngineState) -> None:
        """See `EngineState.adopt`."""
        adopted = other._state if isinstance(other, FairState) else other
        self._in_turn(2 * adopted.nbytes, lambda: self._state.adopt(adopted))

    def move(self, slot: str, memory: HostArray) -> bool:
        """See `EngineState.move`."""
        return self._in_turn(2 * memory.nbytes, lambda: self._state.move(slot, memory))

    # --- waits and the end -------------------------------------------------------------------------------

    def yield_buffers(self, gradient: Gradient | None) -> None:
        """See `EngineState.yield_buffers`."""
        self._state.yield_buffers(gradient)

    def settle(self) -> None:
        """See `EngineState.settle`: a wait for the device needs no turn."""
        self._state.settle()

    def close(self) -> None:
        """See `EngineState.close`: the end waits for nobody."""
        self._state.close()

    def _in_turn(self, nbytes: int, call: Callable[[], _Made], gradient: Gradient | None = None) -> _Made:
        began = self._flow.acquire(nbytes, self._state, gradient)
        try:
            return call()
        finally:
            self._flow.release(began)
