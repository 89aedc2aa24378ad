"""`Client.statistics`: snapshots of one server or several, for as long as somebody listens."""

from __future__ import annotations

import asyncio
import collections
import itertools
import threading
from collections.abc import Callable

import numpy as np
import pytest

import stepwire
import stepwire.aio
from stepwire_server.config import ServerConfig
from stepwire_server.devices.pool import DevicePool
from stepwire_server.server import Server
from tests.support.numpy_server import numpy_pool

GRADIENT = {"w": np.full(10, 2.0, np.float32)}


@pytest.fixture
def pool() -> DevicePool:
    return numpy_pool()


def test_a_session_is_seen_with_its_last_result(server: Server) -> None:
    with stepwire.connect(server.target) as client, client.create_session(GRADIENT, label="run") as session:
        session.step(GRADIENT)
        statistics = next(client.statistics())
        (load,), (seen,) = statistics.servers, statistics.sessions
        assert (load.target, load.sessions, load.streams) == (server.target, 1, 1)
        assert load.reserved_bytes["cpu"] >= seen.memory_bytes == 120
        assert (seen.session_id, seen.label, seen.activity) == (session.session_id, "run", "attached")
        assert seen.transports == (session.transport.name,)
        assert (seen.applied_step, seen.durable_step, seen.attached_workers, seen.workers) == (1, None, 1, 1)
        assert seen.last_result == session.last_result
        assert seen.last_result is not None
        assert seen.last_result.grad_norm == pytest.approx(2.0 * 10**0.5, rel=1e-6)


def test_snapshots_come_until_nobody_listens(server: Server, until: Callable[[Callable[[], bool]], None]) -> None:
    with stepwire.connect(server.target) as client:
        snapshots = client.statistics(interval=0.1)
        assert [len(each.servers) for each in itertools.islice(snapshots, 3)] == [1, 1, 1]
        assert server.registry.streams.watchers == 1
        snapshots.close()  # type: ignore[attr-defined]
        until(lambda: server.registry.streams.watchers == 0)
        client.statistics()  # nothing begins before the first is asked for
        assert server.registry.streams.watchers == 0


def test_several_servers_are_seen_together(server: Server) -> None:
    with Server(ServerConfig(bind="127.0.0.1:0", device="cpu"), pool=numpy_pool()) as other:
        targets = [server.target, other.target]
        with (
            stepwire.connect(targets) as client,
            client.create_session({"w": np.ones(1 << 20, np.float32)}) as session,
        ):
            statistics = next(client.statistics())
            assert [load.target for load in statistics.servers] == targets
            assert ",".join(seen.session_id for seen in statistics.sessions) == session.session_id


@pytest.mark.parametrize("interval", [0.0, 0.05, 3601.0, float("nan")])
def test_an_interval_out_of_range_is_refused_at_once(server: Server, interval: float) -> None:
    with stepwire.connect(server.target) as client:
        with pytest.raises(stepwire.InvalidRequestError, match="interval: "):
            client.statistics(interval=interval)


def test_a_server_that_is_not_there_is_told() -> None:
    with stepwire.connect("127.0.0.1:1", timeout=5.0) as client, pytest.raises(stepwire.UnavailableError):
        next(client.statistics())


def test_a_server_that_ends_is_told(server: Server) -> None:
    with stepwire.connect(server.target) as client:
        snapshots = client.statistics(interval=3600.0)
        next(snapshots)
        server.close()
        with pytest.raises(stepwire.UnavailableError):
            next(snapshots)


def test_a_silent_server_is_told_at_the_deadline(server: Server) -> None:
    with stepwire.connect(server.target) as client:
        snapshots = client.statistics(interval=0.1, timeout=0.2)
        next(snapshots)
        clock, asked = server.registry.clock, threading.Event()
        server.registry.clock = lambda: clock() if asked.wait(60.0) else clock()
        with pytest.raises(stepwire.DeadlineExceededError, match=r"no message within 0\.3 s; ask again"):
            collections.deque(snapshots, maxlen=0)
        asked.set()


def test_asyncio_has_them_too(server: Server) -> None:
    async def look() -> int:
        async with stepwire.aio.connect(server.target) as client:
            async for statistics in client.statistics(interval=0.1):
                return len(statistics.servers)
        return 0

    assert asyncio.run(look()) == 1
