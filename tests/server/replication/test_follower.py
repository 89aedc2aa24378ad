"""A standby while it is promoted, and while it ends: the records of its primary meanwhile."""

from __future__ import annotations

import pathlib
import threading
from typing import Any

import pytest

from stepwire.errors import FencedError, Reason, UnavailableError
from stepwire_server.replication import follower as module
from stepwire_server.replication.claims import Claim, Claims
from stepwire_server.replication.follower import Follower
from stepwire_server.replication.outbox import NOTHING
from stepwire_server.replication.records import RecordKind, ReplicationRecord

PATIENCE_SECONDS = 120.0


def record(number: int, kind: RecordKind = RecordKind.LOOK) -> ReplicationRecord:
    return ReplicationRecord(number, 1, kind, b"", 0, b"", NOTHING)


class Changed(threading.Condition):
    """Tells that somebody waits."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = threading.Event()

    def wait(self, timeout: float | None = None) -> bool:
        self.waits.set()
        return super().wait(timeout)


class Asked(Claims):
    """Claims that are asked for while a record comes; then the directory fails, or tells."""

    def __init__(self, folder: pathlib.Path, fails: bool) -> None:
        super().__init__(folder, "a")
        self.fails = fails
        self.follower: Any = None
        self.outcomes: list[object] = []
        self.make(Claim(1, "p", "s", "h:1"))

    def newest(self) -> Claim:
        if self.follower is None:
            return super().newest()
        follower, self.follower = self.follower, None
        follower._changed.waits.clear()
        self.admitting = threading.Thread(target=self._admit, args=(follower,))
        self.admitting.start()
        while self.admitting.is_alive() and not follower._changed.waits.wait(0.01):
            pass
        if self.fails:
            raise OSError("the directory is gone")
        return super().newest()

    def _admit(self, follower: Follower) -> None:
        try:
            follower.admit(record(2))
            self.outcomes.append(None)
        except FencedError as refusal:
            self.outcomes.append((refusal.reason, refusal.metadata))


@pytest.fixture
def asked(tmp_path: pathlib.Path, request: Any) -> Asked:
    return Asked(tmp_path, request.param)


@pytest.fixture
def follower(asked: Asked) -> Any:
    """A standby of the primary "p", named, with one record."""
    made: Any = Follower("s", None, None, asked)  # type: ignore[arg-type]
    made._changed = Changed()
    made.start()
    made.begin("p", 1, whole=True)
    made.admit(record(1, RecordKind.MEMBER))
    asked.follower = made
    yield made
    made.close()


@pytest.mark.parametrize("asked", [True], indirect=True)
def test_a_promotion_that_fails_refuses_no_record(asked: Asked, follower: Any) -> None:
    """A refusal would depose the primary, and then nobody served the sessions."""
    with pytest.raises(OSError, match="the directory is gone"):
        follower.promote("h:2")
    asked.admitting.join(PATIENCE_SECONDS)
    assert asked.outcomes == [None]
    assert (follower.received, follower.promoted, follower.status().in_sync) == (2, False, True)


@pytest.mark.parametrize("asked", [False], indirect=True)
def test_a_record_that_comes_during_a_promotion_is_refused_with_the_new_epoch(asked: Asked, follower: Any) -> None:
    assert follower.promote("h:2") == Claim(2, "s", "", "h:2")
    asked.admitting.join(PATIENCE_SECONDS)
    assert asked.outcomes == [(Reason.NOT_PRIMARY, {"epoch": "2"})]
    assert follower.received == 1


@pytest.mark.parametrize("asked", [False], indirect=True)
def test_a_standby_that_ends_refuses_no_record_as_a_primary_does(asked: Asked, follower: Any) -> None:
    follower.leave()
    with pytest.raises(UnavailableError) as refused:
        follower.admit(record(2))
    assert refused.value.reason is Reason.SHUTTING_DOWN
    assert not follower.status().in_sync


@pytest.mark.parametrize("asked", [False], indirect=True)
def test_records_without_a_payload_take_memory_too(follower: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_BYTES", 2 * record(2).nbytes)
    follow, go_on = follower._follow, threading.Event()

    def slowly(each: ReplicationRecord) -> None:
        assert go_on.wait(PATIENCE_SECONDS)
        follow(each)

    monkeypatch.setattr(follower, "_follow", slowly)
    for number in (2, 3):
        follower.admit(record(number))
    follower._changed.waits.clear()
    admitting = threading.Thread(target=follower.admit, args=(record(4),))
    admitting.start()
    assert follower._changed.waits.wait(PATIENCE_SECONDS)
    assert follower.received == 3
    go_on.set()
    admitting.join(PATIENCE_SECONDS)
    assert follower.received == 4


@pytest.mark.parametrize("asked", [False], indirect=True)
def test_a_primary_whose_epochs_begin_anew_is_followed_by_who_drops_all(follower: Any) -> None:
    """As after a restart without a directory; a refusal would depose it."""
    follower.admit(record(2)._replace(epoch=5))
    with pytest.raises(FencedError) as refused:
        follower.admit(record(3))
    assert refused.value.reason is Reason.STALE_EPOCH
    follower.begin("q", 1, whole=True)
    follower.admit(record(1))
    assert (follower.primary_id, follower.epoch, follower.received, follower.is_member) == ("q", 1, 1, False)
