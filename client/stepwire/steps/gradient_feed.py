"""Gradients that are made while the first of them are already sent."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from stepwire.arrays.packing import ChunkLayout

__all__ = ["GivenUp", "GradientFeed"]


class GivenUp(Exception):
    """The step was given up before its commit, by who began it; nothing of it was applied."""


class GradientFeed:
    """What a backward pass has made so far, and whether the step is to be taken at all. Thread-safe.

    The step's messages are made from it in gRPC's sending thread, chunk by chunk, in the order in which their tensors
    are ready; the one that ends the step waits for `commit`. Until then `abort` leaves no trace of it on the server.

    The alternative, to queue tensors as they come, would send each in chunks of its own: many small messages where a
    model has many small tensors.
    """

    def __init__(self, names: Sequence[str]) -> None:
        """Expect the gradients of these tensors, in layout order."""
        self._indices = {name: index for index, name in enumerate(names)}
        self._ready: dict[int, npt.NDArray[Any]] = {}
        self._waits: dict[int, Callable[[], object]] = {}
        self._committed = False
        self._aborted = False
        self._cancel: Callable[[], object] | None = None
        self._changed = threading.Condition()

    def bind(self, cancel: Callable[[], object]) -> None:
        """Say what ends the exchange that the step is sent in, for `abort`; each repetition has its own."""
        with self._changed:
            self._cancel = cancel
        if self._aborted:
            cancel()

    def give(self, name: str, gradient: npt.NDArray[Any], wait: Callable[[], object] | None = None) -> None:
        """Hand a gradient over; it must not change until the step is done.

        Args:
            name: of the tensor.
            gradient: in the tensor's shape.
            wait: called before it is first read, where a device is still writing it.
        """
        with self._changed:
            index = self._indices[name]
            self._ready[index] = np.ascontiguousarray(gradient).reshape(-1)
            if wait is not None:
                self._waits[index] = wait
            self._changed.notify_all()

    def commit(self) -> None:
        """Let the step end: every gradient that it names has been given, and its numbers hold."""
        with self._changed:
            self._committed = True
            self._changed.notify_all()

    def abort(self) -> None:
        """Give the step up, before `commit`; who takes it gets `GivenUp`."""
        with self._changed:
            self._aborted, cancel = True, self._cancel
            self._changed.notify_all()
        if cancel is not None:
            cancel()

    def check(self) -> None:
        """Refuse to go on where the step was given up.

        Raises:
            GivenUp: it was.
        """
        if self._aborted:
            raise GivenUp

    def chunks(self, chunks: Sequence[ChunkLayout], flat: list[npt.NDArray[Any]]) -> Iterator[ChunkLayout]:
        """Yield chunks as soon as all that lies in them is ready, its gradients put into `flat`.

        It ends where the step is given up: gRPC would log an error raised in its thread.
        """
        absent = {index for index, array in enumerate(flat) if not array.size}
        waiting = {place: {packed.tensor for packed in chunk.ranges} - absent for place, chunk in enumerate(chunks)}
        while waiting:
            if (place := self._next(waiting)) is None:
                return
            for tensor in waiting.pop(place):
                if (wait := self._waits.pop(tensor, None)) is not None:
                    wait()
                flat[tensor] = self._ready[tensor]
            yield chunks[place]

    def _next(self, waiting: dict[int, set[int]]) -> int | None:
        with self._changed:
            while not self._aborted:
                for place, tensors in waiting.items():
                    if tensors <= self._ready.keys():
                        return place
                self._changed.wait()
        return None

    def committed(self) -> bool:
        """Wait for `commit`, or for `abort`; tell whether it is the first."""
        with self._changed:
            self._changed.wait_for(lambda: self._committed or self._aborted)
            return not self._aborted
