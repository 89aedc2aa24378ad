"""A model that moves between servers whose checkpoints are in object stores: the loss of a machine undoes no move."""

from __future__ import annotations

import concurrent.futures
import contextlib
import pathlib
import threading
from collections.abc import Callable
from typing import Any

import pytest

import stepwire
from stepwire_server.durability import mirror
from stepwire_server.durability.store_index import StoreIndex
from stepwire_server.server import Server
from tests.integration.sharding.pair import arrays
from tests.integration.training import bits, same_bits
from tests.support.numpy_server import numpy_server

pytest.importorskip("obstore", reason="obstore is not installed: pip install obstore")

SHAPES = {"w": (40, 7), "b": (13,)}
OPTIONS: dict[str, Any] = {"optimizer": stepwire.AdamW(lr=1e-2), "keep": True}

Start = Callable[[str, str], Server]


@pytest.fixture
def start(tmp_path: pathlib.Path) -> Any:
    """Start a server with the disk of a machine and a store, each by its name, until the test ends."""
    with contextlib.ExitStack() as stack:

        def started(machine: str, store: str) -> Server:
            url = f"file://{tmp_path / store}"
            return stack.enter_context(numpy_server(data_dir=str(tmp_path / machine), checkpoint_store=url))

        yield started


def steps(session: stepwire.Session, first: int, count: int) -> list[Any]:
    return [bits(session.step(arrays(SHAPES, step))) for step in range(first, first + count)]


@pytest.mark.parametrize("level", ["checkpoint", "journal"])
@pytest.mark.parametrize("shards", [1, 2])
def test_another_machine_finds_what_has_moved_and_where_it_is(start: Start, level: Any, shards: int) -> None:
    first, *others = start("first", "one"), start("second", "two"), start("third", "three")
    onto = [server.target for server in others[:shards]]
    with stepwire.connect(first.target, transport="tcp", timeout=120.0) as client:
        session = client.create_session(arrays(SHAPES, 0), durability=level, **OPTIONS)
        stays = client.create_session(arrays(SHAPES, 0), **OPTIONS)
        assert steps(session, 1, 3) == steps(stays, 1, 3)
        former = session.session_id
        found = stepwire.move_session(former, first.target, onto)
        assert steps(session, 4, 2) == steps(stays, 4, 2)
        assert session.session_id == found
        state = session.state()
    after_loss = start("first again", "one")  # the machine is lost, and the store is not
    with stepwire.connect(after_loss.target, transport="tcp", timeout=120.0) as client:
        again = client.session(former)
        assert (again.session_id, again.applied_step) == (found, 5)
        assert same_bits(again.state(), state)
        assert former not in {each.session_id for each in client.sessions()}
    lost = others[0]
    assert lost.registry.directory is not None
    own = lost.registry.directory.own
    assert {own.stored_step(each) for each in found.split(",")} >= {3}, "what came is in the store of its new server"


def test_a_store_that_fails_at_the_new_place_leaves_the_session_where_it_was(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = start("first", "one"), start("second", "two")
    with stepwire.connect(first.target, transport="tcp", timeout=120.0) as client:
        session = client.create_session(arrays(SHAPES, 0), durability="checkpoint", **OPTIONS)
        stays = client.create_session(arrays(SHAPES, 0), **OPTIONS)
        steps(session, 1, 2)
        with monkeypatch.context() as patched:
            patched.setattr(mirror.Mirror, "_uploaded", _away)
            with pytest.raises(stepwire.DataLossError, match="the session is not in the object store: away"):
                stepwire.move_session(session.session_id, first.target, second.target)
        steps(stays, 1, 2)
        former = session.session_id
        assert steps(session, 3, 2) == steps(stays, 3, 2)
        assert session.session_id == former
        found = stepwire.move_session(former, first.target, second.target)
        assert steps(session, 5, 2) == steps(stays, 5, 2)
        assert session.session_id == found


def test_a_store_that_fails_at_the_former_place_is_asked_again(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = start("first", "one"), start("second", "two")
    with stepwire.connect(first.target, transport="tcp", timeout=120.0) as client:
        session = client.create_session(arrays(SHAPES, 0), durability="journal", **OPTIONS)
        stays = client.create_session(arrays(SHAPES, 0), **OPTIONS)
        assert steps(session, 1, 2) == steps(stays, 1, 2)
        failures, write_index = [_away, _away], mirror.write_index

        def sometimes(objects: Any, key: str, index: StoreIndex) -> None:
            (failures.pop() if index.moved and failures else write_index)(objects, key, index)

        monkeypatch.setattr(mirror, "write_index", sometimes)
        found = stepwire.move_session(session.session_id, first.target, second.target)
        assert failures == []
        assert steps(session, 3, 2) == steps(stays, 3, 2)
        assert session.session_id == found


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_store_that_is_away_for_longer_than_a_mover_waits_ends_no_session(
    start: Start, monkeypatch: pytest.MonkeyPatch, elsewhere: bool
) -> None:
    """The next move completes the one before, and goes on where that has not led to its servers."""
    first, second, third = start("first", "one"), start("second", "two"), start("third", "three")
    with stepwire.connect(first.target, transport="tcp", timeout=120.0) as client:
        session = client.create_session(arrays(SHAPES, 0), durability="journal", **OPTIONS)
        stays = client.create_session(arrays(SHAPES, 0), **OPTIONS)
        assert steps(session, 1, 2) == steps(stays, 1, 2)
        former, write_index, onto = session.session_id, mirror.write_index, third if elsewhere else second

        def away(objects: Any, key: str, index: StoreIndex) -> None:
            (_away if index.moved else write_index)(objects, key, index)

        with monkeypatch.context() as patched:
            patched.setattr(mirror, "write_index", away)
            with pytest.raises(stepwire.DataLossError, match="mend the disk or the store, and move it again"):
                stepwire.move_session(former, first.target, second.target, timeout=2.0)
        found = stepwire.move_session(former, first.target, onto.target)
        assert steps(session, 3, 2) == steps(stays, 3, 2)
        assert session.session_id == found
        assert {each.session_id for each in client.sessions()} == {stays.session_id}


def test_nobody_else_waits_for_a_store_that_hangs(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = start("first", "one"), start("second", "two")
    with stepwire.connect(first.target, transport="tcp", timeout=120.0) as client:
        session = client.create_session(arrays(SHAPES, 0), durability="journal", **OPTIONS)
        stays = client.create_session(arrays(SHAPES, 0), durability="journal", **OPTIONS)
        steps(session, 1, 2)
        reached, released, write_index = threading.Event(), threading.Event(), mirror.write_index

        def hangs(objects: Any, key: str, index: StoreIndex) -> None:
            if index.moved:
                reached.set()
                assert released.wait(120.0)
            write_index(objects, key, index)

        monkeypatch.setattr(mirror, "write_index", hangs)
        with concurrent.futures.ThreadPoolExecutor(1) as threads:
            moving = threads.submit(stepwire.move_session, session.session_id, first.target, second.target)
            assert reached.wait(120.0)
            try:
                other = client.create_session(arrays(SHAPES, 0), **OPTIONS)
                assert steps(other, 1, 1) == steps(stays, 1, 1)
                other.close()
                assert not moving.done()
            finally:
                released.set()
            found = moving.result(120.0)
        assert len(steps(session, 3, 1)) == 1
        assert session.session_id == found


def _away(*_: Any) -> Any:
    raise OSError("away")
