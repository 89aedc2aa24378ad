"""The state that a new session begins with, where that is the state of another session."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from stepwire_server.durability.checkpoints import CheckpointStore
from stepwire_server.sessions.session import Session

__all__ = ["Beginning"]


class Beginning(NamedTuple):
    """The two halves of a beginning.

    Attributes:
        bring: brings a new session into the state.
        keep: saves that state as the first checkpoint of the session, before the session is there.
    """

    bring: Callable[[Session], object]
    keep: Callable[[Session, CheckpointStore], object]
