"""A client on the same GPU, as `gpu_ipc` starts it: opens the engine's memory, and writes to it when asked.

The first line of the input is a description of the memory, and the answer is the seconds that opening took, as JSON.
After each further line one kibibyte is written and waited for. The process has no CuPy, as no client needs it.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from stepwire.transports.cuda.driver import CudaDriver
from stepwire.transports.cuda.memory import DeviceMapping

__all__ = ["Opened"]

_SYNCHRONIZATIONS = 100


class Opened:
    """The memory of an engine in another process.

    Attributes:
        seconds: of the context, of the opening, and of a wait for a device at rest.
    """

    def __init__(self, told: Mapping[str, Any], driver: CudaDriver) -> None:
        """Open the memory that `handle`, `uuid` and `nbytes` describe."""
        begun = time.perf_counter()
        context = driver.context_on(bytes.fromhex(told["uuid"]))
        made = time.perf_counter()
        connection, server_end = socket.socketpair()
        server_end.close()
        self._mapping = DeviceMapping(context, bytes.fromhex(told["handle"]), told["nbytes"], connection)
        opened = time.perf_counter()
        waits = [self._wait() for _ in range(_SYNCHRONIZATIONS)]
        self.seconds = {"context": made - begun, "open": opened - made, "synchronize": min(waits)}
        self._values = np.ones(256, np.float32)

    def write(self) -> None:
        """Write, and wait until the device has it."""
        self._mapping.write(0, self._values)
        self._mapping.synchronize()

    def close(self) -> None:
        """Let go of the memory."""
        del self._mapping

    def _wait(self) -> float:
        begun = time.perf_counter()
        self._mapping.synchronize()
        return time.perf_counter() - begun


def main() -> None:
    """Open the memory, and write until the input ends."""
    opened = Opened(json.loads(sys.stdin.readline()), CudaDriver())
    print(json.dumps(opened.seconds), flush=True)
    for _ in sys.stdin:
        opened.write()
        print(flush=True)


if __name__ == "__main__":
    main()
