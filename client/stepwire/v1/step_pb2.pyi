from stepwire.v1 import aggregation_pb2 as _aggregation_pb2
from stepwire.v1 import optimizer_pb2 as _optimizer_pb2
from stepwire.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ReplyMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REPLY_MODE_UNSPECIFIED: _ClassVar[ReplyMode]
    REPLY_MODE_PARAMETERS: _ClassVar[ReplyMode]
    REPLY_MODE_NONE: _ClassVar[ReplyMode]
    REPLY_MODE_CHANGED: _ClassVar[ReplyMode]
REPLY_MODE_UNSPECIFIED: ReplyMode
REPLY_MODE_PARAMETERS: ReplyMode
REPLY_MODE_NONE: ReplyMode
REPLY_MODE_CHANGED: ReplyMode

class StepBegin(_message.Message):
    __slots__ = ("step", "epoch", "load", "base_step", "gradient_dtype", "hyperparameters", "loss_scale", "missing_tensors", "weight", "reply", "overlap", "in_shared_memory", "traceparent", "await_admission", "tables")
    STEP_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    BASE_STEP_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_DTYPE_FIELD_NUMBER: _ClassVar[int]
    HYPERPARAMETERS_FIELD_NUMBER: _ClassVar[int]
    LOSS_SCALE_FIELD_NUMBER: _ClassVar[int]
    MISSING_TENSORS_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    REPLY_FIELD_NUMBER: _ClassVar[int]
    OVERLAP_FIELD_NUMBER: _ClassVar[int]
    IN_SHARED_MEMORY_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    AWAIT_ADMISSION_FIELD_NUMBER: _ClassVar[int]
    TABLES_FIELD_NUMBER: _ClassVar[int]
    step: int
    epoch: int
    load: int
    base_step: int
    gradient_dtype: _tensor_pb2.Dtype
    hyperparameters: _containers.RepeatedCompositeFieldContainer[_optimizer_pb2.Hyperparameters]
    loss_scale: float
    missing_tensors: _containers.RepeatedScalarFieldContainer[int]
    weight: float
    reply: ReplyOptions
    overlap: bool
    in_shared_memory: bool
    traceparent: str
    await_admission: bool
    tables: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.TableEntries]
    def __init__(self, step: _Optional[int] = ..., epoch: _Optional[int] = ..., load: _Optional[int] = ..., base_step: _Optional[int] = ..., gradient_dtype: _Optional[_Union[_tensor_pb2.Dtype, str]] = ..., hyperparameters: _Optional[_Iterable[_Union[_optimizer_pb2.Hyperparameters, _Mapping]]] = ..., loss_scale: _Optional[float] = ..., missing_tensors: _Optional[_Iterable[int]] = ..., weight: _Optional[float] = ..., reply: _Optional[_Union[ReplyOptions, _Mapping]] = ..., overlap: bool = ..., in_shared_memory: bool = ..., traceparent: _Optional[str] = ..., await_admission: bool = ..., tables: _Optional[_Iterable[_Union[_tensor_pb2.TableEntries, _Mapping]]] = ...) -> None: ...

class StepAdmitted(_message.Message):
    __slots__ = ("gradient",)
    GRADIENT_FIELD_NUMBER: _ClassVar[int]
    gradient: bool
    def __init__(self, gradient: bool = ...) -> None: ...

class ReplyOptions(_message.Message):
    __slots__ = ("mode", "dtype", "chunk_bytes", "first", "base", "omit_rows")
    MODE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    OMIT_ROWS_FIELD_NUMBER: _ClassVar[int]
    mode: ReplyMode
    dtype: _tensor_pb2.Dtype
    chunk_bytes: int
    first: _containers.RepeatedScalarFieldContainer[int]
    base: int
    omit_rows: bool
    def __init__(self, mode: _Optional[_Union[ReplyMode, str]] = ..., dtype: _Optional[_Union[_tensor_pb2.Dtype, str]] = ..., chunk_bytes: _Optional[int] = ..., first: _Optional[_Iterable[int]] = ..., base: _Optional[int] = ..., omit_rows: bool = ...) -> None: ...

class StepCommit(_message.Message):
    __slots__ = ("clip_coefficient", "skip", "group_coefficients")
    CLIP_COEFFICIENT_FIELD_NUMBER: _ClassVar[int]
    SKIP_FIELD_NUMBER: _ClassVar[int]
    GROUP_COEFFICIENTS_FIELD_NUMBER: _ClassVar[int]
    clip_coefficient: float
    skip: bool
    group_coefficients: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, clip_coefficient: _Optional[float] = ..., skip: bool = ..., group_coefficients: _Optional[_Iterable[float]] = ...) -> None: ...

