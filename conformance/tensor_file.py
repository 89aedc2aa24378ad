"""Safetensors in twenty lines each way: 8 bytes of header length, a JSON header, then the elements.

The format is little-endian and row-major throughout, https://huggingface.co/docs/safetensors. This reader keeps the
vectors free of any dependency. A test of the generator reads the same files with the official package.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

__all__ = ["read_tensors", "write_tensors"]

_DTYPES: Final[dict[str, Any]] = {"F64": "<f8", "F32": "<f4"}
_NAMES: Final = {np.dtype(code): name for name, code in _DTYPES.items()}


def read_tensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Read every tensor of a file."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    tensors = {}
    for key, entry in header.items():
        first, end = entry["data_offsets"]
        elements = np.frombuffer(data[start + first : start + end], _DTYPES[entry["dtype"]])
        tensors[key] = elements.reshape(entry["shape"])
    return tensors


def write_tensors(path: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write tensors in the order of their keys, so that equal tensors make equal files."""
    header, payloads, offset = {}, [], 0
    for key in sorted(tensors):
        array = np.asarray(tensors[key], order="C")
        end = offset + array.nbytes
        header[key] = {"dtype": _NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [offset, end]}
        payloads.append(array.tobytes())
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(payloads))
