from stepwire.v1 import optimizer_pb2 as _optimizer_pb2
from stepwire.v1 import session_pb2 as _session_pb2
from stepwire.v1 import step_pb2 as _step_pb2
from stepwire.v1 import tensor_pb2 as _tensor_pb2
from stepwire.v1 import transport_pb2 as _transport_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetServerInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetServerInfoResponse(_message.Message):
    __slots__ = ("version", "protocol_min", "protocol_max", "instance_id", "devices", "limits", "features", "sessions", "draining", "local")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_MIN_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_MAX_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    LOCAL_FIELD_NUMBER: _ClassVar[int]
    version: str
    protocol_min: int
    protocol_max: int
    instance_id: str
    devices: _containers.RepeatedCompositeFieldContainer[DeviceInfo]
    limits: Limits
    features: _containers.RepeatedScalarFieldContainer[str]
    sessions: int
    draining: bool
    local: _transport_pb2.LocalAccess
    def __init__(self, version: _Optional[str] = ..., protocol_min: _Optional[int] = ..., protocol_max: _Optional[int] = ..., instance_id: _Optional[str] = ..., devices: _Optional[_Iterable[_Union[DeviceInfo, _Mapping]]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., features: _Optional[_Iterable[str]] = ..., sessions: _Optional[int] = ..., draining: bool = ..., local: _Optional[_Union[_transport_pb2.LocalAccess, _Mapping]] = ...) -> None: ...

class DeviceInfo(_message.Message):
    __slots__ = ("name", "description", "memory_bytes", "budget_bytes", "reserved_bytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    RESERVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    description: str
    memory_bytes: int
    budget_bytes: int
    reserved_bytes: int
    def __init__(self, name: _Optional[str] = ..., description: _Optional[str] = ..., memory_bytes: _Optional[int] = ..., budget_bytes: _Optional[int] = ..., reserved_bytes: _Optional[int] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_sessions", "max_tensors", "max_chunk_bytes", "max_unary_bytes", "max_streams", "max_lease_seconds", "step_idle_seconds")
    MAX_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    MAX_TENSORS_FIELD_NUMBER: _ClassVar[int]
    MAX_CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_UNARY_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_STREAMS_FIELD_NUMBER: _ClassVar[int]
    MAX_LEASE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    STEP_IDLE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    max_sessions: int
    max_tensors: int
    max_chunk_bytes: int
    max_unary_bytes: int
    max_streams: int
    max_lease_seconds: float
    step_idle_seconds: float
    def __init__(self, max_sessions: _Optional[int] = ..., max_tensors: _Optional[int] = ..., max_chunk_bytes: _Optional[int] = ..., max_unary_bytes: _Optional[int] = ..., max_streams: _Optional[int] = ..., max_lease_seconds: _Optional[float] = ..., step_idle_seconds: _Optional[float] = ...) -> None: ...

class CreateSessionRequest(_message.Message):
    __slots__ = ("request_id", "config")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    config: _session_pb2.SessionConfig
    def __init__(self, request_id: _Optional[str] = ..., config: _Optional[_Union[_session_pb2.SessionConfig, _Mapping]] = ...) -> None: ...

class CreateSessionResponse(_message.Message):
    __slots__ = ("session", "attach_token", "replayed")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    ATTACH_TOKEN_FIELD_NUMBER: _ClassVar[int]
    REPLAYED_FIELD_NUMBER: _ClassVar[int]
    session: _session_pb2.Session
    attach_token: int
    replayed: bool
    def __init__(self, session: _Optional[_Union[_session_pb2.Session, _Mapping]] = ..., attach_token: _Optional[int] = ..., replayed: bool = ...) -> None: ...

class GetSessionRequest(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    def __init__(self, session_id: _Optional[str] = ...) -> None: ...

class GetSessionResponse(_message.Message):
    __slots__ = ("session",)
    SESSION_FIELD_NUMBER: _ClassVar[int]
    session: _session_pb2.Session
    def __init__(self, session: _Optional[_Union[_session_pb2.Session, _Mapping]] = ...) -> None: ...

class ListSessionsRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListSessionsResponse(_message.Message):
    __slots__ = ("sessions", "next_page_token")
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    sessions: _containers.RepeatedCompositeFieldContainer[_session_pb2.Session]
    next_page_token: str
    def __init__(self, sessions: _Optional[_Iterable[_Union[_session_pb2.Session, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class DeleteSessionRequest(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    def __init__(self, session_id: _Optional[str] = ...) -> None: ...

class DeleteSessionResponse(_message.Message):
    __slots__ = ("applied_step",)
    APPLIED_STEP_FIELD_NUMBER: _ClassVar[int]
    applied_step: int
    def __init__(self, applied_step: _Optional[int] = ...) -> None: ...

class AttachRequest(_message.Message):
    __slots__ = ("open", "begin", "chunk", "commit", "check", "padding", "payload")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    CHECK_FIELD_NUMBER: _ClassVar[int]
    PADDING_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    open: AttachOpen
    begin: _step_pb2.StepBegin
    chunk: _tensor_pb2.Chunk
    commit: _step_pb2.StepCommit
    check: _transport_pb2.MemoryCheck
    padding: bytes
    payload: bytes
    def __init__(self, open: _Optional[_Union[AttachOpen, _Mapping]] = ..., begin: _Optional[_Union[_step_pb2.StepBegin, _Mapping]] = ..., chunk: _Optional[_Union[_tensor_pb2.Chunk, _Mapping]] = ..., commit: _Optional[_Union[_step_pb2.StepCommit, _Mapping]] = ..., check: _Optional[_Union[_transport_pb2.MemoryCheck, _Mapping]] = ..., padding: _Optional[bytes] = ..., payload: _Optional[bytes] = ...) -> None: ...

class AttachOpen(_message.Message):
    __slots__ = ("session_id", "slot", "attach_token", "epoch", "transport")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    ATTACH_TOKEN_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    slot: int
    attach_token: int
    epoch: int
    transport: _transport_pb2.Transport
    def __init__(self, session_id: _Optional[str] = ..., slot: _Optional[int] = ..., attach_token: _Optional[int] = ..., epoch: _Optional[int] = ..., transport: _Optional[_Union[_transport_pb2.Transport, str]] = ...) -> None: ...

class AttachResponse(_message.Message):
    __slots__ = ("opened", "chunk", "result", "staged", "checked", "padding", "payload")
    OPENED_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    STAGED_FIELD_NUMBER: _ClassVar[int]
    CHECKED_FIELD_NUMBER: _ClassVar[int]
    PADDING_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    opened: AttachOpened
    chunk: _tensor_pb2.Chunk
    result: _step_pb2.StepResult
    staged: _step_pb2.Staged
    checked: _transport_pb2.MemoryChecked
    padding: bytes
    payload: bytes
    def __init__(self, opened: _Optional[_Union[AttachOpened, _Mapping]] = ..., chunk: _Optional[_Union[_tensor_pb2.Chunk, _Mapping]] = ..., result: _Optional[_Union[_step_pb2.StepResult, _Mapping]] = ..., staged: _Optional[_Union[_step_pb2.Staged, _Mapping]] = ..., checked: _Optional[_Union[_transport_pb2.MemoryChecked, _Mapping]] = ..., padding: _Optional[bytes] = ..., payload: _Optional[bytes] = ...) -> None: ...

class AttachOpened(_message.Message):
    __slots__ = ("attach_token", "epoch", "applied_step", "durable_step", "applied_load", "ready", "transport", "transport_reason", "handoff", "unfinished_step")
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
    def __init__(self, attach_token: _Optional[int] = ..., epoch: _Optional[int] = ..., applied_step: _Optional[int] = ..., durable_step: _Optional[int] = ..., applied_load: _Optional[int] = ..., ready: bool = ..., transport: _Optional[_Union[_transport_pb2.Transport, str]] = ..., transport_reason: _Optional[str] = ..., handoff: _Optional[_Union[_transport_pb2.Handoff, _Mapping]] = ..., unfinished_step: _Optional[int] = ...) -> None: ...

class StepRequest(_message.Message):
    __slots__ = ("session_id", "slot", "attach_token", "begin", "payload")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    ATTACH_TOKEN_FIELD_NUMBER: _ClassVar[int]
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    slot: int
    attach_token: int
    begin: _step_pb2.StepBegin
    payload: bytes
    def __init__(self, session_id: _Optional[str] = ..., slot: _Optional[int] = ..., attach_token: _Optional[int] = ..., begin: _Optional[_Union[_step_pb2.StepBegin, _Mapping]] = ..., payload: _Optional[bytes] = ...) -> None: ...

class StepResponse(_message.Message):
    __slots__ = ("result", "payload")
    RESULT_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    result: _step_pb2.StepResult
    payload: bytes
    def __init__(self, result: _Optional[_Union[_step_pb2.StepResult, _Mapping]] = ..., payload: _Optional[bytes] = ...) -> None: ...

class PullRequest(_message.Message):
    __slots__ = ("session_id", "slots", "dtype", "chunk_bytes")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    slots: _containers.RepeatedScalarFieldContainer[str]
    dtype: _tensor_pb2.Dtype
    chunk_bytes: int
    def __init__(self, session_id: _Optional[str] = ..., slots: _Optional[_Iterable[str]] = ..., dtype: _Optional[_Union[_tensor_pb2.Dtype, str]] = ..., chunk_bytes: _Optional[int] = ...) -> None: ...

class PullResponse(_message.Message):
    __slots__ = ("header", "slot", "chunk", "padding", "payload")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    PADDING_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    header: PullHeader
    slot: str
    chunk: _tensor_pb2.Chunk
    padding: bytes
    payload: bytes
    def __init__(self, header: _Optional[_Union[PullHeader, _Mapping]] = ..., slot: _Optional[str] = ..., chunk: _Optional[_Union[_tensor_pb2.Chunk, _Mapping]] = ..., padding: _Optional[bytes] = ..., payload: _Optional[bytes] = ...) -> None: ...

class PullHeader(_message.Message):
    __slots__ = ("step", "epoch", "tensor_steps", "load", "loss_scale")
    STEP_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TENSOR_STEPS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    LOSS_SCALE_FIELD_NUMBER: _ClassVar[int]
    step: int
    epoch: int
    tensor_steps: _containers.RepeatedScalarFieldContainer[int]
    load: int
    loss_scale: _optimizer_pb2.LossScaleState
    def __init__(self, step: _Optional[int] = ..., epoch: _Optional[int] = ..., tensor_steps: _Optional[_Iterable[int]] = ..., load: _Optional[int] = ..., loss_scale: _Optional[_Union[_optimizer_pb2.LossScaleState, _Mapping]] = ...) -> None: ...

class LoadRequest(_message.Message):
    __slots__ = ("open", "slot", "chunk", "commit", "padding", "payload")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    PADDING_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    open: LoadOpen
    slot: str
    chunk: _tensor_pb2.Chunk
    commit: bool
    padding: bytes
    payload: bytes
    def __init__(self, open: _Optional[_Union[LoadOpen, _Mapping]] = ..., slot: _Optional[str] = ..., chunk: _Optional[_Union[_tensor_pb2.Chunk, _Mapping]] = ..., commit: bool = ..., padding: _Optional[bytes] = ..., payload: _Optional[bytes] = ...) -> None: ...

class LoadOpen(_message.Message):
    __slots__ = ("session_id", "worker_slot", "attach_token", "load", "slots", "dtype", "step", "tensor_steps", "loss_scale")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    WORKER_SLOT_FIELD_NUMBER: _ClassVar[int]
    ATTACH_TOKEN_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    TENSOR_STEPS_FIELD_NUMBER: _ClassVar[int]
    LOSS_SCALE_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    worker_slot: int
    attach_token: int
    load: int
    slots: _containers.RepeatedScalarFieldContainer[str]
    dtype: _tensor_pb2.Dtype
    step: int
    tensor_steps: _containers.RepeatedScalarFieldContainer[int]
    loss_scale: _optimizer_pb2.LossScaleState
    def __init__(self, session_id: _Optional[str] = ..., worker_slot: _Optional[int] = ..., attach_token: _Optional[int] = ..., load: _Optional[int] = ..., slots: _Optional[_Iterable[str]] = ..., dtype: _Optional[_Union[_tensor_pb2.Dtype, str]] = ..., step: _Optional[int] = ..., tensor_steps: _Optional[_Iterable[int]] = ..., loss_scale: _Optional[_Union[_optimizer_pb2.LossScaleState, _Mapping]] = ...) -> None: ...

class LoadResponse(_message.Message):
    __slots__ = ("session", "replayed")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    REPLAYED_FIELD_NUMBER: _ClassVar[int]
    session: _session_pb2.Session
    replayed: bool
    def __init__(self, session: _Optional[_Union[_session_pb2.Session, _Mapping]] = ..., replayed: bool = ...) -> None: ...
