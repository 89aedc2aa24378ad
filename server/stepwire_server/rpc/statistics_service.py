"""The statistics of a server, streamed to whoever watches: one snapshot at once, and one per interval."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any, Final

import grpc

from stepwire.errors import InvalidRequestError
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.v1 import statistics_pb2
from stepwire.wire.frames import read_message
from stepwire.wire.messages import duration_to_wire, seconds_from_wire
from stepwire_server.records.session_snapshot import SessionSnapshot
from stepwire_server.rpc.encode import encode_device, encode_result
from stepwire_server.rpc.serving import Serving
from stepwire_server.sessions.registry import Registry
from stepwire_server.sessions.tenants import TenantSessions
from stepwire_server.sessions.watching import Rates, snapshots

__all__ = ["StatisticsService"]

_DEFAULT_SECONDS: Final = 1.0
_LEAST_SECONDS: Final = 0.1
_MOST_SECONDS: Final = 3600.0
_ACTIVITIES: Final = {
    "attached": statistics_pb2.SESSION_ACTIVITY_ATTACHED,
    "idle": statistics_pb2.SESSION_ACTIVITY_IDLE,
    "empty": statistics_pb2.SESSION_ACTIVITY_EMPTY,
    "damaged": statistics_pb2.SESSION_ACTIVITY_DAMAGED,
}


class StatisticsService:
    """Serves the part of `stepwire.v1.OptimizerService` that is about watching."""

    def __init__(
        self, registry: Registry, serving: Serving, tenant: Callable[[grpc.ServicerContext], str | None]
    ) -> None:
        """Tell of the sessions of `registry`; `tenant` returns whose a caller sees, None for all."""
        self._registry = registry
        self._serving = serving
        self._tenant = tenant
        self._started = registry.clock()

    def handlers(self) -> dict[str, grpc.RpcMethodHandler[Any, Any]]:
        """Return the rows of the method table."""
        return {"GetStatistics": grpc.unary_stream_rpc_method_handler(self.get_statistics)}

    def get_statistics(self, data: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        """Stream snapshots until the caller leaves."""
        seconds, left, rates = _interval(read_message(pb.GetStatisticsRequest, data)), threading.Event(), Rates()
        if not context.add_callback(left.set):
            return
        with self._registry.streams.watcher(context.cancel, self._tenant(context)):
            while not left.is_set():
                # The identity is asked for each time: a token may expire, or be revoked.
                yield self._snapshot(self._tenant(context), rates).SerializeToString()
                left.wait(seconds)

    def _snapshot(self, tenant: str | None, rates: Rates) -> pb.GetStatisticsResponse:
        registry, first, now = self._registry, not rates.looked, self._registry.clock()
        sessions, seen = snapshots(registry, tenant), TenantSessions(registry, tenant)
        known, statistics = rates.look(sessions, now), seen.statistics()
        server = statistics_pb2.ServerLoad(
            sessions=statistics.sessions,
            parked=statistics.parked,
            streams=statistics.streams,
            under_way=self._under_way(tenant),
            steps_per_second=None if first else sum(known.values()),
            devices=[encode_device(device, seen.reserved_bytes(device)) for device in registry.pool],
            draining=self._serving.drain.started,
            uptime=duration_to_wire(now - self._started),
        )
        return pb.GetStatisticsResponse(
            server=server, sessions=[_progress(session, known.get(session.session_id)) for session in sessions]
        )

    def _under_way(self, tenant: str | None) -> int:
        """Count the steps under way; for one tenant those of its streams."""
        if tenant is None:
            return self._serving.drain.statistics().steps
        return sum(stream.in_step for stream in self._registry.streams if stream.tenant == tenant)


def _progress(session: SessionSnapshot, steps_per_second: float | None) -> statistics_pb2.SessionProgress:
    message = statistics_pb2.SessionProgress(
        session_id=session.session_id,
        label=session.label,
        device=session.device,
        activity=_ACTIVITIES[session.state],
        transports=session.transports,
        applied_step=session.applied_step,
        durable_step=session.durable_step,
        steps_per_second=steps_per_second,
        memory_bytes=session.memory_bytes,
        attached_workers=session.attached_workers,
        workers=session.workers,
        idle=duration_to_wire(session.idle_seconds),
    )
    if session.result is not None:
        encode_result(session.result, session.durable_step or 0, message.last_result)
    return message


def _interval(request: pb.GetStatisticsRequest) -> float:
    """Return the seconds between two snapshots.

    Raises:
        InvalidRequestError: they are out of range.
    """
    if not request.HasField("interval"):
        return _DEFAULT_SECONDS
    seconds = seconds_from_wire(request.interval)
    if not _LEAST_SECONDS <= seconds <= _MOST_SECONDS:
        raise InvalidRequestError.of("interval", f"{seconds:g} s is not in [{_LEAST_SECONDS:g}, {_MOST_SECONDS:g}]")
    return seconds
