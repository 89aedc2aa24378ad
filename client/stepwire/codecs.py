"""Wire encodings: which dtypes travel, what they are called, and how they become float32.

Everything on the wire is little-endian; so is every machine that CuPy and these wheels run on, and the
import says so where it is not.
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

__all__ = [
    "BFLOAT16",
    "FLOAT16",
    "FLOAT32",
    "dtype_from_wire",
    "dtype_named",
    "dtype_to_wire",
    "is_wire_dtype",
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
}
_FROM_WIRE: Final[dict[int, np.dtype[Any]]] = {value: dtype for dtype, value in _TO_WIRE.items()}
_NAMES: Final = {dtype.name: dtype for dtype in _TO_WIRE}


def is_wire_dtype(dtype: np.dtype[Any]) -> bool:
    """Tell whether arrays of this dtype can be sent as they are."""
    return dtype in _TO_WIRE


def dtype_to_wire(dtype: np.dtype[Any]) -> tensor_pb2.Dtype:
    """Return the enum value of a wire dtype."""
    return _TO_WIRE[dtype]


def dtype_from_wire(value: int, default: np.dtype[Any], field: str) -> np.dtype[Any]:
    """Return the dtype of an enum value, `default` for DTYPE_UNSPECIFIED.

    Raises:
        InvalidRequestError: an encoding this build does not have; the message names the field.
    """
    if value == tensor_pb2.DTYPE_UNSPECIFIED:
        return default
    if (dtype := _FROM_WIRE.get(value)) is None:
        raise InvalidRequestError(
            f"{field}: encoding {value} is not served; use one of {', '.join(_NAMES)}",
            metadata={"field": field},
        )
    return dtype


def dtype_named(dtype: npt.DTypeLike | str, field: str) -> np.dtype[Any]:
    """Return the wire dtype that a user named, such as "bfloat16" or `np.float32`.

    Raises:
        InvalidRequestError: not a wire dtype.
    """
    if isinstance(dtype, str) and dtype in _NAMES:
        return _NAMES[dtype]
    found: np.dtype[Any] | None = None
    with contextlib.suppress(TypeError):
        found = np.dtype(dtype)
    if found is None or not is_wire_dtype(found):
        raise InvalidRequestError(
            f"{field}: dtype {dtype!r} cannot be sent; use one of {', '.join(_NAMES)}",
            metadata={"field": field},
        )
    return _FROM_WIRE[_TO_WIRE[found]]
