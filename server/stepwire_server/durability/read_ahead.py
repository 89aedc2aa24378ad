"""The log read by a thread of its own, while what it has read is made again.

The thread checks the next records while a step is made again, so a start takes the longer of the two and not their sum.
It waits where the payloads that somebody still has fill the room. Whoever waits for a record gets it at once: a payload
without room stays on the disk then, and is read once more. A commit may be larger than the room.
"""

from __future__ import annotations

import pathlib
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

from stepwire_server.durability.disk import Disk
from stepwire_server.durability.reading import LogReader, LogRecord
from stepwire_server.durability.records import LogPosition

__all__ = ["ReadAhead"]

_KEPT_BYTES: Final = 64 << 20  # of gradients, from the reading of the log until their step is made again
_MOST_RECORDS: Final = 1024  # small records, which have next to no payload, are not read ahead without end


class ReadAhead:
    """Iterates over the records of a log once; see `read_log`."""

    def __init__(self, disk: Disk, folder: pathlib.Path, *, keep_bytes: int = _KEPT_BYTES) -> None:
        """Read nothing yet.

        Args:
            disk: the system calls.
            folder: the folder.
            keep_bytes: the bytes of payloads that are kept at a time: those that the caller still has count.
        """
        self._most = self._free = keep_bytes
        self._changed = threading.Condition()
        self._records: deque[LogRecord] = deque()
        self._awaited = self._ended = self._stopped = False
        self._error: BaseException | None = None
        self._reader = LogReader(disk, folder, room=self)

    @property
    def end(self) -> LogPosition:
        """The place behind the last record; see `LogReader.end`."""
        return self._reader.end

    def __iter__(self) -> Iterator[LogRecord]:
        """Yield the records; the thread has ended when the iteration has.

        Raises:
            DataLossError: as `LogReader.__iter__`, behind the last good record.
        """
        thread = threading.Thread(target=self._read, name="stepwire-log-reader", daemon=True)
        thread.start()
        try:
            while (record := self._next()) is not None:
                yield record
                del record  # its payload gives its room back before the next one is waited for
        finally:
            with self._changed:
                self._stopped = True
                self._changed.notify_all()
            thread.join()
        if self._error is not None:
            raise self._error

    def array(self, nbytes: int) -> npt.NDArray[np.uint8] | None:
        """Return an array that has its room as long as it lives; None if it would never fit, or nobody can wait.

        The thread that reads calls it.
        """
        if not 0 < nbytes <= self._most:
            return None
        with self._changed:
            self._changed.wait_for(lambda: nbytes <= self._free or self._awaited or self._stopped)
            if nbytes > self._free:
                return None
            self._free -= nbytes
        array = np.empty(nbytes, np.uint8)
        weakref.finalize(array, self._release, nbytes).atexit = False
        return array

    def _release(self, nbytes: int) -> None:
        with self._changed:
            self._free += nbytes
            self._changed.notify_all()

    def _next(self) -> LogRecord | None:
        with self._changed:
            if not self._records and not self._ended:
                self._awaited = True
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._records or self._ended)
            self._awaited = False
            self._changed.notify_all()
            return self._records.popleft() if self._records else None

    def _read(self) -> None:
        try:
            for record in self._reader:
                if not self._put(record):
                    return
        except BaseException as error:  # whoever iterates gets it
            self._error = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _put(self, record: LogRecord) -> bool:
        """Hand a record over; False if nobody wants any more."""
        with self._changed:
            self._records.append(record)
            self._changed.notify_all()
            self._changed.wait_for(lambda: len(self._records) < _MOST_RECORDS or self._stopped)
            return not self._stopped
