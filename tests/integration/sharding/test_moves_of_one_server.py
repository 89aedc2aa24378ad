"""A client of one server follows its session: to another server, to several, and back."""

from __future__ import annotations

import contextlib
import pathlib
from typing import Any

import numpy as np
import pytest

import stepwire
from stepwire_server.server import Server
from tests.integration.sharding.pair import SHAPES, Opened, Pair, arrays, over
from tests.integration.training import bits
from tests.support.lost_replies import lost_replies
from tests.support.numpy_server import numpy_server

SMALL = {"w": (20, 30), "b": (30,), "scale": ()}
OPTIONS: dict[str, Any] = {"optimizer": stepwire.Adam(lr=1e-2), "clip_grad_norm": 1.0}


def alone(servers: list[Server], opened: Opened) -> stepwire.Client:
    """A client of the second server."""
    return opened((servers[1].target,))


def moved(session: stepwire.Session, servers: list[Server], *onto: int) -> str:
    """Move a session onto some of the servers; all of them are asked for it."""
    targets = [server.target for server in servers]
    return stepwire.move_session(session.session_id, targets, [targets[each] for each in onto])


@pytest.mark.parametrize("transport", ["tcp", "auto"])
@pytest.mark.parametrize("shapes", [SMALL, SHAPES], ids=["small", "large"])
def test_steps_have_the_bits_of_a_session_that_stays(
    servers: list[Server], one: stepwire.Client, shapes: dict[str, tuple[int, ...]], transport: str
) -> None:
    with (
        stepwire.connect(servers[1].target, transport=transport, timeout=120.0) as client,
        contextlib.closing(Pair(one, client, shapes, **OPTIONS)) as pair,
    ):
        for step, onto in enumerate(((), (2,), (3,), (0, 1, 4), (2, 3), (1,), (2,)), start=1):
            found = moved(pair.cut, servers, *onto) if onto else pair.cut.session_id
            pair.step(arrays(shapes, 2 * step))
            assert (pair.cut.session_id, len(pair.cut.shards)) == (found, found.count(",") + 1)
            pair.step(arrays(shapes, 2 * step + 1))
        pair.compare()


def test_direct_steps_go_on_at_the_other_server(servers: list[Server]) -> None:
    with (
        stepwire.connect(servers[1].target, timeout=120.0) as client,
        client.create_session(arrays(SMALL, 0), **OPTIONS) as session,
    ):
        session.step(arrays(SMALL, 1))
        lanes = [session.transport]
        moved(session, servers, 3)
        session.step(arrays(SMALL, 2))
        assert session._link.direct is not None
        assert session._link.shards[0].hold.free_lane is not None  # type: ignore[attr-defined]
        lanes.append(session.transport)
        assert [lane and lane.name for lane in lanes] == ["packets", "packets"]
        session.step(arrays(SMALL, 3))
        assert session.applied_step == 3


@pytest.mark.parametrize("onto", [(3,), (2, 4)])
@pytest.mark.parametrize("applied", [True, False])
def test_a_step_whose_reply_was_lost_before_a_move_counts_once(
    servers: list[Server], opened: Opened, one: stepwire.Client, onto: tuple[int, ...], applied: bool
) -> None:
    with contextlib.closing(Pair(one, alone(servers, opened), SHAPES, **OPTIONS)) as pair:
        pair.step(arrays(SHAPES, 1))
        with lost_replies(applied=applied), pytest.raises(stepwire.DeadlineExceededError):
            pair.cut.step(arrays(SHAPES, 2))
        moved(pair.cut, servers, *onto)
        pair.whole.step(arrays(SHAPES, 2))
        assert bits(pair.cut.step(arrays(SHAPES, 2))) == bits(pair.whole.pull())
        result = pair.cut.last_result
        assert result is not None
        assert (result.step, result.replayed) == (2, applied)
        with lost_replies(applied=applied), pytest.raises(stepwire.DeadlineExceededError):
            pair.cut.step(arrays(SHAPES, 3))
        moved(pair.cut, servers, 0)
        if applied:
            pair.whole.step(arrays(SHAPES, 3))
        pair.step(arrays(SHAPES, 4))  # another gradient is another step
        pair.compare()


@pytest.mark.parametrize("onto", [(3,), (2, 4)])
def test_whatever_comes_first_follows(servers: list[Server], opened: Opened, onto: tuple[int, ...]) -> None:
    client = alone(servers, opened)
    calls: list[Any] = [
        lambda session: session.pull(),
        lambda session: session.info(),
        lambda session: session.state(),
        lambda session: session.load(arrays(SHAPES, 5)),
        lambda session: session.step_async(arrays(SHAPES, 2)).result(),
    ]
    for call in calls:
        with client.create_session(arrays(SHAPES, 0), **OPTIONS) as session:
            session.step(arrays(SHAPES, 1))
            found = moved(session, servers, *onto)
            call(session)
            assert session.session_id == found
    session = client.create_session(arrays(SHAPES, 0), **OPTIONS)
    found = moved(session, servers, *onto)
    session.close()
    assert not {each.session_id for each in opened((servers[onto[0]].target,)).sessions()} & set(found.split(","))


@pytest.mark.parametrize("onto", [(3,), (2, 4)])
def test_former_ids_and_requests_find_the_session_where_it_is(
    servers: list[Server], opened: Opened, onto: tuple[int, ...]
) -> None:
    client, name = alone(servers, opened), f"of-one-server-{len(onto)}"
    with client.create_session(arrays(SHAPES, 0), request_id=name, **OPTIONS) as session:
        former = session.session_id
        found = moved(session, servers, *onto)
        session.step(arrays(SHAPES, 1))
        for again in (client.session(former), client.create_session(arrays(SHAPES, 0), request_id=name, **OPTIONS)):
            assert (again.session_id, again.applied_step) == (found, 1)
        back = moved(session, servers, 1)
        assert client.session(found).session_id == back, "the ids of several shards, of which none is here"


