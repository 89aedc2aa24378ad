from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from typing import ClassVar as _ClassVar

DESCRIPTOR: _descriptor.FileDescriptor

class StatePrecision(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STATE_PRECISION_UNSPECIFIED: _ClassVar[StatePrecision]
    STATE_PRECISION_FLOAT32: _ClassVar[StatePrecision]
    STATE_PRECISION_BFLOAT16_MOMENTS: _ClassVar[StatePrecision]
    STATE_PRECISION_INT8_MOMENTS: _ClassVar[StatePrecision]
STATE_PRECISION_UNSPECIFIED: StatePrecision
STATE_PRECISION_FLOAT32: StatePrecision
STATE_PRECISION_BFLOAT16_MOMENTS: StatePrecision
STATE_PRECISION_INT8_MOMENTS: StatePrecision
