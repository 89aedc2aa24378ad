"""Device memory whose stream has ended and whose client has not closed it yet: bounded, accounted for, and freed."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import structlog

from stepwire.errors import Reason, ResourceExhaustedError
from stepwire_server.sharing.device_buffers import DeviceBuffers

__all__ = ["Loans"]

_log = structlog.get_logger()

_MOST_KEPT: Final = 64
_END_SECONDS: Final = 2.0


class Loans:
    """What clients may still map after their streams; a `Lender`. Thread-safe. Closes twice without complaint.

    A client closes its memory when it notices that its stream has ended, at its next step, or when it ends itself; and
    it keeps it for as long as its program holds an array in it. Each loan is part of a device's budget until then.
    """

    def __init__(self, most_kept: int = _MOST_KEPT) -> None:
        """Keep at most `most_kept`; while there are as many, nothing new is lent."""
        self._most_kept = most_kept
        self._kept: list[DeviceBuffers] = []
        self._changed = threading.Condition()
        self._closed = False
        # Freeing waits for the device, and who hears of the end of a client may not wait.
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="device-memory")

    def __len__(self) -> int:
        """Count what is kept."""
        with self._changed:
            return len(self._kept)

    def check_room(self) -> None:
        """Refuse to lend while too much is kept.

        Raises:
            ResourceExhaustedError: it is.
        """
        with self._changed:
            if len(self._kept) >= self._most_kept:
                raise ResourceExhaustedError(
                    f"{len(self._kept)} clients whose streams have ended still map device memory; end them, or have "
                    "them detach their sessions and drop the arrays that they made of it",
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
        """Give clients a moment to close what they map, and free the rest: the process ends, and its memory with it."""
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
            if memory not in self._kept:  # closed meanwhile, and freed there
                return
        try:
            memory.free()
        except Exception as problem:
            _log.error("device memory cannot be freed", session_id=memory.session_id, problem=str(problem))
        with self._changed:
            self._kept = [other for other in self._kept if other is not memory]
            self._changed.notify_all()
