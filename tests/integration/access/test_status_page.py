"""The status page of a server with tokens: a browser brings one as its password, and sees its tenant's sessions."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
from typing import Any

import numpy as np

import stepwire
from stepwire_server.access.identity import Role
from stepwire_server.config import ServerConfig
from stepwire_server.server import Server
from tests.integration.access.conftest import Tokens
from tests.support.numpy_server import numpy_pool

GRADIENT = {"w": np.ones(4, np.float32)}


def ask(server: Server, path: str, password: str | None = None) -> tuple[int, Any, str]:
    """Ask as a browser does; return the status, the challenge and the first event or the text."""
    assert server.monitoring.status is not None
    headers = {}
    if password is not None:
        headers["Authorization"] = f"Basic {base64.b64encode(f'anybody:{password}'.encode()).decode()}"
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.monitoring.status.port)) as connection:
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        if response.headers["Content-Type"] == "text/event-stream":
            lines = (response.readline().decode() for _ in range(100))
            return response.status, None, next(line for line in lines if line.startswith("data: "))
        return response.status, response.headers["WWW-Authenticate"], response.read().decode()


def test_a_browser_brings_a_token_and_sees_its_tenants_sessions(tokens: Tokens) -> None:
    ann, bob = tokens.add("ann", tenant="a"), tokens.add("bob", Role.READER, tenant="b")
    scraper = tokens.add("prometheus", Role.METRICS)
    config = ServerConfig(bind="127.0.0.1:0", device="cpu", status="127.0.0.1:0", tokens=str(tokens.path))
    with Server(config, pool=numpy_pool()) as server, stepwire.connect(server.target, token=ann) as client:
        with client.create_session(GRADIENT, label="secret plans") as session:
            status, challenge, _ = ask(server, "/")
            assert (status, challenge) == (401, 'Basic realm="stepwire"')
            assert ask(server, "/events", "sw_wrong")[0] == 401
            assert ask(server, "/", scraper)[0] == 403
            assert ask(server, "/", ann)[0] == 200
            own = json.loads(ask(server, f"/events?session={session.session_id}", ann)[2].removeprefix("data: "))
            assert [each["id"] for each in own["sessions"]] == [session.session_id]
            assert own["detail"]["id"] == session.session_id
            text = ask(server, f"/events?session={session.session_id}", bob)[2]
            others = json.loads(text.removeprefix("data: "))
            assert (others["sessions"], others["detail"], others["refusals"]) == ([], None, [])
            assert session.session_id not in text


def test_further_names_are_known_where_they_are_configured() -> None:
    config = ServerConfig(bind="127.0.0.1:0", device="cpu", status="127.0.0.1:0", status_hosts="Trainer.example,other")
    with Server(config, pool=numpy_pool()) as server:
        assert server.monitoring.status is not None
        found = []
        for host in ("trainer.example:8088", "other", "third"):
            with contextlib.closing(
                http.client.HTTPConnection("127.0.0.1", server.monitoring.status.port)
            ) as connection:
                connection.request("GET", "/", headers={"Host": host})
                found.append(connection.getresponse().status)
        assert found == [200, 200, 421]
