"""Sessions that live on elsewhere, in an object store: a record that counts is found on every machine."""

from __future__ import annotations

import errno
import pathlib
from collections.abc import Callable
from typing import Any

import google_crc32c
import pytest

from stepwire.errors import DataLossError, FencedError, SessionMovedError
from stepwire_server.durability.mirror import Mirror
from stepwire_server.durability.moved import MovedHold, MovedSession, MovedShard
from stepwire_server.durability.ownership import Ownership
from stepwire_server.durability.store_index import newest_index
from tests.server.durability.memory_objects import At, Gone, MemoryObjects, away, ended
from tests.server.durability.test_mirror import ONE, TWO, Own, UnsyncedDisk, add, look, newest, objects, own, save

__all__ = ["objects", "own"]  # the fixtures


def record(session_id: str) -> MovedSession:
    return MovedSession(
        session_id=session_id,
        request_id=f"/{session_id}",
        tenant="",
        move_id="move",
        attach_key=b"key",
        holds={0: MovedHold(3, 1)},
        shards=(MovedShard("f" * 32, "host:1", b"another key"),),
    )


def begun(own: Own, machine: str, store: MemoryObjects) -> Ownership:
    """Return an owner whose two sessions are in the store."""
    owner = own(machine, store)
    for session_id in (ONE, TWO):
        add(owner, session_id)
        save(owner, session_id, 1)
    assert look(owner)
    return owner


def has_moved(owner: Ownership, session_id: str) -> bool:
    """Tell whether a session has moved; else it is there. Nothing is both."""
    try:
        owner.moved.check(session_id)
    except SessionMovedError:
        assert not owner.archive.has(session_id)
        return True
    assert newest(owner, session_id) >= 1
    return False


def test_a_session_that_has_moved_has_moved_on_every_machine(own: Own, objects: MemoryObjects) -> None:
    first = begun(own, "first", objects)
    first.moved.add(record(ONE), durable=True)
    first.remove(ONE)
    for machine in ("second", "second", "third"):
        owner = own(machine)
        assert (has_moved(owner, ONE), has_moved(owner, TWO)) == (True, False)
        assert look(owner)
        assert not [key for key in objects.content if f"sessions/{ONE}/checkpoints" in key]
    last = own("fourth")
    last.moved.add(record(TWO), durable=True)
    assert [each.session_id for each in own("first").moved.durable()] == [ONE, TWO]


@pytest.mark.many
@pytest.mark.parametrize("afterwards", [False, True])
@pytest.mark.parametrize("happening", [away, ended], ids=["failure", "end"])
def test_whatever_call_fails_a_record_that_was_acknowledged_counts(
    happening: Callable[[], None], afterwards: bool, own: Own
) -> None:
    for number in range(1, 50):
        store = MemoryObjects()
        first = begun(own, f"{number}-first", store)
        calls = At(number, happening, afterwards=afterwards)
        store.at, done = calls, False
        try:
            first.moved.add(record(ONE), durable=True)
            done = True
            first.remove(ONE)
            look(first)
        except (DataLossError, Gone):
            pass
        over, store.at = calls.left > 0, None
        moved = has_moved(own(f"{number}-second", store), ONE)
        assert moved or not done
        assert has_moved(own(f"{number}-third", store), ONE) == moved, "what one owner has seen stays"
        if over:
            return
    raise AssertionError("the calls do not end")


def test_a_machine_that_ends_behind_a_record_leaves_nothing_of_the_session(own: Own, objects: MemoryObjects) -> None:
    begun(own, "first", objects).moved.add(record(ONE), durable=True)
    again = own("first")
    assert (has_moved(again, ONE), has_moved(again, TWO)) == (True, False)
    assert look(again)
    assert not [key for key in objects.content if ONE in key]


def test_a_store_that_fails_is_asked_again_for_the_same_record(own: Own, objects: MemoryObjects) -> None:
    first = begun(own, "first", objects)
    objects.at = At(1, away)
    with pytest.raises(DataLossError, match="cannot be kept in the object store"):
        first.moved.add(record(ONE), durable=True)
    first.moved.check(ONE)
    first.moved.add(record(TWO), durable=True)
    first.moved.add(record(ONE), durable=True)
    for owner in (own("first"), own("second")):
        assert (has_moved(owner, ONE), has_moved(owner, TWO)) == (True, True)


