"""Wire encodings: the dtypes that travel, their names, and their sizes in bytes.

Everything on the wire is little-endian. Every machine that CuPy and these wheels run on is little-endian too, and the
import fails on any other.

An encoding is a NumPy dtype. A payload consists of its items. An item of float32, bfloat16 and float16 is one element.
Only gradients travel as `INT8`. An item of `INT8` is a block of `BLOCK` elements: the largest magnitude, and a code for
each element (see `int8_blocks`). A block starts at a multiple of `BLOCK` in the flat space. So `wire_items` and
`wire_bytes` compute sizes, and a count times `itemsize` is wrong.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any, Final

import ml_dtypes
import numpy as np
import numpy.typing as npt

from stepwire.errors import InvalidRequestError
from stepwire.v1 import tensor_pb2
from stepwire.wire.int8_blocks import BLOCK, INT8

__all__ = [
    "BFLOAT16",
    "BLOCK",
    "FLOAT16",
    "FLOAT32",
    "INT8",
    "dtype_from_wire",
    "dtype_named",
    "dtype_to_wire",
    "elements_within",
    "is_wire_dtype",
    "wire_alignment",
    "wire_bytes",
    "wire_items",
    "wire_name",
]

if sys.byteorder != "little":
    raise ImportError("stepwire sends arrays as they lie in memory and needs a little-endian machine")

FLOAT32: Final = np.dtype(np.float32)
BFLOAT16: Final = np.dtype(ml_dtypes.bfloat16)
FLOAT16: Final = np.dtype(np.float16)

_TO_WIRE: Final[dict[np.dtype[Any], tensor_pb2.Dtype]] = {
    FLOAT32: tensor_pb2.DTYPE_FLOAT32,
    BFLOAT16: tensor_pb2.DTYPE_BFLOAT16,
    FLOAT16: tensor_pb2.DTYPE_FLOAT16,
    INT8: tensor_pb2.DTYPE_INT8_BLOCKWISE,
}
_FROM_WIRE: Final[dict[int, np.dtype[Any]]] = {value: dtype for dtype, value in _TO_WIRE.items()}
_TO_NAME: Final[dict[np.dtype[Any], str]] = {
    FLOAT32: "float32",
    BFLOAT16: "bfloat16",
    FLOAT16: "float16",
    INT8: "int8",
}
_NAMED: Final = {name: dtype for dtype, name in _TO_NAME.items()}


def is_wire_dtype(dtype: np.dtype[Any]) -> bool:
    """Tell whether arrays of this dtype are sent without a change, an element an item."""
    return dtype in _TO_WIRE and dtype != INT8


def wire_name(dtype: np.dtype[Any]) -> str:
    """Return the name of an encoding: "float32", "bfloat16", "float16" or "int8"."""
    return _TO_NAME[dtype]


def wire_alignment(dtype: np.dtype[Any]) -> int:
    """Return the alignment of chunks in this encoding: every flat offset is a multiple of this number of elements."""
    return BLOCK if dtype == INT8 else 1


def wire_items(dtype: np.dtype[Any], count: int) -> int:
    """Return the items of a payload of `count` elements, a last block that is not full included."""
    return -(-count // BLOCK) if dtype == INT8 else count


def wire_bytes(dtype: np.dtype[Any], count: int) -> int:
    """Return the bytes of a payload of `count` elements."""
    return (-(-count // BLOCK) if dtype == INT8 else count) * dtype.itemsize


def elements_within(dtype: np.dtype[Any], nbytes: int) -> int:
    """Return the largest number of elements in a payload of at most `nbytes`."""
    return nbytes // dtype.itemsize * (BLOCK if dtype == INT8 else 1)


def dtype_to_wire(dtype: np.dtype[Any]) -> tensor_pb2.Dtype:
    """Return the enum value of a wire dtype."""
    return _TO_WIRE[dtype]


def dtype_from_wire(value: int, default: np.dtype[Any], field: str, *, gradients: bool = False) -> np.dtype[Any]:
    """Return the dtype of an enum value, `default` for DTYPE_UNSPECIFIED.

    Args:
        value: the value of the enum.
        default: the default of the field.
        field: the path that an error names.
        gradients: True for a field of gradients, which may be `INT8`.

    Returns:
        The dtype.

    Raises:
        InvalidRequestError: this build does not have the encoding, or the field does not allow it. The message names
            the field.
    """
    if value == tensor_pb2.DTYPE_UNSPECIFIED:
        return default
    dtype = _FROM_WIRE.get(value)
    if dtype is None or (dtype == INT8 and not gradients):
        raise InvalidRequestError.of(
            field, f"encoding {value} is not served{_not_here(dtype)}; use one of {_names(gradients)}"
        )
    return dtype


def dtype_named(dtype: npt.DTypeLike | str, field: str, *, gradients: bool = False) -> np.dtype[Any]:
    """Return the wire dtype that a user named, such as "bfloat16" or `np.float32`.

    Args:
        dtype: a name or a dtype. "int8" stands for `INT8`; `np.int8` is refused, because no array of int8 is sent.
        field: the path that an error names.
        gradients: True for a dtype of gradients, which may be `INT8`.

    Returns:
        The wire dtype.

    Raises:
        InvalidRequestError: the dtype is not a wire dtype, or the field does not allow it.
    """
    found: np.dtype[Any] | None = _NAMED.get(dtype) if isinstance(dtype, str) else None
    if found is None:
        with contextlib.suppress(TypeError):
            found = np.dtype(dtype)
    if found is None or found not in _TO_WIRE or (found == INT8 and not gradients):
        raise InvalidRequestError.of(
            field, f"dtype {dtype!r} cannot be sent{_not_here(found)}; use one of {_names(gradients)}"
        )
    return _FROM_WIRE[_TO_WIRE[found]]


def _not_here(dtype: np.dtype[Any] | None) -> str:
    return " here, only as the encoding of gradients" if dtype is not None and dtype == INT8 else ""


def _names(gradients: bool) -> str:
    return ", ".join(name for name, dtype in _NAMED.items() if gradients or dtype != INT8)
