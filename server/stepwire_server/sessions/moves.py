"""Moves of sessions to other servers: frozen, exported, imported, and handed over.

The order is the proof. A mover freezes the sessions of all shards at one step, copies their states into new sessions
that nobody knows yet, and then asks the first shard to keep the record of the successor. That record is the decision:
before it the old sessions count, behind it the new ones. The first shard keeps it only while it rests, in its memory,
for that very move. So a step that any shard has applied meanwhile was acknowledged by nobody, since the first shard has
not applied it; and its client sends it again where the model is then.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Collection, Mapping, Sequence

from stepwire.errors import DataLossError, InvalidRequestError, UnsupportedFeatureError
from stepwire_server.durability.moved import MovedHold, MovedSession, MovedShard
from stepwire_server.sessions.attach_tokens import AttachTokens
from stepwire_server.sessions.freeze import Frozen, Rest
from stepwire_server.sessions.named_checkpoints import telling_of_the_disk
from stepwire_server.sessions.registry import Registry
from stepwire_server.sessions.session import Session
from stepwire_server.sessions.workers import FIRST_GENERATION, Holder, Worker

__all__ = ["Moves"]


class Moves:
    """Moves sessions of a registry away, and receives those of others. Thread-safe."""

    def __init__(self, registry: Registry) -> None:
        """Serve the sessions of a registry."""
        self._registry = registry
        # By session, the end that a disk or a store has refused: the session rests until the next move asks again.
        self._pending: dict[str, Callable[[], object]] = {}
        self._ending = threading.Lock()  # of one session at a time, for as long as disk and store take

    def freeze(
        self,
        session: Session,
        move_id: str,
        last_step: int,
        seconds: float,
        last_contributions: Mapping[int, int],
        begin_anew: Collection[int] = (),
    ) -> Frozen:
        """Freeze a session; see `Passage.freeze`. A record of its successor that was refused before is kept first.

        Raises:
            SessionMovedError: that is kept now.
            DataLossError: it is refused again.
            UnsupportedFeatureError: the session has what cannot be moved; the message names it.
            StepwireError: as `Passage.freeze`.
        """
        self._check_movable(session)
        if session.session_id in self._pending:
            with self._ending:
                if (end := self._pending.get(session.session_id)) is not None:
                    end()
            self._registry.moved.check(session.session_id)
        return session.passage.freeze(move_id, last_step, seconds, last_contributions, begin_anew)

    def keep(self, session: Session) -> None:
        """Make an imported state as durable as its session is to be: also in the object store, if there is one.

        Raises:
            DataLossError: DURABILITY_FAILED, the disk or the store failed.
        """
        if session.durable and (directory := self._registry.directory) is not None:
            with telling_of_the_disk():
                directory.checkpointer.checkpoint(session)
            directory.own.check_stored(session.session_id)

    def hand_over(self, session_id: str, rest: Rest, shards: Sequence[MovedShard], *, decided: bool) -> bool:
        """End a session that lives on elsewhere, and keep the record of its successor; False if that was done before.

        Args:
            session_id: the session's id.
            rest: the move, and the moment at which the session rests.
            shards: the successor.
            decided: the first shard has its record: the session need not rest.

        Raises:
            InvalidRequestError: the successor has no shards.
            StateChangedError: the session is not frozen by this move; it stays.
            SessionMovedError: another move has moved it.
            DataLossError: DURABILITY_FAILED, the disk failed; the record may be there.
        """
        if not shards:
            raise InvalidRequestError.of("successor.shards", "there are none; name the sessions that it lives on in")
        with self._ending:
            known = self._registry.moved.get(session_id)
            if known is not None and known.move_id == rest.move_id:
                return False
            session = self._registry.get(session_id)
            self._end(session, rest.move_id, None if decided else rest, tuple(shards))
        return True

    def successor(self, session_id: str, token: int, worker: int = 0) -> list[tuple[MovedShard, int]]:
        """Return the shards that a session lives on in, with tokens; none for a session that is still here.

        Args:
            session_id: the session's id.
            token: of the client that held the worker at the end; without it all tokens are 0. 0 for a client without
                one.
            worker: the index of the worker.

        Raises:
            SessionNotFoundError: there is no such session.
            FencedError: the token is of a client that had lost the worker.
        """
        if (moved := self._registry.moved.get(session_id)) is None:
            self._registry.get(session_id)
            return []
        if not token:
            return [(each, 0) for each in moved.shards]
        _held_at_the_end(moved, worker).check_client(token)
        return [(each, _first_token(each, worker)) for each in moved.shards]

    def _end(self, session: Session, move_id: str, rest: Rest | None, shards: tuple[MovedShard, ...]) -> None:
        """Keep the record of a session's successor, and end it; remember what a disk, or a store, refuses.

        Nobody else waits for these but whoever ends another session.
        """
        try:
            with session.passage.leaving(move_id, rest) as holds:
                record = MovedSession(
                    session_id=session.session_id,
                    request_id=session.request_id,
                    tenant=session.tenant,
                    move_id=move_id,
                    attach_key=session.ledger.members.tokens.key,
                    holds={index: MovedHold(each.generation, each.acquired) for index, each in holds.items()},
                    shards=shards,
                )
                self._registry.moved.add(record, durable=session.durable)
        except DataLossError:
            self._pending[session.session_id] = functools.partial(self._end, session, move_id, None, shards)
            raise
        self._pending.pop(session.session_id, None)
        self._registry.delete(session.session_id, departed=session)

    def _check_movable(self, session: Session) -> None:
        config = session.config
        obstacles = {
            "row_ids": ("rows that are named by ids", bool(config.hashed_tables)),
            "durability_replicated": ("durability 'replicated'", config.durability.level == "replicated"),
        }
        for feature, (what, present) in obstacles.items():
            if present:
                raise UnsupportedFeatureError(
                    f"move: the session has {what}, which cannot be moved to other servers; save its state with "
                    "Session.state(), and load it into a session there",
                    metadata={"field": "move", "feature": feature},
                )


def _held_at_the_end(moved: MovedSession, index: int) -> Worker:
    """Return a worker of a session as it was at the end."""
    worker = Worker(index, _tokens(moved.attach_key))
    if (hold := moved.holds.get(index)) is not None:
        worker.holder = Holder(index, hold.generation, hold.acquired, None)
    return worker


def _first_token(shard: MovedShard, worker: int) -> int:
    """Return the token of the first hold of a worker, which the state came in with; 0 if the key is not known."""
    return _tokens(shard.attach_key).token(worker, FIRST_GENERATION) if shard.attach_key else 0


def _tokens(key: bytes) -> AttachTokens:
    tokens = AttachTokens()
    tokens.adopt(key)
    return tokens
