"""What one attached stream shares with its client on a GPU: one allocation, the gradient and the parameters behind it.

Nobody but the client can unmap it there, and to free it before is undefined behaviour of CUDA. So it ends when both
have ended: the stream, and the client's connection to the handoff, which the kernel closes with the process. Unverified
on a GPU.
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
    """Who sees to the end of memory that clients may still map."""

    def keep(self, memory: DeviceBuffers) -> None:
        """The stream has ended, and its client has not."""
        ...

    def give_back(self, memory: DeviceBuffers) -> None:
        """The client of memory that was kept has ended; must not wait for anything."""
        ...


class DeviceBuffers:
    """The memory of one stream on a GPU, accounted for until nobody uses it; a `StreamMemory` and an `Offer`.

    Closes twice without complaint.

    Attributes:
        session_id: of the session.
    """

    in_place = False
    on_device = True

    def __init__(self, session: Session, lender: Lender) -> None:
        """Make it, and put the present parameters there.

        Raises:
            UnsupportedFeatureError: the session's device shares no memory; the message says why.
            ResourceExhaustedError: the budget or the device has no room.
            SessionNotFoundError, DataLossError: there is no sound session.
        """
        config = session.config
        size, gradient, reply = config.layout.size, config.gradient_dtype, config.reply_dtype
        self.session_id = session.session_id
        self.gradient_bytes = in_pages(wire_bytes(gradient, size))
        self.parameter_bytes = in_pages(size * reply.itemsize)
        nbytes = -(-(self.gradient_bytes + self.parameter_bytes) // _ALLOCATION_BYTES) * _ALLOCATION_BYTES
        with contextlib.ExitStack() as held:
            held.enter_context(session.memory.room(nbytes, "the device memory that is shared with the client"))
            self._memory = held.enter_context(contextlib.closing(session.memory.export(nbytes)))
            self.gradient: Any = self._memory.array(0, gradient, wire_items(gradient, size))
            self.parameters: Any = self._memory.array(self.gradient_bytes, reply, size)
            session.memory.read_parameters(self.parameters)
            self._held = held.pop_all()
        self._lender = lender
        self._lock = threading.Lock()  # of the three below
        self._ended = False
        self._handed = False
        self._released = False

    def check(self, pattern: bytes) -> bytes | None:
        """See `StreamMemory.check`."""
        if self._memory.read(0, len(pattern)) != pattern:
            return None
        return self._memory.read(self.gradient_bytes, len(pattern))

    def descriptors(self) -> Sequence[int]:
        """See `Offer`: there are none."""
        return ()

    def response(self) -> transport_pb2.HandoffResponse:
        """See `Offer`. From now on a client may map it."""
        with self._lock:
            self._handed = True
        return transport_pb2.HandoffResponse(
            cuda_ipc_handle=self._memory.handle, cuda_device_uuid=self._memory.device_uuid
        )

    def released(self) -> None:
        """See `Offer`."""
        with self._lock:
            self._released = True
            kept = self._ended
        if kept:
            self._lender.give_back(self)

    def close(self) -> None:
        """The stream has ended, and nobody can fetch it any more: free it, or keep it for who has."""
        self.gradient = self.parameters = _NOTHING
        with self._lock:
            if self._ended:
                return
            self._ended = True
            kept = self._handed and not self._released
            if kept:  # under the lock: nobody gives back what has yet to be kept
                self._lender.keep(self)
        if not kept:
            self.free()

    def free(self) -> None:
        """Give the memory back; freeing twice is harmless."""
        self._held.close()
