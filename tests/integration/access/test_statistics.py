"""Statistics for those that may have them: of their own tenant's sessions, as long as their token is good."""

from __future__ import annotations

import numpy as np
import pytest

import stepwire
from stepwire_server.access.identity import Role
from stepwire_server.config import ServerConfig
from stepwire_server.server import Server
from tests.integration.access.conftest import Authority, Tokens
from tests.support.numpy_server import numpy_pool

GRADIENT = {"w": np.ones(4, np.float32)}


def test_each_tenant_sees_its_own_sessions_and_an_administrator_all(own: Authority, tokens: Tokens) -> None:
    ann, bob = tokens.add("ann", tenant="a"), tokens.add("bob", Role.READER, tenant="b")
    root = tokens.add("root", Role.ADMIN)
    scraper = tokens.add("prometheus", Role.METRICS)
    config = ServerConfig(
        bind="127.0.0.1:0",
        device="cpu",
        tls_cert=own.cert,
        tls_key=own.key,
        tokens=str(tokens.path),
        sweep_seconds=0.01,
    )
    with Server(config, pool=numpy_pool()) as server:

        def seen(token: str) -> list[str]:
            """Return the ids that a caller sees, and check that no total tells of others."""
            with stepwire.connect(server.target, tls=own.tls, token=token) as client:
                statistics, info = next(client.statistics()), client.info()
                ids = [session.session_id for session in statistics.sessions]
                load = statistics.servers[0]
                reserved = sum(session.memory_bytes for session in statistics.sessions)
                assert (load.sessions, load.parked, load.streams) == (len(ids), 0, len(ids))
                assert load.reserved_bytes["cpu"] == info.devices["cpu"]["reserved_bytes"]
                assert load.reserved_bytes["cpu"] == reserved or token == root, "kernels and staging are of all"
                assert info.sessions == len(ids)
                return ids

        with (
            stepwire.connect(server.target, tls=own.tls, token=ann) as client,
            client.create_session(GRADIENT, request_id="run") as session,
        ):
            session.step(GRADIENT)
            assert seen(ann) == seen(root) == [session.session_id]
            assert seen(bob) == []
            with pytest.raises(
                stepwire.PermissionDeniedError, match="role metrics, which may not call .*GetStatistics"
            ):
                seen(scraper)


def test_a_revoked_token_watches_no_longer(tokens: Tokens) -> None:
    token = tokens.add("bob", Role.READER)
    config = ServerConfig(bind="127.0.0.1:0", device="cpu", tokens=str(tokens.path), sweep_seconds=0.01)
    with (
        Server(config, pool=numpy_pool()) as server,
        stepwire.connect(server.target, token=token) as client,
    ):
        snapshots = client.statistics(interval=0.1)
        next(snapshots)
        tokens.revoke("bob")
        with pytest.raises(stepwire.AuthenticationError, match="the token is unknown here"):
            for _ in snapshots:
                pass
