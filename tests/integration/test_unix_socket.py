"""A server without a port: everything that works over TCP works over a Unix socket, for whom the socket is open to.

The cuts, strandings and silences of the other tests here run over both: see `proxy` in the conftest.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from structlog.testing import capture_logs

import stepwire
from stepwire_server.config import ServerConfig
from stepwire_server.server import Server
from tests.integration.processes import run_command
from tests.integration.training import SMALL, TINY, WIDE, Model, bits, same_bits
from tests.support.raw import RawClient

_NOBODY = 65534
_AS_NOBODY = """
import json, os, sys
import numpy as np, stepwire

def use():
    with stepwire.connect(sys.argv[1], timeout=120.0) as client:
        with client.create_session({"w": np.ones(1, np.float32)}, optimizer=stepwire.SGD(lr=0.5)) as session:
            value = session.step({"w": np.ones(1, np.float32)})["w"].tolist()
            return session.transport.name, session.transport.reasons.get("uds"), value

use()  # as root, so that all is imported: the interpreter may lie where the other user cannot read it
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
print(json.dumps(use()))
"""


@pytest.fixture
def folder() -> Iterator[pathlib.Path]:
    """Where sockets lie."""
    with tempfile.TemporaryDirectory(prefix="unix-") as folder:
        yield pathlib.Path(folder)


@pytest.fixture
def alone(folder: pathlib.Path, settings: dict[str, Any]) -> Iterator[Server]:
    """A server that only listens on a socket."""
    with Server(ServerConfig(bind=f"unix:{folder}/s", device="cpu", **settings)) as server:
        yield server


@pytest.mark.parametrize("model", [SMALL, WIDE], ids=lambda model: model.name)
def test_training_gives_the_bits_that_it_gives_over_tcp(
    alone: Server, server: Server, connect: Callable[[str], stepwire.Client], model: Model
) -> None:
    there, here = model.create(connect(server.target)), model.create(connect(alone.target))
    for step in range(1, 4):
        gradient = model.gradient(step)
        assert bits(here.step(gradient)) == bits(there.step(gradient))
    assert same_bits(here.state(), there.state())
    assert here.transport is not None
    assert there.transport is not None
    assert (here.transport.name, there.transport.name) == ("uds", "tcp")


def test_both_addresses_of_a_server_reach_the_same_sessions(
    server: Server, connect: Callable[[str], stepwire.Client]
) -> None:
    session = TINY.create(connect(server.target))
    session.step(TINY.gradient(1))
    other = connect(f"unix:{server.unix_socket}").session(session.session_id)
    assert (other.applied_step, bits(other.pull())) == (1, bits(session.pull()))
    other.step(TINY.gradient(2))
    with pytest.raises(stepwire.FencedError):
        session.step(TINY.gradient(3))


def test_the_server_says_over_what_each_client_came(server: Server, connect: Callable[[str], stepwire.Client]) -> None:
    with capture_logs() as lines:
        for target in (server.target, f"unix:{server.unix_socket}"):
            TINY.create(connect(target)).attach()
    told = [line["transport"] for line in lines if line["event"] == "attached"]
    assert told == ["tcp", "uds"]


def test_a_client_of_another_language_needs_nothing_else(alone: Server) -> None:
    with RawClient(alone.target) as raw:
        created = raw.create(4)
        assert raw.info().sessions == 1
        assert raw.attach(created.session.session_id).receive() is not None


@pytest.mark.parametrize("command", [("health",), ("sessions", "list"), ("doctor",)])
def test_commands_take_a_socket_for_a_target(alone: Server, command: tuple[str, ...]) -> None:
    assert run_command(*command, "--target", alone.target, "--json") == 0


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_user_is_shut_out_of_the_socket_and_told_what_to_do(server: Server) -> None:
    """The port is open to every user of the machine, as ever."""
    done = subprocess.run(
        [sys.executable, "-c", _AS_NOBODY, server.target],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    name, reason, value = json.loads(done.stdout)
    assert (name, value) == ("tcp", [0.5])
    assert reason == (
        f"the server's socket {server.unix_socket} is closed to uid {_NOBODY}; run both as one user; in a container: "
        "docker run --user 0:0"
    )
