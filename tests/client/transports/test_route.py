"""The way that is found: over real sockets, against servers that offer what a test says."""

from __future__ import annotations

import concurrent.futures
import logging
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest

import stepwire
import stepwire_server.testing
from stepwire.connection.channel import Calls
from stepwire.connection.retry import Retry
from stepwire.errors import UnavailableError, UnsupportedFeatureError
from stepwire.results import TransportChoice
from stepwire.transports.route import Route, Router
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.wire.addresses import boot_id

ONE = {"w": np.ones(3, np.float32)}


class Answering(grpc.GenericRpcHandler):
    """Answers GetServerInfo, and nothing else, at a target of its own."""

    def __init__(self, target: str) -> None:
        self.info: pb.GetServerInfoResponse | None = pb.GetServerInfoResponse(instance_id="one")
        self.info.local.boot_id = boot_id()
        self.asked = 0
        self._server = grpc.server(concurrent.futures.ThreadPoolExecutor(4))
        self._server.add_generic_rpc_handlers((self,))
        port = self._server.add_insecure_port(target)
        self.target = target if target.startswith("unix:") else f"127.0.0.1:{port}"
        self._server.start()

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
            self.asked += 1
            if self.info is None:
                context.abort(grpc.StatusCode.INTERNAL, "a bug")
            return self.info.SerializeToString()

        return grpc.unary_unary_rpc_method_handler(answer)

    def close(self) -> None:
        self._server.stop(0).wait()


