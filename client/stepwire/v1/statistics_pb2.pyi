import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from stepwire.v1 import server_pb2 as _server_pb2
from stepwire.v1 import step_pb2 as _step_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SessionActivity(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SESSION_ACTIVITY_UNSPECIFIED: _ClassVar[SessionActivity]
    SESSION_ACTIVITY_ATTACHED: _ClassVar[SessionActivity]
    SESSION_ACTIVITY_IDLE: _ClassVar[SessionActivity]
    SESSION_ACTIVITY_EMPTY: _ClassVar[SessionActivity]
    SESSION_ACTIVITY_DAMAGED: _ClassVar[SessionActivity]
SESSION_ACTIVITY_UNSPECIFIED: SessionActivity
SESSION_ACTIVITY_ATTACHED: SessionActivity
SESSION_ACTIVITY_IDLE: SessionActivity
SESSION_ACTIVITY_EMPTY: SessionActivity
SESSION_ACTIVITY_DAMAGED: SessionActivity

class ServerLoad(_message.Message):
    __slots__ = ("sessions", "parked", "streams", "under_way", "steps_per_second", "devices", "draining", "uptime")
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    PARKED_FIELD_NUMBER: _ClassVar[int]
    STREAMS_FIELD_NUMBER: _ClassVar[int]
    UNDER_WAY_FIELD_NUMBER: _ClassVar[int]
    STEPS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    UPTIME_FIELD_NUMBER: _ClassVar[int]
    sessions: int
    parked: int
    streams: int
    under_way: int
    steps_per_second: float
    devices: _containers.RepeatedCompositeFieldContainer[_server_pb2.DeviceInfo]
    draining: bool
    uptime: _duration_pb2.Duration
    def __init__(self, sessions: _Optional[int] = ..., parked: _Optional[int] = ..., streams: _Optional[int] = ..., under_way: _Optional[int] = ..., steps_per_second: _Optional[float] = ..., devices: _Optional[_Iterable[_Union[_server_pb2.DeviceInfo, _Mapping]]] = ..., draining: bool = ..., uptime: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class SessionProgress(_message.Message):
    __slots__ = ("session_id", "label", "device", "activity", "transports", "applied_step", "durable_step", "steps_per_second", "memory_bytes", "attached_workers", "workers", "idle", "last_result")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    ACTIVITY_FIELD_NUMBER: _ClassVar[int]
    TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    APPLIED_STEP_FIELD_NUMBER: _ClassVar[int]
    DURABLE_STEP_FIELD_NUMBER: _ClassVar[int]
    STEPS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    ATTACHED_WORKERS_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    IDLE_FIELD_NUMBER: _ClassVar[int]
    LAST_RESULT_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    label: str
    device: str
    activity: SessionActivity
    transports: _containers.RepeatedScalarFieldContainer[str]
    applied_step: int
    durable_step: int
    steps_per_second: float
    memory_bytes: int
    attached_workers: int
    workers: int
    idle: _duration_pb2.Duration
    last_result: _step_pb2.StepResult
    def __init__(self, session_id: _Optional[str] = ..., label: _Optional[str] = ..., device: _Optional[str] = ..., activity: _Optional[_Union[SessionActivity, str]] = ..., transports: _Optional[_Iterable[str]] = ..., applied_step: _Optional[int] = ..., durable_step: _Optional[int] = ..., steps_per_second: _Optional[float] = ..., memory_bytes: _Optional[int] = ..., attached_workers: _Optional[int] = ..., workers: _Optional[int] = ..., idle: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., last_result: _Optional[_Union[_step_pb2.StepResult, _Mapping]] = ...) -> None: ...
