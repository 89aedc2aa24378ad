"""A log line a commit, for a server that logs at level debug."""

from __future__ import annotations

import structlog

from stepwire_server.records.committed import Committed

__all__ = ["log_committed"]

_log = structlog.get_logger()


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
