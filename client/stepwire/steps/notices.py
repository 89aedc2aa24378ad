"""Calls of a user's `on_tensor`, which runs in the middle of a step: it cannot use the session that steps."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy.typing as npt

from stepwire.errors import InvalidRequestError

__all__ = ["Notices", "OnReady"]

OnReady: TypeAlias = Callable[[str, npt.NDArray[Any]], None]
"""A user's function of the name and the new values of a tensor."""


class Notices(threading.local):
    """The flag of a thread that is within an `on_tensor` of one session.

    The step waits for the function to return. A call from within it would wait for the step: on the client for the turn
    of the session, or on the server for the session's lock. Neither would end.
    """

    _within = False

    def check(self) -> None:
        """Refuse a call from within `on_tensor`.

        Raises:
            InvalidRequestError: this thread is within it.
        """
        if self._within:
            raise InvalidRequestError.of(
                "on_tensor",
                "the function called the session, whose step waits for the function; note the name, and call the "
                "session after the step",
            )

    def give(self, notify: OnReady, name: str, values: npt.NDArray[Any]) -> None:
        """Call the function for a tensor."""
        self._within = True
        try:
            notify(name, values)
        finally:
            self._within = False
