from stepwire.v1 import transport_pb2 as _transport_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AttachOpen(_message.Message):
    __slots__ = ("session_id", "worker", "attach_token", "epoch", "transport", "durable_step", "any_worker", "acquisition")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    ATTACH_TOKEN_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    DURABLE_STEP_FIELD_NUMBER: _ClassVar[int]
    ANY_WORKER_FIELD_NUMBER: _ClassVar[int]
    ACQUISITION_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    worker: int
    attach_token: int
    epoch: int
    transport: _transport_pb2.Transport
    durable_step: int
    any_worker: bool
    acquisition: int
    def __init__(self, session_id: _Optional[str] = ..., worker: _Optional[int] = ..., attach_token: _Optional[int] = ..., epoch: _Optional[int] = ..., transport: _Optional[_Union[_transport_pb2.Transport, str]] = ..., durable_step: _Optional[int] = ..., any_worker: bool = ..., acquisition: _Optional[int] = ...) -> None: ...

class AttachOpened(_message.Message):
    __slots__ = ("attach_token", "epoch", "applied_step", "durable_step", "applied_load", "ready", "transport", "transport_reason", "handoff", "unfinished_step", "worker", "contribution", "begins_anew", "worker_load")
    ATTACH_TOKEN_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    APPLIED_STEP_FIELD_NUMBER: _ClassVar[int]
    DURABLE_STEP_FIELD_NUMBER: _ClassVar[int]
    APPLIED_LOAD_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_REASON_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_FIELD_NUMBER: _ClassVar[int]
    UNFINISHED_STEP_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTION_FIELD_NUMBER: _ClassVar[int]
    BEGINS_ANEW_FIELD_NUMBER: _ClassVar[int]
    WORKER_LOAD_FIELD_NUMBER: _ClassVar[int]
    attach_token: int
    epoch: int
    applied_step: int
    durable_step: int
    applied_load: int
    ready: bool
    transport: _transport_pb2.Transport
    transport_reason: str
    handoff: _transport_pb2.Handoff
    unfinished_step: int
    worker: int
    contribution: int
    begins_anew: bool
    worker_load: int
    def __init__(self, attach_token: _Optional[int] = ..., epoch: _Optional[int] = ..., applied_step: _Optional[int] = ..., durable_step: _Optional[int] = ..., applied_load: _Optional[int] = ..., ready: bool = ..., transport: _Optional[_Union[_transport_pb2.Transport, str]] = ..., transport_reason: _Optional[str] = ..., handoff: _Optional[_Union[_transport_pb2.Handoff, _Mapping]] = ..., unfinished_step: _Optional[int] = ..., worker: _Optional[int] = ..., contribution: _Optional[int] = ..., begins_anew: bool = ..., worker_load: _Optional[int] = ...) -> None: ...
