"""The log lines of a session's life: created, attached, detached, closed, each with the peer that did so."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Final

import grpc
import structlog

from stepwire.v1 import transport_pb2
from stepwire_server.observability.bounded_lines import BoundedLines
from stepwire_server.sessions.beginning import Created
from stepwire_server.sessions.session import Session
from stepwire_server.sessions.workers import Holder
from stepwire_server.sharing.offer import StreamTransport

__all__ = ["attached", "closed", "created", "transport_name"]

_log = structlog.get_logger()
_lines: Final = BoundedLines(lambda event, **values: _log.info(event, **values), a_second=50, at_once=10_000)
"""The lines of sessions, bounded too: whoever may create one may do so thousands of times a second."""

_NAMES = {
    transport_pb2.TRANSPORT_SHM: "shm",
    transport_pb2.TRANSPORT_CUDA_IPC: "cuda_ipc",
    transport_pb2.TRANSPORT_PACKETS: "packets",
}


def created(made: Created, context: grpc.ServicerContext) -> None:
    """Log a session that was created; one that was there before has its line already."""
    if made.replayed:
        return
    session = made.session
    _lines.write(
        "session created",
        session_id=session.session_id,
        label=session.config.label,
        device=session.device,
        elements=session.config.layout.size,
        memory_bytes=session.memory_bytes,
        durability=session.config.durability.level,
        peer=context.peer(),
    )


def closed(session_id: str, applied_step: int, context: grpc.ServicerContext) -> None:
    """Log a session that a client has closed."""
    _lines.write("session closed", session_id=session_id, step=applied_step, peer=context.peer())


@contextlib.contextmanager
def attached(
    session: Session, holder: Holder, shared: StreamTransport, context: grpc.ServicerContext
) -> Iterator[None]:
    """Log a stream for a block: its beginning, and its end, whoever ends it.

    `acquired` tells a client that came without a token, and fences whoever held the worker before.
    """
    peer = context.peer()
    reason = {"reason": shared.reason} if shared.reason else {}
    _lines.write(
        "attached",
        session_id=session.session_id,
        worker=holder.worker,
        acquired=holder.acquired == holder.generation,
        transport=transport_name(shared, peer),
        step=session.ledger.applied_step,
        peer=peer,
        **reason,
    )
    try:
        yield
    finally:
        _lines.write(
            "detached",
            session_id=session.session_id,
            worker=holder.worker,
            step=session.ledger.applied_step,
            peer=peer,
        )


def transport_name(shared: StreamTransport, peer: str) -> str:
    """Name the transport of a stream as clients do."""
    if shared.transport in _NAMES:
        return _NAMES[shared.transport]
    return "uds" if peer.startswith("unix:") else "tcp"
