from google.protobuf import descriptor_pb2 as _descriptor_pb2
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class Reason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REASON_UNSPECIFIED: _ClassVar[Reason]
    REASON_INVALID_TENSOR: _ClassVar[Reason]
    REASON_INVALID_CONFIG: _ClassVar[Reason]
    REASON_INVALID_FRAME: _ClassVar[Reason]
    REASON_NON_FINITE_GRADIENT: _ClassVar[Reason]
    REASON_SESSION_NOT_FOUND: _ClassVar[Reason]
    REASON_STEP_MISMATCH: _ClassVar[Reason]
    REASON_STEP_SUPERSEDED: _ClassVar[Reason]
    REASON_STATE_CHANGED: _ClassVar[Reason]
    REASON_NOT_ENOUGH_WORKERS: _ClassVar[Reason]
    REASON_STEP_UNFINISHED: _ClassVar[Reason]
    REASON_STALE_EPOCH: _ClassVar[Reason]
    REASON_FENCED: _ClassVar[Reason]
    REASON_NOT_PRIMARY: _ClassVar[Reason]
    REASON_UNSUPPORTED_FEATURE: _ClassVar[Reason]
    REASON_SESSION_NOT_READY: _ClassVar[Reason]
    REASON_MEMORY_EXHAUSTED: _ClassVar[Reason]
    REASON_TOO_MANY_SESSIONS: _ClassVar[Reason]
    REASON_TOO_MANY_STREAMS: _ClassVar[Reason]
    REASON_TOO_MANY_CALLS: _ClassVar[Reason]
    REASON_TOO_MANY_STEPS: _ClassVar[Reason]
    REASON_TABLE_FULL: _ClassVar[Reason]
    REASON_SHUTTING_DOWN: _ClassVar[Reason]
    REASON_STREAM_DISPLACED: _ClassVar[Reason]
    REASON_UNREACHABLE: _ClassVar[Reason]
    REASON_NO_STANDBY: _ClassVar[Reason]
    REASON_SESSION_MOVED: _ClassVar[Reason]
    REASON_SESSION_MOVING: _ClassVar[Reason]
    REASON_DEADLINE_EXCEEDED: _ClassVar[Reason]
    REASON_UNAUTHENTICATED: _ClassVar[Reason]
    REASON_PERMISSION_DENIED: _ClassVar[Reason]
    REASON_SESSION_DAMAGED: _ClassVar[Reason]
    REASON_DEVICE_LOST: _ClassVar[Reason]
    REASON_DURABLE_STEP_LOST: _ClassVar[Reason]
    REASON_STATE_LOST: _ClassVar[Reason]
    REASON_CHECKPOINT_DAMAGED: _ClassVar[Reason]
    REASON_DURABILITY_FAILED: _ClassVar[Reason]
    REASON_LOG_DAMAGED: _ClassVar[Reason]
    REASON_INTERNAL: _ClassVar[Reason]
REASON_UNSPECIFIED: Reason
REASON_INVALID_TENSOR: Reason
REASON_INVALID_CONFIG: Reason
REASON_INVALID_FRAME: Reason
REASON_NON_FINITE_GRADIENT: Reason
REASON_SESSION_NOT_FOUND: Reason
REASON_STEP_MISMATCH: Reason
REASON_STEP_SUPERSEDED: Reason
REASON_STATE_CHANGED: Reason
REASON_NOT_ENOUGH_WORKERS: Reason
REASON_STEP_UNFINISHED: Reason
REASON_STALE_EPOCH: Reason
REASON_FENCED: Reason
REASON_NOT_PRIMARY: Reason
REASON_UNSUPPORTED_FEATURE: Reason
REASON_SESSION_NOT_READY: Reason
REASON_MEMORY_EXHAUSTED: Reason
REASON_TOO_MANY_SESSIONS: Reason
REASON_TOO_MANY_STREAMS: Reason
REASON_TOO_MANY_CALLS: Reason
REASON_TOO_MANY_STEPS: Reason
REASON_TABLE_FULL: Reason
REASON_SHUTTING_DOWN: Reason
REASON_STREAM_DISPLACED: Reason
REASON_UNREACHABLE: Reason
REASON_NO_STANDBY: Reason
REASON_SESSION_MOVED: Reason
REASON_SESSION_MOVING: Reason
REASON_DEADLINE_EXCEEDED: Reason
REASON_UNAUTHENTICATED: Reason
REASON_PERMISSION_DENIED: Reason
REASON_SESSION_DAMAGED: Reason
REASON_DEVICE_LOST: Reason
REASON_DURABLE_STEP_LOST: Reason
REASON_STATE_LOST: Reason
REASON_CHECKPOINT_DAMAGED: Reason
REASON_DURABILITY_FAILED: Reason
REASON_LOG_DAMAGED: Reason
REASON_INTERNAL: Reason
REASON_ROW_FIELD_NUMBER: _ClassVar[int]
reason_row: _descriptor.FieldDescriptor

class ReasonRow(_message.Message):
    __slots__ = ("code", "repeatable", "remedy")
    CODE_FIELD_NUMBER: _ClassVar[int]
    REPEATABLE_FIELD_NUMBER: _ClassVar[int]
    REMEDY_FIELD_NUMBER: _ClassVar[int]
    code: str
    repeatable: bool
    remedy: str
    def __init__(self, code: _Optional[str] = ..., repeatable: bool = ..., remedy: _Optional[str] = ...) -> None: ...
