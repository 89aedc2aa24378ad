"""The copy of checkpoints in an object store: right after a failure, an end, or a newer owner, at any of its calls."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import pytest

from stepwire.errors import DataLossError, FencedError, InvalidRequestError
from stepwire_server.durability import ownership
from stepwire_server.durability.archive import ArchivedSession
from stepwire_server.durability.checkpoints import automatic_name
from stepwire_server.durability.disk import Disk
from stepwire_server.durability.ownership import Ownership
from stepwire_server.durability.store_epochs import KEPT, StoreEpochs
from tests.server.durability.checkpoint_cases import (
    bits,
    make_manifest,
    make_values,
    read_checkpoint,
    write_checkpoint,
)
from tests.server.durability.memory_objects import At, Gone, MemoryObjects, away, ended

ONE, TWO = "1" * 32, "2" * 32
SLOTS = {"param": 40, "exp_avg": 40}

Own = Callable[..., Ownership]


class UnsyncedDisk(Disk):
    """A disk that nobody waits for: no power fails here."""

    def sync(self, descriptor: int) -> None:
        """Do nothing."""

    def sync_folder(self, folder: pathlib.Path) -> None:
        """Do nothing."""


@pytest.fixture
def objects() -> MemoryObjects:
    return MemoryObjects()


@pytest.fixture
def own(tmp_path: pathlib.Path, objects: MemoryObjects, monkeypatch: pytest.MonkeyPatch) -> Own:
    """Start as the owner of a machine's data directory; the place of the store is `objects` unless another is given."""

    def start(machine: str, store: MemoryObjects = objects) -> Ownership:
        monkeypatch.setattr(ownership.ObjectStore, "open", lambda url: store)
        return Ownership(UnsyncedDisk(), tmp_path / machine, "memory://")

    return start


def add(owner: Ownership, session_id: str) -> None:
    owner.archive.add(ArchivedSession(session_id=session_id, request_id=session_id, config=b"", create_time=1.0))


def save(owner: Ownership, session_id: str, step: int, name: str = "") -> None:
    """Save a checkpoint with values of its step, keep two automatic ones, and tell the mirror."""
    store, values = owner.archive.checkpoints(session_id), make_values(SLOTS, step)
    manifest = make_manifest(step, 1, session_id=session_id, epoch=owner.epoch)
    write_checkpoint(store, name or automatic_name(step, 1), values, manifest)
    store.prune(2)
    owner.touch(session_id)


def look(owner: Ownership) -> bool:
    assert owner.mirror is not None
    return owner.mirror.look()


def newest(owner: Ownership, session_id: str) -> int:
    """Return the step of the newest checkpoint, whose arrays are what they were."""
    found = owner.archive.checkpoints(session_id).newest()
    assert found.checkpoint is not None
    assert not found.damaged
    name = found.checkpoint.name
    found.checkpoint.close()
    manifest, values = read_checkpoint(owner.archive.checkpoints(session_id), name)
    assert bits(values) == bits(make_values(SLOTS, manifest.step))
    return manifest.step


def test_the_store_has_what_the_disk_has(own: Own, objects: MemoryObjects) -> None:
    first = own("first")
    add(first, ONE)
    for step in range(1, 6):
        save(first, ONE, step)
        assert look(first)
    save(first, ONE, 6, "best")
    assert look(first)
    names = [key.split("/")[3] for key in objects.content if key.endswith("manifest.json")]
    assert sorted(names) == [automatic_name(4, 1), automatic_name(5, 1), "best"]
    calls = At(1 << 30, away)
    objects.at = calls
    assert look(first)
    assert (1 << 30) - calls.left == 1  # the look for a newer owner
    second = own("second")
    assert newest(second, ONE) == 6
    assert [info.name for info in second.archive.checkpoints(ONE).list()] == [automatic_name(5, 1), "best"]


@pytest.mark.many
@pytest.mark.slow
@pytest.mark.parametrize("afterwards", [False, True])
@pytest.mark.parametrize("happening", [away, ended], ids=["failure", "end"])
def test_whatever_call_fails_the_next_owner_has_a_whole_state(
    happening: Callable[[], None], afterwards: bool, own: Own
) -> None:
    """The newest checkpoint or the one before; and the newest as soon as one look has ended well."""
    for number in range(1, 200):
        store, machine = MemoryObjects(), f"{number}"
        first = own(f"{machine}-first", store)
        for session_id in (ONE, TWO):
            add(first, session_id)
            for step in (1, 2):
                save(first, session_id, step)
        assert look(first)
        for session_id in (ONE, TWO):
            save(first, session_id, 3)
        store.at = at = At(number, happening, afterwards=afterwards)
        done = True
        try:
            done = look(first)
        except Gone:
            done = False
        store.at = None
        content = dict(store.content)
        second = own(f"{machine}-second", MemoryObjects(content))
        for session_id in (ONE, TWO):
            assert newest(second, session_id) == 3 if done else newest(second, session_id) in (2, 3), number
        if happening is away:
            assert look(first), number
        else:
            first = own(f"{machine}-first", store)
            assert look(first), number
        third = own(f"{machine}-third", store)
        assert [newest(third, session_id) for session_id in (ONE, TWO)] == [3, 3]
        unused = [key for key in store.content if key.endswith("manifest.json") and automatic_name(1, 1) in key]
        assert not unused, number
        if at.left > 0:
            assert done
            return
    raise AssertionError("there are more calls")


