from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ReplicationRole(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REPLICATION_ROLE_UNSPECIFIED: _ClassVar[ReplicationRole]
    REPLICATION_ROLE_PRIMARY: _ClassVar[ReplicationRole]
    REPLICATION_ROLE_STANDBY: _ClassVar[ReplicationRole]
    REPLICATION_ROLE_DEPOSED: _ClassVar[ReplicationRole]

class RecordKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RECORD_KIND_UNSPECIFIED: _ClassVar[RecordKind]
    RECORD_KIND_OPEN: _ClassVar[RecordKind]
    RECORD_KIND_CHUNK: _ClassVar[RecordKind]
    RECORD_KIND_COMMIT: _ClassVar[RecordKind]
    RECORD_KIND_LOAD: _ClassVar[RecordKind]
    RECORD_KIND_HOLD: _ClassVar[RecordKind]
    RECORD_KIND_CLOSE: _ClassVar[RecordKind]
    RECORD_KIND_STATE: _ClassVar[RecordKind]
    RECORD_KIND_BLOCK: _ClassVar[RecordKind]
    RECORD_KIND_STATE_END: _ClassVar[RecordKind]
    RECORD_KIND_DIGEST: _ClassVar[RecordKind]
    RECORD_KIND_LOOK: _ClassVar[RecordKind]
    RECORD_KIND_MEMBER: _ClassVar[RecordKind]
    RECORD_KIND_HANDOVER: _ClassVar[RecordKind]
    RECORD_KIND_DROP: _ClassVar[RecordKind]
REPLICATION_ROLE_UNSPECIFIED: ReplicationRole
REPLICATION_ROLE_PRIMARY: ReplicationRole
REPLICATION_ROLE_STANDBY: ReplicationRole
REPLICATION_ROLE_DEPOSED: ReplicationRole
RECORD_KIND_UNSPECIFIED: RecordKind
RECORD_KIND_OPEN: RecordKind
RECORD_KIND_CHUNK: RecordKind
RECORD_KIND_COMMIT: RecordKind
RECORD_KIND_LOAD: RecordKind
RECORD_KIND_HOLD: RecordKind
RECORD_KIND_CLOSE: RecordKind
RECORD_KIND_STATE: RecordKind
RECORD_KIND_BLOCK: RecordKind
RECORD_KIND_STATE_END: RecordKind
RECORD_KIND_DIGEST: RecordKind
RECORD_KIND_LOOK: RecordKind
RECORD_KIND_MEMBER: RecordKind
RECORD_KIND_HANDOVER: RecordKind
RECORD_KIND_DROP: RecordKind

class FollowRequest(_message.Message):
    __slots__ = ("open", "acknowledgement", "digest", "problem", "refusal", "leave")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    ACKNOWLEDGEMENT_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    LEAVE_FIELD_NUMBER: _ClassVar[int]
    open: FollowOpen
    acknowledgement: FollowAcknowledgement
    digest: FollowDigest
    problem: FollowProblem
    refusal: FollowRefusal
    leave: FollowLeave
    def __init__(self, open: _Optional[_Union[FollowOpen, _Mapping]] = ..., acknowledgement: _Optional[_Union[FollowAcknowledgement, _Mapping]] = ..., digest: _Optional[_Union[FollowDigest, _Mapping]] = ..., problem: _Optional[_Union[FollowProblem, _Mapping]] = ..., refusal: _Optional[_Union[FollowRefusal, _Mapping]] = ..., leave: _Optional[_Union[FollowLeave, _Mapping]] = ...) -> None: ...

class FollowOpen(_message.Message):
    __slots__ = ("standby_id", "primary_id", "received", "promoted_epoch", "shard")
    STANDBY_ID_FIELD_NUMBER: _ClassVar[int]
    PRIMARY_ID_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_FIELD_NUMBER: _ClassVar[int]
    PROMOTED_EPOCH_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    standby_id: str
    primary_id: str
    received: int
    promoted_epoch: int
    shard: str
    def __init__(self, standby_id: _Optional[str] = ..., primary_id: _Optional[str] = ..., received: _Optional[int] = ..., promoted_epoch: _Optional[int] = ..., shard: _Optional[str] = ...) -> None: ...

class FollowAcknowledgement(_message.Message):
    __slots__ = ("number",)
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    number: int
    def __init__(self, number: _Optional[int] = ...) -> None: ...

class FollowDigest(_message.Message):
    __slots__ = ("session_id", "number", "digest")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    number: int
    digest: bytes
    def __init__(self, session_id: _Optional[bytes] = ..., number: _Optional[int] = ..., digest: _Optional[bytes] = ...) -> None: ...

class FollowProblem(_message.Message):
    __slots__ = ("session_id", "number", "problem")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    number: int
    problem: str
    def __init__(self, session_id: _Optional[bytes] = ..., number: _Optional[int] = ..., problem: _Optional[str] = ...) -> None: ...

class FollowRefusal(_message.Message):
    __slots__ = ("epoch",)
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    def __init__(self, epoch: _Optional[int] = ...) -> None: ...

class FollowLeave(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class FollowResponse(_message.Message):
    __slots__ = ("opened", "record", "padding", "payload")
    OPENED_FIELD_NUMBER: _ClassVar[int]
    RECORD_FIELD_NUMBER: _ClassVar[int]
    PADDING_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    opened: FollowOpened
    record: ReplicationRecord
    padding: bytes
    payload: bytes
    def __init__(self, opened: _Optional[_Union[FollowOpened, _Mapping]] = ..., record: _Optional[_Union[ReplicationRecord, _Mapping]] = ..., padding: _Optional[bytes] = ..., payload: _Optional[bytes] = ...) -> None: ...

class FollowOpened(_message.Message):
    __slots__ = ("primary_id", "epoch", "whole")
    PRIMARY_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    WHOLE_FIELD_NUMBER: _ClassVar[int]
    primary_id: str
    epoch: int
    whole: bool
    def __init__(self, primary_id: _Optional[str] = ..., epoch: _Optional[int] = ..., whole: bool = ...) -> None: ...

class ReplicationRecord(_message.Message):
    __slots__ = ("number", "epoch", "kind", "session_id", "entry", "meta")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    ENTRY_FIELD_NUMBER: _ClassVar[int]
    META_FIELD_NUMBER: _ClassVar[int]
    number: int
    epoch: int
    kind: RecordKind
    session_id: bytes
    entry: int
    meta: bytes
    def __init__(self, number: _Optional[int] = ..., epoch: _Optional[int] = ..., kind: _Optional[_Union[RecordKind, str]] = ..., session_id: _Optional[bytes] = ..., entry: _Optional[int] = ..., meta: _Optional[bytes] = ...) -> None: ...

class PromoteRequest(_message.Message):
    __slots__ = ("lossy",)
    LOSSY_FIELD_NUMBER: _ClassVar[int]
    lossy: bool
    def __init__(self, lossy: bool = ...) -> None: ...

class PromoteResponse(_message.Message):
    __slots__ = ("epoch", "sessions")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    sessions: int
    def __init__(self, epoch: _Optional[int] = ..., sessions: _Optional[int] = ...) -> None: ...

class ForgetStandbyRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ForgetStandbyResponse(_message.Message):
    __slots__ = ("standby_id",)
    STANDBY_ID_FIELD_NUMBER: _ClassVar[int]
    standby_id: str
    def __init__(self, standby_id: _Optional[str] = ...) -> None: ...

class GetReplicationRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetReplicationResponse(_message.Message):
    __slots__ = ("role", "epoch", "server_id", "peer_id", "connected", "in_sync", "position", "acknowledged", "sessions", "incomplete", "divergences", "problem", "pending_steps", "pending_bytes", "acknowledged_steps", "promotions")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SERVER_ID_FIELD_NUMBER: _ClassVar[int]
    PEER_ID_FIELD_NUMBER: _ClassVar[int]
    CONNECTED_FIELD_NUMBER: _ClassVar[int]
    IN_SYNC_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    ACKNOWLEDGED_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    INCOMPLETE_FIELD_NUMBER: _ClassVar[int]
    DIVERGENCES_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    PENDING_STEPS_FIELD_NUMBER: _ClassVar[int]
    PENDING_BYTES_FIELD_NUMBER: _ClassVar[int]
    ACKNOWLEDGED_STEPS_FIELD_NUMBER: _ClassVar[int]
    PROMOTIONS_FIELD_NUMBER: _ClassVar[int]
    role: ReplicationRole
    epoch: int
    server_id: str
    peer_id: str
    connected: bool
    in_sync: bool
    position: int
    acknowledged: int
    sessions: int
    incomplete: int
    divergences: int
    problem: str
    pending_steps: int
    pending_bytes: int
    acknowledged_steps: int
    promotions: int
    def __init__(self, role: _Optional[_Union[ReplicationRole, str]] = ..., epoch: _Optional[int] = ..., server_id: _Optional[str] = ..., peer_id: _Optional[str] = ..., connected: bool = ..., in_sync: bool = ..., position: _Optional[int] = ..., acknowledged: _Optional[int] = ..., sessions: _Optional[int] = ..., incomplete: _Optional[int] = ..., divergences: _Optional[int] = ..., problem: _Optional[str] = ..., pending_steps: _Optional[int] = ..., pending_bytes: _Optional[int] = ..., acknowledged_steps: _Optional[int] = ..., promotions: _Optional[int] = ...) -> None: ...
