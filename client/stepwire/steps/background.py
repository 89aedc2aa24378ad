"""Steps in the background: one after another, with a bound on the steps in flight."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any

from stepwire.connection.errands import adopt_thread
from stepwire.errors import InvalidRequestError
from stepwire.optimizers.hyperparameters import whole_number

__all__ = ["BackgroundStatistics", "BackgroundSteps"]


@dataclasses.dataclass(frozen=True, slots=True)
class BackgroundStatistics:
    """The background steps of one session, as of one moment.

    Attributes:
        limit: the most steps in flight.
        in_flight: the steps under way or waiting.
        failed: the steps that failed; those that were cancelled because of them are not counted.
    """

    limit: int
    in_flight: int
    failed: int


class _StepFuture(Future[Any]):
    """The future of a step, which notes that its caller has read a failure."""

    def __init__(self, read: Callable[[], object]) -> None:
        super().__init__()
        self._read = read

    def result(self, timeout: float | None = None) -> Any:
        try:
            return super().result(timeout)
        except BaseException:
            self._told()
            raise

    def exception(self, timeout: float | None = None) -> BaseException | None:
        try:
            failure = super().exception(timeout)
        except CancelledError:
            self._told()
            raise
        if failure is not None:
            self._told()
        return failure

    def _told(self) -> None:
        if self.done():  # not a time-out of the wait
            self._read()


class BackgroundSteps:
    """A thread for the steps of one session, in the order in which they were handed in. Thread-safe.

    A step that fails cancels the steps behind it: their gradients belong to parameters that never were. A caller that
    has not read the failure does not know of it, so steps that it hands in are behind the failed step too.
    """

    def __init__(self, limit: int) -> None:
        """Let `limit` steps be in flight: the step under way, and the waiting ones.

        Raises:
            InvalidRequestError: `limit` is not a positive integer.
        """
        if whole_number(limit, "steps_in_flight") < 1:
            raise InvalidRequestError.of("steps_in_flight", f"{limit!r} is not a positive integer")
        self._limit = limit
        self._thread = ThreadPoolExecutor(1, "stepwire-steps", adopt_thread)
        self._waiting: list[_StepFuture] = []
        self._failed = 0
        self._breaks = 0  # the failures, and the end: the steps handed in before are cancelled
        self._unread = False
        self._closed = False
        self._changed = threading.Condition()

    def submit(self, step: Callable[[], Any]) -> Future[Any]:
        """Hand a step in; the call waits while as many steps as allowed are in flight.

        Returns:
            The future of the step. It is cancelled if a step before this one failed, or if the steps were ended.
        """
        with self._changed:
            breaks, future = self._breaks, _StepFuture(self._read)

            def is_cancelled() -> bool:
                return self._unread or self._closed or breaks != self._breaks

            self._changed.wait_for(lambda: is_cancelled() or len(self._waiting) < self._limit)
            if not (cancelled := is_cancelled()):
                self._thread.submit(self._run, future, step)
                self._waiting.append(future)
        if cancelled:
            future.cancel()
            future.set_running_or_notify_cancel()  # lets those go that wait for several futures
        else:
            future.add_done_callback(self._done)
        return future

    def statistics(self) -> BackgroundStatistics:
        """Return the numbers of steps in flight and of failures."""
        with self._changed:
            return BackgroundStatistics(limit=self._limit, in_flight=len(self._waiting), failed=self._failed)

    def close(self) -> None:
        """Cancel the waiting steps, and let the step under way end. Closing twice is harmless."""
        with self._changed:
            self._closed = True
        self._cancel_waiting()
        self._thread.shutdown(wait=False)

    def _run(self, future: _StepFuture, step: Callable[[], Any]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            result = step()
        except BaseException as failure:
            with self._changed:
                self._failed += 1
                self._unread = True
            self._cancel_waiting()
            future.set_exception(failure)
        else:
            future.set_result(result)

    def _cancel_waiting(self) -> None:
        with self._changed:
            self._breaks += 1
            waiting = list(self._waiting)
            self._changed.notify_all()
        for future in waiting:
            future.cancel()

    def _read(self) -> None:
        with self._changed:
            self._unread = False

    def _done(self, future: Future[Any]) -> None:
        with self._changed:
            self._waiting = [each for each in self._waiting if each is not future]
            self._changed.notify_all()
