"""A primary, its claims and its standby: who may be promoted, and from when on nothing is acknowledged alone."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from stepwire.errors import Reason, UnavailableError
from stepwire_server.replication.claims import Claim, Claims
from stepwire_server.replication.joining import Joining
from stepwire_server.replication.outbox import Outbox, Subject
from stepwire_server.replication.primary import Primary
from stepwire_server.replication.records import RecordKind
from stepwire_server.replication.replica import Replica

COMMIT = Subject(RecordKind.COMMIT, bytes(16), 1)
SESSION: Any = SimpleNamespace(session_id="ab" * 16)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Crossed(Claims):
    """Claims between whose making and its return something happens."""

    happens: Callable[[], object] = staticmethod(lambda: None)

    def make(self, claim: Claim) -> bool:
        made = super().make(claim)
        happens, self.happens = self.happens, lambda: None
        happens()
        return made


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def claims(tmp_path: pathlib.Path) -> Crossed:
    return Crossed(tmp_path, "a")


def primary_of(claims: Claims | None, clock: Clock, *, alone: bool = True) -> Primary:
    claim = Claim(1, "p", "", "h:1") if claims is None else claims.begin("p", "h:1")
    return Primary("p", claim, claims, clock, alone=alone, returns_alone=True)


def test_nothing_is_acknowledged_alone_from_the_record_on_that_names_the_standby(claims: Crossed, clock: Clock) -> None:
    primary = primary_of(claims, clock)
    replica = Replica(primary, SESSION, "r")
    primary.join(Joining("s"))
    before = primary.send(COMMIT)
    replica.sent(before)
    assert (replica.keeps(before), primary.alone) == (False, True)
    primary.name_member()
    assert claims.newest() == Claim(2, "p", "s", "h:1")
    behind = primary.send(COMMIT)
    assert (primary.alone, primary.is_member, primary.member_since) == (False, False, before + 1)
    primary.outbox.acknowledge(before)
    assert not replica.keeps(before), "the standby has it, and may not be promoted yet"
    primary.outbox.acknowledge(behind)
    assert (primary.is_member, replica.keeps(before), replica.keeps(behind)) == (True, True, True)


def test_a_primary_without_claims_does_not_go_on_alone_once_its_standby_may_know_that_it_is_named(
    clock: Clock,
) -> None:
    primary = primary_of(None, clock)
    reader = primary.join(Joining("s")).reader
    primary.name_member()
    primary.left(reader)  # before the record was acknowledged; the standby may have it all the same
    clock.now = 1e6
    primary.go_on_alone()
    assert not primary.alone
    with pytest.raises(UnavailableError) as refused:
        primary.check()
    assert refused.value.reason is Reason.NO_STANDBY


def test_a_standby_that_comes_back_while_its_primary_claims_to_go_on_alone_is_named_again(
    claims: Crossed, clock: Clock
) -> None:
    primary = primary_of(claims, clock)
    opened = primary.join(Joining("s"))
    primary.name_member()
    primary.outbox.acknowledge(primary.outbox.position)
    primary.left(opened.reader)
    clock.now = 10.0
    claims.happens = lambda: primary.join(Joining("s", "p", primary.outbox.position))
    primary.go_on_alone()
    assert claims.newest() == Claim(3, "p", "", "h:1")
    assert (primary.alone, primary.is_member) == (False, False), "no claim names the standby"
    primary.name_member()
    assert claims.newest() == Claim(4, "p", "s", "h:1")
    primary.outbox.acknowledge(primary.outbox.position)
    assert primary.is_member


def test_a_standby_that_stands_still_takes_no_memory_of_a_primary_that_goes_on(claims: Crossed, clock: Clock) -> None:
    primary = primary_of(claims, clock)
    primary.outbox = Outbox(most_bytes=800)
    reader = primary.join(Joining("s")).reader
    for _ in range(3):
        primary.send(COMMIT, payload=np.zeros(40, np.uint8))
    assert not primary.outbox.connected
    assert next(primary.outbox.read(reader, 0), None) is None
    assert primary.outbox.acknowledged == primary.outbox.position == 3, "nothing is kept"
    assert primary.join(Joining("s")).whole
