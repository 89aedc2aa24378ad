"""The memory that one attached stream shares with its client: the gradient's memory and the parameters' memory.

The two are separate, because the client writes the gradient and may only read the parameters, and because their lives
differ. A gradient's memory ends with its stream, so that a former client cannot write the gradient of the next one. The
parameters of a float32 session on the CPU stay in their memory for the life of the session. Then a step writes no reply
at all: the client reads the state.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Final

import numpy as np

from stepwire.v1 import transport_pb2
from stepwire.wire.dtypes import wire_bytes, wire_items
from stepwire_server.engines.protocol import HostArray
from stepwire_server.host.sealed_memory import SharedMemory, in_pages
from stepwire_server.sessions.session import Session

__all__ = ["HostBuffers"]

_BYTES: Final = np.dtype(np.uint8)
_NOTHING: Final = np.empty(0, np.uint8)


class HostBuffers:
    """The memory of one stream, in the budget until `close`; an `Offer`. Closes twice without complaint.

    Attributes:
        gradient: the gradient, `layout.size` elements in items of the session's gradient dtype. The client may change
            the gradient at any moment.
        parameters: the parameters, `(layout.size,)` of the session's reply dtype.
        in_place: True if the state's own parameters are in this memory.
        on_device: always False.
        gradient_bytes: the size of the gradient's memory.
        parameter_bytes: the size of the parameters' memory.
    """

    on_device = False

    def __init__(self, session: Session) -> None:
        """Allocate the memory, and copy the present parameters into it.

        Raises:
            OSError: the system has no memory or no descriptors left.
            ResourceExhaustedError: the budget has too little memory.
            SessionNotFoundError, DataLossError: there is no sound session.
        """
        config = session.config
        self.gradient_bytes = in_pages(wire_bytes(config.gradient_dtype, config.layout.size))
        self.parameter_bytes = in_pages(config.layout.size * config.reply_dtype.itemsize)
        with contextlib.ExitStack() as resources:
            resources.enter_context(session.memory.room(self.gradient_bytes, "the shared memory of the gradient"))
            gradient = resources.enter_context(SharedMemory("stepwire-gradient", self.gradient_bytes))
            resources.enter_context(session.memory.pin(gradient.array(_BYTES, gradient.nbytes)))
            parameters = self._parameters(session, resources)
            self._memory = (gradient, parameters)
            items = wire_items(config.gradient_dtype, config.layout.size)
            self.gradient: HostArray = gradient.array(config.gradient_dtype, items)
            self.parameters: HostArray = parameters.array(config.reply_dtype, config.layout.size)
            if not self.in_place:
                session.memory.read_parameters(self.parameters)
            self._resources = resources.pop_all()

    def _parameters(self, session: Session, resources: contextlib.ExitStack) -> SharedMemory:
        """Move the state's own parameters into shared memory and return it, or return new memory for replies."""
        self.in_place = session.config.steps_in_place
        if self.in_place and (moved := session.memory.moved_parameters()) is not None:
            return resources.enter_context(moved)
        with contextlib.ExitStack() as copies:
            copies.enter_context(session.memory.room(self.parameter_bytes, "the shared memory of the parameters"))
            memory = SharedMemory("stepwire-parameters", self.parameter_bytes, read_only=True)
            with contextlib.ExitStack() as undo:
                undo.callback(memory.close)
                self.in_place = self.in_place and session.memory.move_parameters(memory)
                undo.pop_all()
            if not self.in_place:
                copies.enter_context(memory)
                copies.enter_context(session.memory.pin(memory.array(_BYTES, memory.nbytes)))
                resources.enter_context(copies.pop_all())
                return memory
        moved = session.memory.moved_parameters()  # the reservation is free again, and so is the state's memory before
        assert moved is not None
        return resources.enter_context(moved)

    def check(self, pattern: bytes) -> bytes | None:
        """Compare a client's pattern with the start of the gradient's memory.

        Returns:
            As many bytes from the start of the parameters' memory; None if the pattern is another one.
        """
        gradient, parameters = (memory.array(_BYTES, len(pattern)) for memory in self._memory)
        return parameters.tobytes() if gradient.tobytes() == pattern else None

    def descriptors(self) -> Sequence[int]:
        """See `Offer`: the descriptors of the gradient's memory and of the parameters' memory."""
        gradient, parameters = self._memory
        return gradient.descriptor, parameters.descriptor

    def response(self) -> transport_pb2.HandoffResponse:
        """See `Offer`: the message is empty, since the client only needs the descriptors."""
        return transport_pb2.HandoffResponse()

    def released(self) -> None:
        """See `Offer`: the memory ends with the stream, and not with the client's mapping."""

    def close(self) -> None:
        """Release the memory. A client may still map it, and the server writes there no more."""
        self.gradient = self.parameters = _NOTHING
        self._resources.close()
