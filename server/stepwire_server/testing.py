"""The real server, in this process, for tests of stepwire and of programs on top of it.

with stepwire_server.testing.serving() as target, stepwire.connect(target) as client:
...
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from stepwire_server.config import ServerConfig
from stepwire_server.observability.logs import logging_to_stderr
from stepwire_server.server import Server

__all__ = ["serving"]

_DEFAULTS: Final[dict[str, Any]] = {
    "bind": "127.0.0.1:0",
    "device": "cpu",
    "sweep_seconds": 0.05,
    "log_level": "warning",
}


@contextmanager
def serving(**settings: Any) -> Iterator[str]:
    """Run a server on a free port for a block.

    Log lines from `log_level` up go to standard error, or, in a program that has configured structlog, through that
    configuration.

    Args:
        settings: the fields of `ServerConfig`; by default the server runs on the CPU and logs warnings alone.

    Yields:
        The target of the server, `host:port`.

    Raises:
        TypeError: a name is no setting.
        InvalidRequestError: an address is taken, or is none.
        UnsupportedFeatureError: a device is missing, or does not work.
    """
    config = ServerConfig(**(_DEFAULTS | settings))
    with logging_to_stderr(config.log_level), Server(config) as server:
        yield server.target
