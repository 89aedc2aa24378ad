"""Sessions as one tenant sees them: others are not there, and nothing that it may ask tells how busy they are."""

from __future__ import annotations

import contextlib
import functools
import threading
from typing import Any

import pytest

from stepwire.errors import Reason, ResourceExhaustedError, SessionNotFoundError
from stepwire_server.sessions.tenants import TenantSessions
from tests.server.sessions.test_registry import config, make_registry

__all__ = ["make_registry"]

UNKNOWN = "0" * 32


def test_numbers_are_those_of_the_tenant(make_registry: Any) -> None:
    registry = make_registry()
    one, other, all_ = (TenantSessions(registry, tenant) for tenant in ("one", "other", None))
    session = one.create("a", config()).session
    device = registry.pool.choose("")
    with registry.streams.stream(lambda: None) as stream, registry.streams.stream(lambda: None):
        registry.streams.admit(stream, session.tenant, returns=0 in session.ledger.members.attached)
        assert one.statistics()[:3] == (1, 1, session.memory_bytes)
        assert other.statistics()[:3] == (0, 0, 0)
        assert all_.statistics()[:3] == (1, 2, device.budget.reserved_bytes)
    assert [each.reserved_bytes(device) for each in (one, other)] == [session.memory_bytes, 0]


def test_an_ended_session_is_nobodys(make_registry: Any) -> None:
    registry = make_registry()
    one = TenantSessions(registry, "one")
    session_id = one.create("a", config()).session.session_id
    assert (registry.tenant_of(session_id), registry.ids_of("one")) == ("one", [session_id])
    one.delete(session_id)
    assert (registry.tenant_of(session_id), registry.ids_of("one")) == (None, [])


class KnowsNothing:
    """A data directory without sessions."""

    def has(self, session_id: str) -> bool:
        return False


def test_ids_of_others_and_of_nobody_are_refused_while_others_create(make_registry: Any) -> None:
    """A creation may take seconds, and so may the checkpoint of a session that is parked."""
    registry = make_registry()
    foreign = registry.create("one/a", config()).session.session_id
    registry.directory = KnowsNothing()
    refused = []

    def ask() -> None:
        for session_id in (foreign, UNKNOWN):
            with pytest.raises(SessionNotFoundError) as error:
                TenantSessions(registry, "other").get(session_id)
            refused.append(str(error.value).replace(session_id, "ID"))

    with registry._creation:
        asking = threading.Thread(target=ask)
        asking.start()
        asking.join(60.0)
        assert len(refused) == 2
    registry.directory = None
    assert refused[0] == refused[1]


def test_a_tenant_with_all_places_of_watchers_gives_up_its_oldest_until_others_have_as_many(make_registry: Any) -> None:
    streams, ended = make_registry().streams, list[str]()
    with contextlib.ExitStack() as stack:

        def watch(tenant: str, number: int) -> None:
            stack.enter_context(streams.watcher(functools.partial(ended.append, f"{tenant}{number}"), tenant))

        for number in range(16):
            watch("a", number)
        for number in range(8):
            watch("b", number)
        for tenant in "ab":
            with pytest.raises(ResourceExhaustedError) as refused:
                watch(tenant, 16)
            assert refused.value.reason is Reason.TOO_MANY_STREAMS
        assert ended == [f"a{number}" for number in range(8)]
        assert streams.watchers == 16
    assert streams.watchers == 0
