"""Calls that wait for their clients without end: others are served all the same, and nothing of them stays."""

from __future__ import annotations

import gc
import itertools
import struct
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any, Final

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2

from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.v1 import state_pb2, step_pb2
from stepwire.wire.channel_options import LARGEST_REQUEST_BYTES
from tests.support.http2 import RawHttp2, grpc_message

SERVICE: Final = "/stepwire.v1.OptimizerService/"
HEALTH: Final = "/grpc.health.v1.Health/"
CALLS: Final = 200
"""More than there are places."""

RST_STREAM: Final = 3
PLACES: Final = 64
"""The places of calls that have brought their message."""

UNFINISHED: Final = 32
"""The calls that may be slow with messages of 8 MiB."""

UNREAD_BYTES: Final = 64 << 20
BATCH: Final = 20
"""Fewer than there are places, so that no call displaces another one."""


class Silent:
    """Calls of every kind that give the server nothing more to do."""

    def __init__(self, live: Any, port: int) -> None:
        self.live, self.port = live, port

    def message(self, connection: RawHttp2, method: str = "GetServerInfo") -> None:
        """A call that never brings its message."""
        connection.open(SERVICE + method, end=False)

    def health_message(self, connection: RawHttp2) -> None:
        connection.open(HEALTH + "Check", end=False)

    def half_message(self, connection: RawHttp2) -> None:
        """A call whose message is cut."""
        connection.open(SERVICE + "Step", grpc_message(bytes(1000))[:500], end=False)

    def watch(self, connection: RawHttp2) -> None:
        connection.open(HEALTH + "Watch", grpc_message(b""))

    def pull(self, connection: RawHttp2) -> None:
        """A pull that nobody reads; the connection's window is 0."""
        request = pb.PullRequest(session_id=self.live.id)
        connection.open(SERVICE + "Pull", grpc_message(request.SerializeToString()))

    def load(self, connection: RawHttp2) -> None:
        """A load that opens, and lives on empty messages."""
        opening = state_pb2.LoadOpen(session_id=self.live.id, attach_token=self.live.token, load=1, slots=["param"])
        message = grpc_message(pb.LoadRequest(open=opening).SerializeToString())
        connection.open(SERVICE + "Load", message + grpc_message(b""), end=False)


@pytest.fixture
def served(serve: Any, connect: Any, make_live: Any, make_config: Any) -> Iterator[tuple[Any, Any, Any]]:
    with serve() as server, connect(server.target) as wire:
        yield server, wire, make_live(wire, wire.create(make_config((2,))))


def check_served(server: Any, wire: Any, live: Any, step: int) -> None:
    """Check that a step, a pull, a listing and a health check are served."""
    with grpc.insecure_channel(server.target) as channel:
        health = channel.unary_unary(HEALTH + "Check")(b"", timeout=60.0)
    assert health_pb2.HealthCheckResponse.FromString(health).status == health_pb2.HealthCheckResponse.SERVING
    assert live.step(step).step == step
    assert wire.pull(live.id, "param")[0].step == step
    assert wire.info().sessions == 1


@pytest.mark.many
@pytest.mark.parametrize("kind", ["message", "health_message", "half_message", "watch", "pull", "load"])
@pytest.mark.parametrize("connections", [1, 20])
def test_calls_that_wait_for_their_clients_keep_nobody_out(
    served: Any, until: Callable[[Callable[[], bool]], None], kind: str, connections: int
) -> None:
    server, wire, live = served
    silent = Silent(live, server.port)
    opened = [RawHttp2(server.port, window=0) for _ in range(connections)]
    try:
        for connection in itertools.islice(itertools.cycle(opened), CALLS):
            getattr(silent, kind)(connection)
        check_served(server, wire, live, 1)
        check_served(server, wire, live, 2)
    finally:
        for connection in opened:
            connection.close()
    until(lambda: server.statistics().calls.total == 0)


def threads_that_send() -> int:
    """Count the threads that wait until gRPC has sent a response.

    CPython 3.11 holds a lock of all threads while it makes the list of frames. A collection of garbage there may wait
    for a thread that waits for that lock (python/cpython#106883), so there is none.
    """
    gc.disable()
    try:
        frames = sys._current_frames()
    finally:
        gc.enable()
    del frames[threading.get_ident()]  # else this frame keeps itself, and those of all threads with what they hold
    return sum(
        frame.f_code.co_name == "_send_response" for top in frames.values() for frame, _ in traceback.walk_stack(top)
    )


