"""The beginning of a session: the state of another one, where it begins with that, and the outcome of the request."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from stepwire_server.durability.checkpoints import CheckpointStore
from stepwire_server.sessions.session import Session

__all__ = ["Beginning", "Created"]


class Beginning(NamedTuple):
    """The two halves of a beginning.

    Attributes:
        bring: brings a new session into the state.
        keep: saves that state as the first checkpoint of the session, before the session is there.
    """

    bring: Callable[[Session], object]
    keep: Callable[[Session, CheckpointStore], object]


class Created(NamedTuple):
    """A created session.

    Attributes:
        session: it.
        token: of the hold of worker 0.
        replayed: the request had created it before.
    """

    session: Session
    token: int
    replayed: bool