@pytest.mark.slow
@pytest.mark.parametrize("afterwards", [False, True])
def test_an_older_owner_that_goes_on_after_any_pause_harms_nothing(afterwards: bool, own: Own) -> None:
    """A newer owner goes on while the older one is paused at one of its calls."""
    for number in range(1, 200):
        store, machine = MemoryObjects(), f"{number}"
        first = own(f"{machine}-first", store)
        add(first, ONE)
        add(first, TWO)
        for step in (1, 2):
            save(first, ONE, step)
            save(first, TWO, step)
        assert look(first)
        save(first, ONE, 3)  # the first goes, too
        first.remove(TWO)
        reached: dict[str, int] = {}

        def newer(store: MemoryObjects = store, machine: str = machine, reached: dict[str, int] = reached) -> None:
            second = own(f"{machine}-second", store.beside())
            for session_id in second.archive.ids():
                reached[session_id] = newest(second, session_id) + 100
                save(second, session_id, reached[session_id])
            assert look(second)

        store.at = at = At(number, newer, afterwards=afterwards)
        done = look(first)
        store.at = None
        assert not look(first) or at.left > 0
        if at.left > 0:
            assert done
            return
        assert ONE in reached
        assert first.mirror is not None
        assert not first.holds()
        third = own(f"{machine}-third", store)
        assert {session_id: newest(third, session_id) for session_id in third.archive.ids()} == reached, number
        assert look(third)
    raise AssertionError("there are more calls")


@pytest.mark.slow
@pytest.mark.parametrize("behind", [False, True], ids=["empty", "behind"])
def test_a_start_that_ends_at_any_call_is_made_again(behind: bool, own: Own) -> None:
    for number in range(1, 200):
        store, machine = MemoryObjects(), f"{number}"
        first = own(f"{machine}-first", store)
        add(first, ONE)
        add(first, TWO)
        save(first, ONE, 1)
        save(first, TWO, 1)
        assert look(first)
        place = f"{machine}-second"
        if behind:
            second = own(place, store)
            save(second, ONE, 2)
            assert look(second)
            third = own(f"{machine}-third", store)
            save(third, ONE, 3)
            assert look(third)
        store.at = at = At(number, ended)
        try:
            own(place, store)
        except Gone:
            pass
        store.at = None
        again = own(place, store)
        assert {each: newest(again, each) for each in again.archive.ids()} == {ONE: 3 if behind else 1, TWO: 1}, number
        assert look(again)
        if at.left > 0:
            return
    raise AssertionError("there are more calls")


def test_a_session_that_was_moved_away_comes_back_from_the_store(own: Own, tmp_path: pathlib.Path) -> None:
    """Only a session that was closed is deleted there."""
    first = own("first")
    add(first, ONE)
    save(first, ONE, 1)
    assert look(first)
    (tmp_path / "first" / "sessions" / ONE).rename(tmp_path / "away")
    again = own("first")
    assert newest(again, ONE) == 1


def test_a_damaged_index_is_refused(own: Own, objects: MemoryObjects) -> None:
    first = own("first")
    add(first, ONE)
    save(first, ONE, 1)
    assert look(first)
    key = max(key for key in objects.content if key.startswith("index/"))
    for data in (objects.content[key].replace(b'"step":1', b'"step":2'), b"none", b"\xff"):
        objects.content[key] = data
        before = dict(objects.content)
        with pytest.raises(DataLossError, match="is no index"):
            own("second")
        assert objects.content == before  # no epoch, either


def test_a_prefix_of_something_else_is_refused(own: Own, objects: MemoryObjects) -> None:
    objects.content["store.json"] = b"[]"
    with pytest.raises(DataLossError, match="none of stepwire's"):
        own("first")


def test_epochs_are_of_one_number_in_both_places(own: Own) -> None:
    assert [own(machine).epoch for machine in ("first", "first", "second", "first", "second")] == [1, 2, 3, 4, 5]


def test_an_owner_that_was_overtaken_at_its_start_does_not_start(
    own: Own, objects: MemoryObjects, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = objects.beside()
    objects.at = At(8, lambda: StoreEpochs(other).acquire(0, "other"))  # type: ignore[arg-type]
    with pytest.raises(FencedError):
        own("first")


def test_few_epochs_are_kept(objects: MemoryObjects) -> None:
    epochs: Any = StoreEpochs(objects)  # type: ignore[arg-type]
    assert [epochs.acquire(0, str(number)) for number in range(20)] == list(range(1, 21))
    assert len(objects.content) == KEPT
    assert epochs.newest() == 20


def test_a_directory_with_sessions_that_the_store_does_not_know_is_refused(own: Own, objects: MemoryObjects) -> None:
    first = own("first")
    add(first, ONE)
    save(first, ONE, 1)
    assert look(first)
    stranger = own("stranger", MemoryObjects())
    add(stranger, TWO)
    before = dict(objects.content)
    with pytest.raises(InvalidRequestError, match="the sessions of another data directory"):
        own("stranger")
    assert objects.content == before
