"""Device memory that clients have not closed after their streams: bounded, in the budget, and freed in the end."""

from __future__ import annotations

import threading
from typing import Final

import structlog

from stepwire.errors import Reason, ResourceExhaustedError
from stepwire.host.threads import DaemonThreads
from stepwire_server.sharing.device_buffers import DeviceBuffers

__all__ = ["Loans"]

_log = structlog.get_logger()

_MOST_KEPT: Final = 64
_END_SECONDS: Final = 2.0


class Loans:
    """Memory that clients may still map after their streams; a `Lender`. Thread-safe. Closes twice without complaint.

    A client notices the end of its stream at its next step, and closes its memory then, or at its own end. Until then
    the client's program may have arrays of the memory, and each loan is in a device's budget.
    """

    def __init__(self, most_kept: int = _MOST_KEPT) -> None:
        """Keep at most `most_kept` loans; no new memory is lent beyond that number."""
        self._most_kept = most_kept
        self._kept: list[DeviceBuffers] = []
        self._changed = threading.Condition()
        self._closed = False
        # Freeing waits for the device, and the thread that notices the end of a client may not wait.
        self._worker = DaemonThreads(1, "device-memory")

    def __len__(self) -> int:
        """Return the number of kept loans."""
        with self._changed:
            return len(self._kept)

    def check_room(self) -> None:
        """Refuse to lend if too many loans are kept.

        Raises:
            ResourceExhaustedError: too many loans are kept.
        """
        with self._changed:
            if len(self._kept) >= self._most_kept:
                raise ResourceExhaustedError(
                    f"{len(self._kept)} clients still map device memory after the end of their streams; end them, or "
                    "detach their sessions and delete their arrays of device memory",
                    reason=Reason.MEMORY_EXHAUSTED,
                    metadata={"kept": len(self._kept)},
                )

    def keep(self, memory: DeviceBuffers) -> None:
        """See `Lender`."""
        with self._changed:
            self._kept.append(memory)

    def give_back(self, memory: DeviceBuffers) -> None:
        """See `Lender`."""
        with self._changed:
            if not self._closed:
                self._worker.submit(self._free, memory)

    def close(self, seconds: float = _END_SECONDS) -> None:
        """Wait a moment for clients to close their memory, and free the rest, before the process and its memory end."""
        with self._changed:
            self._changed.wait_for(lambda: not self._kept, 0.0 if self._closed else seconds)
            self._closed = True
            left, self._kept = self._kept, []
        self._worker.shutdown()
        for memory in left:
            _log.warning("device memory is freed while its client maps it", session_id=memory.session_id)
            memory.free()

    def _free(self, memory: DeviceBuffers) -> None:
        with self._changed:
            if memory not in self._kept:  # `close` has freed it
                return
        try:
            memory.free()
        except Exception as problem:
            _log.error("device memory cannot be freed", session_id=memory.session_id, problem=str(problem))
        with self._changed:
            self._kept = [other for other in self._kept if other is not memory]
            self._changed.notify_all()
