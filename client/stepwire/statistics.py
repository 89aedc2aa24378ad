"""The statistics of a server and of its sessions, as plain data."""

from __future__ import annotations

import dataclasses
from typing import Final

from stepwire.step_result import StepResult
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.v1 import server_pb2, statistics_pb2

__all__ = ["ServerLoad", "SessionProgress", "Statistics"]

_ACTIVITIES: Final = {
    statistics_pb2.SESSION_ACTIVITY_ATTACHED: "attached",
    statistics_pb2.SESSION_ACTIVITY_IDLE: "idle",
    statistics_pb2.SESSION_ACTIVITY_EMPTY: "empty",
    statistics_pb2.SESSION_ACTIVITY_DAMAGED: "damaged",
}


@dataclasses.dataclass(frozen=True, slots=True)
class ServerLoad:
    """A server at one moment: its sessions and streams; those of one tenant for a caller of one.

    Attributes:
        target: the target of the connection.
        sessions: the sessions in memory.
        parked: the sessions on disk alone.
        streams: the attached streams.
        under_way: the steps, loads and creations under way.
        steps_per_second: the steps per second of all sessions since the snapshot before; None in the first.
        budget_bytes: the bytes that sessions may reserve on each device, by its name.
        reserved_bytes: the bytes that they have reserved there.
        draining: True once the server refuses new steps.
        uptime_seconds: the time since its start.
    """

    target: str
    sessions: int
    parked: int
    streams: int
    under_way: int
    steps_per_second: float | None
    budget_bytes: dict[str, int]
    reserved_bytes: dict[str, int]
    draining: bool
    uptime_seconds: float

    @classmethod
    def from_wire(cls, message: statistics_pb2.ServerLoad, target: str) -> ServerLoad:
        """Decode the load of the server of a target."""
        devices: list[server_pb2.DeviceInfo] = list(message.devices)
        return cls(
            target=target,
            sessions=message.sessions,
            parked=message.parked,
            streams=message.streams,
            under_way=message.under_way,
            steps_per_second=message.steps_per_second if message.HasField("steps_per_second") else None,
            budget_bytes={device.name: device.budget_bytes for device in devices},
            reserved_bytes={device.name: device.reserved_bytes for device in devices},
            draining=message.draining,
            uptime_seconds=message.uptime.ToTimedelta().total_seconds(),
        )


@dataclasses.dataclass(frozen=True, slots=True)
class SessionProgress:
    """A session in a server's memory, at one moment.

    Attributes:
        session_id: the session's id, the right to use the session.
        label: the creator's text.
        device: the device of its state.
        activity: "attached", "idle", "empty" (no parameters so far) or "damaged"; "unknown" of a newer server.
        transports: the transports of the attached workers, each once, sorted.
        applied_step: the last committed step.
        durable_step: the last step that survives a loss of the server; None for a session in memory alone.
        steps_per_second: the steps per second since the snapshot before; None in the first that has the session.
        memory_bytes: the bytes of its state.
        attached_workers: the workers that have a stream.
        workers: the most workers that it may have.
        idle_seconds: the time since its last use; 0 while it is used.
        last_result: the result of the last step; None before the first.
    """

    session_id: str
    label: str
    device: str
    activity: str
    transports: tuple[str, ...]
    applied_step: int
    durable_step: int | None
    steps_per_second: float | None
    memory_bytes: int
    attached_workers: int
    workers: int
    idle_seconds: float
    last_result: StepResult | None

    @classmethod
    def from_wire(cls, message: statistics_pb2.SessionProgress) -> SessionProgress:
        """Decode a session."""
        return cls(
            session_id=message.session_id,
            label=message.label,
            device=message.device,
            activity=_ACTIVITIES.get(message.activity, "unknown"),
            transports=tuple(message.transports),
            applied_step=message.applied_step,
            durable_step=message.durable_step if message.HasField("durable_step") else None,
            steps_per_second=message.steps_per_second if message.HasField("steps_per_second") else None,
            memory_bytes=message.memory_bytes,
            attached_workers=message.attached_workers,
            workers=message.workers,
            idle_seconds=message.idle.ToTimedelta().total_seconds(),
            last_result=StepResult.from_wire(message.last_result) if message.HasField("last_result") else None,
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Statistics:
    """One snapshot of a server, or of several.

    Attributes:
        servers: the servers, in the order of the targets.
        sessions: the sessions in memory that the caller sees, ordered by id; those of several servers one after
            another, shards singly.
    """

    servers: tuple[ServerLoad, ...]
    sessions: tuple[SessionProgress, ...]

    @classmethod
    def from_wire(cls, message: pb.GetStatisticsResponse, target: str) -> Statistics:
        """Decode a snapshot of the server of a target."""
        server = ServerLoad.from_wire(message.server, target)
        return cls((server,), tuple(map(SessionProgress.from_wire, message.sessions)))
