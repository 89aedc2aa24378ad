"""The servers of tables, as classes for sparse gradients name them: targets, or a client of the caller's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from stepwire.client import Client
from stepwire.connecting import connect

__all__ = ["Server", "client_of"]

Server: TypeAlias = str | Sequence[str] | Client | None
"""One target, or several, or a client; None for the target of `connect`."""


def client_of(server: Server, timeout: float | None) -> tuple[Client, bool]:
    """Return the client of a server, and tell whether it was made here, to be closed by its user.

    Args:
        server: the server.
        timeout: default seconds of a call of a client that is made here; None for those of `connect`.

    Raises:
        InvalidRequestError: as `connect`.
    """
    if isinstance(server, Client):
        return server, False
    return (connect(server) if timeout is None else connect(server, timeout=timeout)), True
