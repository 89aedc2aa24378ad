import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AggregationMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    AGGREGATION_MODE_UNSPECIFIED: _ClassVar[AggregationMode]
    AGGREGATION_MODE_SYNC: _ClassVar[AggregationMode]
    AGGREGATION_MODE_ASYNC: _ClassVar[AggregationMode]

class Reduction(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REDUCTION_UNSPECIFIED: _ClassVar[Reduction]
    REDUCTION_MEAN: _ClassVar[Reduction]
    REDUCTION_SUM: _ClassVar[Reduction]
    REDUCTION_WEIGHTED_MEAN: _ClassVar[Reduction]
    REDUCTION_MEDIAN: _ClassVar[Reduction]
    REDUCTION_TRIMMED_MEAN: _ClassVar[Reduction]
    REDUCTION_NORM_BOUNDED_MEAN: _ClassVar[Reduction]
AGGREGATION_MODE_UNSPECIFIED: AggregationMode
AGGREGATION_MODE_SYNC: AggregationMode
AGGREGATION_MODE_ASYNC: AggregationMode
REDUCTION_UNSPECIFIED: Reduction
REDUCTION_MEAN: Reduction
REDUCTION_SUM: Reduction
REDUCTION_WEIGHTED_MEAN: Reduction
REDUCTION_MEDIAN: Reduction
REDUCTION_TRIMMED_MEAN: Reduction
REDUCTION_NORM_BOUNDED_MEAN: Reduction

class Aggregation(_message.Message):
    __slots__ = ("mode", "workers", "required_workers", "reduction", "max_staleness_steps", "max_clock_lead", "staleness_correction", "round_timeout", "least_grace", "most_grace", "uploads_at_once", "trimmed", "norm_bound")
    MODE_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    REQUIRED_WORKERS_FIELD_NUMBER: _ClassVar[int]
    REDUCTION_FIELD_NUMBER: _ClassVar[int]
    MAX_STALENESS_STEPS_FIELD_NUMBER: _ClassVar[int]
    MAX_CLOCK_LEAD_FIELD_NUMBER: _ClassVar[int]
    STALENESS_CORRECTION_FIELD_NUMBER: _ClassVar[int]
    ROUND_TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    LEAST_GRACE_FIELD_NUMBER: _ClassVar[int]
    MOST_GRACE_FIELD_NUMBER: _ClassVar[int]
    UPLOADS_AT_ONCE_FIELD_NUMBER: _ClassVar[int]
    TRIMMED_FIELD_NUMBER: _ClassVar[int]
    NORM_BOUND_FIELD_NUMBER: _ClassVar[int]
    mode: AggregationMode
    workers: int
    required_workers: int
    reduction: Reduction
    max_staleness_steps: int
    max_clock_lead: int
    staleness_correction: bool
    round_timeout: _duration_pb2.Duration
    least_grace: _duration_pb2.Duration
    most_grace: _duration_pb2.Duration
    uploads_at_once: int
    trimmed: int
    norm_bound: float
    def __init__(self, mode: _Optional[_Union[AggregationMode, str]] = ..., workers: _Optional[int] = ..., required_workers: _Optional[int] = ..., reduction: _Optional[_Union[Reduction, str]] = ..., max_staleness_steps: _Optional[int] = ..., max_clock_lead: _Optional[int] = ..., staleness_correction: bool = ..., round_timeout: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., least_grace: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., most_grace: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., uploads_at_once: _Optional[int] = ..., trimmed: _Optional[int] = ..., norm_bound: _Optional[float] = ...) -> None: ...

class RoundResult(_message.Message):
    __slots__ = ("contribution", "dropped", "members", "contributors", "waiting_seconds", "staleness")
    CONTRIBUTION_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTORS_FIELD_NUMBER: _ClassVar[int]
    WAITING_SECONDS_FIELD_NUMBER: _ClassVar[int]
    STALENESS_FIELD_NUMBER: _ClassVar[int]
    contribution: int
    dropped: bool
    members: int
    contributors: _containers.RepeatedCompositeFieldContainer[Contributor]
    waiting_seconds: float
    staleness: int
    def __init__(self, contribution: _Optional[int] = ..., dropped: bool = ..., members: _Optional[int] = ..., contributors: _Optional[_Iterable[_Union[Contributor, _Mapping]]] = ..., waiting_seconds: _Optional[float] = ..., staleness: _Optional[int] = ...) -> None: ...

class Contributor(_message.Message):
    __slots__ = ("worker", "weight", "grad_norm", "non_finite_count")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    GRAD_NORM_FIELD_NUMBER: _ClassVar[int]
    NON_FINITE_COUNT_FIELD_NUMBER: _ClassVar[int]
    worker: int
    weight: float
    grad_norm: float
    non_finite_count: int
    def __init__(self, worker: _Optional[int] = ..., weight: _Optional[float] = ..., grad_norm: _Optional[float] = ..., non_finite_count: _Optional[int] = ...) -> None: ...

class Member(_message.Message):
    __slots__ = ("worker", "attached", "contribution")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    ATTACHED_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTION_FIELD_NUMBER: _ClassVar[int]
    worker: int
    attached: bool
    contribution: int
    def __init__(self, worker: _Optional[int] = ..., attached: bool = ..., contribution: _Optional[int] = ...) -> None: ...
