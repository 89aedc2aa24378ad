"""The refusals of a server that has as many sessions or streams as it may."""

from __future__ import annotations

from collections.abc import Sequence

from stepwire.errors import InvalidRequestError, Reason, ResourceExhaustedError
from stepwire_server.sessions.idle import with_idle_sessions
from stepwire_server.sessions.session import Session
from stepwire_server.sessions.tenants import own_request_id

__all__ = ["another_config", "too_many_sessions", "too_many_streams", "too_many_watchers"]


def another_config(request_id: str) -> InvalidRequestError:
    """Return the refusal of a request that created a session before, with another config."""
    return InvalidRequestError(
        f"request_id: {own_request_id(request_id)!r} created another session before, with another config; use a new id",
        metadata={"field": "request_id"},
    )


def too_many_sessions(most: int, present: Sequence[Session], now: float) -> ResourceExhaustedError:
    """Return the refusal of a session beyond the limit; it names those of `present` that are idle."""
    error = ResourceExhaustedError(
        f"the server holds {most} sessions, its most; close some, or start it with a larger --max-sessions",
        reason=Reason.TOO_MANY_SESSIONS,
        metadata={"max_sessions": most},
    )
    return with_idle_sessions(error, present, now)


def too_many_streams(most: int) -> ResourceExhaustedError:
    """Return the refusal of a stream beyond the limit."""
    return ResourceExhaustedError(
        f"the server has {most} attached streams, its most; detach some, or start it with a larger --max-streams",
        reason=Reason.TOO_MANY_STREAMS,
        metadata={"max_streams": most},
        retry_after_seconds=1.0,
    )


def too_many_watchers(most: int) -> ResourceExhaustedError:
    """Return the refusal of a caller that watches beyond the limit."""
    return ResourceExhaustedError(
        f"{most} callers watch the server, its most; end one of them, such as a `stepwire top`",
        reason=Reason.TOO_MANY_STREAMS,
        metadata={"max_watchers": most},
        retry_after_seconds=1.0,
    )
