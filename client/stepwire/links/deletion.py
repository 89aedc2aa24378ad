"""The deletion of a session on its server, by a client that wants no answer."""

from __future__ import annotations

import contextlib
from typing import Final

from stepwire.errors import SessionNotFoundError, StepwireError, UnavailableError
from stepwire.transports.route import Route
from stepwire.v1 import optimizer_service_pb2 as pb

__all__ = ["delete", "delete_held"]

_TIMEOUT_SECONDS: Final = 5.0


def delete(route: Route, session_id: str) -> None:
    """Delete a session, whoever holds its worker. One that is gone, or out of reach, is left to its lease.

    Raises:
        StepwireError: the server's refusal.
    """
    request = pb.DeleteSessionRequest(session_id=session_id)
    # ValueError: the channel is closed
    with contextlib.suppress(SessionNotFoundError, UnavailableError, ValueError):
        route.calls.unary("DeleteSession", request, pb.DeleteSessionResponse, _TIMEOUT_SECONDS)


def delete_held(route: Route, session_id: str, token: int, seconds: float) -> None:
    """Delete a session unless another client has acquired its worker. The server is asked once."""
    request = pb.DeleteSessionRequest(session_id=session_id, attach_token=token)
    with contextlib.suppress(StepwireError, ValueError):  # ValueError: the channel is closed
        route.calls.once("DeleteSession", request, pb.DeleteSessionResponse, seconds)
