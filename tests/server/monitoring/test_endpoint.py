"""Addresses for reading: where they may be, what they respond to, and that a slow or rude client harms nobody."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
from collections.abc import Callable, Iterator
from http import HTTPStatus

import pytest

from stepwire.errors import InvalidRequestError
from stepwire_server.config import ServerConfig
from stepwire_server.monitoring.connections import Connections
from stepwire_server.monitoring.endpoint import Address, Endpoint, Request, Response, checked_address


def respond(request: Request) -> Response:
    if request.path == "/broken":
        raise RuntimeError("a secret")
    if request.path == "/stream":
        return Response(HTTPStatus.OK, b"1", stream=iter((b"2", b"3")))
    text = f"{request.path} {request.query.get('query')} {request.headers.get('x-name')}"
    return Response(HTTPStatus.OK, text.encode(), headers={"X-Further": "yes"})


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    made = Endpoint(Address("127.0.0.1", 0, loopback=True), "metrics", respond)
    made.start()
    yield made
    made.close()


@pytest.fixture
def ask(endpoint: Endpoint) -> Callable[..., http.client.HTTPResponse]:
    def make(method: str, path: str, **headers: str) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", endpoint.port, timeout=60)
        connection.request(method, path, headers=headers)
        return connection.getresponse()

    return make


def test_a_get_has_a_path_a_query_and_headers(ask: Callable[..., http.client.HTTPResponse]) -> None:
    found = ask("GET", "/some/path?query=1", **{"X-NAME": "Ann"})
    assert (found.status, found.read()) == (200, b"/some/path 1 Ann")
    assert found.headers["X-Further"] == "yes"
    assert found.headers["X-Content-Type-Options"] == "nosniff"
    assert found.headers["Server"] == "stepwire"


def test_head_has_no_body_and_nothing_else_is_served(ask: Callable[..., http.client.HTTPResponse]) -> None:
    head = ask("HEAD", "/")
    assert (head.status, head.headers["Content-Length"], head.read()) == (200, "11", b"")
    assert [ask(method, "/").status for method in ("POST", "PUT", "DELETE")] == [501] * 3


def test_a_stream_follows_the_body(ask: Callable[..., http.client.HTTPResponse]) -> None:
    found = ask("GET", "/stream")
    assert (found.status, found.headers["Content-Length"], found.read()) == (200, None, b"123")


def test_an_error_tells_nothing(ask: Callable[..., http.client.HTTPResponse]) -> None:
    found = ask("GET", "/broken")
    assert (found.status, found.read()) == (500, b"internal error; the server's log explains it\n")


def test_silent_connections_do_not_keep_others_out(endpoint: Endpoint, ask: Callable[..., object]) -> None:
    silent = [socket.create_connection(("127.0.0.1", endpoint.port)) for _ in range(8)]
    assert ask("GET", "/").status == 200  # type: ignore[attr-defined]
    for connection in silent:
        connection.close()


def test_a_request_that_never_ends_gives_up_its_place(
    endpoint: Endpoint, ask: Callable[..., http.client.HTTPResponse]
) -> None:
    open_ = [socket.create_connection(("127.0.0.1", endpoint.port), timeout=60) for _ in range(32)]
    for connection in open_:
        connection.sendall(b"GET / HTTP/1.0\r\nx-name: A")
    assert ask("GET", "/").status == 200
    assert open_[0].recv(1) == b"", "the oldest is displaced"
    open_[-1].sendall(b"nn\r\n\r\n")
    assert open_[-1].makefile("rb").read().endswith(b"/ None Ann")
    for connection in open_:
        connection.close()


def test_responses_keep_their_places_and_a_connection_more_is_dropped() -> None:
    arrived, going = threading.Semaphore(0), threading.Event()

    def wait(request: Request) -> Response:
        arrived.release()
        going.wait(60.0)
        return respond(request)

    endpoint = Endpoint(Address("127.0.0.1", 0, loopback=True), "metrics", wait)
    endpoint.start()
    open_ = []
    for _ in range(32):
        open_.append(socket.create_connection(("127.0.0.1", endpoint.port), timeout=60))
        open_[-1].sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert arrived.acquire(timeout=60.0)
    with socket.create_connection(("127.0.0.1", endpoint.port), timeout=60) as beyond:
        assert beyond.recv(1) == b"", "the server has closed it"
    going.set()
    assert [connection.makefile("rb").read().endswith(b"/ None None") for connection in open_] == [True] * 32
    endpoint.close()
    for connection in open_:
        connection.close()


@pytest.mark.parametrize("lines", [1, 40])
def test_a_request_has_a_largest_size(endpoint: Endpoint, lines: int) -> None:
    with socket.create_connection(("127.0.0.1", endpoint.port), timeout=60) as connection:
        connection.sendall(b"GET / HTTP/1.0\r\n" + (b"x: " + bytes([120]) * (40_000 // lines) + b"\r\n") * lines)
        assert connection.recv(12) == b"HTTP/1.0 431"


def test_slow_requests_end_however_often_they_send_a_byte() -> None:
    now = [0.0]
    connections = Connections(3, 10.0, lambda: now[0])
    with contextlib.ExitStack() as stack:
        ends = [[stack.enter_context(end) for end in socket.socketpair()] for _ in range(4)]
        for index, (mine, _) in enumerate(ends[:3]):
            now[0] = float(index)
            assert connections.enter(mine)
        connections.asked(ends[0][0])
        now[0] = 11.5
        connections.end_slow()
        assert ends[1][1].recv(1) == b""
        for mine, other in (ends[0], ends[2]):
            mine.sendall(b"x")
            assert other.recv(1) == b"x"
        assert connections.enter(ends[3][0])
        connections.leave(ends[0][0])
        assert connections.enter(ends[1][0])
        connections.asked(ends[2][0])


def test_closing_twice_is_harmless_and_frees_the_port(endpoint: Endpoint) -> None:
    endpoint.close()
    endpoint.close()
    again = Endpoint(Address("127.0.0.1", endpoint.port, loopback=True), "metrics", respond)
    again.close()


def test_a_taken_port_is_named(endpoint: Endpoint) -> None:
    with pytest.raises(InvalidRequestError, match=rf"metrics: cannot listen on 127.0.0.1:{endpoint.port}: .*in use"):
        Endpoint(Address("127.0.0.1", endpoint.port, loopback=True), "metrics", respond)


@pytest.mark.parametrize("text", ["localhost", ":9464", "127.0.0.1:", "127.0.0.1:x", "127.0.0.1:65536"])
def test_an_address_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        checked_address(ServerConfig(metrics=text), "metrics")
    assert str(refused.value) == f"metrics: {text!r} is not host:port"


def test_loopback_needs_nothing() -> None:
    assert checked_address(ServerConfig(metrics="localhost:9464"), "metrics") == Address("localhost", 9464, True)
    assert checked_address(ServerConfig(metrics="[::1]:0"), "metrics") == Address("::1", 0, True)


def test_beyond_loopback_callers_bring_tokens_and_the_line_is_encrypted() -> None:
    with pytest.raises(InvalidRequestError, match="nothing would be asked of a caller; give --tokens"):
        checked_address(ServerConfig(metrics="0.0.0.0:9464", insecure=True), "metrics")
    with pytest.raises(InvalidRequestError, match="give --tokens with a token of the role reader, or a loopback"):
        checked_address(ServerConfig(status="0.0.0.0:9565", insecure=True), "status")
    with pytest.raises(InvalidRequestError, match="the token would travel in the clear; give --tls-cert"):
        checked_address(ServerConfig(metrics="0.0.0.0:9464", tokens="tokens"), "metrics")
    for accepted in ({"insecure": True}, {"tls_cert": "cert.pem"}):
        config = ServerConfig(metrics="0.0.0.0:9464", tokens="tokens", **accepted)
        assert checked_address(config, "metrics") == Address("0.0.0.0", 9464, False)
