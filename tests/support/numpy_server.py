"""A server whose engine evaluates rules with NumPy: nothing is compiled, and the bits are those of compiled kernels."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from stepwire_server.config import ServerConfig
from stepwire_server.devices.pool import DevicePool
from stepwire_server.engines.cpu.engine import CpuEngine
from stepwire_server.server import Server

__all__ = ["numpy_pool", "numpy_server"]


def numpy_pool(budget_bytes: int = 0) -> DevicePool:
    """Start the devices of such a server; it closes them."""
    return DevicePool.of([CpuEngine(threads=1, use_numba=False)], budget_bytes)


@contextlib.contextmanager
def numpy_server(*, clock: Callable[[], float] = time.monotonic, **settings: Any) -> Iterator[Server]:
    """Run a server on a free port for a block, for tests of other things than kernels.

    A kernel takes longer to compile than most tests take. `tests/server/engines` holds the engines to the same bits.

    Args:
        clock: the clock of leases, idle times and telemetry, in seconds.
        settings: the fields of `ServerConfig`; by default nothing is swept.
    """
    defaults = {
        "bind": "127.0.0.1:0",
        "device": "cpu",
        "sweep_seconds": 3600.0,
        "journal_segment_bytes": 1 << 20,  # set aside on the disk, and copied with every image
    }
    config = ServerConfig(**defaults | settings)
    with Server(config, clock=clock, pool=numpy_pool(config.memory_budget)) as server:
        yield server
