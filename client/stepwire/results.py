"""Records of a step, of a session and of the server, as plain data."""

from __future__ import annotations

import dataclasses
import datetime
from typing import Any

import numpy as np
import numpy.typing as npt

from stepwire.optimizers import Hyperparameters, Optimizer
from stepwire.optimizers.aggregation import Aggregation, aggregation_from_wire
from stepwire.optimizers.durability import Durability, durability_from_wire
from stepwire.optimizers.gradient_treatment import GradientTreatment, treatment_from_wire
from stepwire.step_result import GroupResult, StepResult
from stepwire.v1 import aggregation_pb2, checkpoint_pb2, session_pb2
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.wire.messages import (
    hyperparameters_from_wire,
    optimizer_from_wire,
    precision_from_wire,
    specs_from_wire,
)

__all__ = [
    "CheckpointInfo",
    "GroupResult",
    "Member",
    "ServerInfo",
    "SessionConfig",
    "SessionInfo",
    "SessionStatistics",
    "Snapshot",
    "StepResult",
    "TableUse",
    "TransportChoice",
]


@dataclasses.dataclass(frozen=True)
class SessionConfig:
    """The config of one session.

    Attributes:
        optimizer: the rule, with the hyper-parameters of groups that have none of their own.
        groups: the hyper-parameters of each group.
        membership: the index of the group of each tensor, by name.
        treatment: the treatment of gradients before the rule.
        state_precision: the precision of moments, of groups and tensors without one of their own.
        tensor_precision: the precision of each tensor's moments, by name, whoever named it.
        durability: the steps that survive a loss of the server, and the times of checkpoints.
        aggregation: the way that the gradients of several workers meet; None for one worker.
        tables: by the name of a table, the meaning of a step for its rows.
    """

    optimizer: Optimizer
    groups: tuple[Hyperparameters, ...]
    membership: dict[str, int]
    treatment: GradientTreatment
    state_precision: str
    tensor_precision: dict[str, str]
    durability: Durability
    aggregation: Aggregation | None = None
    tables: dict[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_wire(cls, message: session_pb2.SessionConfig) -> SessionConfig:
        """Decode a session's config."""
        specs = specs_from_wire(message)
        return cls(
            optimizer=optimizer_from_wire(message.optimizer, "optimizer"),
            groups=tuple(hyperparameters_from_wire(group.overrides) for group in message.groups),
            membership={tensor.name: tensor.group for tensor in message.tensors},
            treatment=treatment_from_wire(
                message.gradient,
                "gradient",
                group_clips=any(group.HasField("clip_grad_norm") for group in message.groups),
            ),
            state_precision=precision_from_wire(message.state_precision),
            tensor_precision={spec.name: spec.state_precision for spec in specs},
            durability=durability_from_wire(message, "config"),
            aggregation=aggregation_from_wire(message.aggregation, "config.aggregation"),
            tables={spec.name: spec.table for spec in specs if spec.table},
        )

    def arguments(self, group: int) -> dict[str, Any]:
        """Return a group's hyper-parameters by the names of the optimizer's constructor."""
        return self.optimizer.arguments(self.groups[group])


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """The whole optimizer state of a session as of one step, in float32.

    Attributes:
        step: the session's applied step.
        slots: `"param"`, `"exp_avg"`, `"exp_avg_sq"`, … → tensor name → array of the tensor's shape. An 8-bit slot has
            a second slot with the maxima of its blocks, such as `"exp_avg_scale"`.
        tensor_steps: the updates that each tensor has had (Adam's t), by name.
        loss_scale: the scale, and the updates since its last change; None without loss scaling.
        tensor_scalars: the scalar that the rule keeps for each tensor besides t, in [0, 1], by name; empty for rules
            without. SGD with momentum: 1 once the buffer has begun, else 0. NAdam: the product of the momenta so far. A
            load without them derives them from `tensor_steps` and the session's numbers.
    """

    step: int
    slots: dict[str, dict[str, npt.NDArray[np.float32]]]
    tensor_steps: dict[str, int]
    loss_scale: tuple[float, int] | None = None
    tensor_scalars: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class Member:
    """A worker of a session.

    Attributes:
        worker: the index of the worker.
        attached: True while a stream is attached as this worker.
        contribution: the number of its last gradient that was answered.
    """

    worker: int
    attached: bool
    contribution: int

    @classmethod
    def from_wire(cls, message: aggregation_pb2.Member) -> Member:
        """Decode a worker."""
        return cls(message.worker, message.attached, message.contribution)


@dataclasses.dataclass(frozen=True, slots=True)
class TableUse:
    """The rows of a table that are named by ids.

    Attributes:
        name: the name of the table.
        rows: the rows that there are.
        evicted_rows: the rows that were evicted since the session came into memory.
    """

    name: str
    rows: int
    evicted_rows: int


@dataclasses.dataclass(frozen=True, slots=True)
class SessionStatistics:
    """The numbers that a client knows of its session, as of one moment.

    Attributes:
        applied_step: the last step known to be applied.
        durable_step: the last step known to survive a loss of the server.
        attached: a stream is attached, as far as is known.
        streams_opened: the streams opened so far; more than one after a broken connection.
        step_in_doubt: the number of a step that failed with an unknown outcome; None without one.
        reply_begun: a part of the reply to that step was written, so arrays given as `out` may hold values of two
            steps.
        steps_in_flight: the background steps under way or waiting.
        background_failures: the background steps that failed.
        applied_load: the last load known to be committed; of several workers, that of this one's parameters.
    """

    applied_step: int
    durable_step: int
    attached: bool
    streams_opened: int
    step_in_doubt: int | None = None
    reply_begun: bool = False
    steps_in_flight: int = 0
    background_failures: int = 0
    applied_load: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class SessionInfo:
    """A session as the server lists it.

    Attributes:
        session_id: the session's id, the right to use the session.
        label: the creator's text.
        epoch: the incarnation of the server that owns the session.
        applied_step: the last committed step.
        durable_step: the last step that survives a loss of the server.
        memory_bytes: the bytes of its state.
        device: the device of its state.
        ready: True once the session has parameters, and so accepts steps.
        attached: True while a stream is attached.
        create_time: the time of its creation.
        expire_time: the time of its end, unless the session is used before.
        idle_seconds: the time since its last use; 0 while a stream is attached or a call is under way.
        parked: True while its state is on disk alone; the next call brings it back.
        members: the workers that have attached so far; empty for a session with one.
        tables: the use of each table whose rows are named by ids.
    """

    session_id: str
    label: str
    epoch: int
    applied_step: int
    durable_step: int
    memory_bytes: int
    device: str
    ready: bool
    attached: bool
    create_time: datetime.datetime
    expire_time: datetime.datetime
    idle_seconds: float
    parked: bool = False
    members: tuple[Member, ...] = ()
    tables: tuple[TableUse, ...] = ()

    @classmethod
    def from_wire(cls, message: session_pb2.Session) -> SessionInfo:
        """Decode a session."""
        return cls(
            session_id=message.session_id,
            label=message.config.label,
            epoch=message.epoch,
            applied_step=message.applied_step,
            durable_step=message.durable_step,
            memory_bytes=message.memory_bytes,
            device=message.device,
            ready=message.ready,
            attached=message.attached,
            create_time=message.create_time.ToDatetime(datetime.UTC),
            expire_time=message.expire_time.ToDatetime(datetime.UTC),
            idle_seconds=message.idle.ToTimedelta().total_seconds(),
            parked=message.state == session_pb2.LIFECYCLE_STATE_PARKED,
            members=tuple(map(Member.from_wire, message.members)),
            tables=tuple(TableUse(table.name, table.rows, table.evicted_rows) for table in message.tables),
        )


@dataclasses.dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """One checkpoint of a session.

    Attributes:
        name: its name; "auto-" begins the names of those that the server took by itself.
        step: the last step in it; 0 if it is damaged.
        load: the last load in it; 0 if it is damaged.
        create_time: the moment of its creation; None if it is damaged.
        nbytes: the bytes of its files; 0 if it is damaged.
        damage: the reason why it cannot be used; empty for a good one, as far as its manifest tells.
        stored: the object store of the server has it too.
        store_problem: the reason why the last upload there failed, which is tried again; empty without a failure.
    """

    name: str
    step: int
    load: int
    create_time: datetime.datetime | None
    nbytes: int
    damage: str
    stored: bool = False
    store_problem: str = ""

    @classmethod
    def from_wire(cls, message: checkpoint_pb2.Checkpoint) -> CheckpointInfo:
        """Decode one line of a server's list."""
        created = message.create_time.ToDatetime(datetime.UTC) if message.HasField("create_time") else None
        numbers = (message.name, message.step, message.load, created, message.bytes)
        return cls(*numbers, message.damage, message.stored, message.store_problem)


@dataclasses.dataclass(frozen=True, slots=True)
class TransportChoice:
    """The transport of a session's gradients and parameters, and the reasons against the better ones.

    Attributes:
        name: "cuda_ipc", "packets", "shm", "uds" or "tcp".
        reasons: for each better transport the reason against it, and the remedy. For packets without shared memory, the
            reason against that memory too, as "shm".
    """

    name: str
    reasons: dict[str, str]

    def __str__(self) -> str:
        """Return the choice and its reasons in one line."""
        names: dict[str, list[str]] = {}
        for name, why in self.reasons.items():
            names.setdefault(why, []).append(name)
        return "; ".join([f"transport {self.name}", *(f"no {', '.join(those)}: {why}" for why, those in names.items())])


@dataclasses.dataclass(frozen=True, slots=True)
class ServerInfo:
    """The properties of a server.

    Attributes:
        version: the version of its distribution.
        protocol_min: the oldest protocol version that it speaks.
        protocol_max: the newest protocol version that it speaks.
        instance_id: an id that is random for each start of the server.
        devices: the devices of sessions, by name: description and bytes in all, allowed and reserved.
        features: the optional features that it serves.
        sessions: the number of sessions alive.
        max_chunk_bytes: the largest payload of one message.
        draining: True once the server refuses new steps.
        not_serving: the reason why the server serves no sessions, such as that it is a standby; empty where it does.
        shard: the name of its shard; empty for a server without one.
        epoch: the epoch of its sessions.
    """

    version: str
    protocol_min: int
    protocol_max: int
    instance_id: str
    devices: dict[str, dict[str, Any]]
    features: tuple[str, ...]
    sessions: int
    max_chunk_bytes: int
    draining: bool
    not_serving: str = ""
    shard: str = ""
    epoch: int = 0

    @classmethod
    def from_wire(cls, message: pb.GetServerInfoResponse) -> ServerInfo:
        """Decode a server's response."""
        return cls(
            version=message.version,
            protocol_min=message.protocol_min,
            protocol_max=message.protocol_max,
            instance_id=message.instance_id,
            devices={
                device.name: {
                    "description": device.description,
                    "memory_bytes": device.memory_bytes,
                    "budget_bytes": device.budget_bytes,
                    "reserved_bytes": device.reserved_bytes,
                }
                for device in message.devices
            },
            features=tuple(message.features),
            sessions=message.sessions,
            max_chunk_bytes=message.limits.max_chunk_bytes,
            draining=message.draining,
            not_serving=message.not_serving,
            shard=message.shard,
            epoch=message.epoch,
        )
