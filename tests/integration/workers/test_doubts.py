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


CUT = 200_000
"""The elements of a tensor of which both of two servers hold a part."""


def filled(value: float, size: int = 300) -> dict[str, Any]:
    return {"w": np.full(size, value, np.float32)}


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
    following = first.step_async(filled(100.0), timeout=120.0)
    while held.holder.generation == before:
        pass
    np.testing.assert_array_equal(second.step(filled(4.0))["w"], filled(-3.0)["w"])
    np.testing.assert_array_equal(following.result(120.0)["w"], filled(-3.0)["w"])
    part = first.last_result.round
    assert (part.contribution, part.dropped, part.staleness) == (2, True, 1)


@pytest.mark.parametrize("size", [300, 300_000], ids=["at once", "awaiting admission"])
def test_a_gradient_that_was_applied_while_its_worker_did_not_listen_is_not_applied_again(
    server: Server, proxy: Proxy, size: int
) -> None:
    """The same gradient again is the same step, whatever the link has added to the first one on its way."""
    options: dict[str, Any] = {"optimizer": stepwire.SGD(lr=1.0), "aggregation": stepwire.Aggregation(workers=2)}
    options["request_id"] = uuid.uuid4().hex
    first, second = (
        joined(target, filled(0.0, size), worker, **options)
        for worker, target in enumerate((proxy.target, server.target))
    )
    first.attach(transport="tcp")
    second.attach()
    rounds = server.registry.get(first.session_id).contributions
    while rounds._round is None:  # type: ignore[union-attr]
        with pytest.raises(stepwire.DeadlineExceededError):
            first.step(filled(2.0, size), timeout=0.5)
    np.testing.assert_array_equal(second.step(filled(4.0, size))["w"], filled(-3.0, size)["w"])
    np.testing.assert_array_equal(first.step(filled(2.0, size), timeout=120.0)["w"], filled(-3.0, size)["w"])
    part = first.last_result.round
    assert (part.contribution, part.dropped, server.registry.get(first.session_id).ledger.applied_step) == (1, False, 1)


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


def sharded(servers: list[Server], treatment: dict[str, Any]) -> tuple[Any, Any]:
    """Return two workers of a model over two servers."""
    options: dict[str, Any] = {"optimizer": stepwire.SGD(lr=1.0), "aggregation": stepwire.Aggregation(workers=2)}
    options |= {"request_id": uuid.uuid4().hex} | treatment
    targets = [each.target for each in servers]
    first, second = (joined(targets, filled(0.0, CUT), worker, **options) for worker in range(2))
    first.attach()
    second.attach()
    return first, second


@pytest.mark.parametrize("treatment", [{}, {"clip_grad_norm": 1e6}, {"non_finite": "allow"}])
def test_a_gradient_in_the_open_rounds_of_all_shards_is_not_taken_for_the_next_one(treatment: dict[str, Any]) -> None:
    with numpy_server() as one, numpy_server() as other:
        first, second = sharded([one, other], treatment)
        held = [
            server.registry.get(each) for server, each in zip((one, other), first.session_id.split(","), strict=True)
        ]
        while any(session.contributions._round is None for session in held):  # type: ignore[union-attr]
            with pytest.raises(stepwire.DeadlineExceededError):
                first.step(filled(2.0, CUT), timeout=0.5)
        before = [session.ledger.members[0].worker.holder.generation for session in held]
        following = first.step_async(filled(100.0, CUT), timeout=120.0)
        while any(
            session.ledger.members[0].worker.holder.generation == n for session, n in zip(held, before, strict=True)
        ):
            pass
        np.testing.assert_array_equal(second.step(filled(4.0, CUT))["w"], filled(-3.0, CUT)["w"])
        np.testing.assert_array_equal(following.result(120.0)["w"], filled(-3.0, CUT)["w"])
        part = first.last_result.round
        assert (part.contribution, part.dropped, part.staleness) == (2, True, 1)


def test_a_gradient_that_is_in_the_open_round_of_one_shard_alone_is_finished_by_itself_alone(
    server: Server, proxy: Proxy
) -> None:
    with numpy_server() as other:
        options: dict[str, Any] = {"optimizer": stepwire.SGD(lr=1.0), "aggregation": stepwire.Aggregation(workers=2)}
        options["request_id"] = uuid.uuid4().hex
        first = joined([other.target, proxy.target], filled(0.0, CUT), 0, **options)
        second = joined([other.target, server.target], filled(0.0, CUT), 1, **options)
        first.attach(transport="tcp")
        held = other.registry.get(first.session_id.split(",")[0])
        proxy.hold("up")
        while held.contributions._round is None:  # type: ignore[union-attr]
            with pytest.raises(stepwire.DeadlineExceededError):
                first.step(filled(2.0, CUT), timeout=0.5)
        proxy.sever()
        others = second.step_async(filled(4.0, CUT))
        with pytest.raises(stepwire.StepMismatchError, match="Repeat it with the same gradients"):
            first.step(filled(100.0, CUT), timeout=120.0)
        np.testing.assert_array_equal(first.step(filled(2.0, CUT))["w"], filled(-3.0, CUT)["w"])
        np.testing.assert_array_equal(others.result(120.0)["w"], filled(-3.0, CUT)["w"])


@pytest.mark.parametrize(
    "treatment",
    [{"clip_grad_norm": 1.0}, {"groups": [{"params": ["w"], "clip_grad_norm": 1.0}]}, {"non_finite": "skip"}],
    ids=["clipped", "clipped by group", "skipped"],
)
def test_a_decision_of_another_worker_is_followed_where_a_check_was_lost(
    server: Server, proxy: Proxy, treatment: dict[str, Any]
) -> None:
    """The check of one shard never comes, and the step is applied there meanwhile: the other shard waits for nobody."""
    with numpy_server() as other:
        options: dict[str, Any] = {"optimizer": stepwire.SGD(lr=1.0), "aggregation": stepwire.Aggregation(workers=2)}
        options |= {"request_id": uuid.uuid4().hex} | treatment
        first = joined([other.target, proxy.target], filled(0.0, CUT), 0, **options)
        second = joined([other.target, server.target], filled(0.0, CUT), 1, **options)
        first.attach(transport="tcp")
        second.attach()
        value = np.nan if "non_finite" in treatment else 2.0
        proxy.hold("down")
        waiting = first.step_async(filled(value, CUT), timeout=120.0)
        expected = second.step(filled(4.0, CUT), timeout=120.0)
        proxy.sever()
        np.testing.assert_array_equal(waiting.result(120.0)["w"], expected["w"])
        assert first.last_result.skipped == second.last_result.skipped == ("non_finite" in treatment)
        assert first.last_result.grad_norm == pytest.approx(second.last_result.grad_norm, rel=1e-6, nan_ok=True)
        clipped = [each.last_result.clipped_grad_norm for each in (first, second)]
        assert clipped[0] == pytest.approx(clipped[1], rel=1e-6, nan_ok=True)
