"""New sessions that outlive their server: on the disk, or in the memory of a standby."""

from __future__ import annotations

from typing import Protocol

from stepwire.errors import DataLossError, Reason
from stepwire_server.sessions.beginning import Beginning
from stepwire_server.sessions.closing import closed_on_failure
from stepwire_server.sessions.data_directory import DataDirectory
from stepwire_server.sessions.session import Session

__all__ = ["Replicas", "keep", "replicate"]


class Replicas(Protocol):
    """The sessions that a standby has too."""

    def add(self, session: Session, request_id: str, *, fresh: bool) -> None:
        """Have the standby keep a new session; `fresh` says that it is as a new one of its config is.

        Raises:
            StepwireError: no standby has it; nothing stays.
        """
        ...

    def remove(self, session_id: str) -> None:
        """Have the standby forget a session that has ended."""
        ...


def replicate(session: Session, request_id: str, beginning: Beginning | None, replicas: Replicas | None) -> None:
    """Have a standby keep a new session, where its durability asks for that.

    Raises:
        StepwireError: as `Replicas.add`; the session is gone.
    """
    if replicas is not None and session.config.durability.level == "replicated":
        with closed_on_failure(session):
            replicas.add(session, request_id, fresh=beginning is None)


def keep(session: Session, request_id: str, beginning: Beginning | None, directory: DataDirectory | None) -> None:
    """Have a data directory keep a new session, where its durability asks for that.

    Raises:
        DataLossError: the disk failed; the session is gone.
        StepwireError: as `beginning.keep`; the session is gone.
    """
    if directory is None or not session.durable:
        return
    with closed_on_failure(session):
        try:
            directory.add(session, request_id, beginning)
        except OSError as error:
            raise DataLossError(
                f"the session cannot be kept in the data directory: {error}; nothing was created",
                reason=Reason.DURABILITY_FAILED,
            ) from error
