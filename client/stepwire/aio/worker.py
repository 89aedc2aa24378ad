"""A thread for blocking calls, one after another, and the outcomes of calls that nobody waits for.

A call can be cancelled before its turn, and not after: a step under way is on the wire, and the server applies it or
not, whatever its client wishes. So a cancelled await leaves the call to its end. Its outcome is not lost: the object's
own record has it. If the call was a step and failed, the next step raises that error first. Without that, the next
gradient would follow on a step that failed unseen.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

from stepwire.connection.errands import adopt_thread
from stepwire.errors import UnavailableError
from stepwire.host.threads import DaemonThreads
from stepwire.lifetimes.forks import Birthplace
from stepwire.session import Session

__all__ = ["Worker"]

_T = TypeVar("_T")
_END = object()


class Worker:
    """A thread for the blocking calls of one object. Its methods are called in one event loop; it ends with `close`."""

    def __init__(self, name: str) -> None:
        """Be ready; the thread starts with the first call."""
        self._pool = DaemonThreads(1, name, adopt_thread)
        self._birthplace = Birthplace()
        self._lock = threading.Lock()
        self._failures = 0
        self._failure: BaseException | None = None
        self._unseen: BaseException | None = None
        self.closed = False

    async def run(self, call: Callable[[], _T]) -> _T:
        """Make a call in its turn, and wait for it.

        Raises:
            RuntimeError: the worker is closed.
            BaseException: the error of the call.
        """
        return await self._result(self._submit(call))

    async def step(self, step: Callable[[], _T]) -> _T:
        """Make a call that counts on the calls before it: a step.

        Raises:
            RuntimeError: the worker is closed.
            UnavailableError: a step before this one failed, and this one was not sent.
            BaseException: the error of the step, or, once, the error of a step whose await was cancelled.
        """
        self.check_seen()
        submitted = self._submit(functools.partial(self._in_turn, step, self._failures))
        return await self._result(submitted, self._left_alone)

    async def create(self, call: Callable[[], Session], *, kept: bool) -> Session:
        """Make a call that makes a session. If its await is cancelled, the session is ended, unless it is to be kept.

        Raises:
            RuntimeError: the worker is closed.
            BaseException: the error of the call.
        """
        return await self._result(self._submit(call), None if kept else _end)

    async def iterate(self, start: Callable[[], Iterator[_T]]) -> AsyncIterator[_T]:
        """Yield what an iterator yields, each element fetched in its turn."""
        iterator = await self.run(start)
        while (element := await self.run(functools.partial(next, iterator, _END))) is not _END:
            yield element

    async def finish(self, call: Callable[[], object]) -> None:
        """Make a last call, which is made even if its await is cancelled, and end the thread. Twice is harmless."""
        if self.closed:
            return
        last = self._submit(call)
        self.closed = True
        try:
            await asyncio.shield(asyncio.wrap_future(last))
        finally:
            self._pool.shutdown(wait=last.done())  # there is nothing to wait for then but the thread's own end

    def leave(self) -> None:
        """Let the thread end when the calls that were made are done, and wait for nothing."""
        self.closed = True
        self._pool.shutdown(wait=False)

    def close(self) -> None:
        """End the thread when the calls that were made are done, and wait for that. Twice is harmless."""
        self.closed = True
        self._pool.shutdown(wait=True)

    def check_seen(self) -> None:
        """Raise, once, the error of a step whose await was cancelled."""
        with self._lock:
            unseen, self._unseen = self._unseen, None
        if unseen is not None:
            unseen.add_note("(This happened to a step whose await had been cancelled.)")
            raise unseen

    def _submit(self, call: Callable[[], _T]) -> Future[_T]:
        self._birthplace.check("client", "connect anew in the child")
        if self.closed:
            raise RuntimeError(
                "it is closed, and makes no more calls; connect, or ask the client for the session, anew"
            )
        return self._pool.submit(contextvars.copy_context().run, call)

    async def _result(self, future: Future[_T], left: Callable[[Future[_T]], None] | None = None) -> _T:
        """Wait for a call. `left` sees to one that is under way when its await is cancelled."""
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            if not future.cancel() and left is not None:
                future.add_done_callback(left)
            raise

    def _in_turn(self, step: Callable[[], _T], failures: int) -> _T:
        with self._lock:
            if failures != self._failures:
                self._unseen = None
                raise UnavailableError(
                    "this step was not sent, because the one before it failed; repeat that one with its gradients, "
                    "and then this one",
                ) from self._failure
        try:
            return step()
        except BaseException as error:
            with self._lock:
                self._failures += 1
                self._failure = error
            raise

    def _left_alone(self, future: Future[Any]) -> None:
        if not future.cancelled() and (error := future.exception()) is not None:
            with self._lock:
                self._unseen = error


def _end(future: Future[Session]) -> None:
    """End a session that nobody knows of."""
    if not future.cancelled() and future.exception() is None:
        future.result().close()
