"""The messages of replication, read and written."""

from __future__ import annotations

from typing import Any, Final

from stepwire.errors import InvalidRequestError, Reason
from stepwire.v1 import replication_service_pb2 as pb
from stepwire.wire.frames import Frame, whole_message
from stepwire_server.replication.joining import Joining
from stepwire_server.replication.records import RecordKind, ReplicationRecord
from stepwire_server.replication.status import ReplicationStatus

__all__ = ["decode_joining", "decode_record", "encode_record", "encode_status"]

_KEY_BYTES: Final = 16
_ROLES: Final = {
    "none": pb.REPLICATION_ROLE_UNSPECIFIED,
    "primary": pb.REPLICATION_ROLE_PRIMARY,
    "standby": pb.REPLICATION_ROLE_STANDBY,
    "deposed": pb.REPLICATION_ROLE_DEPOSED,
}


def encode_record(record: ReplicationRecord) -> bytes:
    """Encode a record, with one copy of its payload."""
    message = pb.ReplicationRecord(
        number=record.number,
        epoch=record.epoch,
        kind=pb.RecordKind.Name(record.kind),
        session_id=record.session,
        entry=record.entry,
        meta=record.meta,
    )
    return whole_message(pb.FollowResponse(record=message), record.payload)


def decode_record(frame: Frame) -> ReplicationRecord:
    """Decode a record.

    Raises:
        InvalidRequestError: INVALID_FRAME, it is of no kind that this release knows, or its session's id is none.
    """
    message: Any = frame.message.record
    if message.kind not in RecordKind.__members__.values() or len(message.session_id) not in (0, _KEY_BYTES):
        raise InvalidRequestError.of(
            "record", f"record {message.number} of kind {message.kind} is not known here", reason=Reason.INVALID_FRAME
        )
    kind = RecordKind(message.kind)
    about = (message.session_id, message.entry, message.meta)
    return ReplicationRecord(message.number, message.epoch, kind, *about, frame.payload)


def decode_joining(message: Any) -> Joining:
    """Decode the opening of a standby's stream.

    Raises:
        InvalidRequestError: INVALID_FRAME, it is none, or has no id.
    """
    if not message.HasField("open") or not message.open.standby_id:
        raise InvalidRequestError.of(
            "open", "the first message of a standby must carry `open` with its id", reason=Reason.INVALID_FRAME
        )
    opening = message.open
    return Joining(opening.standby_id, opening.primary_id, opening.received, opening.promoted_epoch, opening.shard)


def encode_status(status: ReplicationStatus) -> pb.GetReplicationResponse:
    """Encode how replication stands."""
    return pb.GetReplicationResponse(**status._asdict() | {"role": _ROLES[status.role]})
