import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from stepwire.v1 import attach_pb2 as _attach_pb2
from stepwire.v1 import checkpoint_pb2 as _checkpoint_pb2
from stepwire.v1 import move_pb2 as _move_pb2
from stepwire.v1 import server_pb2 as _server_pb2
from stepwire.v1 import session_pb2 as _session_pb2
from stepwire.v1 import precision_pb2 as _precision_pb2
from stepwire.v1 import state_pb2 as _state_pb2
from stepwire.v1 import statistics_pb2 as _statistics_pb2
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
    __slots__ = ("version", "protocol_min", "protocol_max", "instance_id", "devices", "limits", "features", "sessions", "draining", "local", "not_serving", "shard", "epoch")
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
    NOT_SERVING_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    version: str
    protocol_min: int
    protocol_max: int
    instance_id: str
    devices: _containers.RepeatedCompositeFieldContainer[_server_pb2.DeviceInfo]
    limits: _server_pb2.Limits
    features: _containers.RepeatedScalarFieldContainer[str]
    sessions: int
    draining: bool
    local: _transport_pb2.LocalAccess
    not_serving: str
    shard: str
    epoch: int
    def __init__(self, version: _Optional[str] = ..., protocol_min: _Optional[int] = ..., protocol_max: _Optional[int] = ..., instance_id: _Optional[str] = ..., devices: _Optional[_Iterable[_Union[_server_pb2.DeviceInfo, _Mapping]]] = ..., limits: _Optional[_Union[_server_pb2.Limits, _Mapping]] = ..., features: _Optional[_Iterable[str]] = ..., sessions: _Optional[int] = ..., draining: bool = ..., local: _Optional[_Union[_transport_pb2.LocalAccess, _Mapping]] = ..., not_serving: _Optional[str] = ..., shard: _Optional[str] = ..., epoch: _Optional[int] = ...) -> None: ...

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
    __slots__ = ("session_id", "attach_token")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    ATTACH_TOKEN_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    attach_token: int
    def __init__(self, session_id: _Optional[str] = ..., attach_token: _Optional[int] = ...) -> None: ...

class DeleteSessionResponse(_message.Message):
    __slots__ = ("applied_step",)
    APPLIED_STEP_FIELD_NUMBER: _ClassVar[int]
    applied_step: int
    def __init__(self, applied_step: _Optional[int] = ...) -> None: ...

class AttachRequest(_message.Message):
    __slots__ = ("open", "begin", "chunk", "commit", "check", "over_stream", "padding", "payload")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    CHECK_FIELD_NUMBER: _ClassVar[int]
    OVER_STREAM_FIELD_NUMBER: _ClassVar[int]
    PADDING_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    open: _attach_pb2.AttachOpen
    begin: _step_pb2.StepBegin
    chunk: _tensor_pb2.Chunk
    commit: _step_pb2.StepCommit
    check: _transport_pb2.MemoryCheck
    over_stream: bool
    padding: bytes
    payload: bytes
    def __init__(self, open: _Optional[_Union[_attach_pb2.AttachOpen, _Mapping]] = ..., begin: _Optional[_Union[_step_pb2.StepBegin, _Mapping]] = ..., chunk: _Optional[_Union[_tensor_pb2.Chunk, _Mapping]] = ..., commit: _Optional[_Union[_step_pb2.StepCommit, _Mapping]] = ..., check: _Optional[_Union[_transport_pb2.MemoryCheck, _Mapping]] = ..., over_stream: bool = ..., padding: _Optional[bytes] = ..., payload: _Optional[bytes] = ...) -> None: ...

