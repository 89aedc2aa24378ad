"""The writing of the log: one sync for all that wait, and a look for a newer owner behind each sync.

One thread at a time has the pen. Mostly it is the log's own thread, which writes chunks while the rest of a step
arrives. A caller that finds the pen free as it begins to wait for its record writes all that waits itself: two threads
need not wake for a small step.
"""

from __future__ import annotations

import contextlib
import pathlib
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple

from stepwire.errors import DataLossError, DeadlineExceededError, FencedError, Reason, StepwireError, UnavailableError
from stepwire_server.durability.disk import Disk
from stepwire_server.durability.records import LogPosition, Record, as_array, require_writable
from stepwire_server.durability.retention import remove_before
from stepwire_server.durability.segments import SEGMENT_BYTES, SegmentWriter
from stepwire_server.observability.histograms import Histogram

__all__ = ["LogLimits", "LogStatistics", "LogWriter"]

PENDING_BYTES: Final = 64 << 20


class LogLimits(NamedTuple):
    """The sizes of a log.

    Attributes:
        segment_bytes: the bytes of a segment; a larger record has a larger one.
        pending_bytes: the bytes of payload that may wait to be written.
    """

    segment_bytes: int = SEGMENT_BYTES
    pending_bytes: int = PENDING_BYTES


DEFAULT_LIMITS: Final = LogLimits()


class LogStatistics(NamedTuple):
    """The work of a log so far.

    Attributes:
        records: the records written.
        syncs: the syncs that records waited for.
        written_bytes: the bytes of the records.
        segments: the segments created.
        pending_bytes: the bytes of payload that wait to be written.
    """

    records: int
    syncs: int
    written_bytes: int
    segments: int
    pending_bytes: int


class _Pending(NamedTuple):
    record: Record
    nbytes: int
    durable: bool


