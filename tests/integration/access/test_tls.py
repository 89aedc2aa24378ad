"""TLS over a real server: what is encrypted, who is let in, and what a client is told when it is not."""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import stepwire
from stepwire.errors import InvalidRequestError
from stepwire_server.server import Server
from tests.integration.access.conftest import Authority, authority
from tests.support.numpy_server import numpy_server

ZEROS = {"w": np.zeros(4, np.float32)}


@pytest.fixture
def server(own: Authority) -> Iterator[Server]:
    with numpy_server(tls_cert=own.cert, tls_key=own.key) as running:
        yield running


def at(server: Server) -> str:
    return f"localhost:{server.port}"


@pytest.mark.parametrize("transport", ["tcp", "uds", "shm"])
def test_steps_are_the_same_over_tls(server: Server, own: Authority, transport: str) -> None:
    with stepwire.connect(at(server), tls=own.tls, transport=transport) as client:
        session: Any = client.create_session(ZEROS, optimizer=stepwire.SGD(lr=1.0))
        np.testing.assert_array_equal(session.step({"w": np.ones(4, np.float32)})["w"], -1.0)
        assert session.transport.name == transport


def test_a_server_that_nobody_vouches_for_is_told_at_once(server: Server, tmp_path: pathlib.Path) -> None:
    other = authority(tmp_path / "other")
    with stepwire.connect(at(server), tls=other.tls, timeout=60.0) as client:
        with pytest.raises(stepwire.AuthenticationError, match=r"tls=stepwire\.TLS\(ca=…\)"):
            client.info()


def test_tls_to_a_server_without_it_is_told(own: Authority) -> None:
    with numpy_server() as plain, stepwire.connect(at(plain), tls=own.tls, timeout=60.0) as client:
        with pytest.raises(stepwire.AuthenticationError, match="the server speaks plaintext"):
            client.info()


def test_a_server_may_ask_for_certificates_of_clients(own: Authority, tmp_path: pathlib.Path) -> None:
    clients = authority(tmp_path / "clients", "client")
    with numpy_server(tls_cert=own.cert, tls_key=own.key, tls_client_ca=clients.ca) as server:
        tls = stepwire.TLS(ca=own.ca, cert=clients.cert, key=clients.key)
        with stepwire.connect(at(server), tls=tls) as client:
            assert client.info().sessions == 0
        with stepwire.connect(at(server), tls=own.tls, timeout=2.0) as client, pytest.raises(stepwire.StepwireError):
            client.info()


def test_new_certificates_serve_new_connections_and_no_step_is_lost(
    server: Server, own: Authority, tmp_path: pathlib.Path
) -> None:
    following = authority(tmp_path / "following")
    with stepwire.connect(at(server), tls=own.tls, transport="tcp") as client:
        session: Any = client.create_session(ZEROS, optimizer=stepwire.SGD(lr=1.0))
        session.step({"w": np.ones(4, np.float32)})
        for new, old in ((following.cert, own.cert), (following.key, own.key)):
            shutil.copy(new, old)
        with stepwire.connect(at(server), tls=following.tls) as another:
            assert another.info().sessions == 1
        np.testing.assert_array_equal(session.step({"w": np.ones(4, np.float32)})["w"], -2.0)
        (tmp_path / "own" / "cert.pem").write_text("no certificate")
        with stepwire.connect(at(server), tls=following.tls) as another:
            assert another.info().sessions == 1


def test_certificates_that_are_none_keep_a_server_from_starting(own: Authority, tmp_path: pathlib.Path) -> None:
    other = authority(tmp_path / "other")
    for settings, match in (
        ({"tls_cert": own.cert}, "give both"),
        ({"tls_cert": own.cert, "tls_key": other.key}, "PEM"),
        ({"tls_cert": str(tmp_path / "none"), "tls_key": own.key}, "No such file"),
        ({"tls_cert": own.cert, "tls_key": own.key, "tls_client_ca": own.key}, "tls_client_ca"),
    ):
        with pytest.raises(InvalidRequestError, match=match), numpy_server(**settings):
            pass


def test_a_client_with_half_a_certificate_is_refused(own: Authority) -> None:
    with pytest.raises(stepwire.InvalidRequestError, match="go together"):
        stepwire.connect("localhost:1", tls=stepwire.TLS(cert=own.cert))
    with pytest.raises(stepwire.InvalidRequestError, match="cannot be read"):
        stepwire.connect("localhost:1", tls=stepwire.TLS(ca="/nowhere/ca.pem"))
