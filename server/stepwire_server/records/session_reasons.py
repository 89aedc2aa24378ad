"""The errors that tell of sessions: what a server that was overtaken knows of them, its clients must not believe."""

from __future__ import annotations

from typing import Final

from stepwire.errors import Reason

__all__ = ["OF_SESSIONS"]

OF_SESSIONS: Final = frozenset(
    {
        Reason.SESSION_NOT_FOUND,
        Reason.STEP_MISMATCH,
        Reason.STEP_SUPERSEDED,
        Reason.STEP_UNFINISHED,
        Reason.STATE_CHANGED,
        Reason.STALE_EPOCH,
        Reason.FENCED,
        Reason.SESSION_NOT_READY,
        Reason.DURABLE_STEP_LOST,
    }
)
"""Their reasons: another server may have gone on with the sessions."""