@pytest.mark.parametrize("onto", [(3,), (2, 4)])
def test_what_a_client_carries_comes_along(
    servers: list[Server], opened: Opened, one: stepwire.Client, onto: tuple[int, ...]
) -> None:
    shapes = {"w": (4, 65_536)}  # blocks of codes that no cut parts
    options: dict[str, Any] = {"gradient_dtype": "int8", "error_feedback": True, "non_finite": "allow"}
    client = alone(servers, opened)
    with (
        client.create_session(arrays(shapes, 0), **options) as session,
        one.create_session(arrays(shapes, 0), **options) as other,
    ):
        for step in range(1, 5):
            if step == 3:
                moved(session, servers, *onto)
            assert bits(session.step(arrays(shapes, step))) == bits(other.step(arrays(shapes, step)))
    changed: dict[str, Any] = {"reply": "changed", "reply_dtype": "bfloat16"}
    with contextlib.closing(Pair(one, client, SHAPES, **OPTIONS)) as pair:
        for step in range(1, 5):
            if step == 3:
                moved(pair.cut, servers, *onto)
            pair.step(arrays(SHAPES, step), **changed)


def test_a_client_that_was_fenced_stays_fenced_behind_a_move(servers: list[Server], opened: Opened) -> None:
    client = alone(servers, opened)
    with client.create_session(arrays(SHAPES, 0), **OPTIONS) as first:
        first.step(arrays(SHAPES, 1))
        other = client.session(first.session_id)
        other.attach(take_over=True)
        moved(first, servers, 3)
        other.step(arrays(SHAPES, 2))
        with pytest.raises(stepwire.FencedError):
            first.step(arrays(SHAPES, 2))
        assert other.applied_step == 2


@pytest.mark.parametrize("onto", [(3,), (2, 4)])
def test_shared_arrays_are_asked_for_again(servers: list[Server], onto: tuple[int, ...]) -> None:
    with (
        stepwire.connect(servers[1].target, timeout=120.0) as client,
        client.create_session(arrays(SMALL, 0), **OPTIONS) as session,
        client.create_session(arrays(SMALL, 0), **OPTIONS) as stays,
    ):
        gradient, parameters = session.shared_gradients(), session.shared_parameters()
        for name, values in arrays(SMALL, 1).items():
            gradient[name][...] = values
        assert bits(session.step(gradient, out=parameters)) == bits(stays.step(arrays(SMALL, 1)))
        moved(session, servers, *onto)
        reply = session.step(gradient, out=parameters)
        assert bits(reply) == bits(stays.step(arrays(SMALL, 1)))
        if len(onto) == 1:
            again = session.shared_parameters()
            assert all(np.shares_memory(reply[name], again[name]) for name in SMALL if again[name].size)
        else:
            with pytest.raises(stepwire.UnsupportedFeatureError, match="several"):
                session.shared_gradients()


def test_a_client_that_keeps_steps_follows_too_and_forks_where_the_session_is(tmp_path: pathlib.Path) -> None:
    durable = {**OPTIONS, "durability": stepwire.Durability(level="checkpoint", every_steps=2)}
    with contextlib.ExitStack() as stack:
        first, second = (
            stack.enter_context(numpy_server(data_dir=str(tmp_path / name))) for name in ("first", "second")
        )
        client = stack.enter_context(stepwire.connect(first.target, window_bytes=1 << 20, timeout=120.0))
        session = stack.enter_context(client.create_session(arrays(SMALL, 0), **durable))
        stays = stack.enter_context(client.create_session(arrays(SMALL, 0), **OPTIONS))
        for step in range(1, 7):
            if step == 3:
                stepwire.move_session(session.session_id, first.target, second.target)
                with session.fork() as fork:
                    assert fork.applied_step == 2
            assert bits(session.step(arrays(SMALL, step))) == bits(stays.step(arrays(SMALL, step)))
        with session.fork() as fork:
            assert fork.applied_step == 6
            found = {each.session_id for each in stack.enter_context(stepwire.connect(second.target)).sessions()}
            assert fork.session_id in found


@pytest.mark.parametrize("shards", [1, 2])
def test_a_fork_follows_where_no_other_call_has(servers: list[Server], opened: Opened, shards: int) -> None:
    client = over(servers, opened, shards)
    with client.create_session(arrays(SMALL, 0), **OPTIONS) as session:
        found = moved(session, servers, 3)
        with pytest.raises(stepwire.UnsupportedFeatureError, match="memory"):
            session.fork()
        assert session.session_id == found
        again = moved(session, servers, 4)
        with pytest.raises(stepwire.UnsupportedFeatureError, match="memory"):
            session.fork(step=0)
        assert session.session_id == again


def test_a_fork_that_has_moved_is_told_to_whoever_asks_for_it_again(tmp_path: pathlib.Path) -> None:
    durable = {**OPTIONS, "durability": "checkpoint"}
    with contextlib.ExitStack() as stack:
        first, second = (
            stack.enter_context(numpy_server(data_dir=str(tmp_path / name))) for name in ("first", "second")
        )
        client = stack.enter_context(stepwire.connect(first.target, timeout=120.0))
        session = stack.enter_context(client.create_session(arrays(SMALL, 0), **durable))
        fork = session.fork(request_id="a-fork")
        former = fork.session_id
        found = stepwire.move_session(former, first.target, second.target)
        with pytest.raises(stepwire.SessionMovedError) as moved_fork:
            session.fork(request_id="a-fork")
        assert moved_fork.value.metadata["session_id"] == former
        assert client.session(former).session_id == found
