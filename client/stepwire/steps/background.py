"""Steps in the background: one after another, with a bound on the steps in flight."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from typing import Any

from stepwire.connection.bells import Bells
from stepwire.connection.errands import Errand, ends_with, run, undelivered
from stepwire.connection.series import Series
from stepwire.errors import InvalidRequestError
from stepwire.optimizers.hyperparameters import whole_number
from stepwire.steps.gradient_feed import GradientFeed

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
    """The future of a step, which notes that its caller has read a failure.

    The methods of `Future` take a lock that an interrupt may leave held, and the step's thread takes it too. So a
    caller waits for a bell of its own, and touches no lock of a step that is not over.
    """

    def __init__(self, read: Callable[[], object], feed: GradientFeed | None) -> None:
        super().__init__()
        self.feed = feed
        self._read = read
        self._is_over = False
        self._over = Bells()
        super().add_done_callback(self._ring)

    def result(self, timeout: float | None = None) -> Any:
        self._wait(timeout)
        try:
            return super().result(0.0)
        except BaseException:
            self._told()
            raise

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self._wait(timeout)
        try:
            failure = super().exception(0.0)
        except CancelledError:
            self._told()
            raise
        if failure is not None:
            self._told()
        return failure

    @property
    def has_failed(self) -> bool:
        return self._is_over and not self.cancelled() and super().exception(0.0) is not None

    def cancel(self) -> bool:
        return run(super().cancel)

    def done(self) -> bool:
        return self._is_over

    def add_done_callback(self, fn: Callable[[Future[Any]], object]) -> None:
        run(functools.partial(super().add_done_callback, fn))

    def _wait(self, timeout: float | None) -> None:
        """Wait for the end of the step; after `timeout` seconds `Future` raises its own error."""
        self._over.wait_for(self.done, timeout)

    def _ring(self, _: object) -> None:
        self._is_over = True
        self._over.ring()

    def _told(self) -> None:
        if self._is_over:  # not a time-out of the wait
            self._read()


class BackgroundSteps:
    """The steps of one session in the background, in the order in which they were handed in. Thread-safe.

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
        self._steps = Series()
        self._waiting: list[_StepFuture] = []
        self._withdrawn: set[Future[Any]] = set()
        self._failed = 0
        self._breaks = 0  # the failures, and the end: the steps handed in before are cancelled
        self._unread = False
        self._closed = False
        self._changed = threading.Condition()  # of the client's own threads alone

    def submit(self, step: Callable[[], Any], feed: GradientFeed | None = None) -> Future[Any]:
        """Hand a step in; the call waits while as many steps as allowed are in flight.

        Args:
            step: the step.
            feed: the feed of its gradients, if they are still being made.

        Returns:
            The future of the step. It is cancelled if a step before this one failed, or if the steps were ended.
        """
        return run(functools.partial(self._submit, step, feed))

    def _submit(self, step: Callable[[], Any], feed: GradientFeed | None) -> Future[Any]:
        future, errand = _StepFuture(self._read, feed), Errand(step)
        withdraw = functools.partial(self._withdraw, future, errand)
        ends_with(withdraw)
        undelivered(withdraw)
        with self._changed:
            breaks = self._breaks

            def is_cancelled() -> bool:
                return self._unread or self._closed or breaks != self._breaks or future.cancelled()

            self._changed.wait_for(lambda: is_cancelled() or len(self._waiting) < self._limit)
            if not (cancelled := is_cancelled()):
                self._steps.add(functools.partial(self._run, future, errand))
                self._waiting.append(future)
        if cancelled:
            future.cancel()
            future.set_running_or_notify_cancel()  # lets those go that wait for several futures
        else:
            future.add_done_callback(self._done)
        return future

    def statistics(self) -> BackgroundStatistics:
        """Return the numbers of steps in flight and of failures."""
        return BackgroundStatistics(limit=self._limit, in_flight=len(self._waiting), failed=self._failed)

    def close(self) -> None:
        """Cancel the waiting steps, and let the step under way end. Closing twice is harmless.

        A step under way whose gradients are still being made is given up: they may never come.
        """
        with self._changed:
            self._closed = True
            feeds = [future.feed for future in self._waiting if future.feed is not None]
        for feed in feeds:
            feed.abort()
        self._cancel_waiting()

    def _run(self, future: _StepFuture, errand: Errand[Any]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        errand()
        failure, errand.failure = errand.failure, None  # whose traceback has the errand: a circle
        if failure is not None:
            with self._changed:
                self._failed += 1
                is_news = future not in self._withdrawn
                self._unread = self._unread or is_news
            if is_news:
                self._cancel_waiting()
            future.set_exception(failure)
        else:
            future.set_result(errand.result)

    def _withdraw(self, future: _StepFuture, errand: Errand[Any]) -> None:
        """Take back a step that was handed in by a caller who was interrupted, and so has no future of it.

        A step under way ends as at its deadline, and one that was applied is in doubt: the same gradient is the same
        step. Its failure is no news to the caller.
        """
        if future.cancel():
            with self._changed:
                self._changed.notify_all()  # its caller may wait for a vacancy
            return
        with self._changed:
            if future.done():
                self._unread = self._unread and not future.has_failed
            else:
                self._withdrawn.add(future)
        errand.leave()

    def _cancel_waiting(self) -> None:
        with self._changed:
            self._breaks += 1
            waiting = list(self._waiting)
            self._changed.notify_all()
        for future in waiting:
            future.cancel()

    def _read(self) -> None:
        self._unread = False

    def _done(self, future: Future[Any]) -> None:
        with self._changed:
            self._waiting = [each for each in self._waiting if each is not future]
            self._withdrawn.discard(future)
            self._changed.notify_all()
