"""The arrays of another moment on their way into a session: read in order from a checkpoint, or as blocks arrive."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Final

import numpy as np

from stepwire_server.engines.protocol import HostArray
from stepwire_server.records.snapshot import Snapshot
from stepwire_server.rules import Precision
from stepwire_server.sessions.row_numbers import restore_rows, rows_on_their_way
from stepwire_server.sessions.state import SessionState
from stepwire_server.steps.reply import split_range
from stepwire_server.steps.tensor_steps import TensorSteps

__all__ = ["IncomingState"]

_COPY_ELEMENTS: Final = 1 << 20


class IncomingState:
    """One moment on its way in. A context manager, which gives its memory back."""

    def __init__(self, state: SessionState) -> None:
        """Make room, where slots are not float32: there all have to be there before the first counts.

        Raises:
            ResourceExhaustedError: such slots do not fit a second time beside the state.
        """
        self._state = state
        config, slots = state.config, state.config.visible_slots
        plain = set(slots) == set(config.slots) and set(config.slots.values()) == {Precision.FLOAT32}
        self._staged = None if plain else state.stage_load(slots)
        self._rows = rows_on_their_way(config)

    def read(self, read: Callable[[str, int, HostArray], None]) -> None:
        """Read all arrays; `read` reads a range of one into an array, `(n,) float32`.

        Raises:
            DataLossError: the checkpoint is damaged.
        """
        config = self._state.config
        sizes = dict.fromkeys(config.visible_slots, config.layout.size)
        for slot, size in (sizes | {slot: len(rows) for slot, rows in self._rows.items()}).items():
            for low, high in split_range(0, size, _COPY_ELEMENTS):
                values = np.empty(high - low, np.float32)
                read(slot, low, values)
                self.write(slot, low, values)

    def write(self, slot: str, start: int, values: HostArray) -> None:
        """Write a block, `(n,) float32`, of a visible slot, or of the numbers of a table's rows."""
        if (rows := self._rows.get(slot)) is not None:
            rows[start : start + len(values)] = values
            return
        arrays = self._state.arrays if self._staged is None else self._staged.arrays
        arrays.write(slot, start, values)

    def finish(self, numbers: Snapshot, sum_bound: float) -> None:
        """Complete the moment, all of whose arrays are there. Under the session's lock.

        Args:
            numbers: t of each tensor, the scalars, the loss scale.
            sum_bound: of the accumulated gradient.
        """
        state = self._state
        if self._staged is not None:
            state.arrays.adopt(self._staged.arrays)
        state.arrays.settle()
        restore_rows(state.row_numbers, state.row_ids, self._rows)
        state.tensor_steps = TensorSteps(state.config, numbers.tensor_steps, numbers.tensor_scalars)
        state.loss_scale, state.sum_bound = numbers.loss_scale or state.loss_scale, sum_bound

    def close(self) -> None:
        """Give the memory back. Closing twice is harmless."""
        if self._staged is not None:
            self._staged.close()

    def __enter__(self) -> IncomingState:
        """Hold the memory for a block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the memory back."""
        self.close()
