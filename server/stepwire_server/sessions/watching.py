"""The sessions of a server at one moment, for whoever watches it: read without a lock, as they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from stepwire_server.records.session_snapshot import SessionSnapshot
from stepwire_server.sessions.session import Session

if TYPE_CHECKING:
    from stepwire_server.sessions.registry import Registry

__all__ = ["Rates", "snapshots", "state_of"]


class Rates:
    """The steps per second of sessions, from one look to the next."""

    def __init__(self) -> None:
        """Start without a look."""
        self._steps: Mapping[str, int] = {}
        self._at: float | None = None

    def look(self, sessions: list[SessionSnapshot], now: float) -> dict[str, float]:
        """Return the rate of each session that was there at the look before, by id.

        Args:
            sessions: the sessions now.
            now: the clock reading of this look, in seconds.
        """
        before, since = self._steps, self._at
        if since is not None and now <= since:  # the steps since then are of the next look
            return {}
        self._steps, self._at = {session.session_id: session.applied_step for session in sessions}, now
        if since is None:
            return {}
        # A load may set the step of a session, which is no progress.
        return {
            name: max(self._steps[name] - before[name], 0) / (now - since) for name in self._steps if name in before
        }

    @property
    def looked(self) -> bool:
        """There was a look."""
        return self._at is not None


def snapshots(registry: Registry, tenant: str | None) -> list[SessionSnapshot]:
    """Describe the sessions of a tenant in memory, ordered by id; None: of all."""
    now = registry.clock()
    found = sorted(registry.of(tenant), key=lambda session: session.session_id)
    return [_snapshot(session, now) for session in found]


def state_of(session: Session) -> str:
    """Name the state of a session in memory: "damaged", "empty", "attached" or "idle"."""
    ledger = session.ledger
    if ledger.damaged:
        return "damaged"
    if not ledger.ready:
        return "empty"
    return "attached" if ledger.attached else "idle"


def _snapshot(session: Session, now: float) -> SessionSnapshot:
    ledger, members = session.ledger, list(session.ledger.members)
    streams = [stream for member in members if (stream := member.worker.holder.stream) is not None]
    return SessionSnapshot(
        session_id=session.session_id,
        label=session.config.label,
        tenant=session.tenant,
        device=session.device,
        state=state_of(session),
        transports=_distinct(stream.transport for stream in streams),
        applied_step=ledger.applied_step,
        durable_step=ledger.durable_step if session.config.durability.level != "memory" else None,
        memory_bytes=session.memory_bytes,
        attached_workers=len(streams),
        workers=ledger.members.most,
        idle_seconds=session.idle_seconds(now) or 0.0,
        result=ledger.last_result,
    )


def _distinct(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(set(names)))
