from stepwire.v1 import precision_pb2 as _precision_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RowSemantics(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROW_SEMANTICS_UNSPECIFIED: _ClassVar[RowSemantics]
    ROW_SEMANTICS_TORCH_SPARSE: _ClassVar[RowSemantics]
    ROW_SEMANTICS_ROW_COUNTER: _ClassVar[RowSemantics]
    ROW_SEMANTICS_SKIPPED: _ClassVar[RowSemantics]
    ROW_SEMANTICS_GLOBAL: _ClassVar[RowSemantics]
    ROW_SEMANTICS_ROW_WISE: _ClassVar[RowSemantics]

class Dtype(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[Dtype]
    DTYPE_FLOAT32: _ClassVar[Dtype]
    DTYPE_BFLOAT16: _ClassVar[Dtype]
    DTYPE_FLOAT16: _ClassVar[Dtype]
    DTYPE_INT8_BLOCKWISE: _ClassVar[Dtype]
ROW_SEMANTICS_UNSPECIFIED: RowSemantics
ROW_SEMANTICS_TORCH_SPARSE: RowSemantics
ROW_SEMANTICS_ROW_COUNTER: RowSemantics
ROW_SEMANTICS_SKIPPED: RowSemantics
ROW_SEMANTICS_GLOBAL: RowSemantics
ROW_SEMANTICS_ROW_WISE: RowSemantics
DTYPE_UNSPECIFIED: Dtype
DTYPE_FLOAT32: Dtype
DTYPE_BFLOAT16: Dtype
DTYPE_FLOAT16: Dtype
DTYPE_INT8_BLOCKWISE: Dtype

class TensorSpec(_message.Message):
    __slots__ = ("name", "shape", "group", "frozen", "table", "state_precision")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    FROZEN_FIELD_NUMBER: _ClassVar[int]
    TABLE_FIELD_NUMBER: _ClassVar[int]
    STATE_PRECISION_FIELD_NUMBER: _ClassVar[int]
    name: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    group: int
    frozen: bool
    table: Table
    state_precision: _precision_pb2.StatePrecision
    def __init__(self, name: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., group: _Optional[int] = ..., frozen: bool = ..., table: _Optional[_Union[Table, _Mapping]] = ..., state_precision: _Optional[_Union[_precision_pb2.StatePrecision, str]] = ...) -> None: ...

class Table(_message.Message):
    __slots__ = ("semantics", "uniform_bound", "seed", "hashed", "max_age_steps")
    SEMANTICS_FIELD_NUMBER: _ClassVar[int]
    UNIFORM_BOUND_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    HASHED_FIELD_NUMBER: _ClassVar[int]
    MAX_AGE_STEPS_FIELD_NUMBER: _ClassVar[int]
    semantics: RowSemantics
    uniform_bound: float
    seed: int
    hashed: bool
    max_age_steps: int
    def __init__(self, semantics: _Optional[_Union[RowSemantics, str]] = ..., uniform_bound: _Optional[float] = ..., seed: _Optional[int] = ..., hashed: bool = ..., max_age_steps: _Optional[int] = ...) -> None: ...

class TableRows(_message.Message):
    __slots__ = ("tensor", "rows")
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    tensor: int
    rows: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, tensor: _Optional[int] = ..., rows: _Optional[_Iterable[int]] = ...) -> None: ...

class TableEntries(_message.Message):
    __slots__ = ("tensor", "entries")
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    tensor: int
    entries: int
    def __init__(self, tensor: _Optional[int] = ..., entries: _Optional[int] = ...) -> None: ...

class Layout(_message.Message):
    __slots__ = ("size", "tensors", "groups", "slots", "chunk_alignment")
    SIZE_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    CHUNK_ALIGNMENT_FIELD_NUMBER: _ClassVar[int]
    size: int
    tensors: _containers.RepeatedCompositeFieldContainer[TensorPlacement]
    groups: _containers.RepeatedCompositeFieldContainer[GroupPlacement]
    slots: _containers.RepeatedScalarFieldContainer[str]
    chunk_alignment: int
    def __init__(self, size: _Optional[int] = ..., tensors: _Optional[_Iterable[_Union[TensorPlacement, _Mapping]]] = ..., groups: _Optional[_Iterable[_Union[GroupPlacement, _Mapping]]] = ..., slots: _Optional[_Iterable[str]] = ..., chunk_alignment: _Optional[int] = ...) -> None: ...

class TensorPlacement(_message.Message):
    __slots__ = ("spec", "offset", "count")
    SPEC_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    spec: TensorSpec
    offset: int
    count: int
    def __init__(self, spec: _Optional[_Union[TensorSpec, _Mapping]] = ..., offset: _Optional[int] = ..., count: _Optional[int] = ...) -> None: ...

class GroupPlacement(_message.Message):
    __slots__ = ("offset", "count")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    offset: int
    count: int
    def __init__(self, offset: _Optional[int] = ..., count: _Optional[int] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("offset", "count", "rows", "patch")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    PATCH_FIELD_NUMBER: _ClassVar[int]
    offset: int
    count: int
    rows: _containers.RepeatedScalarFieldContainer[int]
    patch: bool
    def __init__(self, offset: _Optional[int] = ..., count: _Optional[int] = ..., rows: _Optional[_Iterable[int]] = ..., patch: bool = ...) -> None: ...