class _Waiter:
    """A thread that waits for a record. It is woken once."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.asleep = threading.Lock()
        self.asleep.acquire()


class LogWriter:
    """The log of one owner, from its epoch on. Thread-safe.

    A failed write, sync, allocation or look for a newer owner is never retried: the log is closed for good.

    Attributes:
        epoch: the owner's epoch.
        sync_seconds: the times of its syncs; whoever has the pen observes them.
    """

    def __init__(
        self,
        disk: Disk,
        folder: pathlib.Path,
        epoch: int,
        is_owner: Callable[[], bool],
        *,
        after: LogPosition,
        limits: LogLimits = DEFAULT_LIMITS,
    ) -> None:
        """Create the first segment, and start the thread.

        Args:
            disk: the system calls.
            folder: the folder of the log, which exists.
            epoch: the owner's epoch.
            is_owner: the look for a newer owner, True if there is none.
            after: the end of the log as the owner has read it, `LogReader.end`. What older owners wrote behind it is
                never read again.
            limits: the sizes.

        Raises:
            DataLossError: DURABILITY_FAILED, the disk failed.
        """
        self.epoch = epoch
        self.sync_seconds = Histogram()
        self._disk, self._folder, self._is_owner, self._limits = disk, folder, is_owner, limits
        self._lock = threading.Lock()
        self._arrived, self._room = threading.Condition(self._lock), threading.Condition(self._lock)
        self._queue: deque[_Pending] = deque()
        self._waiters: list[_Waiter] = []
        self._callbacks: list[Callable[[StepwireError], None]] = []
        self._failure: StepwireError | None = None
        self._closing = self._writing = False
        self._appended = self._confirmed = self._pending_bytes = self._syncs = 0
        try:
            self._segments = SegmentWriter(disk, folder, epoch, after=after, segment_bytes=limits.segment_bytes)
        except OSError as error:
            raise _disk_failed(error) from error
        self._thread = threading.Thread(target=self._run, name="stepwire-log", daemon=True)
        self._thread.start()

    @property
    def direct(self) -> bool:
        """The file system accepts O_DIRECT."""
        return self._segments.direct

    @property
    def written_bytes(self) -> int:
        """The bytes of the records so far."""
        return self._segments.written_bytes

    @property
    def position(self) -> LogPosition:
        """The place behind the last record that was appended."""
        return LogPosition(self.epoch, self._appended)

    @property
    def durable_position(self) -> LogPosition:
        """The place behind the last record that survives a loss of the server."""
        return LogPosition(self.epoch, self._confirmed)

    def statistics(self) -> LogStatistics:
        """Return the work so far."""
        log = self._segments
        return LogStatistics(log.number, self._syncs, log.written_bytes, log.segments, self._pending_bytes)

    def check(self) -> None:
        """Refuse when the log is closed for good.

        Raises:
            DataLossError: DURABILITY_FAILED, the disk failed.
            FencedError: NOT_PRIMARY, another server owns the data directory.
        """
        if self._failure is not None:
            raise _copy(self._failure)

    def append(self, record: Record, *, durable: bool = False, awaited: bool = False) -> int:
        """Have a record written, and return its number. The order of the calls is the order of the log.

        The call waits only while too many bytes of payload wait to be written.

        Args:
            record: the record; its payload stays as it is until the record is durable, or was written.
            durable: somebody will wait for the record, so a sync follows.
            awaited: the caller itself calls `wait` next, which may write the record: the log's thread is not woken.

        Raises:
            ValueError: the record is larger than a reader would believe.
            DataLossError, FencedError: as `check`.
            UnavailableError: SHUTTING_DOWN, `close` was called.
        """
        require_writable(record)
        nbytes = as_array(record.payload).nbytes
        with self._lock:
            while self._is_full(nbytes):
                self._arrived.notify()
                self._room.wait()
            self.check()
            if self._closing:
                raise UnavailableError("the log is closed, because the server ends", reason=Reason.SHUTTING_DOWN)
            self._appended += 1
            self._pending_bytes += nbytes
            self._queue.append(_Pending(record, nbytes, durable))
            if not awaited:
                self._arrived.notify()
            return self._appended

    def wait(self, number: int, timeout: float | None = None) -> None:
        """Wait until a record is on the disk and this owner was still the newest afterwards.

        A record that was confirmed before a failure stays so. A record that was not appended as durable waits for the
        sync of a later one.

        Args:
            number: the number that `append` returned.
            timeout: the longest time to wait, in seconds. Without it, the caller may write what waits itself.

        Raises:
            DataLossError, FencedError: as `check`; the record may or may not be in the log.
            DeadlineExceededError: the time was too short; the record may become durable yet.
        """
        with self._lock:
            if number <= self._confirmed:
                return
            self.check()
            if number > self._appended:
                raise ValueError(f"record {number} was not appended; the last one is {self._appended}")
            batch = self._seized() if timeout is None else None
        if batch:
            self._write_all(batch)
        with self._lock:
            if number <= self._confirmed:
                return
            self.check()
            waiter = _Waiter(number)
            self._waiters.append(waiter)
            if self._queue and not self._writing:
                self._arrived.notify()
        if not waiter.asleep.acquire(timeout=-1 if timeout is None else timeout):
            with self._lock, contextlib.suppress(ValueError):
                self._waiters.remove(waiter)
        with self._lock:
            if number <= self._confirmed:
                return
            self.check()
        raise DeadlineExceededError(f"record {number} of the log was not durable within {timeout} s")

    def keeps(self, number: int) -> bool:
        """Tell whether a record that was waited for survives a loss of the server: the disk has it."""
        return True

    def drop(self, session: bytes, entry: int) -> None:
        """Note that the chunks of an entry belong to no commit: on the disk they do no harm."""

    def on_failure(self, callback: Callable[[StepwireError], None]) -> None:
        """Have a function called once when the log is closed for good: by a thread that writes, or at once if it is."""
        with self._lock:
            failure = self._failure
            if failure is None:
                self._callbacks.append(callback)
        if failure is not None:
            callback(_copy(failure))

    def release(self, position: LogPosition) -> list[str]:
        """Remove the segments all of whose records lie before a place, older epochs' too; never the present segment.

        Args:
            position: the epoch and the number of the first record that is still needed.

        Returns:
            The names of the files.

        Raises:
            ValueError: the place is not of this log.
            OSError: the disk failed; a removed file may come back. The log goes on.
        """
        if position > (self.epoch, self._appended + 1):
            raise ValueError(f"{position} lies behind the end of the log, {self.position}")
        return remove_before(self._disk, self._folder, position)

    def close(self) -> None:
        """Make durable what was appended, and end the thread. Closing twice is harmless."""
        with self._lock:
            self._closing = True
            self._arrived.notify()
            self._room.notify_all()
        self._thread.join()

    def _is_full(self, nbytes: int) -> bool:
        most = self._limits.pending_bytes
        waits = self._pending_bytes > 0 and self._pending_bytes + nbytes > most
        return waits and self._failure is None and not self._closing

    def _run(self) -> None:
        try:
            while batch := self._next_batch():
                self._write_all(batch)
            if self._failure is None and self._segments.number > self._confirmed:
                self._confirm()
        except Exception as error:
            self._fail(error)
        finally:
            with contextlib.suppress(OSError):
                self._segments.close()

    def _next_batch(self) -> deque[_Pending] | None:
        """Return all that waits, with the pen; None once the log is closed."""
        with self._lock:
            while (batch := self._seized()) is None:
                if not self._writing and (self._closing or self._failure is not None):
                    return None
                self._arrived.wait()
            return batch

    def _seized(self) -> deque[_Pending] | None:
        """Acquire the pen and all that waits; None if nothing does, or another thread writes. Under the lock."""
        if self._writing or not self._queue:
            return None
        batch, self._queue, self._writing = self._queue, deque(), True
        return batch

    def _write_all(self, batch: deque[_Pending]) -> None:
        """Write a batch with the pen, and let go of the pen. A failure closes the log."""
        try:
            self._write(batch)
        except BaseException as error:
            self._fail(error)
            if not isinstance(error, Exception):
                raise
        finally:
            with self._lock:
                self._writing = False
                if self._queue or self._closing or self._failure is not None:
                    self._arrived.notify()

    def _write(self, batch: deque[_Pending]) -> None:
        durable = any(pending.durable for pending in batch)
        while batch:
            record, nbytes, _ = batch.popleft()
            self._segments.append(record, last=durable and not batch)
            if nbytes:
                with self._lock:
                    self._pending_bytes -= nbytes
                    self._room.notify_all()
        if durable:
            self._confirm()
        else:
            self._segments.flush()

    def _confirm(self) -> None:
        """Sync, look, and wake those who wait for what was synced."""
        began = time.perf_counter()
        self._segments.sync()
        self.sync_seconds.observe(time.perf_counter() - began)
        if not self._is_owner():
            raise FencedError(
                f"another server owns the data directory since epoch {self.epoch + 1}, and this one is of epoch "
                f"{self.epoch}; attach to the newer server",
                reason=Reason.NOT_PRIMARY,
                metadata={"epoch": self.epoch},
            )
        with self._lock:
            self._confirmed = self._segments.number
            self._syncs += 1
            self._wake(self._confirmed)

    def _fail(self, error: BaseException) -> None:
        failure = error if isinstance(error, StepwireError) else _disk_failed(error)
        with self._lock:
            self._failure = failure
            self._queue.clear()
            self._pending_bytes = 0
            self._wake(self._appended)
            self._room.notify_all()
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback(_copy(failure))

    def _wake(self, number: int) -> None:
        waiters, self._waiters = self._waiters, [waiter for waiter in self._waiters if waiter.number > number]
        for waiter in waiters:
            if waiter.number <= number:
                waiter.asleep.release()


def _disk_failed(error: BaseException) -> DataLossError:
    return DataLossError(
        f"the log of steps failed and is closed for good: {error}; state stays readable, so save it, mend the disk and "
        "start the server again",
        reason=Reason.DURABILITY_FAILED,
    )


def _copy(error: StepwireError) -> StepwireError:
    """Return an error anew, because one that is raised twice gathers traces."""
    return type(error)(str(error), reason=error.reason, metadata=error.metadata)
