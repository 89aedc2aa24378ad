"""The moments of a session that its checkpoints have: which are there, and how far they say that it was."""

from __future__ import annotations

from collections.abc import Collection

from stepwire.errors import DataLossError, Reason
from stepwire_server.durability.checkpoints import CheckpointStore, automatic_name, moment_of
from stepwire_server.sessions.session import Session

__all__ = ["check_reached", "free_name", "has_moment"]


def has_moment(session: Session, store: CheckpointStore, bad: Collection[str]) -> bool:
    """Tell whether there is an automatic checkpoint of the present moment, and of the present client's hold.

    Args:
        session: the session.
        store: its checkpoints.
        bad: the names of those whose arrays are damaged.
    """
    ledger = session.ledger
    name = automatic_name(ledger.applied_step, ledger.applied_load)
    return any(
        info.name.startswith(name) and info.acquired == ledger.members.acquisitions
        for info in store.list()
        if info.damage is None and info.name not in bad
    )


def free_name(session: Session, store: CheckpointStore) -> str:
    """Return a name for an automatic checkpoint of the present moment."""
    ledger, names = session.ledger, {info.name for info in store.list()}
    name = automatic_name(ledger.applied_step, ledger.applied_load)
    others = (f"{name}-{ledger.members.acquisitions:x}", *(f"{name}-{ledger.epoch:x}-{k}" for k in range(len(names))))
    return next(each for each in (name, *others) if each not in names)


def check_reached(session: Session, store: CheckpointStore, bad: Collection[str]) -> None:
    """Refuse a session that its disk had further: a damaged checkpoint tells of a later moment.

    Args:
        session: the session, as it came back.
        store: its checkpoints.
        bad: the names of those whose arrays are damaged.

    Raises:
        DataLossError: CHECKPOINT_DAMAGED.
    """
    damaged = [info for info in store.list() if info.damage is not None or info.name in bad]
    latest, reached = max(damaged, key=moment_of, default=None), session.ledger
    if latest is None or moment_of(latest) <= (reached.applied_step, reached.applied_load):
        return
    raise DataLossError(
        f"session {session.session_id}: checkpoint {latest.name!r} of step {moment_of(latest)[0]} is damaged, and what "
        f"is left ends at step {reached.applied_step}; restore it from a copy, or delete it to go on from there",
        reason=Reason.CHECKPOINT_DAMAGED,
        metadata={"session_id": session.session_id, "checkpoint": latest.name, "step": reached.applied_step},
    )
