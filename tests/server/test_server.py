"""Wiring: where a server listens and does not, and how it ends."""

from __future__ import annotations

import pathlib
import queue
import socket
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2
from structlog.testing import capture_logs

from stepwire.errors import InvalidRequestError, UnsupportedFeatureError
from stepwire_server.config import ServerConfig
from stepwire_server.devices.pool import DevicePool
from stepwire_server.server import Server
from tests.server.pretended_engine import PretendedEngine


def make(**settings: Any) -> Server:
    return Server(ServerConfig(**{"bind": "127.0.0.1:0", "device": "cpu", "threads": 1} | settings))


@pytest.mark.parametrize(
    "bind",
    [
        "",
        "localhost",
        "127.0.0.1",
        ":50051",
        "127.0.0.1:",
        "127.0.0.1:port",
        "127.0.0.1:-1",
        "127.0.0.1:5 ",
        "127.0.0.1:65536",
        "127.0.0.1:99999999",
        "127.0.0.1:\u00b2",
    ],
)
def test_an_address_that_is_none_is_refused(bind: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        make(bind=bind)
    assert str(refused.value) == f"bind: {bind!r} is not host:port or unix:/path"
    assert refused.value.metadata == {"field": "bind"}


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "[::]", "10.0.0.1", "192.0.2.7", "example.com", "[2001:db8::1]", "127.0.0"]
)
def test_plaintext_beyond_this_machine_is_refused_unless_accepted(host: str) -> None:
    """Facts, attack 16."""
    with pytest.raises(InvalidRequestError, match="is not a loopback address .* accept it with --insecure") as refused:
        make(bind=f"{host}:0")
    assert refused.value.metadata == {"field": "bind"}


def test_accepted_plaintext_is_served() -> None:
    with make(bind="0.0.0.0:0", insecure=True) as server:
        assert server.target == f"0.0.0.0:{server.port}"
        assert server.port > 0


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "localhost"])
def test_a_loopback_address_is_served(host: str, connect: Any) -> None:
    with make(bind=f"{host}:0") as server, connect(server.target) as wire:
        assert server.target == f"{host}:{server.port}"
        assert wire.info().sessions == 0


def test_an_address_that_is_taken_is_refused() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        bind = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(InvalidRequestError, match=f"cannot listen on '{bind}': the port is taken"):
            make(bind=bind)


def test_a_server_that_cannot_listen_closes_its_devices() -> None:
    engine = PretendedEngine("cuda:0")
    with make() as server, pytest.raises(InvalidRequestError, match="the port is taken"):
        Server(ServerConfig(bind=server.target), pool=DevicePool.of([engine]))
    assert engine.closed == 1


def test_a_server_that_cannot_start_closes_its_devices(tmp_path: pathlib.Path) -> None:
    engine = PretendedEngine("cpu")
    config = ServerConfig(bind="127.0.0.1:0", port_file=str(tmp_path / "nowhere" / "port"))
    with pytest.raises(InvalidRequestError, match="port_file"):
        Server(config, pool=DevicePool.of([engine])).__enter__()
    assert engine.closed == 1


def test_a_server_says_which_devices_it_serves_and_why() -> None:
    with capture_logs() as lines:
        make(memory_budget=12345).close()
    chosen, device, *_ = lines
    assert (chosen["event"], chosen["devices"], chosen["why"]) == ("devices chosen", "cpu", "the CPU was asked for")
    assert (device["event"], device["name"], device["budget_bytes"]) == ("device", "cpu", 12345)


@pytest.mark.parametrize(("level", "expected"), [("debug", [1, 2]), ("info", [])])
def test_a_server_that_logs_at_debug_tells_each_commit(
    connect: Any, make_config: Any, make_live: Any, level: str, expected: list[int]
) -> None:
    with capture_logs() as lines, make(log_level=level) as server, connect(server.target) as wire:
        live = make_live(wire, wire.create(make_config((10,))))
        for step in (1, 2, 2):
            live.step(step)
    committed = [line for line in lines if line["event"] == "committed"]
    assert [line["step"] for line in committed] == expected
    assert {(line["session_id"], line["log_level"]) for line in committed} <= {(live.id, "debug")}


