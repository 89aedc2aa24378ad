"""Records of sessions that live on elsewhere: the newest of each tenant, in memory and on the disk."""

from __future__ import annotations

import pathlib

import msgspec
import pytest

from stepwire.errors import SessionMovedError
from stepwire_server.durability import moved as moved_module
from stepwire_server.durability.disk import Disk
from stepwire_server.durability.moved import MovedHold, MovedSession, MovedSessions, MovedShard

MOST = 3


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moved_module, "_MOST_RECORDS", MOST)


def record(index: int, tenant: str = "") -> MovedSession:
    name = f"{tenant or 'x'}{index:x}".rjust(32, "0")
    return MovedSession(
        session_id=name,
        request_id=f"{tenant}/{name}",
        tenant=tenant,
        move_id="move",
        attach_key=b"key",
        holds={0: MovedHold(3, 1), 2: MovedHold(5, 5)},
        shards=(MovedShard("f" * 32, "host:1", b"another key"),),
    )


def read(folder: pathlib.Path) -> MovedSessions:
    for name in ("moved", "work"):
        (folder / name).mkdir(exist_ok=True)
    return MovedSessions.read(Disk(), folder / "moved", folder / "work")


@pytest.mark.parametrize("durable", [False, True])
def test_the_newest_records_of_each_tenant_are_kept(tmp_path: pathlib.Path, durable: bool) -> None:
    moved = read(tmp_path)
    other = record(0, "b")
    moved.add(other, durable=durable)
    for index in range(2 * MOST):
        moved.add(record(index, "a"), durable=durable)
    kept = [other, *(record(index, "a") for index in range(MOST, 2 * MOST))]
    assert moved.ids() == tuple(each.session_id for each in kept)
    moved.check(record(0, "a").session_id)
    moved.check_request(record(0, "a").request_id)
    for each in kept:
        with pytest.raises(SessionMovedError):
            moved.check(each.session_id)
        with pytest.raises(SessionMovedError):
            moved.check_request(each.request_id)
    assert read(tmp_path).ids() == (moved.ids() if durable else ())


def test_a_request_is_known_by_its_newest_record(tmp_path: pathlib.Path) -> None:
    """A session that comes back and moves on once more has another id, and its request."""
    moved = read(tmp_path)
    first = record(0)
    moved.add(first, durable=True)
    again = msgspec.structs.replace(record(1), request_id=first.request_id)
    moved.add(again, durable=True)
    for index in range(2, MOST + 1):
        moved.add(record(index), durable=True)
    moved.check(first.session_id)
    for each in (moved, read(tmp_path)):
        with pytest.raises(SessionMovedError) as refused:
            each.check_request(first.request_id)
        assert refused.value.metadata == {"session_id": again.session_id}


def test_a_new_owner_goes_on_with_the_order_of_the_records(tmp_path: pathlib.Path) -> None:
    first = read(tmp_path)
    for index in (5, 1, 4):
        first.add(record(index), durable=True)
    second = read(tmp_path)
    second.add(record(2), durable=True)
    assert second.ids() == read(tmp_path).ids() == tuple(record(index).session_id for index in (1, 4, 2))


def test_a_record_that_is_there_already_is_kept_once(tmp_path: pathlib.Path) -> None:
    """An attempt failed behind the link, so the same move is asked for again."""
    read(tmp_path).add(record(1), durable=True)
    again = MovedSessions()
    again._disk, again._folder, again._work = Disk(), tmp_path / "moved", tmp_path / "work"
    again.add(record(1), durable=True)
    assert read(tmp_path).ids() == again.ids() == (record(1).session_id,)