@pytest.fixture
def answering() -> Iterator[Callable[[str], Answering]]:
    """Start servers."""
    servers: list[Answering] = []

    def start(target: str = "127.0.0.1:0") -> Answering:
        servers.append(Answering(target))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def router() -> Iterator[Callable[..., Router]]:
    """Make routers that start at a target."""
    opened: list[Any] = []

    def make(target: str, asked: str = "auto") -> Router:
        calls = Calls(target, timeout_seconds=30.0, retry=Retry(sleep=lambda seconds: None))
        opened.extend([calls, Router(calls, asked)])
        made: Router = opened[-1]
        return made

    yield make
    for one in reversed(opened):
        one.close()


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Where a socket may lie."""
    return tmp_path_factory.mktemp("s") / "s.sock"


def find(router: Router, asked: str = "auto") -> Any:
    return router.find(asked, Retry().deadline(30.0))


def test_the_same_server_on_a_socket_is_the_better_way(answering: Any, router: Any, place: pathlib.Path) -> None:
    server, behind = answering(), answering(f"unix:{place}")
    server.info.local.unix_socket = str(place)
    way = find(router(server.target))
    assert (way.name, way.calls.target, "uds" in way.reasons) == ("uds", f"unix:{place}", False)
    assert (server.asked, behind.asked) == (1, 1)


def test_two_sessions_share_a_connection(answering: Any, router: Any, place: pathlib.Path) -> None:
    server, _ = answering(), answering(f"unix:{place}")
    server.info.local.unix_socket = str(place)
    routes = router(server.target)
    assert find(routes).calls is find(routes).calls


def test_another_server_on_the_socket_is_not_trusted(answering: Any, router: Any, place: pathlib.Path) -> None:
    server, impostor = answering(), answering(f"unix:{place}")
    server.info.local.unix_socket, impostor.info.instance_id = str(place), "two"
    way = find(router(server.target))
    assert (way.name, way.calls.target) == ("tcp", server.target)
    assert way.reasons["uds"] == f"another server answers on the socket {place}"
    server.info.instance_id = impostor.info.instance_id = ""
    assert find(router(server.target)).name == "tcp"


def test_a_socket_whose_server_fails_is_left(answering: Any, router: Any, place: pathlib.Path) -> None:
    server, broken = answering(), answering(f"unix:{place}")
    server.info.local.unix_socket, broken.info = str(place), None
    way = find(router(server.target))
    assert way.name == "tcp"
    assert way.reasons["uds"].startswith(f"the server does not answer on its socket {place}: a bug")


@pytest.mark.parametrize("asked", ["uds", "shm", "cuda_ipc"])
def test_what_is_asked_for_and_cannot_be_had_is_refused(answering: Any, router: Any, asked: str) -> None:
    server = answering()
    with pytest.raises(UnsupportedFeatureError) as refused:
        find(router(server.target), asked)
    problem = refused.value.metadata["problem"]
    assert refused.value.metadata == {"field": "transport", "feature": f"transport_{asked}", "problem": problem}
    assert str(refused.value).startswith(f"transport: {asked!r} cannot be had: {problem}; ")


def test_tcp_is_taken_without_asking_anybody(answering: Any, router: Any) -> None:
    server = answering()
    way = find(router(server.target), "tcp")
    assert (way.name, way.memories, server.asked) == ("tcp", (), 0)
    assert way.reasons == dict.fromkeys(("cuda_ipc", "packets", "shm", "uds"), "transport 'tcp' was asked for")


def test_a_target_that_is_a_socket_is_one(answering: Any, router: Any, place: pathlib.Path) -> None:
    server = answering(f"unix:{place}")
    assert find(router(server.target)).name == "uds"
    assert find(router(server.target), "uds").calls.target == server.target
    with pytest.raises(UnsupportedFeatureError, match=f"'tcp' cannot be had: the target unix:{place} has no port"):
        find(router(server.target), "tcp")


def test_a_server_that_does_not_tell_about_itself_is_used_as_named(answering: Any, router: Any) -> None:
    server = answering()
    server.info = None
    way = find(router(server.target))
    assert way.name == "tcp"
    assert set(way.reasons.values()) == {"the server does not tell which machine it runs on"}


def test_a_server_that_cannot_be_reached_is_told(answering: Any, router: Any) -> None:
    server = answering()
    server.close()
    with pytest.raises(UnavailableError):
        router(server.target).find("auto", Retry().deadline(0.2))


def test_memory_that_may_be_had_is_tried_when_a_stream_opens(answering: Any, router: Any, place: pathlib.Path) -> None:
    server, _ = answering(), answering(f"unix:{place}")
    server.info.local.unix_socket = server.info.local.handoff_socket = str(place)
    server.info.local.device_memory_off = "no GPU"
    way = find(router(server.target))
    assert (way.name, way.memories, way.reasons) == ("uds", ("packets", "shm"), {"cuda_ipc": "no GPU"})
    assert find(router(server.target), "shm").memories == ("shm",)
    uds = find(router(server.target), "uds")
    assert (uds.memories, uds.reasons) == (
        (),
        dict.fromkeys(("cuda_ipc", "packets", "shm"), "transport 'uds' was asked for"),
    )


# --- one session's route --------------------------------------------------------------------------------------


@pytest.fixture
def offered(answering: Any, place: pathlib.Path) -> Answering:
    """A server that offers shared memory."""
    server: Answering = answering()
    answering(f"unix:{place}")
    assert server.info is not None
    server.info.local.unix_socket = server.info.local.handoff_socket = str(place)
    server.info.local.device_memory_off = "no GPU"
    return server


def test_a_route_is_found_once_and_again_when_it_is_lost(offered: Answering, router: Any) -> None:
    route, deadline = Route(router(offered.target), "s"), Retry().deadline(30.0)
    assert route.way(deadline) is route.way(deadline)
    assert offered.asked == 1
    route.lost()
    route.way(deadline)
    assert offered.asked == 2


def test_what_is_settled_is_told_with_why_nothing_better_is(
    offered: Answering, router: Any, caplog: pytest.LogCaptureFixture
) -> None:
    route = Route(router(offered.target), "ab12")
    assert route.choice is None
    with caplog.at_level(logging.INFO, "stepwire"):
        way = route.way(Retry().deadline(30.0))
        route.settle(way, "shm")
        assert route.choice == TransportChoice("shm", {"cuda_ipc": "no GPU"})
        route.settle(way, "shm")
        route.refuse(way, "shm", "no room")
        route.settle(way)
    assert route.choice == TransportChoice("uds", {"cuda_ipc": "no GPU", "shm": "no room"})
    assert [record.getMessage() for record in caplog.records] == [
        "session ab12: transport shm; no cuda_ipc: no GPU",
        "session ab12: transport uds; no cuda_ipc: no GPU; no shm: no room",
    ]


def test_memory_that_was_asked_for_and_refused_is_an_error(offered: Answering, router: Any) -> None:
    route = Route(router(offered.target), "s", "shm")
    way = route.way(Retry().deadline(30.0))
    with pytest.raises(UnsupportedFeatureError, match="'shm' cannot be had: no room"):
        route.refuse(way, "shm", "no room")


def test_a_way_that_another_call_lost_meanwhile_is_settled_all_the_same(offered: Answering, router: Any) -> None:
    route = Route(router(offered.target), "s")
    way = route.way(Retry().deadline(30.0))
    route.lost()
    route.refuse(way, "shm", "no room")
    route.settle(way)
    assert route.choice == TransportChoice("uds", {"cuda_ipc": "no GPU", "shm": "no room"})


def test_a_way_that_was_found_for_another_transport_is_not_kept(
    offered: Answering, router: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user asks for another transport while a pull finds its way."""
    routes = router(offered.target)
    route, find_way = Route(routes, "s"), routes.find

    def find_late(asked: str, deadline: Any) -> Any:
        way = find_way(asked, deadline)
        monkeypatch.undo()
        route.ask("tcp")
        return way

    monkeypatch.setattr(routes, "find", find_late)
    assert route.way(Retry().deadline(30.0)).name == "uds"
    assert route.way(Retry().deadline(30.0)).name == "tcp"


