"""Standbys that come, go, are left behind, and diverge; and primaries without one."""

from __future__ import annotations

import contextlib
import pathlib
import threading
from typing import Any

import numpy as np
import pytest

import stepwire
from stepwire.connection.retry import Retry
from stepwire.errors import Reason
from stepwire_server.replication.claims import Claims
from stepwire_server.replication.joining import Joining
from stepwire_server.replication.outbox import Subject
from stepwire_server.replication.records import RecordKind
from stepwire_server.server import Server
from tests.integration.replication.pair import ELEMENTS, SHARD, START, Pair, gradient, pair_in
from tests.support.health import health_of
from tests.support.numpy_server import numpy_server

pytestmark = pytest.mark.many


def once(target: str) -> stepwire.Client:
    """Connect, and repeat no call: the next attempt would come after every deadline."""
    return stepwire.connect(target, timeout=120.0, retry=Retry(uniform=lambda low, high: 3600.0))


def parameters_of(server: Server) -> Any:
    (session,) = server.registry.of(None)
    out = np.empty(ELEMENTS, np.float32)
    session._state.read("param", 0, out)
    return out


def test_a_deposed_primary_tells_nothing(tmp_path: pathlib.Path) -> None:
    with pair_in(tmp_path) as pair, stepwire.connect(pair.primary.target, timeout=5.0) as client:
        session = pair.create(client)
        session.step(gradient(0))
        assert health_of(pair.primary) == "SERVING"
        assert (health_of(pair.standby), health_of(pair.standby, "")) == ("NOT_SERVING", "SERVING")
        pair.standby.replication.promote()
        speaker = pair.speaker
        with speaker.outbox.changed:
            assert speaker.outbox.changed.wait_for(lambda: speaker.deposed, 120.0)
        for call in (lambda: session.step(gradient(1)), session.pull, session.info, client.create_session):
            with pytest.raises(stepwire.FencedError) as refused:
                call(START) if call == client.create_session else call()
            assert refused.value.reason is Reason.NOT_PRIMARY
        assert (health_of(pair.primary), health_of(pair.primary, "")) == ("NOT_SERVING", "NOT_SERVING")
        assert health_of(pair.standby) == "SERVING"
        assert pair.primary.replication.status().role == "deposed"


def test_a_primary_that_does_not_know_yet_acknowledges_nothing(tmp_path: pathlib.Path) -> None:
    """The connection is gone before the standby is promoted, as with a partition: the primary hears of nothing."""
    with pair_in(tmp_path) as pair, once(pair.primary.target) as client:
        session = pair.create(client)
        session.step(gradient(0))

        def partition() -> None:
            pair.cut()
            pair.standby.replication.promote()

        promoted = pair.intercept(1, partition, admitted=False)
        with pytest.raises(stepwire.UnavailableError) as refused:
            session.step(gradient(1))
        assert promoted.wait(120.0)
        assert refused.value.reason is Reason.NO_STANDBY
        with pytest.raises(stepwire.UnavailableError):
            session.pull()
        assert parameters_of(pair.standby).tobytes() != parameters_of(pair.primary).tobytes(), "it is applied there"
        with stepwire.connect(pair.standby.target, timeout=120.0) as other:
            assert other.session(session.session_id).info().applied_step == 1


def test_steps_are_refused_without_a_standby_and_go_on_with_the_next(tmp_path: pathlib.Path) -> None:
    with pair_in(tmp_path) as pair, once(pair.target) as client:
        session = pair.create(client)
        session.step(gradient(0))
        pair.standby.close()
        with pytest.raises(stepwire.UnavailableError, match="replicated, and none follows this server just now"):
            session.step(gradient(1))
        with pytest.raises(stepwire.UnavailableError, match="none follows"):
            pair.create(client)
        pair.standby = pair.follow()
        session.step(gradient(1))
        session.step(gradient(2))
        assert session.info().durable_step == 3
        pair.standby.replication.promote()
        assert parameters_of(pair.standby).tobytes() == parameters_of(pair.primary).tobytes()


def test_a_connection_that_breaks_goes_on_where_it_was(tmp_path: pathlib.Path) -> None:
    with pair_in(tmp_path) as pair, stepwire.connect(pair.target, timeout=120.0) as client:
        session = pair.create(client)
        session.step(gradient(0))
        follower = pair.standby.replication._follower
        assert follower is not None
        (held,) = follower._sessions.values()
        pair.intercept(0, lambda: None, admitted=False)
        session.step(gradient(1))
        assert [*follower._sessions.values()] == [held], "no state was sent again"
        assert session.info().durable_step == 2


