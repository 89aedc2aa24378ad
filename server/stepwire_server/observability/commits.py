"""Commits, told to whoever keeps account of them, and a log line each for a server that logs at level debug."""

from __future__ import annotations

from collections.abc import Sequence

import structlog

from stepwire_server.records.committed import CommitSink, Committed

__all__ = ["log_committed", "tell"]

_log = structlog.get_logger()


def tell(sinks: Sequence[CommitSink], committed: Committed) -> None:
    """Tell each sink of a commit. A sink that fails is logged: the step is applied, whatever becomes of its account."""
    for sink in sinks:
        try:
            sink(committed)
        except Exception:
            _log.exception("sink failed", session_id=committed.session_id, step=committed.result.step)


def log_committed(committed: Committed) -> None:
    """Log one committed step; a `CommitSink`."""
    result = committed.result
    _log.debug(
        "committed",
        session_id=committed.session_id,
        worker=committed.worker,
        load=committed.load,
        step=result.step,
        skipped=result.skipped,
        grad_norm=result.grad_norm,
        apply_seconds=result.times.apply,
    )
