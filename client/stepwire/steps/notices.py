"""Calls of a user's functions, `on_tensor` in the middle of a step and the logger after it: they cannot step."""

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
    """The note of a thread that is within a function of the user's.

    The step waits for the function to return. A call from within `on_tensor` would wait for the step: on the client for
    the turn of the session, or on the server for the session's lock. Neither would end. A step from within the logger
    would call the logger.

    Attributes:
        within: the name of that function; empty for none.
    """

    within = ""

    def check(self) -> None:
        """Refuse a call from within the user's function.

        Raises:
            InvalidRequestError: this thread is within it.
        """
        if self.within:
            raise InvalidRequestError.of(
                self.within,
                "the function called the session, whose step waits for the function; note the name, and call the "
                "session after the step",
            )

    def give(self, name: str, function: Callable[..., object], *values: object) -> None:
        """Call the user's function of a name, such as "on_tensor"."""
        self.within = name
        try:
            function(*values)
        finally:
            self.within = ""
