from stepwire.v1 import optimizer_pb2 as _optimizer_pb2
from stepwire.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PullHeader(_message.Message):
    __slots__ = ("step", "epoch", "tensor_steps", "load", "loss_scale", "tensor_scalars")
    STEP_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TENSOR_STEPS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    LOSS_SCALE_FIELD_NUMBER: _ClassVar[int]
    TENSOR_SCALARS_FIELD_NUMBER: _ClassVar[int]
    step: int
    epoch: int
    tensor_steps: _containers.RepeatedScalarFieldContainer[int]
    load: int
    loss_scale: _optimizer_pb2.LossScaleState
    tensor_scalars: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, step: _Optional[int] = ..., epoch: _Optional[int] = ..., tensor_steps: _Optional[_Iterable[int]] = ..., load: _Optional[int] = ..., loss_scale: _Optional[_Union[_optimizer_pb2.LossScaleState, _Mapping]] = ..., tensor_scalars: _Optional[_Iterable[float]] = ...) -> None: ...

class LoadOpen(_message.Message):
    __slots__ = ("session_id", "worker", "attach_token", "load", "slots", "dtype", "step", "tensor_steps", "loss_scale", "epoch", "tensor_scalars", "tables", "by_rows")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    ATTACH_TOKEN_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    TENSOR_STEPS_FIELD_NUMBER: _ClassVar[int]
    LOSS_SCALE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TENSOR_SCALARS_FIELD_NUMBER: _ClassVar[int]
    TABLES_FIELD_NUMBER: _ClassVar[int]
    BY_ROWS_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    worker: int
    attach_token: int
    load: int
    slots: _containers.RepeatedScalarFieldContainer[str]
    dtype: _tensor_pb2.Dtype
    step: int
    tensor_steps: _containers.RepeatedScalarFieldContainer[int]
    loss_scale: _optimizer_pb2.LossScaleState
    epoch: int
    tensor_scalars: _containers.RepeatedScalarFieldContainer[float]
    tables: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.TableEntries]
    by_rows: bool
    def __init__(self, session_id: _Optional[str] = ..., worker: _Optional[int] = ..., attach_token: _Optional[int] = ..., load: _Optional[int] = ..., slots: _Optional[_Iterable[str]] = ..., dtype: _Optional[_Union[_tensor_pb2.Dtype, str]] = ..., step: _Optional[int] = ..., tensor_steps: _Optional[_Iterable[int]] = ..., loss_scale: _Optional[_Union[_optimizer_pb2.LossScaleState, _Mapping]] = ..., epoch: _Optional[int] = ..., tensor_scalars: _Optional[_Iterable[float]] = ..., tables: _Optional[_Iterable[_Union[_tensor_pb2.TableEntries, _Mapping]]] = ..., by_rows: bool = ...) -> None: ...
