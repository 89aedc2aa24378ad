"""Sessions that come back from the disk: from the newest checkpoint that is good, and past those that are not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Set

import structlog

from stepwire.errors import DataLossError, Reason
from stepwire_server.durability.archive import Archive
from stepwire_server.durability.checkpoint import Checkpoint
from stepwire_server.records.session_config import SessionConfig
from stepwire_server.sessions.checkpointing import restore
from stepwire_server.sessions.closing import closed_on_failure
from stepwire_server.sessions.moments import check_reached
from stepwire_server.sessions.redo import Codec
from stepwire_server.sessions.session import Session

__all__ = ["Make", "Restorer"]

_log = structlog.get_logger()

Make = Callable[[str, SessionConfig], Session]
"""Makes a session of an id, at step 0."""


class Restorer:
    """Restores sessions, and remembers which of their checkpoints turned out to be damaged."""

    def __init__(self, archive: Archive, codec: Codec, epoch: int) -> None:
        """Restore the sessions of an archive, for the owner of an epoch."""
        self._archive, self._codec, self._epoch = archive, codec, epoch
        self._bad: dict[str, set[str]] = defaultdict(set)

    def restored(self, session_id: str, make: Make) -> Session:
        """Make a session from its newest checkpoint whose arrays are good; without any, it stays at step 0.

        Raises:
            SessionNotFoundError: there is none of this id.
            DataLossError: its folder, or each of its checkpoints, is damaged.
            ResourceExhaustedError: as `make`.
            OSError: the disk failed.
        """
        archived = self._archive.get(session_id)
        session = make(session_id, self._codec.decode_config(archived.config))
        session.ledger.members.tokens.adopt(archived.attach_key)
        with closed_on_failure(session):
            self._restore_newest(session)
        return session

    def check_reached(self, session: Session) -> None:
        """Refuse a session that its disk had further.

        Raises:
            DataLossError: CHECKPOINT_DAMAGED.
        """
        check_reached(session, self._archive.checkpoints(session.session_id), self._bad[session.session_id])

    def bad(self, session_id: str) -> Set[str]:
        """Return the names of a session's checkpoints whose arrays were found to be damaged."""
        return self._bad[session_id]

    def forget(self, session_id: str) -> None:
        """Forget a session."""
        self._bad.pop(session_id, None)

    def _restore_newest(self, session: Session) -> None:
        store = self._archive.checkpoints(session.session_id)
        bad = self._bad[session.session_id] = set[str]()
        while (checkpoint := store.newest(without=bad).checkpoint) is not None:
            with checkpoint:
                if self._restore(session, checkpoint):
                    return
                bad.add(checkpoint.name)
        if any(info.damage is not None for info in store.list()) or bad:
            raise DataLossError(
                f"session {session.session_id} has no checkpoint that is not damaged; restore one from a copy",
                reason=Reason.CHECKPOINT_DAMAGED,
                metadata={"session_id": session.session_id},
            )
        session.ledger.worker.restore(1, self._epoch)

    def _restore(self, session: Session, checkpoint: Checkpoint) -> bool:
        try:
            if checkpoint.manifest.session_id != session.session_id:
                raise DataLossError(
                    f"checkpoint {checkpoint.name!r} is of session {checkpoint.manifest.session_id}; move it away",
                    reason=Reason.CHECKPOINT_DAMAGED,
                )
            restore(session, checkpoint)
        except DataLossError as error:
            _log.warning("checkpoint damaged", session_id=session.session_id, problem=str(error))
            return False
        manifest = checkpoint.manifest
        _log.info(
            "restored",
            session_id=session.session_id,
            checkpoint=checkpoint.name,
            step=manifest.step,
            norms={slot: facts.norm for slot, facts in manifest.arrays.items()},
            digests={slot: facts.digest for slot, facts in manifest.arrays.items()},
            shadow_norm=None if manifest.shadow is None else manifest.shadow.update_norm,
        )
        return True
