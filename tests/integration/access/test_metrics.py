"""Metrics for those that may have them: a token of the right role, over TLS beyond this machine."""

from __future__ import annotations

import ssl
import urllib.error
import urllib.request
from typing import Any

import pytest

from stepwire_server.access.identity import Role
from stepwire_server.config import ServerConfig
from stepwire_server.server import Server
from tests.integration.access.conftest import Authority, Tokens

pytest.importorskip("prometheus_client", reason="prometheus-client is not installed: pip install 'stepwire[metrics]'")


def make(**settings: Any) -> Server:
    return Server(ServerConfig(bind="127.0.0.1:0", device="cpu", threads=1, **settings))


def ask(server: Server, token: str | None, context: ssl.SSLContext | None = None) -> tuple[int, str]:
    """Ask for the metrics; return the status and the beginning of the text."""
    assert server.monitoring.metrics is not None
    url = f"{server.monitoring.metrics.url.replace('0.0.0.0', '127.0.0.1')}/metrics"
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), context=context) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as refused:
        with refused:
            return refused.code, refused.read().decode()


def test_a_server_with_tokens_asks_for_one(tokens: Tokens) -> None:
    trainer, scraper = tokens.add("ann"), tokens.add("prometheus", Role.METRICS)
    with make(metrics="127.0.0.1:0", tokens=str(tokens.path)) as server:
        status, text = ask(server, None)
        assert (status, text.partition(":")[0]) == (401, "this server needs a token")
        assert ask(server, "sw_wrong") == (
            401,
            "the token is unknown here; ask the server's operator for another one\n",
        )
        status, text = ask(server, trainer)
        assert (status, text.partition(";")[0]) == (
            403,
            "the token 'ann' has the role trainer, which may not call /metrics",
        )
        status, text = ask(server, scraper)
        assert status == 200
        assert "stepwire_build_info{" in text


def test_beyond_loopback_the_certificate_of_the_server_is_shown(own: Authority, tokens: Tokens) -> None:
    scraper = tokens.add("prometheus", Role.METRICS)
    settings = {"tls_cert": own.cert, "tls_key": own.key, "tokens": str(tokens.path)}
    with make(metrics="0.0.0.0:0", **settings) as server:
        assert server.monitoring.metrics is not None
        assert server.monitoring.metrics.url.startswith("https://")
        assert ask(server, scraper, ssl.create_default_context(cafile=own.ca))[0] == 200