class AttachResponse(_message.Message):
    __slots__ = ("opened", "chunk", "result", "gradient_check", "checked", "admitted", "padding", "payload")
    OPENED_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_CHECK_FIELD_NUMBER: _ClassVar[int]
    CHECKED_FIELD_NUMBER: _ClassVar[int]
    ADMITTED_FIELD_NUMBER: _ClassVar[int]
    PADDING_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    opened: _attach_pb2.AttachOpened
    chunk: _tensor_pb2.Chunk
    result: _step_pb2.StepResult
    gradient_check: _step_pb2.GradientCheck
    checked: _transport_pb2.MemoryChecked
    admitted: _step_pb2.StepAdmitted
    padding: bytes
    payload: bytes
    def __init__(self, opened: _Optional[_Union[_attach_pb2.AttachOpened, _Mapping]] = ..., chunk: _Optional[_Union[_tensor_pb2.Chunk, _Mapping]] = ..., result: _Optional[_Union[_step_pb2.StepResult, _Mapping]] = ..., gradient_check: _Optional[_Union[_step_pb2.GradientCheck, _Mapping]] = ..., checked: _Optional[_Union[_transport_pb2.MemoryChecked, _Mapping]] = ..., admitted: _Optional[_Union[_step_pb2.StepAdmitted, _Mapping]] = ..., padding: _Optional[bytes] = ..., payload: _Optional[bytes] = ...) -> None: ...

class StepRequest(_message.Message):
    __slots__ = ("session_id", "worker", "attach_token", "begin", "payload")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    ATTACH_TOKEN_FIELD_NUMBER: _ClassVar[int]
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    worker: int
    attach_token: int
    begin: _step_pb2.StepBegin
    payload: bytes
    def __init__(self, session_id: _Optional[str] = ..., worker: _Optional[int] = ..., attach_token: _Optional[int] = ..., begin: _Optional[_Union[_step_pb2.StepBegin, _Mapping]] = ..., payload: _Optional[bytes] = ...) -> None: ...

class StepResponse(_message.Message):
    __slots__ = ("result", "payload")
    RESULT_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    result: _step_pb2.StepResult
    payload: bytes
    def __init__(self, result: _Optional[_Union[_step_pb2.StepResult, _Mapping]] = ..., payload: _Optional[bytes] = ...) -> None: ...

class PullRequest(_message.Message):
    __slots__ = ("session_id", "slots", "dtype", "chunk_bytes", "rows", "row_ids")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    ROW_IDS_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    slots: _containers.RepeatedScalarFieldContainer[str]
    dtype: _tensor_pb2.Dtype
    chunk_bytes: int
    rows: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.TableRows]
    row_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, session_id: _Optional[str] = ..., slots: _Optional[_Iterable[str]] = ..., dtype: _Optional[_Union[_tensor_pb2.Dtype, str]] = ..., chunk_bytes: _Optional[int] = ..., rows: _Optional[_Iterable[_Union[_tensor_pb2.TableRows, _Mapping]]] = ..., row_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class PullResponse(_message.Message):
    __slots__ = ("header", "slot", "chunk", "padding", "payload")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    PADDING_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    header: _state_pb2.PullHeader
    slot: str
    chunk: _tensor_pb2.Chunk
    padding: bytes
    payload: bytes
    def __init__(self, header: _Optional[_Union[_state_pb2.PullHeader, _Mapping]] = ..., slot: _Optional[str] = ..., chunk: _Optional[_Union[_tensor_pb2.Chunk, _Mapping]] = ..., padding: _Optional[bytes] = ..., payload: _Optional[bytes] = ...) -> None: ...

class LoadRequest(_message.Message):
    __slots__ = ("open", "slot", "chunk", "commit", "padding", "payload")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    PADDING_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    open: _state_pb2.LoadOpen
    slot: str
    chunk: _tensor_pb2.Chunk
    commit: bool
    padding: bytes
    payload: bytes
    def __init__(self, open: _Optional[_Union[_state_pb2.LoadOpen, _Mapping]] = ..., slot: _Optional[str] = ..., chunk: _Optional[_Union[_tensor_pb2.Chunk, _Mapping]] = ..., commit: bool = ..., padding: _Optional[bytes] = ..., payload: _Optional[bytes] = ...) -> None: ...

