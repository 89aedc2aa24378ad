"""TLS over a real server: what is encrypted, who is let in, and what a client is told when it is not."""

from __future__ import annotations

import pathlib
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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
        other = authority(tmp_path / "other", "eve")
        for wrong, words in (
            (own.tls, r"asks for a client's certificate; give tls=stepwire\.TLS\(cert=…, key=…\)"),
            (stepwire.TLS(ca=own.ca, cert=other.cert, key=other.key), "does not accept this client's certificate"),
            (None, r"the server speaks TLS; connect with tls=True"),
        ):
            with stepwire.connect(at(server), tls=wrong, timeout=60.0) as client:
                with pytest.raises(stepwire.AuthenticationError, match=words):  # at once: not after a minute
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


def test_certificates_rotate_while_a_session_steps_and_no_step_is_lost_or_doubled(
    server: Server, own: Authority, tmp_path: pathlib.Path
) -> None:
    """Each new connection is over the newest certificate; a step is sent over each of them in turn."""
    over, steps = threading.Event(), [0]
    ones = {"w": np.ones(4, np.float32)}
    with stepwire.connect(at(server), tls=own.tls, transport="tcp") as client:
        session: Any = client.create_session(ZEROS, optimizer=stepwire.SGD(lr=1.0))

        def train() -> None:
            while not over.is_set():
                session.step(ones)
                steps[0] += 1

        with ThreadPoolExecutor(1) as threads:
            training = threads.submit(train)
            try:
                for number in range(3):
                    following = authority(tmp_path / f"following-{number}")
                    for new, old in ((following.cert, own.cert), (following.key, own.key)):
                        shutil.copy(new, old)
                    with stepwire.connect(at(server), tls=following.tls) as another:
                        assert another.info().sessions == 1
            finally:
                over.set()
            training.result()
        assert steps[0] == session.applied_step == session.info().applied_step > 0
        np.testing.assert_array_equal(session.pull()["w"], -float(steps[0]))


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


@pytest.fixture
def clients(tmp_path: pathlib.Path) -> Authority:
    """An authority of clients, and a certificate that it has signed."""
    return authority(tmp_path / "clients", "ann")


def mutual(own: Authority, client: Authority) -> stepwire.TLS:
    return stepwire.TLS(ca=own.ca, cert=client.cert, key=client.key)


def test_after_the_authority_of_clients_has_changed_its_clients_are_out(
    own: Authority, clients: Authority, tmp_path: pathlib.Path
) -> None:
    """Over connections that are open still: calls are refused, and silent streams end within a sweep."""
    following = authority(tmp_path / "following", "bob")
    settings = {"tls_cert": own.cert, "tls_key": own.key, "tls_client_ca": clients.ca, "sweep_seconds": 3600.0}
    with numpy_server(**settings) as server:
        with stepwire.connect(at(server), tls=mutual(own, clients), transport="tcp") as client:
            session: Any = client.create_session(ZEROS, optimizer=stepwire.SGD(lr=1.0), keep=True)
            session.step({"w": np.ones(4, np.float32)})
            shutil.copy(following.ca, clients.ca)
            server.access.look()  # as the sweep does
            while server.registry.statistics().streams:  # it waited for a message, and has ended
                pass
            for call in (client.info, lambda: session.step({"w": np.ones(4, np.float32)})):
                with pytest.raises(stepwire.AuthenticationError, match="no authority in --tls-client-ca vouches for"):
                    call()
        with stepwire.connect(at(server), tls=mutual(own, following)) as client:
            assert client.session(session.own_id).info().applied_step == 1


def test_a_connection_does_not_outlive_its_certificate(own: Authority, clients: Authority) -> None:
    with numpy_server(tls_cert=own.cert, tls_key=own.key, tls_client_ca=clients.ca) as server:
        with stepwire.connect(at(server), tls=mutual(own, clients), transport="tcp") as client:
            session: Any = client.create_session(ZEROS, optimizer=stepwire.SGD(lr=1.0), keep=True)
            session.step({"w": np.ones(4, np.float32)})
            assert server.access.certificates is not None
            server.access.certificates.clock = lambda: 1e11  # after the year 3000
            for call in (lambda: session.step({"w": np.ones(4, np.float32)}), client.info):
                with pytest.raises(stepwire.AuthenticationError, match=r"the certificate 'CN=ann.*' has expired"):
                    call()


def test_a_unix_socket_asks_for_no_certificate_and_is_there_if_it_is_named(
    own: Authority, clients: Authority, tmp_path: pathlib.Path
) -> None:
    """By itself it would be a way past the port's certificates, which clients of this host would take unasked."""
    settings = {"tls_cert": own.cert, "tls_key": own.key, "tls_client_ca": clients.ca}
    with numpy_server(**settings) as server:
        assert server.unix_socket == ""
        mine = stepwire.TLS(ca=own.ca, cert=clients.cert, key=clients.key)
        with stepwire.connect(server.target, tls=mine) as client:
            session = client.create_session({"w": np.zeros(4, np.float32)})
            session.step({"w": np.ones(4, np.float32)})
            (stream,) = server.registry.streams
            assert stream.transport == "packets"
            stream.check()
    with numpy_server(**settings, unix_socket=str(tmp_path / "s")) as server:
        with stepwire.connect(f"unix:{server.unix_socket}") as client:
            assert client.info().sessions == 0
