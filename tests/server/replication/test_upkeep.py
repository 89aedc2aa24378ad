"""The digests of sessions, as a primary compares them with those of its standby."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from stepwire_server.replication.claims import Claim
from stepwire_server.replication.primary import Primary
from stepwire_server.replication.replica import Replica
from stepwire_server.replication.upkeep import Upkeep

SESSION: Any = SimpleNamespace(session_id="ab" * 16)
KEY = bytes.fromhex(SESSION.session_id)


def test_digests_that_are_never_answered_are_not_kept() -> None:
    clock = lambda: 0.0  # noqa: E731
    primary = Primary("p", Claim(1, "p", "", "h:1"), None, clock, alone=True, returns_alone=True)
    upkeep: Any = Upkeep(primary, SimpleNamespace(), clock, 600.0)  # type: ignore[arg-type]
    upkeep.digested(KEY, 1, b"of no session")
    assert upkeep._digests == {}
    primary.replicas[KEY] = replica = Replica(primary, SESSION, "r")
    replica.sent(1)
    for number in (5, 9):
        upkeep.digested(KEY, number, b"own")
    upkeep.digested(KEY, 5, b"late")
    assert (primary.divergences, upkeep._digests) == (0, {KEY: (9, b"own")})
    upkeep.digested(KEY, 9, b"own")
    assert (primary.divergences, upkeep._digests) == (0, {})
    upkeep.digested(KEY, 12, b"other")
    upkeep.digested(KEY, 12, b"own")
    assert (primary.divergences, replica.synced, upkeep._digests) == (1, None, {})
    upkeep.digested(KEY, 13, b"own")
    del primary.replicas[KEY]
    upkeep.compare()
    assert upkeep._digests == {}
