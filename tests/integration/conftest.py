"""What the tests over a real socket share: the real server, the real client, a raw one, and a network that fails.

Nothing here sleeps, uses a fixed port, or depends on how fast anything is: tests wait for events, and the seconds
that occur only bound a test that would otherwise hang.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import stepwire
from stepwire_server.config import ServerConfig
from stepwire_server.devices.pool import DevicePool
from stepwire_server.server import Server
from tests.integration.proxy import Proxy
from tests.support.raw import RawClient

Opened = Callable[[str], stepwire.Client]


@pytest.fixture
def exits() -> Iterator[contextlib.ExitStack]:
    """Close what was opened, the last first."""
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.fixture
def clock() -> Callable[[], float]:
    """The server's clock. Overridden where time passes only when a test says so."""
    return time.monotonic


@pytest.fixture
def until() -> Callable[[Callable[[], bool]], None]:
    """Look again and again until something is true that another thread is about to make true."""

    def wait(condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 60.0
        while not condition():
            assert time.monotonic() < end, "it did not come true"

    return wait


@pytest.fixture
def settings() -> dict[str, Any]:
    """Settings of the server: chunks of 64 KiB, and a sweep that only tests call. Overridden where others matter."""
    return {"max_chunk_bytes": 64 << 10, "sweep_seconds": 3600.0}


@pytest.fixture
def pool() -> DevicePool | None:
    """The server's devices: the processor, with compiled kernels. Overridden where the kernels are many."""
    return None


@pytest.fixture
def server(settings: dict[str, Any], clock: Callable[[], float], pool: DevicePool | None) -> Iterator[Server]:
    """The real server, in this process."""
    with Server(ServerConfig(bind="127.0.0.1:0", device="cpu", **settings), clock=clock, pool=pool) as server:
        yield server


@pytest.fixture(params=["tcp", "uds"])
def proxy(server: Server, request: pytest.FixtureRequest) -> Iterator[Proxy]:
    """The network in front of the server, over TCP and over a Unix socket."""
    with Proxy(server.target if request.param == "tcp" else f"unix:{server.unix_socket}") as proxy:
        yield proxy


@pytest.fixture
def connect(exits: contextlib.ExitStack) -> Opened:
    """Open real clients that retry within milliseconds, and use no other way than their target."""
    retry = stepwire.Retry(initial_seconds=0.001, max_seconds=0.01)
    return lambda target: exits.enter_context(_connected(target, retry))


@pytest.fixture
def connect_once(exits: contextlib.ExitStack) -> Opened:
    """Open real clients that repeat no call: the next attempt would come after every deadline."""
    retry = stepwire.Retry(uniform=lambda low, high: 3600.0)
    return lambda target: exits.enter_context(_connected(target, retry))


def _connected(target: str, retry: stepwire.Retry) -> stepwire.Client:
    transport = "uds" if target.startswith("unix:") else "tcp"
    return stepwire.connect(target, transport=transport, timeout=120.0, retry=retry)


@pytest.fixture
def client(server: Server, connect: Opened) -> stepwire.Client:
    """A real client with a good connection."""
    return connect(server.target)


@pytest.fixture
def raw(server: Server) -> Iterator[RawClient]:
    """A client in generated code, with a good connection."""
    with RawClient(server.target) as raw:
        yield raw
