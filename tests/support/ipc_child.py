"""A process that opens device memory of another as a client does: `python -m tests.support.ipc_child`.

CuPy wraps the memory and copies, and compiles nothing: in a process of a client CUDA's headers may be missing. The
parent sends a description, and then empty lines; this process answers "written", and then the parameters.
"""

from __future__ import annotations

import importlib
import json
import socket
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from stepwire.transports.cuda.driver import CudaDriver
from stepwire.transports.cuda.memory import DeviceMapping
from stepwire.transports.cuda.views import DeviceView

__all__ = ["gradient_of", "open_memory", "read", "write"]

_FLOAT32 = np.dtype(np.float32)


def gradient_of(size: int) -> np.ndarray:
    """Return the gradient that the process writes, `(size,) float32`."""
    return np.arange(size, dtype=np.float32) - 1000


def open_memory(told: Mapping[str, Any], driver: CudaDriver) -> DeviceMapping:
    """Map the memory of a description: `handle` and `uuid` in hexadecimal digits, `nbytes`."""
    context = driver.context_on(bytes.fromhex(told["uuid"]))
    connection, server_end = socket.socketpair()
    server_end.close()
    return DeviceMapping(context, bytes.fromhex(told["handle"]), told["nbytes"], connection)


def write(mapping: DeviceMapping, cupy: Any, size: int) -> None:
    """Leave a gradient at the beginning, through CuPy's view of the memory."""
    gradient = cupy.asarray(DeviceView(mapping, 0, (size,), _FLOAT32))
    assert gradient.data.ptr == mapping.address, "a copy, and no view"
    gradient.set(gradient_of(size))
    mapping.synchronize()


def read(mapping: DeviceMapping, at: int, size: int) -> np.ndarray:
    """Return the parameters from byte `at` on, `(size,) float32`."""
    return np.asarray(DeviceView(mapping, at, (size,), _FLOAT32))


def main() -> None:
    """Write when described, and read when asked."""
    told = json.loads(sys.stdin.readline())
    mapping = open_memory(told, CudaDriver())
    write(mapping, importlib.import_module("cupy"), told["size"])
    print("written", flush=True)
    sys.stdin.readline()
    print(read(mapping, told["at"], told["size"]).tobytes().hex(), flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    main()