def test_equal_reasons_are_told_once() -> None:
    choice = TransportChoice("tcp", {"cuda_ipc": "far", "shm": "far", "uds": "off"})
    assert str(choice) == "transport tcp; no cuda_ipc, shm: far; no uds: off"


# --- sessions -------------------------------------------------------------------------------------------------


def test_a_session_finds_the_socket_of_a_real_server(target: str) -> None:
    with stepwire.connect(target, timeout=120.0) as client, client.create_session(ONE) as session:
        assert session.transport is None
        session.attach(transport="uds")
        assert session.transport is not None
        assert session.transport.name == "uds"
        np.testing.assert_array_equal(session.step(ONE)["w"], np.float32([0.999] * 3))


def test_a_session_keeps_its_transport_when_another_is_refused(target: str) -> None:
    with stepwire.connect(target, transport="tcp") as client, client.create_session(ONE) as session:
        session.attach()
        before = session.transport
        with pytest.raises(UnsupportedFeatureError, match="'cuda_ipc' cannot be had"):
            session.attach(transport="cuda_ipc")
        session.step(ONE)
        assert session.transport == before
        assert before is not None
        assert (before.name, set(before.reasons)) == ("tcp", {"cuda_ipc", "packets", "shm", "uds"})


def test_the_environment_may_choose_for_who_does_not(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPWIRE_TRANSPORT", "tcp")
    for transport, name in (("auto", "tcp"), ("uds", "uds")):
        with stepwire.connect(target, transport=transport) as client, client.create_session(ONE) as session:
            session.attach()
            assert session.transport is not None
            assert session.transport.name == name


def test_a_server_without_local_ways_is_used_over_tcp() -> None:
    with (
        stepwire_server.testing.serving(unix_socket="off", shared_memory=False, packets=False) as target,
        stepwire.connect(target) as client,
        client.create_session(ONE) as session,
    ):
        session.step(ONE)
        assert session.transport is not None
        assert session.transport.name == "tcp"
        assert session.transport.reasons["uds"].startswith("the server has no Unix socket; ")
        assert "switched off" in session.transport.reasons["shm"]


def test_an_explicit_transport_fails_where_the_session_is_made() -> None:
    with stepwire_server.testing.serving(unix_socket="off") as target:
        with stepwire.connect(target, transport="uds") as client:
            with pytest.raises(UnsupportedFeatureError, match="'uds' cannot be had: the server has no Unix socket"):
                client.create_session(ONE)
            assert list(client.sessions()) == []


def test_a_server_that_starts_anew_tells_a_client_of_its_socket_that_the_session_is_gone() -> None:
    """Its private socket is gone with it; over the port the client learns the truth."""
    with stepwire_server.testing.serving() as target:
        client = stepwire.connect(target, timeout=120.0, retry=Retry(initial_seconds=0.001, max_seconds=0.01))
        session = client.create_session(ONE)
        session.attach(transport="uds")
        session.attach(transport="auto")
        session.step(ONE)
    with client, stepwire_server.testing.serving(bind=target):
        with pytest.raises(stepwire.SessionNotFoundError) as gone:
            session.step(ONE)
        assert gone.value.metadata["last_known_step"] == "1"
