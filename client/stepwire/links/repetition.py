"""The repetition of a call over whatever connection works, in whatever epoch the session is."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

from stepwire.connection.retry import Deadline
from stepwire.errors import FencedError, Reason, SessionNotFoundError, UnavailableError
from stepwire.links.hold import Hold
from stepwire.transports.route import Route

__all__ = ["repeated"]

_T = TypeVar("_T")


def repeated(route: Route, hold: Hold, attempt: Callable[[Deadline], _T], deadline: Deadline) -> _T:
    """Make a call until it succeeds, is refused, or its deadline has passed.

    Raises:
        SessionNotFoundError: as the server says, with the last step that this client knows.
        StepwireError: the error of the last attempt.
    """
    try:
        return route.calls.retry.call(functools.partial(_on_route, route, hold, attempt), deadline)
    except SessionNotFoundError as error:
        raise SessionNotFoundError(
            f"{error} (the last step this client knows to be applied is {hold.applied_step})",
            metadata={**error.metadata, "last_known_step": hold.applied_step},
        ) from None


def _on_route(route: Route, hold: Hold, attempt: Callable[[Deadline], _T], deadline: Deadline) -> _T:
    """Make one attempt, and a second one at once if the session has moved to another epoch."""
    try:
        return attempt(deadline)
    except UnavailableError as error:
        if error.reason in (Reason.UNREACHABLE, Reason.NO_STANDBY):
            route.lost()
        elif error.reason == Reason.STREAM_DISPLACED:
            hold.displaced()
        raise route.calls.followed(error, deadline) from None
    except FencedError as error:
        if (moved := route.calls.followed(error, deadline)) is not error:
            hold.detach()
            route.lost()
            raise moved from None
        if error.reason != Reason.STALE_EPOCH or hold.epoch == 0:
            raise
        hold.forget_epoch()
        return attempt(deadline)
