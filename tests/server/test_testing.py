"""The server that tests of others run in their own process."""

from __future__ import annotations

import pytest

import stepwire
import stepwire_server.testing


def test_a_server_serves_for_a_block() -> None:
    with stepwire_server.testing.serving(max_sessions=2) as target, stepwire.connect(target) as client:
        assert list(client.info().devices) == ["cpu"]
        assert target.startswith("127.0.0.1:")
    with stepwire.connect(target, timeout=0.1) as client, pytest.raises(stepwire.UnavailableError):
        client.info()


def test_settings_are_the_servers() -> None:
    with stepwire_server.testing.serving(max_chunk_bytes=65536) as target, stepwire.connect(target) as client:
        assert client.info().max_chunk_bytes == 65536
    with pytest.raises(TypeError, match="max_sesions"), stepwire_server.testing.serving(max_sesions=1):
        raise AssertionError("served")


def test_servers_of_one_process_are_apart() -> None:
    with (
        stepwire_server.testing.serving() as one,
        stepwire_server.testing.serving() as other,
        stepwire.connect(one) as here,
        stepwire.connect(other) as there,
    ):
        assert one != other
        assert here.info().instance_id != there.info().instance_id
