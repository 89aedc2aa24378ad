"""The records that a primary sends: those of a journal, and those of whole sessions."""

from __future__ import annotations

import enum
from typing import Any, Final, NamedTuple

import msgspec

from stepwire_server.durability.manifest import MemberFacts
from stepwire_server.durability.records import Header
from stepwire_server.engines.protocol import HostArray
from stepwire_server.records.snapshot import Snapshot
from stepwire_server.records.step_result import StepResult
from stepwire_server.rules.loss_scale import LossScale
from stepwire_server.sessions.exchange import Captured
from stepwire_server.sessions.workers import Holder

__all__ = [
    "BlockPlace",
    "ReceivedRecord",
    "RecordKind",
    "ReplicationRecord",
    "SessionOpening",
    "StateNumbers",
    "captured_of",
    "numbers_of",
]


_RECORD_BYTES: Final = 256
"""The bytes of a record beside its message and its payload: many small ones take memory too."""


class RecordKind(enum.IntEnum):
    """The subject of a record; `replication_service.proto` documents each. 2 to 5 are those of the journal."""

    OPEN = 1
    CHUNK = 2
    COMMIT = 3
    LOAD = 4
    HOLD = 5
    CLOSE = 6
    STATE = 7
    BLOCK = 8
    STATE_END = 9
    DIGEST = 10
    LOOK = 11
    MEMBER = 12
    HANDOVER = 13
    DROP = 14


class ReplicationRecord(NamedTuple):
    """One record on its way.

    Attributes:
        number: its number, from 1 without a gap.
        epoch: the epoch of the primary.
        kind: the subject.
        session: the session's id, 16 bytes; empty for a record of no session.
        entry: the number of the step, load or hold that it belongs to; 0 for others.
        meta: a small message.
        payload: the bytes that go with the message, `(n,) uint8`.
    """

    number: int
    epoch: int
    kind: RecordKind
    session: bytes
    entry: int
    meta: bytes
    payload: HostArray

    @property
    def nbytes(self) -> int:
        """The bytes that it takes while it waits, about."""
        return _RECORD_BYTES + len(self.meta) + self.payload.nbytes


class ReceivedRecord(NamedTuple):
    """A record of a journal that came over a connection, as `Redo` reads it.

    Attributes:
        header: the header, with kind, session, entry, number and epoch.
        meta: the small message.
        payload: the bytes, `(n,) uint8`.
    """

    header: Header
    meta: bytes
    payload: HostArray

    def read_payload(self) -> HostArray:
        """Return the payload."""
        return self.payload


class SessionOpening(msgspec.Struct, frozen=True, kw_only=True):
    """A session as the standby makes it.

    Attributes:
        request_id: the request that created it, with its tenant.
        config: the config of its creation, as a message of the contract.
        attach_key: the key of the attach tokens.
        fresh: it stands at step 0 as it was created; otherwise its state follows.
    """

    request_id: str
    config: bytes
    attach_key: bytes
    fresh: bool


class BlockPlace(msgspec.Struct, frozen=True, array_like=True):
    """The place of a block of a state: the slot, and the first element."""

    slot: str
    start: int


class StateNumbers(msgspec.Struct, frozen=True, kw_only=True):
    """The numbers of a session at one moment; `Captured` documents the fields."""

    step: int
    load: int
    tensor_steps: tuple[int, ...]
    tensor_scalars: tuple[float, ...]
    loss_scale: tuple[float, int] | None
    sum_bound: float
    ready: bool
    last_result: bytes | None
    generation: int
    acquired: int
    members: tuple[MemberFacts, ...]


def numbers_of(captured: Captured) -> StateNumbers:
    """Return the numbers of a moment."""
    numbers, result = captured.numbers, captured.last_result
    scale = numbers.loss_scale
    return StateNumbers(
        step=numbers.step,
        load=numbers.load,
        tensor_steps=tuple(numbers.tensor_steps),
        tensor_scalars=tuple(numbers.tensor_scalars),
        loss_scale=None if scale is None else (scale.scale, scale.clean_steps),
        sum_bound=captured.sum_bound,
        ready=captured.ready,
        last_result=None if result is None else msgspec.msgpack.encode(result),
        generation=captured.holder.generation,
        acquired=captured.holder.acquired,
        members=captured.members,
    )


def captured_of(numbers: StateNumbers) -> Captured:
    """Return a moment of some numbers, without its arrays."""
    scale: Any = numbers.loss_scale
    result = numbers.last_result
    return Captured(
        Snapshot(
            numbers.step,
            numbers.load,
            numbers.tensor_steps,
            None if scale is None else LossScale(*scale),
            numbers.tensor_scalars,
        ),
        numbers.sum_bound,
        numbers.ready,
        None if result is None else msgspec.msgpack.decode(result, type=StepResult),
        Holder(0, numbers.generation, numbers.acquired, None),
        numbers.acquired,
        numbers.members,
    )
