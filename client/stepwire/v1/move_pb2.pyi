from stepwire.v1 import optimizer_pb2 as _optimizer_pb2
from stepwire.v1 import step_pb2 as _step_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StateNumbers(_message.Message):
    __slots__ = ("step", "load", "tensor_steps", "tensor_scalars", "loss_scale", "sum_bound", "last_result", "workers")
    STEP_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    TENSOR_STEPS_FIELD_NUMBER: _ClassVar[int]
    TENSOR_SCALARS_FIELD_NUMBER: _ClassVar[int]
    LOSS_SCALE_FIELD_NUMBER: _ClassVar[int]
    SUM_BOUND_FIELD_NUMBER: _ClassVar[int]
    LAST_RESULT_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    step: int
    load: int
    tensor_steps: _containers.RepeatedScalarFieldContainer[int]
    tensor_scalars: _containers.RepeatedScalarFieldContainer[float]
    loss_scale: _optimizer_pb2.LossScaleState
    sum_bound: float
    last_result: _step_pb2.StepResult
    workers: _containers.RepeatedCompositeFieldContainer[WorkerNumbers]
    def __init__(self, step: _Optional[int] = ..., load: _Optional[int] = ..., tensor_steps: _Optional[_Iterable[int]] = ..., tensor_scalars: _Optional[_Iterable[float]] = ..., loss_scale: _Optional[_Union[_optimizer_pb2.LossScaleState, _Mapping]] = ..., sum_bound: _Optional[float] = ..., last_result: _Optional[_Union[_step_pb2.StepResult, _Mapping]] = ..., workers: _Optional[_Iterable[_Union[WorkerNumbers, _Mapping]]] = ...) -> None: ...

class WorkerNumber(_message.Message):
    __slots__ = ("worker", "contribution", "begins_anew")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTION_FIELD_NUMBER: _ClassVar[int]
    BEGINS_ANEW_FIELD_NUMBER: _ClassVar[int]
    worker: int
    contribution: int
    begins_anew: bool
    def __init__(self, worker: _Optional[int] = ..., contribution: _Optional[int] = ..., begins_anew: bool = ...) -> None: ...

class WorkerNumbers(_message.Message):
    __slots__ = ("worker", "contribution", "last_result", "present", "clock", "loaded")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTION_FIELD_NUMBER: _ClassVar[int]
    LAST_RESULT_FIELD_NUMBER: _ClassVar[int]
    PRESENT_FIELD_NUMBER: _ClassVar[int]
    CLOCK_FIELD_NUMBER: _ClassVar[int]
    LOADED_FIELD_NUMBER: _ClassVar[int]
    worker: int
    contribution: int
    last_result: _step_pb2.StepResult
    present: bool
    clock: int
    loaded: int
    def __init__(self, worker: _Optional[int] = ..., contribution: _Optional[int] = ..., last_result: _Optional[_Union[_step_pb2.StepResult, _Mapping]] = ..., present: bool = ..., clock: _Optional[int] = ..., loaded: _Optional[int] = ...) -> None: ...

class ImportOpen(_message.Message):
    __slots__ = ("session_id", "attach_token")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    ATTACH_TOKEN_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    attach_token: int
    def __init__(self, session_id: _Optional[str] = ..., attach_token: _Optional[int] = ...) -> None: ...

class Successor(_message.Message):
    __slots__ = ("shards",)
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    shards: _containers.RepeatedCompositeFieldContainer[SuccessorShard]
    def __init__(self, shards: _Optional[_Iterable[_Union[SuccessorShard, _Mapping]]] = ...) -> None: ...

class SuccessorShard(_message.Message):
    __slots__ = ("session_id", "target", "attach_token", "attach_key")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    ATTACH_TOKEN_FIELD_NUMBER: _ClassVar[int]
    ATTACH_KEY_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    target: str
    attach_token: int
    attach_key: bytes
    def __init__(self, session_id: _Optional[str] = ..., target: _Optional[str] = ..., attach_token: _Optional[int] = ..., attach_key: _Optional[bytes] = ...) -> None: ...
