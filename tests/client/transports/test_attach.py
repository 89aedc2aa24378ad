"""Opening a stream: the memory that can be had, and messages where none can, with the reason told."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import stepwire
import stepwire_server.testing
from stepwire.errors import UnavailableError, UnsupportedFeatureError
from stepwire.lifetimes.forks import forks
from stepwire.transports.host import memory as shared_memory
from tests.support.raw_handoff import held_by_process

START = {"w": np.ones((3, 5), np.float32), "b": np.zeros(4, np.float32)}
GRADIENT = {"w": np.full((3, 5), 0.5, np.float32), "b": np.ones(4, np.float32)}


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with stepwire_server.testing.serving(threads=1) as target:
        yield target


@pytest.fixture
def client(server: str) -> Iterator[stepwire.Client]:
    with stepwire.connect(server, timeout=120.0, transport="auto") as client:
        yield client


@pytest.fixture
def session(client: stepwire.Client) -> Iterator[stepwire.Session]:
    with client.create_session(START) as session:
        yield session


def assert_in_messages(session: stepwire.Session, reason: str) -> None:
    """The session works, without shared memory, and says why."""
    session.attach()
    assert session.transport is not None and session.transport.name == "uds"
    assert reason in session.transport.reasons["shm"]
    assert session.step(GRADIENT)["w"].shape == (3, 5)
    with pytest.raises(UnsupportedFeatureError, match="shares no memory") as refused:
        session.shared_gradients()
    assert reason in str(refused.value)


def test_packets_beside_shared_memory_are_what_is_found_by_itself(session: stepwire.Session) -> None:
    session.attach()
    assert session.transport is not None and session.transport.name == "packets"
    assert set(session.transport.reasons) == {"cuda_ipc"}


@pytest.mark.parametrize("fails", ["_check", "_mapped"])
def test_memory_that_cannot_be_fetched_leads_to_messages(
    session: stepwire.Session, fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("no such luck")

    before = held_by_process()[1]
    monkeypatch.setattr(shared_memory, fails, refuse)
    assert_in_messages(session, "no such luck")
    assert held_by_process()[1] <= before + 1  # the parameters were moved, and stay


def test_a_server_that_sees_other_memory_is_not_trusted(
    session: stepwire.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_memory.SharedMemory, "check", lambda self, ask: bool(ask(bytes(64))) and False)
    assert_in_messages(session, "the server sees other memory than it handed over")


def test_a_pattern_that_the_server_does_not_find_leads_to_messages(
    session: stepwire.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_memory.SharedMemory, "check", lambda self, ask: bool(ask(os.urandom(64))))
    assert_in_messages(session, "not in the memory that this server shares")


def test_a_connection_that_breaks_during_the_check_is_mended(
    session: stepwire.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    check, breaks = shared_memory.SharedMemory.check, [True]

    def broken(memory: shared_memory.SharedMemory, ask: Any) -> bool:
        if breaks:
            breaks.clear()
            raise UnavailableError("the connection broke")
        return check(memory, ask)

    monkeypatch.setattr(shared_memory.SharedMemory, "check", broken)
    session.attach()
    assert (breaks, session.transport is not None and session.transport.name) == ([], "packets")


@pytest.mark.parametrize(("transport", "found"), [("auto", "packets"), ("shm", "shm")])
def test_a_fork_between_a_stream_and_its_memory_is_no_reason_against_the_memory(
    server: str, transport: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    map_memory, forked = shared_memory._mapped, [False]

    def forks_before(*arguments: Any) -> Any:
        if not forked[0]:
            forked[0] = True
            forks.note()
            raise OSError("the stream has ended")
        return map_memory(*arguments)

    monkeypatch.setattr(shared_memory, "_mapped", forks_before)
    with stepwire.connect(server, transport=transport) as client, client.create_session(START) as session:
        session.step(GRADIENT)
        assert (forked, session.applied_step) == ([True], 1)
        assert session.transport is not None and session.transport.name == found


def test_asked_for_by_name_it_is_had_or_refused(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with stepwire.connect(server, transport="shm") as client, client.create_session(START) as session:
        assert session.shared_parameters()["w"].tolist() == START["w"].tolist()
        session.detach()
        monkeypatch.setattr(shared_memory.SharedMemory, "check", lambda self, ask: False)
        with pytest.raises(UnsupportedFeatureError, match="'shm' cannot be had: the server sees other memory"):
            session.attach()
        monkeypatch.undo()
        assert session.step(GRADIENT)["b"].shape == (4,)


def test_the_worker_is_acquired_once_however_many_streams_that_needs(
    client: stepwire.Client, session: stepwire.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    session.step(GRADIENT)
    other = client.session(session.session_id)
    checks: list[object] = []
    monkeypatch.setattr(shared_memory.SharedMemory, "check", lambda self, ask: bool(checks.append(ask)))
    other.attach()
    assert other.step(GRADIENT)["b"].shape == (4,)
    # The first stream, for packets, acquires the worker, and those for memory and for messages renew the hold.
    assert (other.applied_step, other._link.shards[0].hold.acquisitions, len(checks)) == (2, 1, 2)