class LoadResponse(_message.Message):
    __slots__ = ("session", "replayed", "worker")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    REPLAYED_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    session: _session_pb2.Session
    replayed: bool
    worker: int
    def __init__(self, session: _Optional[_Union[_session_pb2.Session, _Mapping]] = ..., replayed: bool = ..., worker: _Optional[int] = ...) -> None: ...

class SaveCheckpointRequest(_message.Message):
    __slots__ = ("session_id", "name")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    name: str
    def __init__(self, session_id: _Optional[str] = ..., name: _Optional[str] = ...) -> None: ...

class SaveCheckpointResponse(_message.Message):
    __slots__ = ("checkpoint", "replayed")
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    REPLAYED_FIELD_NUMBER: _ClassVar[int]
    checkpoint: _checkpoint_pb2.Checkpoint
    replayed: bool
    def __init__(self, checkpoint: _Optional[_Union[_checkpoint_pb2.Checkpoint, _Mapping]] = ..., replayed: bool = ...) -> None: ...

class ListCheckpointsRequest(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    def __init__(self, session_id: _Optional[str] = ...) -> None: ...

class ListCheckpointsResponse(_message.Message):
    __slots__ = ("checkpoints",)
    CHECKPOINTS_FIELD_NUMBER: _ClassVar[int]
    checkpoints: _containers.RepeatedCompositeFieldContainer[_checkpoint_pb2.Checkpoint]
    def __init__(self, checkpoints: _Optional[_Iterable[_Union[_checkpoint_pb2.Checkpoint, _Mapping]]] = ...) -> None: ...

class VerifyCheckpointRequest(_message.Message):
    __slots__ = ("session_id", "name")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    name: str
    def __init__(self, session_id: _Optional[str] = ..., name: _Optional[str] = ...) -> None: ...

class VerifyCheckpointResponse(_message.Message):
    __slots__ = ("checkpoint",)
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    checkpoint: _checkpoint_pb2.Checkpoint
    def __init__(self, checkpoint: _Optional[_Union[_checkpoint_pb2.Checkpoint, _Mapping]] = ...) -> None: ...

class DeleteCheckpointRequest(_message.Message):
    __slots__ = ("session_id", "name")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    name: str
    def __init__(self, session_id: _Optional[str] = ..., name: _Optional[str] = ...) -> None: ...

class DeleteCheckpointResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RollbackRequest(_message.Message):
    __slots__ = ("session_id", "attach_token", "load", "epoch", "applied_step", "checkpoint", "step", "worker")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    ATTACH_TOKEN_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    APPLIED_STEP_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    attach_token: int
    load: int
    epoch: int
    applied_step: int
    checkpoint: str
    step: int
    worker: int
    def __init__(self, session_id: _Optional[str] = ..., attach_token: _Optional[int] = ..., load: _Optional[int] = ..., epoch: _Optional[int] = ..., applied_step: _Optional[int] = ..., checkpoint: _Optional[str] = ..., step: _Optional[int] = ..., worker: _Optional[int] = ...) -> None: ...

class RollbackResponse(_message.Message):
    __slots__ = ("session", "replayed", "worker")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    REPLAYED_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    session: _session_pb2.Session
    replayed: bool
    worker: int
    def __init__(self, session: _Optional[_Union[_session_pb2.Session, _Mapping]] = ..., replayed: bool = ..., worker: _Optional[int] = ...) -> None: ...

class ForkSessionRequest(_message.Message):
    __slots__ = ("session_id", "request_id", "checkpoint", "step", "label", "device", "lease", "durability", "checkpoints")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    DURABILITY_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINTS_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    request_id: str
    checkpoint: str
    step: int
    label: str
    device: str
    lease: _duration_pb2.Duration
    durability: _session_pb2.Durability
    checkpoints: _session_pb2.CheckpointPolicy
    def __init__(self, session_id: _Optional[str] = ..., request_id: _Optional[str] = ..., checkpoint: _Optional[str] = ..., step: _Optional[int] = ..., label: _Optional[str] = ..., device: _Optional[str] = ..., lease: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., durability: _Optional[_Union[_session_pb2.Durability, str]] = ..., checkpoints: _Optional[_Union[_session_pb2.CheckpointPolicy, _Mapping]] = ...) -> None: ...

class ForkSessionResponse(_message.Message):
    __slots__ = ("session", "attach_token", "replayed")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    ATTACH_TOKEN_FIELD_NUMBER: _ClassVar[int]
    REPLAYED_FIELD_NUMBER: _ClassVar[int]
    session: _session_pb2.Session
    attach_token: int
    replayed: bool
    def __init__(self, session: _Optional[_Union[_session_pb2.Session, _Mapping]] = ..., attach_token: _Optional[int] = ..., replayed: bool = ...) -> None: ...

class FreezeSessionRequest(_message.Message):
    __slots__ = ("session_id", "move_id", "last_step", "lease", "last_contributions")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    MOVE_ID_FIELD_NUMBER: _ClassVar[int]
    LAST_STEP_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    LAST_CONTRIBUTIONS_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    move_id: str
    last_step: int
    lease: _duration_pb2.Duration
    last_contributions: _containers.RepeatedCompositeFieldContainer[_move_pb2.WorkerNumber]
    def __init__(self, session_id: _Optional[str] = ..., move_id: _Optional[str] = ..., last_step: _Optional[int] = ..., lease: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., last_contributions: _Optional[_Iterable[_Union[_move_pb2.WorkerNumber, _Mapping]]] = ...) -> None: ...

class FreezeSessionResponse(_message.Message):
    __slots__ = ("applied_step", "last_step", "applied_load", "epoch", "contributions", "last_contributions")
    APPLIED_STEP_FIELD_NUMBER: _ClassVar[int]
    LAST_STEP_FIELD_NUMBER: _ClassVar[int]
    APPLIED_LOAD_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTIONS_FIELD_NUMBER: _ClassVar[int]
    LAST_CONTRIBUTIONS_FIELD_NUMBER: _ClassVar[int]
    applied_step: int
    last_step: int
    applied_load: int
    epoch: int
    contributions: _containers.RepeatedCompositeFieldContainer[_move_pb2.WorkerNumber]
    last_contributions: _containers.RepeatedCompositeFieldContainer[_move_pb2.WorkerNumber]
    def __init__(self, applied_step: _Optional[int] = ..., last_step: _Optional[int] = ..., applied_load: _Optional[int] = ..., epoch: _Optional[int] = ..., contributions: _Optional[_Iterable[_Union[_move_pb2.WorkerNumber, _Mapping]]] = ..., last_contributions: _Optional[_Iterable[_Union[_move_pb2.WorkerNumber, _Mapping]]] = ...) -> None: ...

class ThawSessionRequest(_message.Message):
    __slots__ = ("session_id", "move_id")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    MOVE_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    move_id: str
    def __init__(self, session_id: _Optional[str] = ..., move_id: _Optional[str] = ...) -> None: ...

class ThawSessionResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ExportSessionRequest(_message.Message):
    __slots__ = ("session_id", "move_id", "chunk_bytes")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    MOVE_ID_FIELD_NUMBER: _ClassVar[int]
    CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    move_id: str
    chunk_bytes: int
    def __init__(self, session_id: _Optional[str] = ..., move_id: _Optional[str] = ..., chunk_bytes: _Optional[int] = ...) -> None: ...

class ExportSessionResponse(_message.Message):
    __slots__ = ("numbers", "slot", "chunk", "padding", "payload")
    NUMBERS_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    PADDING_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    numbers: _move_pb2.StateNumbers
    slot: str
    chunk: _tensor_pb2.Chunk
    padding: bytes
    payload: bytes
    def __init__(self, numbers: _Optional[_Union[_move_pb2.StateNumbers, _Mapping]] = ..., slot: _Optional[str] = ..., chunk: _Optional[_Union[_tensor_pb2.Chunk, _Mapping]] = ..., padding: _Optional[bytes] = ..., payload: _Optional[bytes] = ...) -> None: ...

class ImportSessionRequest(_message.Message):
    __slots__ = ("open", "slot", "chunk", "numbers", "padding", "payload")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    NUMBERS_FIELD_NUMBER: _ClassVar[int]
    PADDING_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    open: _move_pb2.ImportOpen
    slot: str
    chunk: _tensor_pb2.Chunk
    numbers: _move_pb2.StateNumbers
    padding: bytes
    payload: bytes
    def __init__(self, open: _Optional[_Union[_move_pb2.ImportOpen, _Mapping]] = ..., slot: _Optional[str] = ..., chunk: _Optional[_Union[_tensor_pb2.Chunk, _Mapping]] = ..., numbers: _Optional[_Union[_move_pb2.StateNumbers, _Mapping]] = ..., padding: _Optional[bytes] = ..., payload: _Optional[bytes] = ...) -> None: ...

class ImportSessionResponse(_message.Message):
    __slots__ = ("applied_step", "attach_key")
    APPLIED_STEP_FIELD_NUMBER: _ClassVar[int]
    ATTACH_KEY_FIELD_NUMBER: _ClassVar[int]
    applied_step: int
    attach_key: bytes
    def __init__(self, applied_step: _Optional[int] = ..., attach_key: _Optional[bytes] = ...) -> None: ...

class HandOverSessionRequest(_message.Message):
    __slots__ = ("session_id", "move_id", "successor", "decided", "step", "load", "epoch", "contributions")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    MOVE_ID_FIELD_NUMBER: _ClassVar[int]
    SUCCESSOR_FIELD_NUMBER: _ClassVar[int]
    DECIDED_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTIONS_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    move_id: str
    successor: _move_pb2.Successor
    decided: bool
    step: int
    load: int
    epoch: int
    contributions: _containers.RepeatedCompositeFieldContainer[_move_pb2.WorkerNumber]
    def __init__(self, session_id: _Optional[str] = ..., move_id: _Optional[str] = ..., successor: _Optional[_Union[_move_pb2.Successor, _Mapping]] = ..., decided: bool = ..., step: _Optional[int] = ..., load: _Optional[int] = ..., epoch: _Optional[int] = ..., contributions: _Optional[_Iterable[_Union[_move_pb2.WorkerNumber, _Mapping]]] = ...) -> None: ...

class HandOverSessionResponse(_message.Message):
    __slots__ = ("replayed",)
    REPLAYED_FIELD_NUMBER: _ClassVar[int]
    replayed: bool
    def __init__(self, replayed: bool = ...) -> None: ...

class GetSuccessorRequest(_message.Message):
    __slots__ = ("session_id", "attach_token", "worker")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    ATTACH_TOKEN_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    attach_token: int
    worker: int
    def __init__(self, session_id: _Optional[str] = ..., attach_token: _Optional[int] = ..., worker: _Optional[int] = ...) -> None: ...

class GetSuccessorResponse(_message.Message):
    __slots__ = ("successor",)
    SUCCESSOR_FIELD_NUMBER: _ClassVar[int]
    successor: _move_pb2.Successor
    def __init__(self, successor: _Optional[_Union[_move_pb2.Successor, _Mapping]] = ...) -> None: ...

class GetStatisticsRequest(_message.Message):
    __slots__ = ("interval",)
    INTERVAL_FIELD_NUMBER: _ClassVar[int]
    interval: _duration_pb2.Duration
    def __init__(self, interval: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class GetStatisticsResponse(_message.Message):
    __slots__ = ("server", "sessions")
    SERVER_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    server: _statistics_pb2.ServerLoad
    sessions: _containers.RepeatedCompositeFieldContainer[_statistics_pb2.SessionProgress]
    def __init__(self, server: _Optional[_Union[_statistics_pb2.ServerLoad, _Mapping]] = ..., sessions: _Optional[_Iterable[_Union[_statistics_pb2.SessionProgress, _Mapping]]] = ...) -> None: ...