def test_a_record_that_only_a_machine_behind_the_store_has_does_not_count(own: Own, objects: MemoryObjects) -> None:
    """Nobody has acknowledged it, and another machine has gone on with the session."""
    first = begun(own, "first", objects)
    objects.at = At(1, away)
    with pytest.raises(DataLossError):
        first.moved.add(record(ONE), durable=True)
    objects.at = None
    second = own("second")
    assert not has_moved(second, ONE)
    save(second, ONE, 2)
    assert look(second)
    with pytest.raises(FencedError):
        first.moved.add(record(ONE), durable=True)
    again = own("first")
    assert not has_moved(again, ONE)
    assert newest(again, ONE) == 2


def test_a_machine_behind_the_store_ends_no_session_that_it_had_closed(
    own: Own, objects: MemoryObjects, tmp_path: pathlib.Path
) -> None:
    """It could not tell the store, and has no other session; another machine has gone on with that one."""
    first = own("first")
    add(first, ONE)
    save(first, ONE, 1)
    assert look(first)
    first.remove(ONE)
    second = own("second")
    save(second, ONE, 2)
    assert look(second)
    again = own("first")
    assert newest(again, ONE) == 2
    assert look(again)
    assert newest(own("third"), ONE) == 2
    assert [each.name for each in (tmp_path / "first" / "superseded").glob("*/closed/*")] == [ONE]


def test_an_upload_brings_no_session_back_that_has_moved_meanwhile(own: Own, objects: MemoryObjects) -> None:
    first = begun(own, "first", objects)
    save(first, ONE, 2)
    moving = At(3, lambda: first.moved.add(record(ONE), durable=True))  # while its checkpoint is uploaded
    objects.at = moving
    look(first)
    assert moving.left < 0, "it has moved"
    assert has_moved(own("second"), ONE)


def test_an_index_of_an_earlier_release_is_read(objects: Any) -> None:
    """It has no `moved`; its checksum is that of the text as that release wrote it."""
    text = b'{"crc32c":%d,"directory":"mine","format":1,"sessions":{}}'
    crc32c = int(google_crc32c.value(text % 0))
    objects.content["index/0000000000000001-000000000001"] = text % crc32c
    index = newest_index(objects)
    assert index is not None
    assert (index.directory, index.moved, index.crc32c) == ("mine", {}, crc32c)
    objects.content["index/0000000000000001-000000000002"] = text % (crc32c ^ 1)
    with pytest.raises(DataLossError, match="its checksum is another one"):
        newest_index(objects)


def test_a_directory_that_had_nothing_to_do_with_a_store_keeps_its_records(
    own: Own, objects: MemoryObjects, tmp_path: pathlib.Path
) -> None:
    alone = Ownership(UnsyncedDisk(), tmp_path / "alone", "")
    add(alone, ONE)
    alone.moved.add(record(ONE), durable=True)
    alone.remove(ONE)
    begun_two = own("first")
    add(begun_two, TWO)
    save(begun_two, TWO, 1)
    assert look(begun_two)
    joined = own("alone")
    assert (has_moved(joined, ONE), has_moved(joined, TWO)) == (True, False)


def test_a_session_is_brought_to_the_store_whatever_has_become_of_another(
    own: Own, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = own("first")
    add(owner, TWO)
    save(owner, TWO, 1)
    add(owner, ONE)
    save(owner, ONE, 1)
    uploaded = Mirror._uploaded

    def unreadable(mirror: Mirror, session_id: str, local: Any) -> Any:
        if session_id == ONE:
            raise OSError(errno.EIO, "this disk cannot read it")
        return uploaded(mirror, session_id, local)

    monkeypatch.setattr(Mirror, "_uploaded", unreadable)
    assert not look(owner)
    with pytest.raises(DataLossError, match="the session is not in the object store: .* this disk cannot read it"):
        owner.check_stored(ONE)
    owner.check_stored(TWO)
    assert newest(own("second"), TWO) == 1
    with pytest.raises(FencedError):
        owner.check_stored(TWO)
