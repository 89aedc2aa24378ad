"""Gradients that are still being made while the first of them are already sent."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from stepwire.arrays.fingerprints import Fingerprint, fingerprint
from stepwire.arrays.packing import ChunkLayout, Flat
from stepwire.connection.bells import Bells
from stepwire.connection.errands import later

__all__ = ["GivenUp", "GradientFeed"]

Pack: TypeAlias = Callable[[ChunkLayout], npt.NDArray[Any]]
"""A function that encodes the present gradient of a chunk, and returns the payload."""


class GivenUp(Exception):
    """The step was given up before its commit, by its own caller; nothing of it was applied."""


class GradientFeed:
    """The gradients that a backward pass has made so far, and whether the step is to end. Thread-safe.

    gRPC's sending thread makes the messages of the step from the feed, chunk by chunk, in the order in which tensors
    are ready. The last message waits for `commit`. Until then `abort` leaves no trace of the step on the server.

    Other code may write a gradient after its message was made. So each message leaves a fingerprint of its payload, and
    `holds` compares the fingerprints with the gradients of the commit.

    Autograd's threads give gradients, and an interrupt may arrive there: so they take no lock, and wait for nothing.

    The alternative, a queue of tensors as they come, would send each tensor in chunks of its own. A model of many small
    tensors would need many small messages.

    Attributes:
        undelivered: the function to call if the outcome of the step, once there, reaches nobody; None before.
    """

    def __init__(self, names: Sequence[str]) -> None:
        """Expect the gradients of these tensors, in layout order."""
        self.undelivered: Callable[[], object] | None = None
        self._indices = {name: index for index, name in enumerate(names)}
        self._ready: dict[int, npt.NDArray[Any]] = {}
        self._waits: dict[int, Callable[[], object]] = {}
        self._committed = False
        self._aborted = False
        self._cancel: Callable[[], object] | None = None
        self._pack: Pack | None = None
        self._sent: list[tuple[ChunkLayout, Fingerprint]] = []
        self._packing = 0
        self._settled = False
        self._lock = threading.Lock()
        self._changed = Bells()

    @property
    def is_committed(self) -> bool:
        """Tell whether `commit` was called, without waiting for it."""
        return self._committed

    @property
    def is_aborted(self) -> bool:
        """Tell whether the step was given up."""
        return self._aborted

    def bind(self, cancel: Callable[[], object]) -> None:
        """Keep the function that ends the exchange of the step, for `abort`; each repetition has its own."""
        with self._lock:
            self._cancel = cancel
        if self._aborted:
            cancel()

    def give(self, name: str, gradient: npt.NDArray[Any], wait: Callable[[], object] | None = None) -> None:
        """Hand a gradient over; it must not change until the step is done.

        Args:
            name: the name of the tensor.
            gradient: the gradient, in the tensor's shape.
            wait: a function that is called before the first read, for a gradient that a device still writes.
        """
        index = self._indices[name]
        if wait is not None:
            self._waits[index] = wait
        self._ready[index] = np.ascontiguousarray(gradient).reshape(-1)
        self._changed.ring()

    def open(self, pack: Pack) -> None:
        """Begin to make the messages of the step, perhaps again: nothing of it is sent yet.

        Args:
            pack: encodes the present gradient of a chunk.
        """
        with self._lock:
            self._pack = None if self._settled else pack
            self._sent = []

    def packed(self, chunk: ChunkLayout, pack: Callable[[], npt.NDArray[Any]]) -> None:
        """Make the payload of a chunk, and keep its fingerprint if the gradient may still change."""
        with self._lock:
            is_settled = self._settled
            self._packing += 1
        try:
            payload = pack()
            if not is_settled:
                self._sent.append((chunk, fingerprint(payload)))
        finally:
            with self._lock:
                self._packing -= 1
            self._changed.ring()

    def holds(self) -> bool:
        """Tell whether the messages made so far have the present gradients; later messages will have them.

        From now on the gradients do not change until the step is done.
        """
        with self._lock:
            self._settled = True
        self._changed.wait_for(lambda: not self._packing)  # a later message leaves no fingerprint
        with self._lock:
            pack, sent = self._pack, self._sent
            self._pack, self._sent = None, []  # `pack` may know the step, whose gradients would be held in a circle
        return pack is None or all(fingerprint(pack(chunk)) == known for chunk, known in sent)

    def commit(self) -> None:
        """Let the step end: every gradient of the step has been given, and its options hold."""
        self._committed = True
        self._changed.ring()

    def abort(self) -> None:
        """Give the step up before `commit`; the thread of the step gets `GivenUp`."""
        with self._lock:
            self._aborted, cancel, self._pack = True, self._cancel, None
        self._changed.ring()
        if cancel is not None:
            later(cancel)  # which is gRPC's code

    def check(self) -> None:
        """Refuse to go on with a step that was given up.

        Raises:
            GivenUp: the step was given up.
        """
        if self._aborted:
            raise GivenUp

    def chunks(self, chunks: Sequence[ChunkLayout], flat: list[npt.NDArray[Any]]) -> Iterator[ChunkLayout]:
        """Yield each chunk as soon as all its tensors are ready, their gradients put into `flat`.

        The iterator ends early if the step is given up: gRPC would log an error raised in its thread.
        """
        absent = {index for index, array in enumerate(flat) if not array.size}
        waiting = {number: {packed.tensor for packed in chunk.ranges} - absent for number, chunk in enumerate(chunks)}
        while waiting:
            if (number := self._next(waiting)) is None:
                return
            for tensor in waiting.pop(number):
                if (wait := self._waits.pop(tensor, None)) is not None:
                    wait()
                flat[tensor] = self._ready[tensor]
            yield chunks[number]

    def complete(self, flat: Flat) -> Flat | None:
        """Return the whole gradient of a committed step, with the given gradients in the places of `flat`.

        Returns:
            The gradient in layout order, an empty array for a tensor without one; None if a tensor was not given.
        """
        with self._lock:
            if any(array.size and index not in self._ready for index, array in enumerate(flat)):
                return None
            for index in list(self._waits):
                self._waits.pop(index)()
            return [self._ready[index] if array.size else array for index, array in enumerate(flat)]

    def _next(self, waiting: dict[int, set[int]]) -> int | None:
        """Wait for a chunk whose tensors are all ready; None if the step is given up."""
        self._changed.wait_for(lambda: self._aborted or self._first_ready(waiting) is not None)
        return None if self._aborted else self._first_ready(waiting)

    def _first_ready(self, waiting: dict[int, set[int]]) -> int | None:
        return next((number for number, tensors in waiting.items() if tensors <= self._ready.keys()), None)

    def committed(self) -> bool:
        """Wait for `commit` or `abort`, and tell whether it was `commit`."""
        self._changed.wait_for(lambda: self._committed or self._aborted)
        return not self._aborted
