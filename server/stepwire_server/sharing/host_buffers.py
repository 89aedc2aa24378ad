"""What one attached stream shares with its client: the gradient's memory and the parameters'.

Two pieces of memory, because the client writes one and may only read the other, and because they live for different
times: a gradient's memory ends with its stream, so that nothing a former client still holds reaches the next one, while
the parameters of a float32 session on the CPU lie in theirs for as long as the session lives. A step then writes no
answer at all: the client reads the state itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Final

import numpy as np

from stepwire.v1 import transport_pb2
from stepwire.wire.dtypes import FLOAT32, wire_bytes, wire_items
from stepwire_server.engines.protocol import HostArray
from stepwire_server.host.sealed_memory import SharedMemory, in_pages
from stepwire_server.sessions.session import Session

__all__ = ["SharedBuffers"]

_BYTES: Final = np.dtype(np.uint8)
_NOTHING: Final = np.empty(0, np.uint8)


class SharedBuffers:
    """The memory of one stream, accounted for until `close`; an `Offer`. Closes twice without complaint.

    Attributes:
        gradient: items of the session's gradient dtype that hold `layout.size` elements. The client may change them at
            any moment.
        parameters: `(layout.size,)` of the session's reply dtype.
        in_place: the parameters of the state itself lie there.
        on_device: never.
        gradient_bytes: of the gradient's memory.
        parameter_bytes: of the parameters' memory.
    """

    on_device = False

    def __init__(self, session: Session) -> None:
        """Make them, and put the present parameters there.

        Raises:
            OSError: the system has no memory or no descriptors left.
            ResourceExhaustedError: the budget has no room.
            SessionNotFoundError, DataLossError: there is no sound session.
        """
        config = session.config
        self.gradient_bytes = in_pages(wire_bytes(config.gradient_dtype, config.layout.size))
        self.parameter_bytes = in_pages(config.layout.size * config.reply_dtype.itemsize)
        with contextlib.ExitStack() as held:
            held.enter_context(session.memory.room(self.gradient_bytes, "the shared memory of the gradient"))
            gradient = held.enter_context(SharedMemory("stepwire-gradient", self.gradient_bytes))
            held.enter_context(session.memory.pin(gradient.array(_BYTES, gradient.nbytes)))
            parameters = self._parameters(session, held)
            self._memory = (gradient, parameters)
            items = wire_items(config.gradient_dtype, config.layout.size)
            self.gradient: HostArray = gradient.array(config.gradient_dtype, items)
            self.parameters: HostArray = parameters.array(config.reply_dtype, config.layout.size)
            if not self.in_place:
                session.memory.read_parameters(self.parameters)
            self._held = held.pop_all()

    def _parameters(self, session: Session, held: contextlib.ExitStack) -> SharedMemory:
        """Return the memory of the state's own parameters, moving them there, or else memory for answers."""
        self.in_place = session.config.reply_dtype == FLOAT32
        if self.in_place and (moved := session.memory.moved_parameters()) is not None:
            return held.enter_context(moved)
        with contextlib.ExitStack() as own:
            own.enter_context(session.memory.room(self.parameter_bytes, "the shared memory of the parameters"))
            memory = SharedMemory("stepwire-parameters", self.parameter_bytes, read_only=True)
            with contextlib.ExitStack() as undo:
                undo.callback(memory.close)
                self.in_place = self.in_place and session.memory.move_parameters(memory)
                undo.pop_all()
            if not self.in_place:
                own.enter_context(memory)
                own.enter_context(session.memory.pin(memory.array(_BYTES, memory.nbytes)))
                held.enter_context(own.pop_all())
                return memory
        moved = session.memory.moved_parameters()  # the room is free again: what the state held before was given back
        assert moved is not None
        return held.enter_context(moved)

    def check(self, pattern: bytes) -> bytes | None:
        """Compare a client's pattern with the start of the gradient's memory.

        Returns:
            As many bytes from the start of the parameters' memory; None where the pattern is not there.
        """
        gradient, parameters = (memory.array(_BYTES, len(pattern)) for memory in self._memory)
        return parameters.tobytes() if gradient.tobytes() == pattern else None

    def descriptors(self) -> Sequence[int]:
        """See `Offer`: of the gradient's memory, and of the parameters'."""
        gradient, parameters = self._memory
        return gradient.descriptor, parameters.descriptor

    def response(self) -> transport_pb2.HandoffResponse:
        """See `Offer`: the descriptors say it all."""
        return transport_pb2.HandoffResponse()

    def released(self) -> None:
        """See `Offer`: the end of the stream decides, and not of what its client maps."""

    def close(self) -> None:
        """Let go of the memory. A client that still maps it keeps what it sees, and nobody writes there any more."""
        self.gradient = self.parameters = _NOTHING
        self._held.close()
