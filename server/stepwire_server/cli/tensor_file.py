"""Files in the safetensors format: arrays by name, beside a few texts. Nothing of a head is believed unchecked."""

from __future__ import annotations

import json
import math
import os
import pathlib
import struct
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final, NamedTuple

import ml_dtypes
import msgspec
import numpy as np
import numpy.typing as npt

from stepwire.errors import InvalidRequestError

__all__ = ["Tensor", "TensorFile", "read_tensor_file", "write_tensor_file"]

_LENGTH: Final = struct.Struct("<Q")
_MOST_HEADER_BYTES: Final = 100_000_000  # the format's own bound
_METADATA: Final = "__metadata__"
_UNIT_BYTES: Final = 8
_DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
}
_CODES: Final = {dtype: code for code, dtype in _DTYPES.items()}

_Count = Annotated[int, msgspec.Meta(ge=0, le=2**62)]


class Tensor(NamedTuple):
    """An array that is read when it is needed.

    Attributes:
        shape: the extents.
        dtype: the dtype in the file.
        read: returns the array.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Callable[[], npt.NDArray[Any]]

    @property
    def nbytes(self) -> int:
        """The bytes of the array in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    @classmethod
    def of(cls, values: npt.NDArray[Any]) -> Tensor:
        """Return an array that is there already."""
        return cls(values.shape, values.dtype, lambda: values)


class TensorFile(NamedTuple):
    """An open file.

    Attributes:
        tensors: the arrays, by name.
        metadata: the texts beside them.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    dtype: str
    shape: tuple[_Count, ...]
    data_offsets: tuple[_Count, _Count]


def write_tensor_file(path: pathlib.Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a new file; nothing stays of one that fails.

    Raises:
        InvalidRequestError: the file exists.
        OSError: the disk failed.
    """
    head: dict[str, Any] = {_METADATA: dict(metadata)}
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        start, end = end, end + tensor.nbytes
        head[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(head).encode("ascii")
    text += b" " * (-(len(text) + _LENGTH.size) % _UNIT_BYTES)
    try:
        file = path.open("xb")
    except FileExistsError:
        raise InvalidRequestError.of("file", f"{path} exists; name a file that does not") from None
    try:
        with file:
            file.write(_LENGTH.pack(len(text)) + text)
            for name in head:
                if name != _METADATA:
                    file.write(np.ascontiguousarray(tensors[name].read()).reshape(-1).view(np.uint8).data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def read_tensor_file(path: pathlib.Path) -> TensorFile:
    """Read the head of a file; arrays are read when they are needed.

    Raises:
        InvalidRequestError: the file is none of the format, or holds what no state holds. The message names the value.
        OSError: the disk failed, or there is no such file.
    """
    with path.open("rb") as file:
        nbytes = os.fstat(file.fileno()).st_size
        raw = file.read(_LENGTH.size)
        length = _LENGTH.unpack(raw)[0] if len(raw) == _LENGTH.size else 0
        if not 2 <= length <= min(_MOST_HEADER_BYTES, nbytes - _LENGTH.size):
            raise _bad(path, f"its head has {length} bytes, in a file of {nbytes}")
        text = file.read(length)
    head = _parsed(path, text, dict[str, msgspec.Raw])
    metadata = _parsed(path, bytes(head.pop(_METADATA, msgspec.Raw(b"{}"))), dict[str, str])
    entries = {name: _parsed(path, bytes(raw), _Entry) for name, raw in head.items()}
    start, end = _LENGTH.size + length, 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        end = _checked(path, name, entry, end)
    if start + end != nbytes:
        raise _bad(path, f"its arrays end at byte {start + end}, and the file at {nbytes}")
    return TensorFile({name: _tensor(path, start, entry) for name, entry in entries.items()}, metadata)


def _parsed(path: pathlib.Path, text: bytes, kind: Any) -> Any:
    try:
        return msgspec.json.decode(text, type=kind)
    except (ValueError, RecursionError) as error:
        raise _bad(path, f"its head is damaged: {str(error)[:200]}") from None


def _checked(path: pathlib.Path, name: str, entry: _Entry, end: int) -> int:
    """Return the end of an array that begins where the one before ends."""
    (first, last), dtype = entry.data_offsets, _DTYPES.get(entry.dtype)
    if dtype is None:
        raise _bad(path, f"{name[:200]!r} has the dtype {entry.dtype[:32]!r}; a state has {', '.join(_DTYPES)}")
    count = 1
    for extent in entry.shape:  # Python's integers have no overflow
        count *= extent
    if first != end or last - first != count * dtype.itemsize:
        raise _bad(
            path,
            f"{name[:200]!r} of shape {list(entry.shape)[:8]} has the bytes {first} to {last}, and {end} to "
            f"{end + count * dtype.itemsize} were expected",
        )
    return last


def _tensor(path: pathlib.Path, start: int, entry: _Entry) -> Tensor:
    dtype, shape, offset = _DTYPES[entry.dtype], entry.shape, start + entry.data_offsets[0]
    count = (entry.data_offsets[1] - entry.data_offsets[0]) // dtype.itemsize
    return Tensor(shape, dtype, lambda: np.fromfile(path, dtype, count, offset=offset).reshape(shape))


def _bad(path: pathlib.Path, problem: str) -> InvalidRequestError:
    return InvalidRequestError.of("file", f"{path} is no file of a state: {problem}")
