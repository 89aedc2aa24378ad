"""Errors of connections that were not made: the target, the next action, and a proxy that is in the way."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest

import stepwire
from stepwire.connection.remedy import PROXIES, with_remedy
from stepwire.errors import Reason, UnavailableError

REFUSED = UnavailableError("failed to connect to all addresses; last error: … (UNAVAILABLE)")


def test_an_error_names_the_target_and_the_next_action() -> None:
    error = with_remedy(REFUSED, "host:50051", {})
    assert str(error).startswith("no server answers at 'host:50051': start a server there with `stepwire serve`, or ")
    assert str(error).endswith(f". {REFUSED}")
    assert isinstance(error, UnavailableError)
    assert error.reason is Reason.UNREACHABLE


@pytest.mark.parametrize("name", PROXIES)
def test_a_proxy_is_named_if_it_is_asked(name: str) -> None:
    environment = {name: "http://proxy:3128"}
    words = f"The environment names a proxy in {name}: a host in no_proxy is reached without it"
    assert words in str(with_remedy(REFUSED, "host:50051", environment))
    assert "proxy" not in str(with_remedy(REFUSED, "localhost:50051", environment))


def test_other_errors_stay_as_they_are() -> None:
    for error in (UnavailableError("Socket closed"), stepwire.SessionNotFoundError("failed to connect")):
        assert with_remedy(error, "host:50051", {}) is error


@contextlib.contextmanager
def proxy() -> Iterator[tuple[str, list[bytes]]]:
    """Refuse every request, as a proxy does that reaches no loopback addresses; the requests are kept."""
    requests: list[bytes] = []

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection:
                    requests.append(connection.recv(4096))
                    connection.sendall(b"HTTP/1.1 403 Forbidden\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", requests
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(60)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_no_proxy_is_asked_for_an_address_of_this_host(target: str, monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    port = target.rpartition(":")[2]
    for name in ("no_proxy", "no_grpc_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with proxy() as (address, requests):
        for name in PROXIES:
            monkeypatch.setenv(name, address)
        with stepwire.connect(f"{host}:{port}", timeout=120.0) as client:
            assert client.info().sessions >= 0
        assert requests == []
        with (
            stepwire.connect(f"no-such-host.invalid:{port}", timeout=1.0) as client,
            pytest.raises(UnavailableError, match=r"no server answers at .* proxy in grpc_proxy: .*response code 403"),
        ):
            client.info()
        assert requests
