"""Servers that follow whoever has their shard by the claims: each comes in the role that is vacant."""

from __future__ import annotations

import contextlib
import itertools
import os
import pathlib
import threading
from collections.abc import Callable
from typing import Any

import pytest

import stepwire
from stepwire_server.cli import serve as cli
from stepwire_server.processes.spawn import server_process
from stepwire_server.replication.claims import Claims
from stepwire_server.server import Server
from tests.integration.replication.pair import SHARD, START, Pair, gradient, undisturbed

pytestmark = pytest.mark.many


def hurried() -> Callable[[], float]:
    """Return a clock whose every reading is a second behind the one before."""
    return itertools.count(0.0, 1.0).__next__


def coming(pair: Pair, **settings: Any) -> Server:
    """Start a server in whichever role is vacant."""
    return pair.serve(standby_of="directory", standby="required", **settings)


def lost(server: Server) -> threading.Event:
    """Return an event that is set once a server wants another process in its place."""
    told = threading.Event()
    server.on_lost(told.set)
    return told


def announced(server: Server) -> threading.Event:
    """Return an event that is set once a standby serves."""
    told, announce = threading.Event(), server.replication._announce

    def tell(epoch: int) -> None:
        announce(epoch)
        told.set()

    server.replication._announce = tell
    return told


def test_the_second_of_a_pair_takes_over_and_the_first_comes_back_behind_it(tmp_path: pathlib.Path) -> None:
    with contextlib.ExitStack() as stack:
        pair = Pair(tmp_path, stack)
        pair.primary = coming(pair)
        pair.standby = coming(pair, clock=hurried(), promote_after_seconds=3)
        assert [each.replication.status().role for each in (pair.primary, pair.standby)] == ["primary", "standby"]
        client = stack.enter_context(stepwire.connect(pair.target, timeout=60.0))
        session = pair.create(client)
        replies = [session.step(gradient(step))["w"].tobytes() for step in range(2)]
        pair.await_member(pair.standby)
        pair.kill(pair.primary)
        third = coming(pair)  # as a killed process comes back: its own claim names somebody who is gone
        replies += [session.step(gradient(step))["w"].tobytes() for step in range(2, 4)]
        assert replies == undisturbed(4)
        pair.primary = pair.standby
        pair.await_member(third)
        status = pair.primary.replication.status()
        assert (status.role, status.epoch, status.in_sync, status.promotions) == ("primary", 4, True, 1)
        following = third.replication.status()
        assert (following.role, following.peer_id) == ("standby", pair.primary.replication.server_id)


def test_a_primary_that_was_overtaken_asks_for_another_process(tmp_path: pathlib.Path) -> None:
    with contextlib.ExitStack() as stack:
        pair = Pair(tmp_path, stack)
        pair.primary, pair.standby = coming(pair), coming(pair)
        pair.await_member(pair.standby)
        told = lost(pair.primary)
        pair.standby.replication.promote()
        assert told.wait(120.0) and pair.primary.lost
        assert pair.primary.replication.status().role == "deposed"


def test_a_primary_that_drains_ends_as_it_should(tmp_path: pathlib.Path) -> None:
    with contextlib.ExitStack() as stack:
        pair = Pair(tmp_path, stack)
        pair.primary, pair.standby = coming(pair), coming(pair)
        pair.await_member(pair.standby)
        assert pair.primary.drain()
        assert not pair.primary.lost


@pytest.mark.parametrize("promote_after", [0, 3])
def test_a_shard_that_was_given_up_begins_anew_on_its_standby(tmp_path: pathlib.Path, promote_after: int) -> None:
    with contextlib.ExitStack() as stack:
        pair = Pair(tmp_path, stack)
        clock = [0.0]
        pair.primary = coming(pair)
        pair.standby = coming(pair, clock=lambda: clock[0], promote_after_seconds=promote_after)
        pair.await_member(pair.standby)
        client = stack.enter_context(stepwire.connect(pair.target, timeout=120.0))
        session = pair.create(client)
        claims, begun = Claims(tmp_path, SHARD), announced(pair.standby)
        claims.release(claims.newest().epoch)
        clock[0] = 100.0
        pair.kill(pair.primary)
        assert begun.wait(120.0)
        status = pair.standby.replication.status()
        assert (status.role, status.sessions, status.epoch, status.promotions) == ("primary", 0, 4, 1)
        coming(pair)  # without it nobody confirms that the session is gone
        with pytest.raises(stepwire.SessionNotFoundError):
            session.step(gradient(0))


def test_a_standby_of_another_shard_is_refused(tmp_path: pathlib.Path) -> None:
    """A port that one shard's primary had may be another's."""
    with contextlib.ExitStack() as stack:
        pair = Pair(tmp_path, stack)
        pair.primary = pair.serve(standby="required")
        assert pair.primary.replication.following(SHARD) == pair.primary.replication.following()
        with pytest.raises(stepwire.FencedError, match="is of the shard 'b', and this server of 'a'"):
            pair.primary.replication.following("b")
        with pytest.raises(stepwire.InvalidRequestError, match="claims of a shard are in a directory"):
            pair.serve(standby_of="directory", directory="", shard="")


@pytest.mark.long
@pytest.mark.slow
def test_a_process_that_was_overtaken_ends_and_a_new_one_follows(command: Any, tmp_path: pathlib.Path) -> None:
    roles = ("--standby-of", "directory", "--standby", "required")
    where = ("--device", "cpu", "--directory", str(tmp_path), "--shard", SHARD, *roles)
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(server_process(*where))
        second = stack.enter_context(server_process(*where))
        with stepwire.connect(f"directory:{tmp_path}", timeout=60.0) as client:
            session = client.create_session(START, optimizer=stepwire.Adam(lr=0.1), durability="replicated")
            replies = [session.step(gradient(0))["w"].tobytes()]
            code, _, _ = command("standby", "promote", "-t", second.target)
            assert code == 0
            assert os.waitstatus_to_exitcode(os.waitpid(first.pid, 0)[1]) == cli.RESTART_EXIT_CODE
            stack.enter_context(server_process(*where))
            replies.append(session.step(gradient(1))["w"].tobytes())
            assert (replies, session.info().durable_step) == (undisturbed(2), 2)