class GradientCheck(_message.Message):
    __slots__ = ("squared_norm", "non_finite_count", "group_squared_norms")
    SQUARED_NORM_FIELD_NUMBER: _ClassVar[int]
    NON_FINITE_COUNT_FIELD_NUMBER: _ClassVar[int]
    GROUP_SQUARED_NORMS_FIELD_NUMBER: _ClassVar[int]
    squared_norm: float
    non_finite_count: int
    group_squared_norms: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, squared_norm: _Optional[float] = ..., non_finite_count: _Optional[int] = ..., group_squared_norms: _Optional[_Iterable[float]] = ...) -> None: ...

class StepResult(_message.Message):
    __slots__ = ("step", "durable_step", "epoch", "replayed", "skipped", "telemetry", "accumulated", "round")
    STEP_FIELD_NUMBER: _ClassVar[int]
    DURABLE_STEP_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REPLAYED_FIELD_NUMBER: _ClassVar[int]
    SKIPPED_FIELD_NUMBER: _ClassVar[int]
    TELEMETRY_FIELD_NUMBER: _ClassVar[int]
    ACCUMULATED_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    step: int
    durable_step: int
    epoch: int
    replayed: bool
    skipped: bool
    telemetry: Telemetry
    accumulated: bool
    round: _aggregation_pb2.RoundResult
    def __init__(self, step: _Optional[int] = ..., durable_step: _Optional[int] = ..., epoch: _Optional[int] = ..., replayed: bool = ..., skipped: bool = ..., telemetry: _Optional[_Union[Telemetry, _Mapping]] = ..., accumulated: bool = ..., round: _Optional[_Union[_aggregation_pb2.RoundResult, _Mapping]] = ...) -> None: ...

class Telemetry(_message.Message):
    __slots__ = ("grad_norm", "clipped_grad_norm", "clip_coefficient", "update_norm", "param_norm", "non_finite_count", "loss_scale", "groups", "receive_seconds", "queue_seconds", "apply_seconds", "previous_send_seconds")
    GRAD_NORM_FIELD_NUMBER: _ClassVar[int]
    CLIPPED_GRAD_NORM_FIELD_NUMBER: _ClassVar[int]
    CLIP_COEFFICIENT_FIELD_NUMBER: _ClassVar[int]
    UPDATE_NORM_FIELD_NUMBER: _ClassVar[int]
    PARAM_NORM_FIELD_NUMBER: _ClassVar[int]
    NON_FINITE_COUNT_FIELD_NUMBER: _ClassVar[int]
    LOSS_SCALE_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    RECEIVE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    APPLY_SECONDS_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_SEND_SECONDS_FIELD_NUMBER: _ClassVar[int]
    grad_norm: float
    clipped_grad_norm: float
    clip_coefficient: float
    update_norm: float
    param_norm: float
    non_finite_count: int
    loss_scale: float
    groups: _containers.RepeatedCompositeFieldContainer[GroupTelemetry]
    receive_seconds: float
    queue_seconds: float
    apply_seconds: float
    previous_send_seconds: float
    def __init__(self, grad_norm: _Optional[float] = ..., clipped_grad_norm: _Optional[float] = ..., clip_coefficient: _Optional[float] = ..., update_norm: _Optional[float] = ..., param_norm: _Optional[float] = ..., non_finite_count: _Optional[int] = ..., loss_scale: _Optional[float] = ..., groups: _Optional[_Iterable[_Union[GroupTelemetry, _Mapping]]] = ..., receive_seconds: _Optional[float] = ..., queue_seconds: _Optional[float] = ..., apply_seconds: _Optional[float] = ..., previous_send_seconds: _Optional[float] = ...) -> None: ...

class GroupTelemetry(_message.Message):
    __slots__ = ("grad_norm", "hyperparameters", "t", "clipped_grad_norm", "clip_coefficient", "update_norm", "param_norm")
    GRAD_NORM_FIELD_NUMBER: _ClassVar[int]
    HYPERPARAMETERS_FIELD_NUMBER: _ClassVar[int]
    T_FIELD_NUMBER: _ClassVar[int]
    CLIPPED_GRAD_NORM_FIELD_NUMBER: _ClassVar[int]
    CLIP_COEFFICIENT_FIELD_NUMBER: _ClassVar[int]
    UPDATE_NORM_FIELD_NUMBER: _ClassVar[int]
    PARAM_NORM_FIELD_NUMBER: _ClassVar[int]
    grad_norm: float
    hyperparameters: _optimizer_pb2.Hyperparameters
    t: int
    clipped_grad_norm: float
    clip_coefficient: float
    update_norm: float
    param_norm: float
    def __init__(self, grad_norm: _Optional[float] = ..., hyperparameters: _Optional[_Union[_optimizer_pb2.Hyperparameters, _Mapping]] = ..., t: _Optional[int] = ..., clipped_grad_norm: _Optional[float] = ..., clip_coefficient: _Optional[float] = ..., update_norm: _Optional[float] = ..., param_norm: _Optional[float] = ...) -> None: ...