def test_a_primary_that_goes_on_alone_leaves_its_standby_behind(tmp_path: pathlib.Path) -> None:
    now = [0.0]
    with contextlib.ExitStack() as stack:
        pair = Pair(tmp_path, stack)
        pair.primary = pair.serve(clock=lambda: now[0], standby="preferred")
        client = stack.enter_context(once(pair.target))
        session = pair.create(client)
        session.step(gradient(0))
        assert session.info().durable_step == 0, "no standby has it"
        pair.standby = pair.follow()
        session.step(gradient(1))
        assert session.info().durable_step == 2
        pair.cut()
        with pytest.raises(stepwire.UnavailableError):
            session.step(gradient(2))
        now[0] += 5.0
        pair.upkeep.look()
        session.step(gradient(2))
        assert (session.info().durable_step, session.applied_step) == (2, 3)
        with pytest.raises(stepwire.FencedError, match="does not name this standby: its primary went on without it"):
            pair.standby.replication.promote()
        assert pair.standby.replication.status().role == "standby"


def test_of_a_promotion_and_a_primary_that_goes_on_alone_one_wins(tmp_path: pathlib.Path) -> None:
    now = [0.0]
    with contextlib.ExitStack() as stack:
        pair = Pair(tmp_path, stack)
        pair.primary = pair.serve(clock=lambda: now[0], standby="preferred")
        pair.standby = pair.follow()
        pair.cut()
        pair.standby.replication.promote()
        now[0] += 5.0
        pair.upkeep.look()
        speaker = pair.speaker
        assert (speaker.deposed, speaker.alone) == (True, False)


def test_a_standby_that_diverges_is_found_and_gets_the_session_again(tmp_path: pathlib.Path) -> None:
    with pair_in(tmp_path) as pair, stepwire.connect(pair.target, timeout=120.0) as client:
        session = pair.create(client)
        session.step(gradient(0))
        follower = pair.standby.replication._follower
        assert follower is not None
        pair.upkeep.compare()
        with follower._changed:
            assert follower._changed.wait_for(lambda: not follower._queue, 120.0)  # it has told its digest
        session.info()  # a round trip to the standby, behind the digest
        assert pair.speaker.divergences == 0
        (held,) = follower._sessions.values()
        held.session._state.arrays.write("exp_avg", 7, np.full(1, 3.0, np.float32))
        pair.upkeep.compare()
        speaker = pair.speaker
        with speaker.outbox.changed:
            assert speaker.outbox.changed.wait_for(lambda: speaker.divergences == 1, 120.0)
        pair.await_member(pair.standby)
        session.step(gradient(1))
        assert [*follower._sessions.values()] != [held]
        pair.upkeep.compare()
        session.step(gradient(2))
        session.info()
        assert pair.primary.replication.status().divergences == 1
        pair.standby.replication.promote()
        assert parameters_of(pair.standby).tobytes() == parameters_of(pair.primary).tobytes()


def test_a_divergence_counts_once_though_later_digests_are_under_way(tmp_path: pathlib.Path) -> None:
    with pair_in(tmp_path) as pair, stepwire.connect(pair.target, timeout=120.0) as client:
        session = pair.create(client)
        session.step(gradient(0))
        (replica,) = pair.speaker.replicas.values()
        synced, upkeep = replica.synced, pair.upkeep
        assert synced is not None
        with upkeep._looking:  # nobody brings the session meanwhile
            upkeep.digested(replica.key, synced + 10, b"primary")
            upkeep.digested(replica.key, synced + 11, b"primary")
            upkeep.digested(replica.key, synced + 11, b"standby")
            assert (pair.speaker.divergences, replica.synced) == (1, None)
            for side in (b"primary", b"standby"):
                upkeep.digested(replica.key, synced + 12, side)
        assert pair.speaker.divergences == 1
        pair.await_member(pair.standby)
        brought = replica.synced
        assert brought is not None
        assert brought > synced
        for number in (brought, brought + 1):
            for side in (b"primary", b"standby"):
                upkeep.digested(replica.key, number, side)
        assert pair.speaker.divergences == 2, "of a digest behind the state alone"


