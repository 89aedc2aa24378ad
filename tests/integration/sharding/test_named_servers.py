"""Several servers behind one name: a client finds its shards by what servers tell, and follows one that moves."""

from __future__ import annotations

import contextlib
import pathlib
import random
import socket
from typing import Any

import pytest

import stepwire
from stepwire_server.server import Server
from tests.integration.sharding.test_moves import NAMES, START, gradients, undisturbed
from tests.support.numpy_server import numpy_server

ONCE = stepwire.Retry(uniform=lambda low, high: 3600.0)
"""Repeats nothing: the pause would be beyond every deadline."""

trustme = pytest.importorskip("trustme")


class Name:
    """A name whose addresses are those of this host's loopback, in another order each time.

    Attributes:
        host: the name.
        port: the port of all servers; 0 before the first.
        addresses: the addresses of the name.
    """

    host = "stepwire.test"

    def __init__(self) -> None:
        self.port, self._chance = 0, random.Random(7)
        self.addresses: list[str] = []
        self._resolve = socket.getaddrinfo

    @property
    def target(self) -> str:
        return f"dns:///{self.host}:{self.port}"

    def resolved(self, host: Any, port: Any, **options: Any) -> list[Any]:
        if host != self.host:
            return self._resolve(host, port, **options)  # type: ignore[return-value]
        self._chance.shuffle(self.addresses)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, port)) for each in self.addresses]


@pytest.fixture
def name(monkeypatch: pytest.MonkeyPatch) -> Name:
    """A name without servers."""
    made = Name()
    monkeypatch.setattr(socket, "getaddrinfo", made.resolved)
    return made


class Shards:
    """Servers at one port, each at an address of its own."""

    def __init__(self, name: Name, folder: pathlib.Path, stack: contextlib.ExitStack) -> None:
        self._name, self._folder, self._stack = name, folder, stack

    def serve(self, shard: str, address: str, **settings: Any) -> Server:
        kept = {"data_dir": str(self._folder / shard)} if shard else {}
        bind = f"{address}:{self._name.port}"
        server = self._stack.enter_context(numpy_server(bind=bind, shard=shard, **kept, **settings))
        self._name.port = server.port
        self._name.addresses.append(address)
        return server


def test_shards_are_those_that_servers_tell_and_one_that_moves_is_followed(name: Name, tmp_path: pathlib.Path) -> None:
    expected = undisturbed(4)
    with contextlib.ExitStack() as stack:
        shards = Shards(name, tmp_path, stack)
        shards.serve("b", "127.0.0.2")
        shards.serve("a", "127.0.0.3")
        client = stack.enter_context(stepwire.connect(f"{name.target}?shards=2", timeout=120.0))
        assert client.targets == (f"{name.target}/a", f"{name.target}/b")
        told = client.info()
        assert (told.shard, told.epoch) == ("a,b", 1)
        session = client.create_session(
            START, optimizer=stepwire.Adam(lr=0.1), clip_grad_norm=1.0, durability="journal", request_id="job"
        )
        replies = []
        for step in range(4):
            if step == 2:
                shards.serve("b", "127.0.0.4")  # it owns the data of b from now on, and the old one is still there
            reply = session.step(gradients(step))
            replies.append(b"".join(reply[each].tobytes() for each in NAMES))
        assert replies == expected
        assert [shard.info().epoch for shard in session.shards] == [1, 2]
        with stepwire.connect(name.target) as another:
            assert another.session(session.session_id).applied_step == 4
        with stepwire.connect(client.targets[1]) as one:
            assert (one.targets, one.info().shard, one.info().epoch) == (client.targets[1:], "b", 2)


def test_a_name_of_too_few_shards_is_told_with_their_number(name: Name, tmp_path: pathlib.Path) -> None:
    with contextlib.ExitStack() as stack:
        shards = Shards(name, tmp_path, stack)
        for shard, address in (("a", "127.0.0.2"), ("b", "127.0.0.3")):
            shards.serve(shard, address)
        with pytest.raises(
            stepwire.UnavailableError, match="has 2 shards so far, and 3 are asked for; start the others"
        ):
            stepwire.connect(f"{name.target}?shards=3", retry=ONCE)
        shards.serve("", "127.0.0.4")
        with pytest.raises(stepwire.InvalidRequestError, match=r"of 3 servers, and the one at 127.0.0.4:.* no shard"):
            stepwire.connect(name.target)


def test_a_certificate_of_the_name_is_that_of_each_address(name: Name, tmp_path: pathlib.Path) -> None:
    made = trustme.CA()
    issued = made.issue_cert(name.host)
    made.cert_pem.write_to_path(tmp_path / "ca.pem")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    issued.private_key_pem.write_to_path(tmp_path / "key.pem")
    files = {"tls_cert": str(tmp_path / "cert.pem"), "tls_key": str(tmp_path / "key.pem")}
    with contextlib.ExitStack() as stack:
        shards = Shards(name, tmp_path, stack)
        for shard, address in (("a", "127.0.0.2"), ("b", "127.0.0.3")):
            shards.serve(shard, address, **files)
        tls = stepwire.TLS(ca=str(tmp_path / "ca.pem"))
        with stepwire.connect(name.target, tls=tls) as client:
            assert client.info().shard == "a,b"
        with pytest.raises(stepwire.AuthenticationError, match="the server's certificate is of another host"):
            stepwire.connect(f"127.0.0.2:{name.port}", tls=tls).info()
