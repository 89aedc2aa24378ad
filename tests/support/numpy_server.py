"""A server whose engine evaluates rules with NumPy: nothing is compiled, and the bits are those of compiled kernels."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from stepwire_server.config import ServerConfig
from stepwire_server.devices.pool import DevicePool
from stepwire_server.engines.cpu.engine import CpuEngine
from stepwire_server.server import Server

__all__ = ["numpy_pool", "numpy_server"]


def numpy_pool() -> DevicePool:
    """Start the devices of such a server; it closes them."""
    return DevicePool.of([CpuEngine(threads=1, use_numba=False)])


@contextlib.contextmanager
def numpy_server(**settings: Any) -> Iterator[Server]:
    """Run a server on a free port for a block, for tests of other things than kernels.

    A kernel takes longer to compile than most tests take. `tests/server/engines` holds the engines to the same bits.

    Args:
        settings: the fields of `ServerConfig`; by default nothing is swept.
    """
    defaults = {"bind": "127.0.0.1:0", "device": "cpu", "sweep_seconds": 3600.0}
    with Server(ServerConfig(**defaults | settings), pool=numpy_pool()) as server:
        yield server