def test_a_standby_comes_while_a_session_is_stepped(tmp_path: pathlib.Path) -> None:
    """The chunks of a step arrive before the standby comes, and its commit after that."""
    with contextlib.ExitStack() as stack:
        pair = Pair(tmp_path, stack)
        pair.primary = pair.serve(standby="preferred")
        client = stack.enter_context(stepwire.connect(pair.target, timeout=120.0))
        session = pair.create(client)
        session.step(gradient(0))
        (served,) = pair.primary.registry.of(None)
        commit, came = served._steps.commit, threading.Event()

        def late(step: Any, writer: Any) -> Any:
            if not came.is_set():
                came.set()
                pair.standby = pair.follow()
            return commit(step, writer)

        served._steps.commit = late  # type: ignore[method-assign]
        session.step(gradient(1))
        pair.await_member(pair.standby)
        session.step(gradient(2))
        assert session.info().durable_step == 3
        pair.standby.replication.promote()
        assert parameters_of(pair.standby).tobytes() == parameters_of(pair.primary).tobytes()


def test_a_server_that_starts_again_does_not_override_a_standby(tmp_path: pathlib.Path) -> None:
    with pair_in(tmp_path) as pair:
        with pytest.raises(stepwire.InvalidRequestError, match="are with the server at .*, and with its standby"):
            pair.serve(standby="required")
        Claims(tmp_path, SHARD).release(Claims(tmp_path, SHARD).newest().epoch)
        pair.serve(standby="required")
        with pytest.raises(stepwire.FencedError, match="does not name this standby"):
            pair.standby.replication.promote()


def test_a_primary_believes_a_promotion_that_was_claimed(tmp_path: pathlib.Path) -> None:
    with pair_in(tmp_path) as pair:
        with pytest.raises(stepwire.FencedError, match="which may be promoted; if it is gone for good"):
            pair.speaker.join(Joining("somebody", promoted_epoch=9))
        assert not pair.speaker.deposed
        claims = Claims(tmp_path, SHARD)
        claims.make(claims.newest()._replace(epoch=3, server="other", standby=""))
        with pytest.raises(stepwire.FencedError, match="another server speaks for the sessions since epoch 3"):
            pair.speaker.join(Joining("other", promoted_epoch=3))


def test_a_pair_without_a_directory(tmp_path: pathlib.Path) -> None:
    with contextlib.ExitStack() as stack:
        pair = Pair(tmp_path, stack)
        primary = pair.primary = stack.enter_context(numpy_server(standby="required"))
        first = pair.standby = stack.enter_context(numpy_server(standby_of=primary.target))
        pair.await_member(first)
        client = stack.enter_context(stepwire.connect(primary.target, timeout=120.0))
        session = pair.create(client)
        session.step(gradient(0))
        pair.cut()
        second = stack.enter_context(numpy_server(standby_of=primary.target))
        follower = second.replication._follower
        assert follower is not None and not follower.is_member
        assert primary.replication.following()[0].forget_standby() == first.replication.server_id
        pair.await_member(second)
        session.step(gradient(1))
        epoch, sessions = second.replication.promote()
        assert (epoch, sessions) == (4, 1)
        with stepwire.connect(second.target, timeout=120.0) as other:
            info = other.session(session.session_id).info()
            assert (info.applied_step, info.epoch) == (2, 4)


def test_a_state_that_cannot_be_read_just_now_says_nothing_against_the_standby(tmp_path: pathlib.Path) -> None:
    with pair_in(tmp_path) as pair, stepwire.connect(pair.primary.target, timeout=120.0) as client:
        session = pair.create(client)
        (replica,) = pair.speaker.replicas.values()
        synced = replica.synced
        with replica.session.exchange.captured():  # somebody else reads it
            pair.upkeep.compare()
        assert (replica.synced, replica.retry_at) == (synced, 0.0)
        assert session.step(gradient(0))["w"].shape == (ELEMENTS,)


def test_a_standby_that_ends_while_records_come_is_forgotten_and_deposes_nobody(tmp_path: pathlib.Path) -> None:
    with pair_in(tmp_path) as pair:
        call, follower, speaker = pair.standby.replication._call, pair.standby.replication._follower, pair.speaker
        assert call is not None and follower is not None
        received, leave, refused = call._received, follower.leave, threading.Event()

        def receive(data: bytes) -> None:
            try:
                received(data)
            finally:
                refused.set()

        def leaves() -> None:  # a record comes before the primary has heard
            leave()
            call._received = receive  # type: ignore[method-assign]
            speaker.send(Subject(RecordKind.LOOK))
            assert refused.wait(120.0)

        follower.leave = leaves  # type: ignore[method-assign]
        call.close()
        with speaker.outbox.changed:
            assert speaker.outbox.changed.wait_for(lambda: not speaker.standby_id or speaker.deposed, 120.0)
        assert (speaker.deposed, speaker.standby_id) == (False, "")
