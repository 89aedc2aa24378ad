"""Idle sessions: those that are parked for want of room, and those that a refusal names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from stepwire.errors import ResourceExhaustedError
from stepwire_server.sessions.session import Session

__all__ = ["least_recently_used", "with_idle_sessions"]

# A refusal travels in the trailers of a call, which have room for some kilobytes.
_MOST_NAMED: Final = 5
_SHOWN_CHARACTERS: Final = 48
_UNITS: Final = (("d", 86_400), ("h", 3_600), ("m", 60), ("s", 1))


def least_recently_used(sessions: Sequence[Session], now: float) -> list[Session]:
    """Return the idle durable ones of some sessions, the one that was not used for longest first.

    Args:
        sessions: the sessions.
        now: the reading of their clock, in seconds.
    """
    idle = [(session.idle_seconds(now), session) for session in sessions if session.durable]
    found = [(seconds, session) for seconds, session in idle if seconds is not None]
    return [session for _, session in sorted(found, key=lambda each: -each[0])]


def with_idle_sessions(
    error: ResourceExhaustedError, sessions: Sequence[Session], now: float
) -> ResourceExhaustedError:
    """Return a refusal that names the idle sessions with the most memory, and the command that ends them.

    A session is idle without a stream and without a call. Its client may come back, so its user decides.

    Args:
        error: the refusal.
        sessions: the sessions in the way.
        now: the reading of their clock, in seconds.
    """
    idle = [(session, seconds) for session in sessions if (seconds := session.idle_seconds(now)) is not None]
    idle.sort(key=lambda each: (-each[0].memory_bytes, -each[1]))
    if not idle:
        told = f"All of its {len(sessions)} sessions there are in use" if sessions else "It holds no session there"
    else:
        named = idle[:_MOST_NAMED]
        rest = f" and {len(idle) - len(named)} more" if len(idle) > len(named) else ""
        oldest = _duration(min(seconds for _, seconds in named))
        told = (
            f"Idle are {'; '.join(_described(*each) for each in named)}{rest}. "
            f"`stepwire sessions close --target HOST:PORT --idle {oldest}` ends all that are idle for so long, "
            "and an id in the place of --idle one of them"
        )
    return ResourceExhaustedError(
        f"{error}. {told}",
        reason=error.reason,
        metadata={**error.metadata, "idle_sessions": len(idle)},
        retry_after_seconds=error.retry_after_seconds,
    )


def _described(session: Session, seconds: float) -> str:
    label = f" {session.config.label[:_SHOWN_CHARACTERS]!r}" if session.config.label else ""
    return f"{session.session_id}{label} with {session.memory_bytes} bytes, for {_duration(seconds)}"


def _duration(seconds: float) -> str:
    """Write a time in the largest unit that it fills, rounded down, such as "3m"; `--idle` reads it."""
    unit, factor = next(((unit, factor) for unit, factor in _UNITS if seconds >= factor), _UNITS[-1])
    return f"{int(seconds // factor)}{unit}"
