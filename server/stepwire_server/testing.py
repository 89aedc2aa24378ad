"""The real server, in this process, for tests of stepwire and of what is built on it.

with stepwire_server.testing.serving() as target, stepwire.connect(target) as client:
...
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from stepwire_server.config import ServerConfig
from stepwire_server.server import Server

__all__ = ["serving"]


@contextmanager
def serving(**settings: Any) -> Iterator[str]:
    """Run a server on a free port for a block; yields its target, `host:port`.

    Args:
        settings: fields of `ServerConfig`; by default it runs on the CPU.
    """
    defaults: dict[str, Any] = {"bind": "127.0.0.1:0", "device": "cpu", "sweep_seconds": 0.05}
    with Server(ServerConfig(**(defaults | settings))) as server:
        yield server.target