def test_pulls_that_nobody_reads_keep_no_more_threads_than_places(
    served: Any, until: Callable[[Callable[[], bool]], None]
) -> None:
    server, wire, live = served
    silent, before = Silent(live, server.port), threads_that_send()
    with RawHttp2(server.port, window=0) as connection:
        for _ in range(CALLS):
            silent.pull(connection)
        ended: set[int] = set()
        while len(ended) < CALLS - PLACES:
            kind, stream, _ = connection.read()
            ended |= {stream} if kind == RST_STREAM else set()
        until(lambda: threads_that_send() <= before + PLACES)
        check_served(server, wire, live, 1)
    until(lambda: server.statistics().calls.total == 0)


def test_messages_that_never_end_are_bounded_and_a_too_large_one_is_refused_at_its_length(
    served: Any, clock: Any, until: Callable[[Callable[[], bool]], None]
) -> None:
    """Each counts as 8 MiB, which it may have: gRPC says nothing of the bytes that are there."""
    server, wire, live = served
    half = grpc_message(bytes(1000))[:-1]
    with RawHttp2(server.port) as one, RawHttp2(server.port) as other:
        for connection, count in ((one, 60), (other, 4)):
            for _ in range(count):
                connection.open(SERVICE + "Step", half, end=False)
        until(lambda: server.statistics().calls.rooms.get("entrance", 0) == 64)
        clock.now += 1.1
        until(lambda: server.statistics().calls.rooms.get("entrance", 0) == UNFINISHED)
        check_served(server, wire, live, 1)
        large = one.open(SERVICE + "Step", b"\x00" + struct.pack(">I", LARGEST_REQUEST_BYTES + 1), end=False)
        until(lambda: one.read()[1] == large)
    until(lambda: server.statistics().calls.total == 0)


def test_responses_that_nobody_reads_are_bounded(
    served: Any, connect: Any, make_live: Any, make_config: Any, until: Callable[[Callable[[], bool]], None]
) -> None:
    """A replay of 100 bytes has a response of 200 KB."""
    server, wire, _ = served
    size = 50_000
    live = make_live(wire, wire.create(make_config((size,))))
    live.step(1, np.ones(size, np.float32))
    request = pb.StepRequest(session_id=live.id, attach_token=live.token, begin=step_pb2.StepBegin(step=1))
    message = grpc_message(request.SerializeToString())
    full = UNREAD_BYTES - 8 * size

    def held() -> int:
        unread: int = server.statistics().calls.unread_bytes
        return unread

    with RawHttp2(server.port, window=0) as connection:
        for number in range(1, UNREAD_BYTES // (4 * size) // BATCH + 3):
            for _ in range(BATCH):
                connection.open(SERVICE + "Step", message)
            until(lambda number=number: held() >= min(number * BATCH * 4 * size, full))
        until(lambda: held() > full)
        assert wire.info().sessions == 2
        assert server.statistics().calls.unread_bytes <= UNREAD_BYTES
    until(lambda: server.statistics().calls.unread_bytes == 0)


def test_standbys_that_never_open_keep_nobody_out(
    tmp_path: Any,
    serve: Any,
    connect: Any,
    make_live: Any,
    make_config: Any,
    until: Callable[[Callable[[], bool]], None],
) -> None:
    settings = {"standby": "preferred", "directory": str(tmp_path), "shard": "a", "max_streams": 8}
    with serve(**settings) as server, connect(server.target) as wire:
        live = make_live(wire, wire.create(make_config((2,))))
        with RawHttp2(server.port) as connection:
            for _ in range(2 * CALLS):
                connection.open("/stepwire.v1.ReplicationService/Follow", end=False)
            until(lambda: server.statistics().calls.rooms.get("follow", 0) == 8)
            check_served(server, wire, live, 1)
        until(lambda: server.statistics().calls.total == 0)


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_no_message_is_inflated(served: Any, compression: grpc.Compression) -> None:
    """8 KiB may be 8 MiB, before anybody has counted them."""
    server, _, _ = served
    request = pb.CreateSessionRequest(request_id="a" * (1 << 20)).SerializeToString()
    with grpc.insecure_channel(server.target, compression=compression) as channel, pytest.raises(grpc.RpcError) as told:
        channel.unary_unary(f"{SERVICE}CreateSession")(request, timeout=60.0)
    assert told.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert told.value.details() == f"Compression algorithm '{compression.name.lower()}' is disabled."
