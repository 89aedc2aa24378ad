from stepwire.v1 import tensor_pb2 as _tensor_pb2
from stepwire.v1 import status_pb2 as _status_pb2
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Transport(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TRANSPORT_UNSPECIFIED: _ClassVar[Transport]
    TRANSPORT_GRPC: _ClassVar[Transport]
    TRANSPORT_SHM: _ClassVar[Transport]
    TRANSPORT_CUDA_IPC: _ClassVar[Transport]
    TRANSPORT_PACKETS: _ClassVar[Transport]
TRANSPORT_UNSPECIFIED: Transport
TRANSPORT_GRPC: Transport
TRANSPORT_SHM: Transport
TRANSPORT_CUDA_IPC: Transport
TRANSPORT_PACKETS: Transport

class LocalAccess(_message.Message):
    __slots__ = ("unix_socket", "handoff_socket", "boot_id", "shared_memory_off", "device_memory_off", "packets_off")
    UNIX_SOCKET_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_SOCKET_FIELD_NUMBER: _ClassVar[int]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    SHARED_MEMORY_OFF_FIELD_NUMBER: _ClassVar[int]
    DEVICE_MEMORY_OFF_FIELD_NUMBER: _ClassVar[int]
    PACKETS_OFF_FIELD_NUMBER: _ClassVar[int]
    unix_socket: str
    handoff_socket: str
    boot_id: str
    shared_memory_off: str
    device_memory_off: str
    packets_off: str
    def __init__(self, unix_socket: _Optional[str] = ..., handoff_socket: _Optional[str] = ..., boot_id: _Optional[str] = ..., shared_memory_off: _Optional[str] = ..., device_memory_off: _Optional[str] = ..., packets_off: _Optional[str] = ...) -> None: ...

class Handoff(_message.Message):
    __slots__ = ("socket", "token", "gradient_dtype", "gradient_bytes", "reply_dtype", "parameter_bytes")
    SOCKET_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_DTYPE_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    REPLY_DTYPE_FIELD_NUMBER: _ClassVar[int]
    PARAMETER_BYTES_FIELD_NUMBER: _ClassVar[int]
    socket: str
    token: bytes
    gradient_dtype: _tensor_pb2.Dtype
    gradient_bytes: int
    reply_dtype: _tensor_pb2.Dtype
    parameter_bytes: int
    def __init__(self, socket: _Optional[str] = ..., token: _Optional[bytes] = ..., gradient_dtype: _Optional[_Union[_tensor_pb2.Dtype, str]] = ..., gradient_bytes: _Optional[int] = ..., reply_dtype: _Optional[_Union[_tensor_pb2.Dtype, str]] = ..., parameter_bytes: _Optional[int] = ...) -> None: ...

class HandoffRequest(_message.Message):
    __slots__ = ("token", "proof")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    token: bytes
    proof: bytes
    def __init__(self, token: _Optional[bytes] = ..., proof: _Optional[bytes] = ...) -> None: ...

class HandoffResponse(_message.Message):
    __slots__ = ("refused", "cuda_ipc_handle", "cuda_device_uuid")
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    CUDA_IPC_HANDLE_FIELD_NUMBER: _ClassVar[int]
    CUDA_DEVICE_UUID_FIELD_NUMBER: _ClassVar[int]
    refused: _status_pb2.RichStatus
    cuda_ipc_handle: bytes
    cuda_device_uuid: bytes
    def __init__(self, refused: _Optional[_Union[_status_pb2.RichStatus, _Mapping]] = ..., cuda_ipc_handle: _Optional[bytes] = ..., cuda_device_uuid: _Optional[bytes] = ...) -> None: ...

class MemoryCheck(_message.Message):
    __slots__ = ("pattern",)
    PATTERN_FIELD_NUMBER: _ClassVar[int]
    pattern: bytes
    def __init__(self, pattern: _Optional[bytes] = ...) -> None: ...

class MemoryChecked(_message.Message):
    __slots__ = ("parameters",)
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    parameters: bytes
    def __init__(self, parameters: _Optional[bytes] = ...) -> None: ...
