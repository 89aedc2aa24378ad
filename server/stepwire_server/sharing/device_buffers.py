"""The memory of one attached stream on a GPU: one allocation with the gradient, followed by the parameters.

Only the client can unmap its memory, and CUDA does not define a free before that. So the memory ends once both the
stream and the client's handoff connection have ended. The kernel closes the connection with the process. Unverified on
a GPU.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from typing import Any, Final, Protocol

import numpy as np

from stepwire.v1 import transport_pb2
from stepwire.wire.dtypes import wire_bytes, wire_items
from stepwire_server.host.sealed_memory import in_pages
from stepwire_server.sessions.session import Session

__all__ = ["DeviceBuffers", "Lender"]

# See `Engine.export`.
_ALLOCATION_BYTES: Final = 2 << 20
_NOTHING: Final = np.empty(0, np.uint8)


class Lender(Protocol):
    """The owner of memory that clients may still map after their stream."""

    def keep(self, memory: DeviceBuffers) -> None:
        """Keep memory after the end of its stream, until its client has ended."""
        ...

    def give_back(self, memory: DeviceBuffers) -> None:
        """Free kept memory after the end of its client. The call must not wait."""
        ...


class DeviceBuffers:
    """The memory of one stream on a GPU, in the budget until its last use; a `StreamMemory` and an `Offer`.

    Closes twice without complaint.

    Attributes:
        session_id: the id of the session.
    """

    in_place = False
    on_device = True

    def __init__(self, session: Session, lender: Lender) -> None:
        """Allocate the memory, and copy the present parameters into it.

        Args:
            session: the session.
            lender: the owner of the memory after the stream.

        Raises:
            UnsupportedFeatureError: the session's device shares no memory; the message has the reason.
            ResourceExhaustedError: the budget or the device has too little memory.
            SessionNotFoundError, DataLossError: there is no sound session.
        """
        config = session.config
        size, gradient, reply = config.layout.size, config.gradient_dtype, config.reply_dtype
        self.session_id = session.session_id
        self.gradient_bytes = in_pages(wire_bytes(gradient, size))
        self.parameter_bytes = in_pages(size * reply.itemsize)
        nbytes = -(-(self.gradient_bytes + self.parameter_bytes) // _ALLOCATION_BYTES) * _ALLOCATION_BYTES
        with contextlib.ExitStack() as resources:
            resources.enter_context(session.memory.room(nbytes, "the device memory that is shared with the client"))
            self._memory = resources.enter_context(contextlib.closing(session.memory.export(nbytes)))
            self.gradient: Any = self._memory.array(0, gradient, wire_items(gradient, size))
            self.parameters: Any = self._memory.array(self.gradient_bytes, reply, size)
            session.memory.read_parameters(self.parameters)
            self._resources = resources.pop_all()
        self._lender = lender
        self._lock = threading.Lock()  # of the three below
        self._ended = False
        self._fetched = False
        self._released = False

    def check(self, pattern: bytes) -> bytes | None:
        """See `StreamMemory.check`."""
        if self._memory.read(0, len(pattern)) != pattern:
            return None
        return self._memory.read(self.gradient_bytes, len(pattern))

    def descriptors(self) -> Sequence[int]:
        """See `Offer`: device memory has no descriptors."""
        return ()

    def response(self) -> transport_pb2.HandoffResponse:
        """See `Offer`. A client may map the memory from now on."""
        with self._lock:
            self._fetched = True
        return transport_pb2.HandoffResponse(
            cuda_ipc_handle=self._memory.handle, cuda_device_uuid=self._memory.device_uuid
        )

    def released(self) -> None:
        """See `Offer`."""
        with self._lock:
            self._released = True
            mapped = self._ended
        if mapped:
            self._lender.give_back(self)

    def close(self) -> None:
        """Free the memory at the end of the stream, or keep it for a client that maps it."""
        self.gradient = self.parameters = _NOTHING
        with self._lock:
            if self._ended:
                return
            self._ended = True
            mapped = self._fetched and not self._released
            if mapped:  # under the lock: `released` cannot give the memory back before it is kept
                self._lender.keep(self)
        if not mapped:
            self.free()

    def free(self) -> None:
        """Free the memory and its reservation; freeing twice is harmless."""
        self._resources.close()