def test_two_servers_do_not_share_a_port() -> None:
    with make() as server, pytest.raises(InvalidRequestError, match="the port is taken"):
        make(bind=server.target)


@pytest.mark.parametrize("device", ["cuda", "cuda:7"])
def test_a_device_that_is_not_there_is_refused(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(UnsupportedFeatureError, match="CuPy cannot be imported"):
        make(device=device)


def test_the_port_is_written_whole_once_the_server_listens(tmp_path: pathlib.Path, connect: Any) -> None:
    path = tmp_path / "port"
    server = make(port_file=str(path))
    assert not path.exists()
    with server, connect(f"127.0.0.1:{int(path.read_text())}") as wire:
        assert wire.info().sessions == 0
        assert list(tmp_path.iterdir()) == [path]


def test_health_follows_the_server() -> None:
    server = make()
    with server, grpc.insecure_channel(server.target) as channel:
        check = channel.unary_unary("/grpc.health.v1.Health/Check")

        def health(service: str) -> int:
            request = health_pb2.HealthCheckRequest(service=service).SerializeToString()
            return int(health_pb2.HealthCheckResponse.FromString(check(request)).status)

        for service in ("", "stepwire.v1.OptimizerService"):
            assert health(service) == health_pb2.HealthCheckResponse.SERVING
        assert server.drain() is True
        for service in ("", "stepwire.v1.OptimizerService"):
            assert health(service) == health_pb2.HealthCheckResponse.NOT_SERVING


def test_closing_twice_frees_everything_once(connect: Any, make_config: Any, make_live: Any) -> None:
    with make() as server:
        with connect(server.target) as wire:
            live = make_live(wire, wire.create(make_config((10,))))
            live.step(1)
        server.close()
        assert server.registry.statistics()[:3] == (0, 0, 0)
    server.close()


def test_draining_and_closing_end_every_device(connect: Any, make_config: Any, make_live: Any) -> None:
    engines = [PretendedEngine("cuda:0"), PretendedEngine("cuda:1")]
    pool = DevicePool.of(engines, 10_000)
    with Server(ServerConfig(bind="127.0.0.1:0"), pool=pool) as server, connect(server.target) as wire:
        for _ in engines:
            make_live(wire, wire.create(make_config((10,)))).step(1)
        assert server.drain() is True
        assert [device.budget.reserved_bytes for device in pool] == [120, 120], "what is there can still be pulled"
    server.close()
    assert [device.budget.reserved_bytes for device in pool] == [0, 0]
    assert [engine.closed for engine in engines] == [1, 1]


def test_a_server_tells_what_it_is_doing(connect: Any, make_config: Any, make_live: Any) -> None:
    with make(memory_budget=10_000) as server, connect(server.target) as wire:
        make_live(wire, wire.create(make_config((10,)))).step(1)
        doing = server.statistics()
        assert doing.registry == server.registry.statistics()
        assert doing.registry[2:] == (120, 10_000, 0)
        assert (doing.drain, doing.handoff) == ((False, 0), server.handoff.statistics())
        server.drain()
        assert server.statistics().drain == (True, 0)


def test_a_sweep_that_fails_is_not_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    sweeps = queue.SimpleQueue[int]()

    def sweep() -> list[str]:
        sweeps.put(1)
        raise RuntimeError("a broken device")

    server = make(sweep_seconds=0.001)
    monkeypatch.setattr(server.registry, "sweep", sweep)
    with server:
        assert [sweeps.get(timeout=60.0) for _ in range(3)] == [1, 1, 1]


def test_a_server_that_was_never_started_can_be_closed() -> None:
    server = make()
    server.close()
    server.close()


def test_closing_cuts_streams_that_are_attached(connect: Any, make_config: Any, make_live: Any, refusal: Any) -> None:
    with make() as server, connect(server.target) as wire:
        live = make_live(wire, wire.create(make_config((10,))))
        stream = wire.open()
        stream.send(live.opening())
        stream.receive()
        server.close()
        with pytest.raises(Exception) as ended:
            stream.receive()
        assert getattr(ended.value, "code", "ended well") in ("CANCELLED", "UNAVAILABLE")
