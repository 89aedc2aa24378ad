"""The engine that adds gradients up on the host, whatever device the session lives on.

Received chunks are bytes of the host. So a GPU gets one reduced gradient over its bus, and not one from each worker.
"""

from __future__ import annotations

import functools

from stepwire_server.engines.cpu.engine import CpuEngine
from stepwire_server.engines.protocol import Engine

__all__ = ["host_engine"]


def host_engine(engine: Engine) -> CpuEngine:
    """Return the engine itself if it is the processor's, or else one that all other devices share."""
    return engine if isinstance(engine, CpuEngine) else _shared()


@functools.cache
def _shared() -> CpuEngine:
    return CpuEngine()
