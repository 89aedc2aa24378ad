"""The memory of a session that is shared with its client, and room for more beside the state."""

from __future__ import annotations

import contextlib

from stepwire_server.devices.budget import Reservation
from stepwire_server.engines.protocol import PARAM, ExportedMemory, HostArray
from stepwire_server.host.sealed_memory import SharedMemory
from stepwire_server.sessions.ledger import Ledger
from stepwire_server.sessions.session_lock import SessionLock
from stepwire_server.sessions.state import SessionState

__all__ = ["SessionMemory"]


class SessionMemory:
    """The door of a session for memory that a client sees. Thread-safe: it shares the session's lock."""

    def __init__(self, state: SessionState, ledger: Ledger, lock: SessionLock) -> None:
        """Open the door of a session."""
        self._state = state
        self._ledger = ledger
        self._lock = lock

    def room(self, nbytes: int, purpose: str) -> Reservation:
        """Reserve memory beside the state.

        Raises:
            ResourceExhaustedError: it does not fit.
        """
        return self._state.device.budget.reserve(nbytes, purpose)

    def pin(self, memory: HostArray) -> contextlib.AbstractContextManager[None]:
        """See `Engine.pin`; no step may be under way in the memory when the block ends."""
        return self._state.device.engine.pin(memory)

    def export(self, nbytes: int) -> ExportedMemory:
        """See `Engine.export`; the caller has reserved the bytes.

        Raises:
            UnsupportedFeatureError, ResourceExhaustedError: as there.
        """
        return self._state.device.engine.export(nbytes)

    def moved_parameters(self) -> SharedMemory | None:
        """Return the memory that the parameters were moved to, for the caller to close; None if they were not.

        Raises:
            SessionNotFoundError, DataLossError: there is no sound state.
            OSError: the system has no descriptors left.
        """
        with self._lock:
            self._ledger.check_sound()
            return self._state.moved_parameters()

    def move_parameters(self, memory: SharedMemory) -> bool:
        """Hold the parameters in `memory` for the rest of the session's life, and close it then.

        Returns:
            False where they cannot lie in memory of the host, or lie in such memory already; nothing has changed then.

        Raises:
            SessionNotFoundError, DataLossError: there is no sound state to move.
        """
        with self._lock:
            self._ledger.check_sound()
            return self._state.move_parameters(memory)

    def read_parameters(self, out: HostArray) -> None:
        """Encode the present parameters, be there any or not, into `out`, `(size,)` of a wire dtype.

        Raises:
            SessionNotFoundError, DataLossError: there is no sound state to read.
        """
        with self._lock:
            self._ledger.check_sound()
            self._state.read(PARAM, 0, out)
