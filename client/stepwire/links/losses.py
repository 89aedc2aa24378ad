"""The losses of a session: what a restarted server has lost is sent again from the replay window, or told once.

A server tells by its numbers that it has less than this client knows: at an attach, in the header of a pull, and when
it is asked. Steps and loads look at the first. Who reads the state, or has the server keep it, looks at the others.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import TypeVar

from stepwire.connection.retry import Deadline
from stepwire.errors import DeadlineExceededError, FencedError, StateLossError
from stepwire.links.hold import Hold
from stepwire.links.repetition import repeated
from stepwire.links.window import ReplayWindow
from stepwire.steps.call import StepCall
from stepwire.transports.route import Route
from stepwire.v1 import step_pb2

__all__ = ["Losses"]

_T = TypeVar("_T")


class Losses:
    """The losses of one session on one server."""

    def __init__(
        self, route: Route, hold: Hold, window: ReplayWindow, lock: threading.RLock, forget: Callable[[], object]
    ) -> None:
        """Make losses good from a window.

        Args:
            route: the way to the server.
            hold: the hold of the session's worker.
            window: the steps that may be sent again.
            lock: the lock that serialises the steps and loads of the session.
            forget: the function to call once a loss is told; nothing that is carried belongs to the state any more.
        """
        self._route = route
        self._hold = hold
        self._window = window
        self._lock = lock
        self._forget = forget

    def send(self, call: StepCall, deadline: Deadline) -> step_pb2.StepResult:
        """Send a step, and before it those that the server has lost.

        Raises:
            StateLossError: as `resend`.
            StepwireError: as `Hold.step`.
        """
        self._window.record(call)
        while True:
            try:
                return self._send(deadline, call)
            except StateLossError as loss:
                self.resend(loss, deadline)

    def mended(self, attempt: Callable[[], _T], deadline: Deadline) -> _T:
        """Make an attempt, and once more after each loss in its way that the window has made good.

        Raises:
            StateLossError: as `resend`.
        """
        while True:
            try:
                return attempt()
            except StateLossError as loss:
                self.resend(loss, deadline)

    def resend(self, loss: StateLossError, deadline: Deadline) -> None:
        """Send the steps again that the server has lost.

        Raises:
            StateLossError: one of them is not kept.
        """
        try:
            self._window.resend(functools.partial(self._send, deadline), loss)
        except StateLossError:
            self._forget()
            raise

    def make_good(self, deadline: Deadline) -> None:
        """Attach if need be, and make good what the server has lost. The caller holds the lock.

        Raises:
            StateLossError: as `resend`.
            StepwireError: as `Hold.attach`.
        """

        def attempt() -> None:
            repeated(self._route, self._hold, self._hold.attach, deadline)
            self._hold.check_kept()

        self.mended(attempt, deadline)

    def read(self, attempt: Callable[[], _T], numbers: Callable[[_T], tuple[int, int]], deadline: Deadline) -> _T:
        """Read something of the state, and again after each loss that it shows and that the window has made good.

        A client that does not hold the worker any more reads whatever is there.

        Args:
            attempt: the reading.
            numbers: the function that returns the step and the load of what was read.
            deadline: the deadline of everything.

        Raises:
            StateLossError: as `resend`.
            StepwireError: as `Hold.attach`, or as the attempt.
        """
        while True:
            known_step, known_load = self._hold.acknowledged
            found = attempt()
            step, load = numbers(found)
            if step >= known_step and load >= known_load or not self._made_good(deadline):
                return found

    def _made_good(self, deadline: Deadline) -> bool:
        """Make a loss good, behind a step or a load that is under way; False if another client holds the worker."""
        if not self._lock.acquire(timeout=deadline.remaining()):
            raise DeadlineExceededError("the server has lost steps, and another call of this session is under way")
        try:
            self._hold.detach()  # the stream is of the server before
            self.make_good(deadline)
        except FencedError:
            return False
        finally:
            self._lock.release()
        return True

    def _send(self, deadline: Deadline, call: StepCall) -> step_pb2.StepResult:
        return repeated(self._route, self._hold, functools.partial(self._hold.step, call), deadline)
