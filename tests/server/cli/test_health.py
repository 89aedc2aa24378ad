"""`stepwire health`: which server is asked, and its state as an exit code."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
import pytest

import stepwire
from stepwire.connection.remedy import with_remedy
from stepwire.errors import Reason, UnavailableError, error_from_code
from stepwire_server.config import beside_target, named_bind
from stepwire_server.testing import serving


@pytest.fixture
def session(server: Any) -> Any:
    """A session of the server."""
    with stepwire.connect(server.target) as client, client.create_session({"w": np.ones(3, np.float32)}) as session:
        yield session


def test_a_healthy_server_is_reported(command: Any, server: Any, session: Any) -> None:
    code, out, err = command("health", "--target", server.target)
    assert (code, err) == (0, "")
    assert out.startswith(f"{server.target}: serving, version {stepwire.__version__}, ")
    assert out.endswith(" sessions on cpu\n")
    code, out, _ = command("health", "-t", server.target, "--json")
    info = json.loads(out)
    assert (code, info["version"], info["draining"], list(info["devices"])) == (
        0,
        stepwire.__version__,
        False,
        ["cpu"],
    )
    assert info["sessions"] >= 1


def test_the_target_may_come_from_the_environment(command: Any, server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPWIRE_TARGET", server.target)
    assert command("health").code == 0


def test_the_server_beside_is_asked_where_no_target_is_named(
    command: Any, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEPWIRE_BIND", f"0.0.0.0:{server.port}")
    assert command("health").out.startswith(f"localhost:{server.port}: serving, ")


@pytest.mark.parametrize(
    ("bind", "target"),
    [
        (None, "localhost:50051"),
        ("", "localhost:50051"),
        ("127.0.0.1:0", "localhost:50051"),
        ("0.0.0.0:7", "localhost:7"),
        ("[::]:7", "localhost:7"),
        ("10.0.0.1:7", "10.0.0.1:7"),
        ("unix:/run/x", "unix:/run/x"),
    ],
)
def test_where_the_server_beside_is(bind: str | None, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if bind is None:
        monkeypatch.delenv("STEPWIRE_BIND", raising=False)
    else:
        monkeypatch.setenv("STEPWIRE_BIND", bind)
    assert beside_target(named_bind()) == target


def test_a_draining_server_is_unhealthy(command: Any, serve: Any) -> None:
    with serve() as server:
        server.drain()
        code, out, _ = command("health", "-t", server.target)
        assert (code, f"{server.target}: draining, " in out) == (1, True)
        code, out, _ = command("health", "-t", server.target, "--json")
        assert (code, json.loads(out)["draining"]) == (1, True)


def test_a_server_that_refuses_the_question_is_alive(command: Any, tmp_path: pathlib.Path) -> None:
    """A supervisor that restarted it would end every session, because its own token is missing."""
    tokens = tmp_path / "tokens"
    tokens.write_text("[]")
    with serving(tokens=str(tokens)) as target:
        code, out, err = command("health", "-t", target)
        assert (code, err) == (0, "")
        assert out.startswith(f"{target}: serving, and refuses this call: this server needs a token")
        code, out, _ = command("health", "-t", target, "--json")
        assert (code, json.loads(out)) == (0, {"refused": "UNAUTHENTICATED"})


def test_a_server_with_too_many_calls_is_alive(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call beyond the most is refused by gRPC with a bare status."""
    busy = error_from_code("RESOURCE_EXHAUSTED", "Concurrent RPC limit exceeded!")

    def refuse(self: stepwire.Client) -> None:
        raise busy

    monkeypatch.setattr(stepwire.Client, "info", refuse)
    code, out, err = command("health", "-t", "127.0.0.1:1")
    assert (code, err) == (0, "")
    assert out == f"127.0.0.1:1: serving, and refuses this call: {busy}\n"


def test_a_failed_handshake_is_no_sign_of_life(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: stepwire.Client) -> None:
        raise with_remedy(UnavailableError("failed to connect: Ssl handshake failed", reason=Reason.UNREACHABLE), "x:1")

    monkeypatch.setattr(stepwire.Client, "info", fail)
    code, out, err = command("health", "-t", "127.0.0.1:1")
    assert (code, out) == (2, "")
    assert err.startswith("stepwire: the TLS handshake with 'x:1' failed")
