import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from stepwire.v1 import aggregation_pb2 as _aggregation_pb2
from stepwire.v1 import optimizer_pb2 as _optimizer_pb2
from stepwire.v1 import precision_pb2 as _precision_pb2
from stepwire.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union
from stepwire.v1.precision_pb2 import StatePrecision as StatePrecision

DESCRIPTOR: _descriptor.FileDescriptor
STATE_PRECISION_UNSPECIFIED: _precision_pb2.StatePrecision
STATE_PRECISION_FLOAT32: _precision_pb2.StatePrecision
STATE_PRECISION_BFLOAT16_MOMENTS: _precision_pb2.StatePrecision
STATE_PRECISION_INT8_MOMENTS: _precision_pb2.StatePrecision

class LifecycleState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LIFECYCLE_STATE_UNSPECIFIED: _ClassVar[LifecycleState]
    LIFECYCLE_STATE_ACTIVE: _ClassVar[LifecycleState]
    LIFECYCLE_STATE_PARKED: _ClassVar[LifecycleState]
    LIFECYCLE_STATE_FOLLOWER: _ClassVar[LifecycleState]

class Durability(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DURABILITY_UNSPECIFIED: _ClassVar[Durability]
    DURABILITY_MEMORY: _ClassVar[Durability]
    DURABILITY_CHECKPOINT: _ClassVar[Durability]
    DURABILITY_JOURNAL: _ClassVar[Durability]
    DURABILITY_REPLICATED: _ClassVar[Durability]

class Initialization(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    INITIALIZATION_UNSPECIFIED: _ClassVar[Initialization]
    INITIALIZATION_LOAD: _ClassVar[Initialization]
    INITIALIZATION_ZEROS: _ClassVar[Initialization]

class TelemetryLevel(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TELEMETRY_LEVEL_UNSPECIFIED: _ClassVar[TelemetryLevel]
    TELEMETRY_LEVEL_GRADIENT: _ClassVar[TelemetryLevel]
    TELEMETRY_LEVEL_FULL: _ClassVar[TelemetryLevel]
    TELEMETRY_LEVEL_NONE: _ClassVar[TelemetryLevel]
LIFECYCLE_STATE_UNSPECIFIED: LifecycleState
LIFECYCLE_STATE_ACTIVE: LifecycleState
LIFECYCLE_STATE_PARKED: LifecycleState
LIFECYCLE_STATE_FOLLOWER: LifecycleState
DURABILITY_UNSPECIFIED: Durability
DURABILITY_MEMORY: Durability
DURABILITY_CHECKPOINT: Durability
DURABILITY_JOURNAL: Durability
DURABILITY_REPLICATED: Durability
INITIALIZATION_UNSPECIFIED: Initialization
INITIALIZATION_LOAD: Initialization
INITIALIZATION_ZEROS: Initialization
TELEMETRY_LEVEL_UNSPECIFIED: TelemetryLevel
TELEMETRY_LEVEL_GRADIENT: TelemetryLevel
TELEMETRY_LEVEL_FULL: TelemetryLevel
TELEMETRY_LEVEL_NONE: TelemetryLevel

class SessionConfig(_message.Message):
    __slots__ = ("tensors", "groups", "optimizer", "gradient", "aggregation", "durability", "initialization", "gradient_dtype", "reply_dtype", "state_precision", "lease", "label", "device", "telemetry", "checkpoints")
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_FIELD_NUMBER: _ClassVar[int]
    AGGREGATION_FIELD_NUMBER: _ClassVar[int]
    DURABILITY_FIELD_NUMBER: _ClassVar[int]
    INITIALIZATION_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_DTYPE_FIELD_NUMBER: _ClassVar[int]
    REPLY_DTYPE_FIELD_NUMBER: _ClassVar[int]
    STATE_PRECISION_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    TELEMETRY_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINTS_FIELD_NUMBER: _ClassVar[int]
    tensors: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.TensorSpec]
    groups: _containers.RepeatedCompositeFieldContainer[_optimizer_pb2.ParameterGroup]
    optimizer: _optimizer_pb2.Optimizer
    gradient: _optimizer_pb2.GradientTreatment
    aggregation: _aggregation_pb2.Aggregation
    durability: Durability
    initialization: Initialization
    gradient_dtype: _tensor_pb2.Dtype
    reply_dtype: _tensor_pb2.Dtype
    state_precision: _precision_pb2.StatePrecision
    lease: _duration_pb2.Duration
    label: str
    device: str
    telemetry: TelemetryLevel
    checkpoints: CheckpointPolicy
    def __init__(self, tensors: _Optional[_Iterable[_Union[_tensor_pb2.TensorSpec, _Mapping]]] = ..., groups: _Optional[_Iterable[_Union[_optimizer_pb2.ParameterGroup, _Mapping]]] = ..., optimizer: _Optional[_Union[_optimizer_pb2.Optimizer, _Mapping]] = ..., gradient: _Optional[_Union[_optimizer_pb2.GradientTreatment, _Mapping]] = ..., aggregation: _Optional[_Union[_aggregation_pb2.Aggregation, _Mapping]] = ..., durability: _Optional[_Union[Durability, str]] = ..., initialization: _Optional[_Union[Initialization, str]] = ..., gradient_dtype: _Optional[_Union[_tensor_pb2.Dtype, str]] = ..., reply_dtype: _Optional[_Union[_tensor_pb2.Dtype, str]] = ..., state_precision: _Optional[_Union[_precision_pb2.StatePrecision, str]] = ..., lease: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., label: _Optional[str] = ..., device: _Optional[str] = ..., telemetry: _Optional[_Union[TelemetryLevel, str]] = ..., checkpoints: _Optional[_Union[CheckpointPolicy, _Mapping]] = ...) -> None: ...

class CheckpointPolicy(_message.Message):
    __slots__ = ("every_steps", "every")
    EVERY_STEPS_FIELD_NUMBER: _ClassVar[int]
    EVERY_FIELD_NUMBER: _ClassVar[int]
    every_steps: int
    every: _duration_pb2.Duration
    def __init__(self, every_steps: _Optional[int] = ..., every: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class Session(_message.Message):
    __slots__ = ("session_id", "epoch", "applied_step", "durable_step", "applied_load", "config", "layout", "memory_bytes", "device", "ready", "attached", "create_time", "expire_time", "loss_scale", "state", "idle", "members", "tables")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    APPLIED_STEP_FIELD_NUMBER: _ClassVar[int]
    DURABLE_STEP_FIELD_NUMBER: _ClassVar[int]
    APPLIED_LOAD_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    ATTACHED_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    EXPIRE_TIME_FIELD_NUMBER: _ClassVar[int]
    LOSS_SCALE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    IDLE_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    TABLES_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    epoch: int
    applied_step: int
    durable_step: int
    applied_load: int
    config: SessionConfig
    layout: _tensor_pb2.Layout
    memory_bytes: int
    device: str
    ready: bool
    attached: bool
    create_time: _timestamp_pb2.Timestamp
    expire_time: _timestamp_pb2.Timestamp
    loss_scale: float
    state: LifecycleState
    idle: _duration_pb2.Duration
    members: _containers.RepeatedCompositeFieldContainer[_aggregation_pb2.Member]
    tables: _containers.RepeatedCompositeFieldContainer[TableUse]
    def __init__(self, session_id: _Optional[str] = ..., epoch: _Optional[int] = ..., applied_step: _Optional[int] = ..., durable_step: _Optional[int] = ..., applied_load: _Optional[int] = ..., config: _Optional[_Union[SessionConfig, _Mapping]] = ..., layout: _Optional[_Union[_tensor_pb2.Layout, _Mapping]] = ..., memory_bytes: _Optional[int] = ..., device: _Optional[str] = ..., ready: bool = ..., attached: bool = ..., create_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., expire_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., loss_scale: _Optional[float] = ..., state: _Optional[_Union[LifecycleState, str]] = ..., idle: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., members: _Optional[_Iterable[_Union[_aggregation_pb2.Member, _Mapping]]] = ..., tables: _Optional[_Iterable[_Union[TableUse, _Mapping]]] = ...) -> None: ...

class TableUse(_message.Message):
    __slots__ = ("name", "rows", "evicted_rows")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    EVICTED_ROWS_FIELD_NUMBER: _ClassVar[int]
    name: str
    rows: int
    evicted_rows: int
    def __init__(self, name: _Optional[str] = ..., rows: _Optional[int] = ..., evicted_rows: _Optional[int] = ...) -> None: ...
