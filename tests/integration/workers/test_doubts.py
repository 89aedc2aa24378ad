"""A worker whose step failed, and who goes on with another gradient: each is applied once, or said to be not."""

from __future__ import annotations

import functools
import uuid
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import stepwire
from stepwire_server.server import Server
from tests.integration.proxy import Proxy
from tests.integration.workers.together import joined, together
from tests.support.numpy_server import numpy_server


@pytest.fixture
def server() -> Iterator[Server]:
    with numpy_server() as server:
        yield server


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    with Proxy(server.target) as proxy:
        yield proxy


def filled(value: float) -> dict[str, Any]:
    return {"w": np.full(300, value, np.float32)}


def workers(server: Server, proxy: Proxy) -> tuple[Any, Any]:
    """Return two workers, the first of which is behind the proxy."""
    options: dict[str, Any] = {"optimizer": stepwire.SGD(lr=1.0), "aggregation": stepwire.Aggregation(workers=2)}
    options["request_id"] = uuid.uuid4().hex
    first, second = joined(proxy.target, filled(0.0), 0, **options), joined(server.target, filled(0.0), 1, **options)
    first.attach(transport="tcp")
    second.attach()
    return first, second


def test_a_gradient_that_is_in_the_open_round_is_not_taken_for_the_next_one(server: Server, proxy: Proxy) -> None:
    first, second = workers(server, proxy)
    session = server.registry.get(first.session_id)
    held, rounds = session.ledger.members[0].worker, session.contributions
    while rounds._round is None:  # type: ignore[union-attr]
        with pytest.raises(stepwire.DeadlineExceededError):
            first.step(filled(2.0), timeout=0.5)
    before = held.holder.generation
    following = first.step_async(filled(100.0), timeout=30.0)
    while held.holder.generation == before:
        pass
    np.testing.assert_array_equal(second.step(filled(4.0))["w"], filled(-3.0)["w"])
    np.testing.assert_array_equal(following.result(30.0)["w"], filled(-3.0)["w"])
    part = first.last_result.round
    assert (part.contribution, part.dropped, part.staleness) == (2, True, 1)


def test_a_gradient_that_never_arrived_makes_room_for_the_next_one(server: Server, proxy: Proxy) -> None:
    first, second = workers(server, proxy)
    proxy.hold("up")
    with pytest.raises(stepwire.DeadlineExceededError):
        first.step(filled(2.0), timeout=0.5)
    proxy.sever()
    found = together(functools.partial(first.step, filled(100.0)), functools.partial(second.step, filled(4.0)))
    np.testing.assert_array_equal(found[0]["w"], filled(-52.0)["w"])
    part = first.last_result.round
    assert (part.contribution, part.dropped) == (1, False)
