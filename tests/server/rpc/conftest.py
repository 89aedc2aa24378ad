"""Sessions and streams for tests of the edge of gRPC."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from stepwire.v1 import optimizer_service_pb2 as pb
from tests.server.rpc.streams import Attached


@pytest.fixture
def large(wire: Any, make_config: Any, make_live: Any) -> Iterator[Any]:
    """A session whose gradient and reply need several messages."""
    live = make_live(wire, wire.create(make_config((150, 300))))
    yield live
    wire.unary("DeleteSession", pb.DeleteSessionRequest(session_id=live.id))


@pytest.fixture
def attach() -> Iterator[Callable[..., Attached]]:
    """Attach: `attach(live, token)`; 0 acquires the worker from its holder."""
    made: list[Attached] = []

    def attached(live: Any, token: int = 0, **fields: Any) -> Attached:
        made.append(Attached(live, token, **fields))
        return made[-1]

    yield attached
    for client in made:
        client.stream.cancel()
